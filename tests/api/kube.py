"""A plain, synchronous client of the API server for tests: an administrator who edits objects by hand.

Independent of the operator's own client, which is under test. Every write says as whom it is made (``manager``),
because drift repair looks at field managers.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal, TypeVar

import httpx
from kubernetes.client import Configuration
from kubernetes.config import load_kube_config

from e2e.cluster.errors import TooLate
from securevllm.api.kinds import Kind, KubeObject, Ref

Result = TypeVar("Result")
PatchType = Literal["merge-patch", "strategic-merge-patch", "json-patch"]

HAND = "kubectl-edit"
"""Field manager of a person with kubectl."""


class Refused(AssertionError):  # noqa: N818 - the API server's answer, which `eventually` may outwait
    """The API server said no.

    Attributes:
        code: HTTP status.
        reason: ``Status.reason``.
        message: ``Status.message``.
    """

    def __init__(self, request: str, code: int, reason: str, message: str) -> None:
        super().__init__(f"{request}: {code} {reason}: {message}")
        self.code, self.reason, self.message = code, reason, message


class Kube:
    """Requests with the credentials of a kubeconfig.

    Args:
        kubeconfig: with a client certificate or a token.
        user_agent: how the audit log tells these requests from the operator's.
    """

    def __init__(self, kubeconfig: Path, user_agent: str = "test") -> None:
        configuration = Configuration()
        load_kube_config(  # type: ignore[no-untyped-call]
            config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
        )
        context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
        if configuration.cert_file:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
        headers = {"User-Agent": user_agent}
        if token := configuration.api_key.get("BearerToken"):
            headers["Authorization"] = token
        self._http = httpx.Client(
            base_url=configuration.host, verify=context, headers=headers, trust_env=False, timeout=20
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, ref: Ref, subresource: str | None = None) -> KubeObject:
        """Read an object.

        Raises:
            Refused: code 404 when there is none.
        """
        return self.request("GET", ref.path(subresource))

    def find(self, ref: Ref) -> KubeObject | None:
        """Read an object, or None."""
        try:
            return self.get(ref)
        except Refused as refused:
            if refused.code != httpx.codes.NOT_FOUND:
                raise
            return None

    def list(self, kind: Kind, namespace: str | None = None, selector: str = "") -> list[KubeObject]:
        """Objects of a kind, with ``apiVersion`` and ``kind``, which list items lack."""
        answer = self.request("GET", kind.path(namespace), query={"labelSelector": selector})
        return [{"apiVersion": kind.api_version, "kind": kind.kind, **item} for item in answer["items"]]

    def create(self, obj: KubeObject, manager: str = HAND) -> KubeObject:
        """POST."""
        ref = Ref.of(obj)
        return self.request("POST", ref.kind.path(ref.namespace), obj, query={"fieldManager": manager})

    def apply(self, obj: KubeObject, manager: str = HAND, *, force: bool = False, dry_run: bool = False) -> KubeObject:
        """Server-side apply."""
        query = {"fieldManager": manager, "force": str(force).lower()} | ({"dryRun": "All"} if dry_run else {})
        return self.request("PATCH", Ref.of(obj).path(), obj, query=query, content_type="application/apply-patch+yaml")

    def replace(self, obj: KubeObject, manager: str = HAND, subresource: str | None = None) -> KubeObject:
        """PUT, as ``kubectl edit`` and ``kubectl replace`` do."""
        return self.request("PUT", Ref.of(obj).path(subresource), obj, query={"fieldManager": manager})

    def patch(
        self,
        ref: Ref,
        body: Any,
        manager: str = HAND,
        subresource: str | None = None,
        patch_type: PatchType = "merge-patch",
    ) -> KubeObject:
        """PATCH; by default a merge patch (RFC 7386)."""
        return self.request(
            "PATCH",
            ref.path(subresource),
            body,
            query={"fieldManager": manager},
            content_type=f"application/{patch_type}+json",
        )

    def delete(self, ref: Ref, **options: Any) -> None:
        """DELETE with ``DeleteOptions``; an object that is gone already is fine."""
        try:
            self.request("DELETE", ref.path(), {"apiVersion": "v1", "kind": "DeleteOptions", **options})
        except Refused as refused:
            if refused.code != httpx.codes.NOT_FOUND:
                raise

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
    ) -> KubeObject:
        """Any request.

        Raises:
            Refused: status 400 and up.
        """
        answer = self._http.request(
            method, path, params=query, json=body, headers={"Content-Type": content_type, "Accept": "application/json"}
        )
        # A path that is not served (yet) gets plain text.
        is_json = "json" in answer.headers.get("Content-Type", "")
        parsed: KubeObject = answer.json() if is_json else {}
        if answer.is_error:
            raise Refused(
                f"{method} {path}", answer.status_code, parsed.get("reason", ""), parsed.get("message", answer.text)
            )
        return parsed


PATIENCE = 4
"""Limits of waits are for a machine that does nothing else; they are this many times longer, for workers and builds."""


def eventually(check: Callable[[], Result], seconds: float = 15.0, pause: float = 0.05) -> Result:
    """Call ``check`` until it gives something true, and give that; for ``PATIENCE`` times ``seconds`` at most.

    Raises:
        TooLate: with the last error that ``check`` raised, or what it gave instead.
    """
    deadline = monotonic() + seconds * PATIENCE
    while True:
        try:
            result = check()
        except AssertionError as error:
            if monotonic() > deadline:
                raise TooLate(f"after {seconds * PATIENCE:.0f} s: {error}") from error
        else:
            if result:
                return result
            if monotonic() > deadline:
                raise TooLate(f"after {seconds * PATIENCE:.0f} s it still gave {result!r}")
        sleep(pause)


def consistently(check: Callable[[], Any], seconds: float, pause: float = 0.1) -> None:
    """Call ``check`` again and again for a while; every result has to be true.

    Raises:
        AssertionError: the first that is not.
    """
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        result = check()
        assert result, f"{seconds - (deadline - monotonic()):.1f} s after the start it gave {result!r}"
        sleep(pause)
