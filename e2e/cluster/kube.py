"""Plain JSON requests and watches over the ApiClient of `kubernetes.aio`, for `hollow`.

Like a kubelet, the caller has nothing better to do than to try again: a request is repeated until the API server
answers it, also across its restarts. Answers of the 4xx kind are the caller's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import load_kube_config

JsonObject = dict[str, Any]

MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
SYNC = "SYNC"

_PAUSE = 0.3
_REQUEST = aiohttp.ClientTimeout(total=10)
_WATCH_SECONDS = 300
_WATCH = aiohttp.ClientTimeout(total=_WATCH_SECONDS + 30)


class RefusedError(RuntimeError):
    """The API server said no.

    Attributes:
        status: HTTP status, 400 to 499 without 429.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """Requests with the credentials of one kubeconfig; made by `connect`."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._server = client.configuration.host.rstrip("/")

    async def get(self, path: str) -> JsonObject:
        """Read one object or a list.

        Raises:
            RefusedError: With status 404 when there is none.
        """
        return await self._send("GET", path)

    async def create(self, path: str, body: JsonObject) -> JsonObject:
        """POST; an object that exists already is an answer too (status 409).

        Raises:
            RefusedError: Not accepted.
        """
        return await self._send("POST", path, body)

    async def merge(self, path: str, body: JsonObject) -> JsonObject:
        """PATCH with an RFC 7386 merge patch.

        Raises:
            RefusedError: Not accepted, or status 404.
        """
        return await self._send("PATCH", path, body, MERGE_PATCH)

    async def merge_by_key(self, path: str, body: JsonObject) -> JsonObject:
        """PATCH with a strategic merge patch: of a list of conditions, those of others stay.

        Raises:
            RefusedError: Not accepted, or status 404.
        """
        return await self._send("PATCH", path, body, STRATEGIC_MERGE_PATCH)

    async def delete(self, path: str, options: JsonObject) -> None:
        """DELETE with DeleteOptions; an object that is gone, or is another one by now, is a success."""
        try:
            await self._send("DELETE", path, options)
        except RefusedError as refused:
            if refused.status not in {HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT}:
                raise

    async def follow(self, path: str) -> AsyncIterator[tuple[str, Any]]:
        """List and watch a collection for ever.

        Yields:
            `(SYNC, [object, ...])` with all of them at first and whenever the watch was interrupted; then
            `(ADDED | MODIFIED | DELETED, object)`.
        """
        while True:
            listing = await self.get(path)
            yield SYNC, listing["items"]
            version = listing["metadata"]["resourceVersion"]
            query = f"watch=true&resourceVersion={version}&timeoutSeconds={_WATCH_SECONDS}"
            try:
                response = await self._client.call_api("GET", f"{self._server}{path}?{query}", _request_timeout=_WATCH)
                stream: aiohttp.ClientResponse = response.response
                try:
                    async for line in stream.content:
                        event = json.loads(line)
                        if event["type"] == "ERROR":  # 410: the resourceVersion is too old
                            break
                        yield event["type"], event["object"]
                finally:
                    # Closing would begin a TLS shutdown that goes on after the event loop has ended.
                    if stream.connection and stream.connection.transport:
                        stream.connection.transport.abort()
                    stream.close()
            except (aiohttp.ClientError, OSError, json.JSONDecodeError):
                await asyncio.sleep(_PAUSE)

    async def _send(
        self, method: str, path: str, body: JsonObject | None = None, content_type: str = "application/json"
    ) -> JsonObject:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        while True:
            try:
                response = await self._client.call_api(
                    method, f"{self._server}{path}", header_params=headers, body=body, _request_timeout=_REQUEST
                )
                payload: bytes = await response.read()  # type: ignore[no-untyped-call]
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(_PAUSE)
                continue
            status = response.status
            if status < HTTPStatus.BAD_REQUEST:
                answer: JsonObject = json.loads(payload)
                return answer
            if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                await asyncio.sleep(_PAUSE)
                continue
            raise RefusedError(f"{method} {path}: {status} {payload.decode(errors='replace')[:400]}", status)


@asynccontextmanager
async def connect(kubeconfig: Path) -> AsyncIterator[Api]:
    """Connect with a kubeconfig; no proxy of the environment is used."""
    configuration = Configuration()
    await load_kube_config(  # type: ignore[no-untyped-call]
        config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
    )
    configuration.client_session_kwargs = {"trust_env": False}
    client = ApiClient(configuration)
    try:
        yield Api(client)
    finally:
        await client.close()  # type: ignore[no-untyped-call]
