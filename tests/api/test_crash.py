"""I9: the operator may die at any instruction. Here it does, by kill -9 at thirty seeded moments."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from securevllm.api import kinds
from securevllm.api.kinds import Ref
from securevllm.render.meta import DENY_NAME
from tests.api.audit import now
from tests.api.children import children
from tests.api.kube import Kube, eventually
from tests.api.lab import Lab, as_rendered, differences, inexact, policies_before_pods
from tests.api.operator_process import USER, new_namespace, resource

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.cluster

KILLS = 30
NAMES = ("a", "b", "c")
GENERATED = ("engine-key", "client-keys", "gateway-ca", "gateway-tls")


def ref(namespace: str, name: str) -> Ref:
    return Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, name)


class User:
    """Somebody who creates, changes and deletes resources, and damages children, all by the dice."""

    def __init__(self, kube: Kube, dice: random.Random) -> None:
        self.kube, self.dice = kube, dice

    def act(self, namespace: str) -> None:
        """Do something to one resource of the namespace."""
        name = self.dice.choice(NAMES)
        if self.kube.find(ref(namespace, name)) is None:
            self.kube.apply(resource(namespace, name))
            return
        actions: list[Callable[[str, str], None]] = [self._change, self._change, self._damage, self._damage, self._end]
        self.dice.choice(actions)(namespace, name)

    def _change(self, namespace: str, name: str) -> None:
        spec: dict[str, Any] = {
            "replicas": self.dice.randint(1, 4),
            "engine": {"args": [f"--max-model-len={self.dice.randint(1, 9) * 1024}"]},
            "gateway": {"replicas": self.dice.randint(1, 3)},  # with one there is no disruption budget
        }
        self.kube.patch(ref(namespace, name), {"spec": spec})

    def _damage(self, namespace: str, name: str) -> None:
        role = self.dice.choice(("engine", "gateway"))
        kind = self.dice.choice((kinds.NETWORK_POLICY, kinds.SERVICE, kinds.DEPLOYMENT, kinds.SERVICE_ACCOUNT))
        child = Ref(kind, namespace, f"{name}-{role}")
        if self.kube.find(child) is None:
            return  # a kill came before it was made
        if self.dice.random() < 0.5:
            self.kube.delete(child)
        else:
            self.kube.patch(child, {"metadata": {"labels": {"damaged": "yes"}}})

    def _end(self, namespace: str, name: str) -> None:
        self.kube.delete(ref(namespace, name))


def made(kube: Kube, namespace: str) -> dict[tuple[str, str], dict[str, str]]:
    """Content of the generated Secrets, by uid of the resource and name."""
    return {
        (owner["uid"], secret["metadata"]["name"]): secret.get("data", {})
        for secret in kube.list(kinds.SECRET, namespace)
        for owner in secret["metadata"].get("ownerReferences", ())
        if secret["metadata"]["name"].partition("-")[2] in GENERATED
    }


@pytest.mark.slow
def test_killed_at_thirty_moments_it_ends_where_render_says_with_the_keys_of_the_first_moment(lab: Lab) -> None:
    kube, dice = lab.kube, random.Random(1979)  # noqa: S311 - moments, no keys
    user = User(kube, dice)
    since = now()
    unfinished = 0
    keys: dict[tuple[str, str], dict[str, str]] = {}
    with (
        new_namespace(kube, "crash") as stays,
        new_namespace(kube, "crash") as empties,
        lab.operator("crash") as operator,
    ):
        longest = seconds_to_converge(kube, stays)
        for _ in range(KILLS):
            # What happened while it was down is done at its start, and this comes in between.
            user.act(stays)
            user.act(empties)
            time.sleep(dice.uniform(0.0, longest))
            operator.kill()
            unfinished += any(differences(kube, namespace) for namespace in (stays, empties))
            for where, data in (made(kube, stays) | made(kube, empties)).items():
                assert keys.setdefault(where, data) == data, f"{where} was made twice"
            user.act(stays)
            operator.start()
        for name in NAMES:
            kube.delete(ref(empties, name))

        eventually(lambda: as_rendered(kube, stays), 30, pause=0.3)
        assert inexact(kube, stays, scratch="default") == []
        for where, data in made(kube, stays).items():
            assert keys.get(where, data) == data
        eventually(lambda: children(kube, empties) == {}, 30)
        assert kube.find(Ref(kinds.NETWORK_POLICY, stays, DENY_NAME)) is not None
        assert operator.stop() == 0
        for namespace in (stays, empties):
            assert policies_before_pods(lab.audit.requests(since, namespace=namespace), {USER}) == []
    print(  # noqa: T201
        f"{unfinished} of {KILLS} kills, up to {longest:.1f} s after the start, left something undone;"
        f" {len(keys)} generated Secrets kept their content"
    )
    # Otherwise the moments are badly chosen and this test shows nothing.
    assert unfinished >= KILLS // 4


def seconds_to_converge(kube: Kube, namespace: str) -> float:
    """Create all resources, and measure how long it takes on this machine today."""
    began = time.monotonic()
    for name in NAMES:
        kube.apply(resource(namespace, name))
    eventually(lambda: as_rendered(kube, namespace), 30)
    return time.monotonic() - began
