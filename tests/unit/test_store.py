from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securevllm.api.kinds import CONFIG_MAP, NAMESPACE, POD, SECRET, SECURE_VLLM_DEPLOYMENT, KubeObject, Ref
from securevllm.cluster import Listing
from securevllm.errors import InternalError
from securevllm.store import Change, Store, Watched


def cm(name: str, version: int, namespace: str = "x", **labels: str) -> KubeObject:
    metadata = {"name": name, "namespace": namespace, "resourceVersion": str(version), "labels": labels}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def by_owner(obj: KubeObject) -> list[str]:
    return [*filter(None, [obj["metadata"].get("labels", {}).get("owner")])]


def store(*namespaces: str) -> Store:
    return Store([Watched(CONFIG_MAP), Watched(POD, managed_fields=False)], namespaces=namespaces, index=by_owner)


def test_of_one_object_the_highest_version_wins() -> None:
    cache = store()
    first, second = cm("a", 5), cm("a", 6)

    assert cache.hear(first) == Change(None, first)
    assert cache.hear(cm("a", 5)) is None
    assert cache.hear(second) == Change(first, second)
    assert cache.hear(cm("a", 4)) is None
    assert cache.get(Ref(CONFIG_MAP, "x", "a")) is second


def test_versions_are_numbers_not_texts() -> None:
    cache = store()
    cache.hear(cm("a", 9))

    assert cache.hear(cm("a", 10)) is not None


def test_a_deleted_object_does_not_come_back_by_an_older_message() -> None:
    cache = store()
    cache.hear(cm("a", 5))

    assert cache.remove(cm("a", 7)) == Change(cm("a", 5), None)
    assert cache.hear(cm("a", 6)) is None
    assert cache.get(Ref(CONFIG_MAP, "x", "a")) is None
    assert cache.hear(cm("a", 8)) == Change(None, cm("a", 8))


def test_a_late_deletion_does_not_remove_the_recreated_object() -> None:
    cache = store()
    cache.hear(cm("a", 9))

    assert cache.remove(cm("a", 7)) is None
    assert cache.get(Ref(CONFIG_MAP, "x", "a")) == cm("a", 9)


def test_a_deletion_that_arrives_first_counts_too() -> None:
    cache = store()

    assert cache.remove(cm("a", 7)) is None
    assert cache.hear(cm("a", 6)) is None


def test_a_list_finds_what_is_gone_new_and_changed() -> None:
    cache = store()
    for obj in (cm("gone", 1), cm("same", 2), cm("changed", 3), cm("just-written", 20)):
        cache.hear(obj)

    changes = cache.replace(CONFIG_MAP, None, Listing([cm("same", 2), cm("changed", 4), cm("new", 5)], 10))

    assert [
        (change.old and change.old["metadata"]["name"], change.new and change.new["metadata"]["name"])
        for change in changes
    ] == [
        ("changed", "changed"),
        (None, "new"),
        ("gone", None),
    ]
    assert sorted(obj["metadata"]["name"] for obj in cache.all(CONFIG_MAP)) == [
        "changed",
        "just-written",
        "new",
        "same",
    ]


def test_an_old_list_does_not_bring_back_what_was_deleted_meanwhile() -> None:
    cache = store()
    cache.hear(cm("a", 5))
    cache.remove(cm("a", 12))

    assert cache.replace(CONFIG_MAP, None, Listing([cm("a", 5)], 10)) == []
    assert cache.all(CONFIG_MAP) == []


def test_memories_of_deletions_are_forgotten_one_list_later() -> None:
    cache = store()
    for number in range(100):
        cache.hear(cm(f"a{number}", number))
        cache.remove(cm(f"a{number}", 100 + number))
    cache.replace(CONFIG_MAP, None, Listing([], 300))
    assert len(cache._shelves[CONFIG_MAP].gone) == 100
    cache.replace(CONFIG_MAP, None, Listing([], 400))

    assert cache._shelves[CONFIG_MAP].gone == {}
    assert cache._shelves[CONFIG_MAP].objects == {}


