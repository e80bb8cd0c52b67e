"""I9: the operator may die at any instruction. Here it does, by kill -9 at thirty seeded moments."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from securevllm.api import kinds
from securevllm.api.kinds import Ref
from securevllm.render.meta import DENY_NAME
from tests.api.audit import now
from tests.api.children import children
from tests.api.kube import eventually
from tests.api.lab import as_rendered, differences, inexact, policies_before_pods
from tests.api.operator_process import USER, new_namespace, resource
from tests.api.people import NAMES, User, made, ref

if TYPE_CHECKING:
    from tests.api.kube import Kube
    from tests.api.lab import Lab

pytestmark = pytest.mark.cluster

KILLS = 30


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
