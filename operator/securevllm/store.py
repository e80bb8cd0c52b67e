"""A cache of the objects that are watched: what the operator believes the cluster looks like.

Filled by lists and watch events (`hear`), by looks (`put`) and by the answers to the operator's own writes (`wrote`),
in any order: of one object the highest resourceVersion wins, and what was deleted does not come back by an older
message. Not thread-safe: it belongs to the event loop's thread.

What is known and what was heard are two things. A look, or the answer to a write, also carries what somebody else
changed a moment before; that one's event must still wake a reconcile, although the cache holds a newer state by then.
Only the event of an own write is no news, and a write that changed nothing is none: its answer has the version of the
last change, whoever made that. It happens when the answer to the write before was lost.

Objects are shared, not copied: whoever reads one must not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from securevllm.api.kinds import Kind, KubeObject, Ref
from securevllm.errors import InternalError

if TYPE_CHECKING:
    from securevllm.cluster import Listing


@dataclass(frozen=True)
class Watched:
    """A kind that is watched.

    Attributes:
        kind: of the objects.
        label_selector: only these, selected by the API server; None is all of them.
        managed_fields: keep ``metadata.managedFields``; half of the size of a Pod, and only needed for repairs.
        own_status: what we write of them is their status; of other kinds it is everything else. (Of pods it is also the
            readiness gate of their group, whose event therefore is news: work, nothing lost.)
    """

    kind: Kind
    label_selector: str | None = None
    managed_fields: bool = True
    own_status: bool = False

    def of_others(self, obj: KubeObject) -> object:
        """What only others change of an object."""
        metadata = obj["metadata"]
        if not self.own_status:
            return obj.get("status"), metadata.get("deletionTimestamp")
        ours = ("resourceVersion", "managedFields")
        rest = {name: value for name, value in obj.items() if name not in {"status", "metadata"}}
        return rest, {name: value for name, value in metadata.items() if name not in ours}


@dataclass(frozen=True)
class Change:
    """One object before and after; None is: it was, or is, not there."""

    old: KubeObject | None
    new: KubeObject | None


_Where = tuple[str | None, str]
"""Namespace and name."""


@dataclass
class _Shelf:
    """The objects of one kind.

    Attributes:
        watched: the kind.
        objects: the newest known, by namespace and name.
        gone: version of the deletion of what is not there.
        heard: the newest version that a list or an event told.
        own: versions made by own writes, of which no event was heard yet.
        listed_at: version of the last list, by namespace.
    """

    watched: Watched
    objects: dict[str | None, dict[str, KubeObject]] = field(default_factory=dict)
    gone: dict[_Where, int] = field(default_factory=dict)
    heard: dict[_Where, int] = field(default_factory=dict)
    own: dict[_Where, set[int]] = field(default_factory=dict)
    listed_at: dict[str | None, int] = field(default_factory=dict)


class Store:
    """The cache.

    Args:
        watched: the kinds; others are refused.
        namespaces: the namespaces that are listed one by one; none is a list over all of them.
        index: words under which `indexed` finds an object, for example the value of a label.
    """

    def __init__(
        self,
        watched: Iterable[Watched],
        *,
        namespaces: Iterable[str] = (),
        index: Callable[[KubeObject], Iterable[str]] = lambda _: (),
    ) -> None:
        self._shelves = {one.kind: _Shelf(one) for one in watched}
        self._namespaces = tuple(namespaces)
        self._index = index
        self._indexed: dict[str, dict[Ref, KubeObject]] = {}
        self._unlisted = set(self.scopes)

    @property
    def scopes(self) -> tuple[tuple[Watched, str | None], ...]:
        """Every list that must be read to fill the cache: a kind and a namespace, None for all namespaces."""
        return tuple(
            (shelf.watched, namespace)
            for shelf in self._shelves.values()
            for namespace in (self._namespaces if self._namespaces and shelf.watched.kind.namespaced else (None,))
        )

    @property
    def namespaces(self) -> tuple[str, ...]:
        """The namespaces that are watched; none is all of them."""
        return self._namespaces

    def unsynced(self) -> str | None:
        """Which lists were never read, for a readiness check; None when the cache is complete."""
        if not self._unlisted:
            return None
        missing = sorted({watched.kind.resource for watched, _ in self._unlisted})
        return f"not listed yet: {', '.join(missing)}"

    def get(self, ref: Ref) -> KubeObject | None:
        """One object; do not change it."""
        return self._shelf(ref.kind).objects.get(ref.namespace, {}).get(ref.name)

    def all(self, kind: Kind, namespace: str | None = None) -> list[KubeObject]:
        """All objects of a kind, of one namespace when it is given; do not change them."""
        objects = self._shelf(kind).objects
        if namespace is not None:
            return [*objects.get(namespace, {}).values()]
        return [obj for names in objects.values() for obj in names.values()]

    def indexed(self, word: str) -> list[KubeObject]:
        """All objects, of every kind, that `index` filed under this word; do not change them."""
        return [*self._indexed.get(word, {}).values()]

    def hear(self, obj: KubeObject, *, listed: bool = False) -> Change | None:
        """Take in what a watch told.

        Args:
            obj: as it is, or was.
            listed: by a list: it leaves out what was between two versions, so of an own one it is not known what else
                it holds.

        Returns:
            What changed; None when it was told before, or is an own write, or a later deletion is known already.
        """
        ref, version = Ref.of(obj), _version(obj)
        shelf, where = self._shelf(ref.kind), (ref.namespace, ref.name)
        old = self.get(ref)
        news = version > max(shelf.heard.get(where, -1), shelf.gone.get(where, -1))
        self.put(obj)
        if news:
            shelf.heard[where] = version
            own = shelf.own.pop(where, set())
            if later := {written for written in own if written > version}:
                shelf.own[where] = later
            news = listed or version not in own
        new = self.get(ref)
        return Change(old, new) if news or old is not new else None

    def put(self, obj: KubeObject) -> None:
        """Take in what a look found, unless this version, or a newer one, or a later deletion is known already."""
        ref, version = Ref.of(obj), _version(obj)
        shelf = self._shelf(ref.kind)
        old = self.get(ref)
        known = _version(old) if old is not None else shelf.gone.get((ref.namespace, ref.name), -1)
        if version <= known:
            return
        shelf.gone.pop((ref.namespace, ref.name), None)
        new = obj if shelf.watched.managed_fields else _without_managed_fields(obj)
        shelf.objects.setdefault(ref.namespace, {})[ref.name] = new
        self._file(ref, old, new)

    def wrote(self, obj: KubeObject) -> None:
        """Take in the answer to an own write. Its event is news where it holds what somebody else changed."""
        ref, version = Ref.of(obj), _version(obj)
        shelf, where = self._shelf(ref.kind), (ref.namespace, ref.name)
        old, of_others = self.get(ref), shelf.watched.of_others
        alone = old is None or (version > _version(old) and of_others(obj) == of_others(old))
        if alone and version > shelf.heard.get(where, -1):
            shelf.own.setdefault(where, set()).add(version)
        self.put(obj)

    def remove(self, obj: KubeObject) -> Change | None:
        """Take in that an object was deleted; `obj` is its last state, with the resourceVersion of the deletion.

        Returns:
            What changed; None when it is unknown, or known in a newer version (recreated under its name).
        """
        ref = Ref.of(obj)
        forgotten = self.get(ref) is None and (ref.namespace, ref.name) in self._shelf(ref.kind).heard
        change = self._remove(ref, _version(obj))
        return Change(obj, None) if forgotten else change

    def forget(self, obj: KubeObject) -> None:
        """Drop a state of an object that a write has shown to be old; the next message, or a look, fills it in.

        A newer state stays: its message has come, and will not come again.
        """
        ref = Ref.of(obj)
        old = self.get(ref)
        if old is not None and _version(old) <= _version(obj):
            del self._shelf(ref.kind).objects[ref.namespace][ref.name]
            self._file(ref, old, None)

    def replace(self, kind: Kind, namespace: str | None, listing: Listing) -> list[Change]:
        """Take in a complete list of a kind, in one namespace or (None) in all.

        Deletions that a watch never reported are found here.
        """
        shelf = self._shelf(kind)
        changes = [self.hear(obj, listed=True) for obj in listing.items]
        listed = {Ref.of(obj) for obj in listing.items}
        # `_remove` leaves alone what is newer than the list: created, or written by us, while it was under way.
        missing = [ref for ref in map(Ref.of, self.all(kind, namespace)) if ref not in listed]
        changes += [self._remove(ref, listing.resource_version) for ref in missing]
        # Messages older than the list before this one can no longer be under way.
        limit = shelf.listed_at.get(namespace, -1)
        shelf.listed_at[namespace] = listing.resource_version
        shelf.gone = {
            where: version
            for where, version in shelf.gone.items()
            if version > limit or namespace not in (None, where[0])
        }
        for told in (shelf.heard, shelf.own):
            for where in [where for where in told if namespace in (None, where[0]) and self._unknown(shelf, where)]:
                del told[where]
        self._unlisted.discard((shelf.watched, namespace))
        return [change for change in changes if change is not None]

    def _remove(self, ref: Ref, version: int) -> Change | None:
        shelf = self._shelf(ref.kind)
        old = self.get(ref)
        if old is not None and _version(old) > version:
            return None
        where = (ref.namespace, ref.name)
        shelf.gone[where] = max(version, shelf.gone.get(where, -1))
        shelf.heard.pop(where, None)
        shelf.own.pop(where, None)
        if old is None:
            return None
        names = shelf.objects[ref.namespace]
        del names[ref.name]
        if not names:
            del shelf.objects[ref.namespace]
        self._file(ref, old, None)
        return Change(old, None)

    @staticmethod
    def _unknown(shelf: _Shelf, where: _Where) -> bool:
        """Forgotten, and gone since: no event will come."""
        return where[1] not in shelf.objects.get(where[0], {})

    def _file(self, ref: Ref, old: KubeObject | None, new: KubeObject | None) -> None:
        for word in self._index(old) if old is not None else ():
            drawer = self._indexed[word]
            drawer.pop(ref, None)
            if not drawer:
                del self._indexed[word]
        for word in self._index(new) if new is not None else ():
            self._indexed.setdefault(word, {})[ref] = new or {}

    def _shelf(self, kind: Kind) -> _Shelf:
        try:
            return self._shelves[kind]
        except KeyError:
            raise InternalError(f"{kind} is not watched: read it through the client") from None


def _version(obj: KubeObject) -> int:
    # Comparable as numbers for one resource: https://kubernetes.io/docs/reference/using-api/api-concepts/
    # (resource versions); every supported API server counts etcd revisions.
    try:
        return int(obj["metadata"]["resourceVersion"])
    except (KeyError, ValueError):
        raise InternalError(f"{Ref.of(obj)} has no usable metadata.resourceVersion") from None


def _without_managed_fields(obj: KubeObject) -> KubeObject:
    metadata = {name: value for name, value in obj["metadata"].items() if name != "managedFields"}
    return obj | {"metadata": metadata}