def test_it_is_synced_when_every_kind_was_listed_also_when_there_is_nothing() -> None:
    cache = store()
    assert cache.unsynced() == "not listed yet: configmaps, pods"
    cache.replace(CONFIG_MAP, None, Listing([], 1))
    assert cache.unsynced() == "not listed yet: pods"
    cache.replace(POD, None, Listing([], 1))

    assert cache.unsynced() is None


def test_namespaces_are_listed_one_by_one_and_do_not_touch_each_other() -> None:
    cache = Store([Watched(CONFIG_MAP), Watched(NAMESPACE)], namespaces=["x", "y"])
    assert [(watched.kind, namespace) for watched, namespace in cache.scopes] == [
        (CONFIG_MAP, "x"),
        (CONFIG_MAP, "y"),
        (NAMESPACE, None),
    ]
    cache.hear(cm("a", 1, "x"))
    cache.hear(cm("a", 1, "y"))
    cache.replace(CONFIG_MAP, "x", Listing([], 5))

    assert cache.all(CONFIG_MAP, "x") == []
    assert len(cache.all(CONFIG_MAP, "y")) == 1
    assert cache.unsynced() is not None


def test_managed_fields_are_dropped_where_nobody_needs_them() -> None:
    cache = store()
    metadata = {"name": "p", "namespace": "x", "resourceVersion": "1", "managedFields": [{"manager": "kubelet"}]}
    cache.put({"apiVersion": "v1", "kind": "Pod", "metadata": metadata})
    config_map = cm("a", 1)
    config_map["metadata"]["managedFields"] = [{"manager": "x"}]
    cache.put(config_map)

    assert "managedFields" not in cache.all(POD)[0]["metadata"]
    assert metadata["managedFields"]
    assert cache.all(CONFIG_MAP)[0]["metadata"]["managedFields"] == [{"manager": "x"}]


def test_the_index_follows_changes() -> None:
    cache = store()
    cache.put(cm("a", 1, owner="one"))
    cache.put(cm("b", 2, owner="one"))
    cache.put(cm("a", 3, owner="two"))

    assert [obj["metadata"]["name"] for obj in cache.indexed("one")] == ["b"]
    assert [obj["metadata"]["name"] for obj in cache.indexed("two")] == ["a"]
    cache.remove(cm("b", 4))
    assert cache.indexed("one") == []
    assert set(cache._indexed) == {"two"}


def test_a_kind_that_is_not_watched_is_refused() -> None:
    with pytest.raises(InternalError, match="Secret is not watched"):
        store().get(Ref(SECRET, "x", "a"))


@pytest.mark.parametrize("version", [{}, {"resourceVersion": ""}])
def test_an_object_without_version_is_refused(version: dict[str, Any]) -> None:
    obj = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "x"} | version}

    with pytest.raises(InternalError, match="ConfigMap x/a has no usable"):
        store().put(obj)


def test_what_somebody_else_changed_right_before_an_own_write_is_still_told() -> None:
    cache = store()
    cache.hear(cm("a", 5))
    cache.wrote(cm("a", 7))  # its answer holds version 6, of which no event has come yet

    assert cache.hear(cm("a", 6)) == Change(cm("a", 7), cm("a", 7))
    assert cache.hear(cm("a", 7)) is None, "the own write is no news"
    assert cache.hear(cm("a", 8)) == Change(cm("a", 7), cm("a", 8))
    assert cache.get(Ref(CONFIG_MAP, "x", "a")) == cm("a", 8)


def test_of_several_own_writes_each_is_no_news_and_what_is_between_them_is() -> None:
    cache = store()
    cache.hear(cm("a", 5))
    cache.wrote(cm("a", 6))
    cache.wrote(cm("a", 8))

    assert [cache.hear(cm("a", version)) is not None for version in (6, 7, 8)] == [False, True, False]
    assert cache._shelves[CONFIG_MAP].own == {}


