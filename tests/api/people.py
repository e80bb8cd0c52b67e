"""Somebody who uses the cluster while a test disturbs it, and what no disturbance may change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from securevllm.api import kinds
from securevllm.api.kinds import Ref
from securevllm.render.meta import DENY_NAME
from tests.api.operator_process import resource

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.api.kube import Kube

NAMES = ("a", "b", "c")
_GENERATED = ("engine-key", "client-keys", "gateway-ca", "gateway-tls")


def ref(namespace: str, name: str) -> Ref:
    """A resource of this user."""
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
        if self.dice.random() < 0.1:
            self.kube.delete(Ref(kinds.NETWORK_POLICY, namespace, DENY_NAME))
            return
        role = self.dice.choice(("engine", "gateway"))
        kind = self.dice.choice((kinds.NETWORK_POLICY, kinds.SERVICE, kinds.DEPLOYMENT, kinds.SERVICE_ACCOUNT))
        child = Ref(kind, namespace, f"{name}-{role}")
        if self.kube.find(child) is None:
            return  # the operator died before it was made
        if self.dice.random() < 0.5:
            self.kube.delete(child)
        else:
            self.kube.patch(child, {"metadata": {"labels": {"damaged": "yes"}}})

    def _end(self, namespace: str, name: str) -> None:
        self.kube.delete(ref(namespace, name))


class GroupUser:
    """Somebody who changes, damages and restarts one resource whose engines are groups of two pods.

    A group that is broken again and again waits longer and longer, so this one seldom does it, and knows a cure.
    """

    NAME = "groups"

    def __init__(self, kube: Kube, dice: random.Random) -> None:
        self.kube, self.dice = kube, dice

    def begin(self, namespace: str) -> None:
        """Create the resource."""
        self.kube.create(resource(namespace, self.NAME, parallelism={"tensor": 2, "nodes": 2}, gateway={"replicas": 1}))

    def act(self, namespace: str) -> None:
        """Do something to it, or nothing."""
        self.dice.choices((lambda _: None, self._change, self._damage, self._break), (6, 3, 3, 1))[0](namespace)

    def cure(self, namespace: str, attempt: int) -> None:
        """Change the template of the engines, which ends every back-off. Not by the dice: that it happens is chance."""
        labels = {"attempt": str(attempt)}
        self.kube.patch(ref(namespace, self.NAME), {"spec": {"engine": {"labels": labels}}})

    def _change(self, namespace: str) -> None:
        self.kube.patch(ref(namespace, self.NAME), {"spec": {"replicas": self.dice.randint(1, 2)}})

    def _damage(self, namespace: str) -> None:
        kind = self.dice.choice((kinds.NETWORK_POLICY, kinds.SERVICE))
        self.kube.delete(Ref(kind, namespace, f"{self.NAME}-e0"))

    def _break(self, namespace: str) -> None:
        self.kube.delete(Ref(kinds.POD, namespace, f"{self.NAME}-e0-{self.dice.randint(0, 1)}-0"))


def made(kube: Kube, namespace: str) -> dict[tuple[str, str], dict[str, str]]:
    """Content of the generated Secrets, by uid of the resource and name."""
    return {
        (owner["uid"], secret["metadata"]["name"]): secret.get("data", {})
        for secret in kube.list(kinds.SECRET, namespace)
        for owner in secret["metadata"].get("ownerReferences", ())
        if secret["metadata"]["name"].partition("-")[2] in _GENERATED
    }
