"""Every error that crosses a layer.

OperatorError
├── SpecError          the resource is wrong; carries what to write instead
├── InternalError      our own mistake: a rendered artefact is not what was meant
├── LeadershipLost     a write was refused because the Lease may belong to somebody else
├── ForeignObject      an object with a child's name belongs to somebody else
├── Contested          somebody else keeps changing a child; it is left alone for a moment
└── ApiError           the API server said no, or did not answer
    ├── NotFound, AlreadyExists, Conflict, Forbidden, Invalid
    └── Unavailable    worth a retry: timeout, connection error, 429, 5xx
"""

from __future__ import annotations

from dataclasses import dataclass


class OperatorError(Exception):
    """Base of all errors that the operator raises itself."""


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong with a resource.

    Attributes:
        field: path of the field, for example ``spec.gateway.tls``.
        reason: CamelCase reason of the ``Accepted`` condition.
        rule: what the value breaks, one sentence without a full stop.
        fix: what to write instead; may be YAML to paste.
        value: the refused value, printed in quotes; empty when there is none to show.
    """

    field: str
    reason: str
    rule: str
    fix: str
    value: str = ""

    def __str__(self) -> str:
        shown = f" {self.value!r}" if self.value else ""
        return f"{self.field}{shown}: {self.rule}. {self.fix}"


class SpecError(OperatorError):
    """The spec cannot be accepted.

    Attributes:
        problems: everything that is wrong, never only the first finding.
    """

    def __init__(self, *problems: Problem) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("; ".join(map(str, self.problems)))

    @property
    def reason(self) -> str:
        """The reason that the ``Accepted`` condition shows."""
        return self.problems[0].reason


class InternalError(OperatorError):
    """An artefact differs from what was meant; nothing may be applied."""


class LeadershipLost(OperatorError):  # noqa: N818 - says what happened
    """No write starts after the renew deadline of the Lease."""


class ForeignObject(OperatorError):  # noqa: N818 - says what it is
    """An object that carries the name of a child has another owner; it is never taken over."""

    def __init__(self, kind: str, namespace: str, name: str, owner: str) -> None:
        self.kind, self.namespace, self.name, self.owner = kind, namespace, name, owner
        super().__init__(
            f"{kind} {namespace}/{name} exists and belongs to {owner}: it is left alone. "
            f"Rename this SecureVLLMDeployment or remove that object."
        )


class Contested(OperatorError):  # noqa: N818 - says what it is
    """A child was repaired several times and changed again each time.

    Attributes:
        pause: seconds until the next repair.
    """

    def __init__(self, pause: float) -> None:
        self.pause = pause
        super().__init__("somebody else keeps changing it; repairs are paused for moments")


class ApiError(OperatorError):
    """The API server refused a request, or could not be reached.

    Attributes:
        status: HTTP status code, 0 when there was no answer.
        reason: ``metav1.Status.reason``, or a short word of ours.
    """

    def __init__(self, message: str, *, status: int = 0, reason: str = "") -> None:
        self.status, self.reason = status, reason
        super().__init__(message)


class NotFound(ApiError):  # noqa: N818 - the name of the API's reason
    """404."""


class AlreadyExists(ApiError):  # noqa: N818 - the name of the API's reason
    """409 on create."""


class Conflict(ApiError):  # noqa: N818 - the name of the API's reason
    """409: the object changed meanwhile, or a precondition on uid or resourceVersion failed."""


class Forbidden(ApiError):  # noqa: N818 - the name of the API's reason
    """403: RBAC, quota or an admission policy."""


class Invalid(ApiError):  # noqa: N818 - the name of the API's reason
    """400 or 422: the object is not valid."""


class Unavailable(ApiError):  # noqa: N818 - says what it is
    """No usable answer: timeout, connection error, 429 or 5xx. Worth a retry."""