def test_what_a_look_found_is_told_by_its_event_all_the_same() -> None:
    cache = store()
    cache.put(cm("a", 5))

    assert cache.hear(cm("a", 5)) is not None
    assert cache.hear(cm("a", 5)) is None


def test_an_own_write_whose_event_came_before_the_answer_is_not_waited_for() -> None:
    cache = store()
    assert cache.hear(cm("a", 5)) is not None
    cache.wrote(cm("a", 5))

    assert cache._shelves[CONFIG_MAP].own == {}


def test_a_list_tells_an_own_write_whose_event_it_overtakes() -> None:
    cache = store()
    cache.hear(cm("a", 5))
    cache.wrote(cm("a", 7))

    changes = cache.replace(CONFIG_MAP, None, Listing([cm("a", 7)], 9))
    assert changes == [Change(cm("a", 7), cm("a", 7))], "what was version 6?"
    assert cache.replace(CONFIG_MAP, None, Listing([cm("a", 7)], 10)) == []


def test_only_the_state_that_a_write_has_shown_to_be_old_is_forgotten() -> None:
    cache = store()
    cache.hear(cm("a", 5))
    cache.hear(cm("a", 7))  # made anew, and its event was taken

    cache.forget(cm("a", 5))  # a deletion of the first was refused
    assert cache.get(Ref(CONFIG_MAP, "x", "a")) == cm("a", 7)
    cache.forget(cm("a", 7))
    assert cache.get(Ref(CONFIG_MAP, "x", "a")) is None
    cache.forget(cm("a", 7))


def test_the_deletion_of_what_was_forgotten_is_told() -> None:
    cache = store()
    cache.hear(cm("a", 5))
    cache.forget(cm("a", 5))

    assert cache.remove(cm("a", 6)) == Change(cm("a", 6), None)
    assert cache.remove(cm("a", 6)) is None


def test_a_list_brings_back_what_was_forgotten() -> None:
    cache = store()
    for obj in (cm("a", 5), cm("b", 6)):
        cache.hear(obj)
        cache.forget(obj)

    assert cache.replace(CONFIG_MAP, None, Listing([cm("a", 5)], 9)) == [Change(None, cm("a", 5))]
    assert {*cache._shelves[CONFIG_MAP].heard} == {("x", "a")}, "of the other one no event will come"


@given(
    writers=st.lists(st.sampled_from(["own", "other"]), min_size=1, max_size=12),
    dice=st.randoms(use_true_random=False),
)
@settings(max_examples=300, deadline=None)
def test_whenever_the_answers_to_own_writes_come_every_change_of_somebody_else_is_told(
    writers: list[str], dice: random.Random
) -> None:
    """Events come in their order; the answer to a write at any moment, also before those of older changes."""
    cache = store()
    cache.hear(cm("a", 1))
    own = {version for version, writer in enumerate(writers, start=2) if writer == "own"}
    events = [(version, "event", version) for version in range(2, len(writers) + 2)]
    answers = [(dice.randrange(version + 1), "answer", version) for version in own]
    told = set()
    for _, what, version in sorted([*events, *answers]):  # at the same moment the answer is first
        if what == "answer":
            cache.wrote(cm("a", version))
        elif cache.hear(cm("a", version)) is not None:
            told.add(version)

    others = {version for _, _, version in events} - own
    assert told >= others
    if [version for _, _, version in sorted(answers)] == sorted(own):  # otherwise an own one may look like a look
        assert told == others
    assert cache._shelves[CONFIG_MAP].own == {}


RESOURCE = Ref(SECURE_VLLM_DEPLOYMENT, "x", "a")


class Server:
    """One resource on an API server: others change its spec, the operator its status; a write may change nothing."""

    def __init__(self) -> None:
        self.version, self.spec, self.status = 1, 0, 0
        self.events: list[KubeObject] = []

    def state(self) -> KubeObject:
        metadata = {"name": "a", "namespace": "x", "resourceVersion": str(self.version), "generation": self.spec}
        return {
            "apiVersion": SECURE_VLLM_DEPLOYMENT.api_version,
            "kind": SECURE_VLLM_DEPLOYMENT.kind,
            "metadata": metadata,
            "spec": {"replicas": self.spec},
            "status": {"seen": self.status},
        }

    def write(self, *, spec: int | None = None, status: int | None = None) -> KubeObject:
        """The answer to a write; with an event where it changed anything."""
        wanted = self.spec if spec is None else spec, self.status if status is None else status
        if wanted != (self.spec, self.status):
            (self.spec, self.status), self.version = wanted, self.version + 1
            self.events.append(self.state())
        return self.state()


def test_an_own_write_that_changed_nothing_does_not_swallow_what_somebody_else_did() -> None:
    """The answer to the first write was lost; the second has the version of the user's edit."""
    server, cache = Server(), Store([Watched(SECURE_VLLM_DEPLOYMENT, own_status=True)])
    cache.hear(server.state())
    server.write(status=1)
    server.write(spec=1)
    cache.wrote(server.write(status=1))

    assert [cache.hear(event) is not None for event in server.events] == [True, True]


def test_of_a_child_the_status_is_what_others_write() -> None:
    cache = store()
    before, after = cm("a", 5), cm("a", 7, ours="new")
    cache.hear(before)
    cache.wrote(after)
    assert cache.hear(after) is None
    ready = cm("a", 8, ours="new") | {"status": {"readyReplicas": 1}}
    cache.wrote(ready)  # an apply that changed nothing, after a controller's word that has not come yet
    assert cache.hear(ready) is not None


@given(
    steps=st.lists(st.sampled_from(["edit", "report", "report, unanswered", "event"]), max_size=30),
)
@settings(max_examples=500, deadline=None)
def test_whatever_answers_are_lost_the_last_spec_is_acted_on(steps: list[str]) -> None:
    server, cache = Server(), Store([Watched(SECURE_VLLM_DEPLOYMENT, own_status=True)])
    cache.hear(server.state())
    acted = told = 0

    def hear() -> None:
        nonlocal acted, told
        if told < len(server.events):
            told += 1
            if cache.hear(server.events[told - 1]) is not None:  # a reconcile: it sees what is known now
                found = cache.get(RESOURCE)
                assert found is not None
                acted = found["spec"]["replicas"]

    for step in steps:
        if step == "edit":
            server.write(spec=server.spec + 1)
        elif step == "event":
            hear()
        else:
            answer = server.write(status=acted)
            if step == "report":
                cache.wrote(answer)
    while told < len(server.events):
        hear()
    assert acted == server.spec


@given(
    history=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["hear", "remove"])), max_size=30),
    seed=st.integers(0, 2**32),
    lists=st.lists(st.integers(0, 30), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_in_any_order_and_with_any_repetition_the_cache_ends_at_the_truth(
    history: list[tuple[str, str]], seed: int, lists: list[int]
) -> None:
    """Events may be late, doubled or overtaken by lists; with every message in, only the last state remains."""
    truth: dict[str, KubeObject] = {}
    snapshots = [Listing([], 1)]
    messages: list[tuple[str, Any]] = []
    for version, (name, what) in enumerate(history, start=2):
        if what == "remove" and name not in truth:
            continue
        obj = cm(name, version, owner=name)
        if what == "hear":
            truth[name] = obj
        else:
            del truth[name]
        messages.append((what, obj))
        snapshots.append(Listing([*truth.values()], version))
    messages += [("list", snapshots[number % len(snapshots)]) for number in lists]
    messages += messages[::2]
    random.Random(seed).shuffle(messages)  # noqa: S311 - a test's order

    cache = store()
    for what, content in messages:
        if what == "list":
            cache.replace(CONFIG_MAP, None, content)
        else:
            getattr(cache, what)(content)
    cache.replace(CONFIG_MAP, None, snapshots[-1])

    assert {obj["metadata"]["name"]: obj for obj in cache.all(CONFIG_MAP)} == truth
    assert {name: cache.indexed(name) for name in truth} == {name: [obj] for name, obj in truth.items()}
