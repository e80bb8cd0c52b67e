"""From facts to conditions. Each condition is an ordered list of checks; the first that has something to say wins."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from securevllm import catalogue
from securevllm.status.facts import Facts, Workload
from securevllm.topology import VLLM, Role

Truth = Literal["True", "False", "Unknown"]


@dataclass(frozen=True)
class Verdict:
    """Status, reason and message of a condition."""

    status: Truth
    reason: str
    message: str


Check = Callable[[Facts], Verdict | None]

_MESSAGE_LIMIT = 4096

DOCS = "docs"
"""Where the pages are that messages name: the folder of the repository, unless the platform says another address."""
_PAGE = re.compile(rf"(?<![\w/.-]){DOCS}/(?=[a-z-]+\.md\b)")


def _no(reason: str, message: str) -> Verdict:
    return Verdict("False", reason, message)


# ---------------------------------------------------------------------------------------------------------- Accepted


def _spec_problems(facts: Facts) -> Verdict | None:
    if not facts.problems:
        return None
    told = " ".join(f"{problem}" for problem in facts.problems)
    if facts.lost:
        told += " No earlier accepted spec can be read: existing objects and the default-deny stay as they are."
    elif facts.fallback:
        told += " What was accepted before keeps running unchanged."
    return _no(facts.problems[0].reason, told)


# ------------------------------------------------------------------------------------------------------ EnginesReady


def _failures_of(*components: str) -> Check:
    def check(facts: Facts) -> Verdict | None:
        mine = sorted(failure for failure in facts.failures if failure.component in components)
        if not mine:
            return None
        first = mine[0]
        more = f" ({len(mine) - 1} more)" if len(mine) > 1 else ""
        return _no(first.reason, f"{first.child}: {first.message}{more}")

    return check


def _suspended(facts: Facts) -> Verdict | None:
    return _no("Suspended", "spec.suspend is true: scaled to nothing, policies are kept.") if facts.suspended else None


def _engine_secrets(facts: Facts) -> Verdict | None:
    return _no("SecretMissing", " ".join(facts.unfetched)) if facts.unfetched else None


def _fetching(facts: Facts) -> Verdict | None:
    fetch = facts.fetch
    if fetch is None or fetch.done:
        return None
    if fetch.failure:
        told = f"The model could not be downloaded: {fetch.failure}. {fetch.trouble}".rstrip()
        return _no("FetchFailed", f"{told} Change the spec, or delete the Job to try again.")
    told = "The fetch Job downloads the model; engines start when it is complete."
    return _no("FetchingModel", f"{told} {fetch.trouble}".rstrip())


def _rollout(workload: Callable[[Facts], Workload | None], what: str) -> Check:
    def check(facts: Facts) -> Verdict | None:
        state = workload(facts)
        if state is None:
            return _no("NotCreated", f"The {what} do not exist yet.")
        if state.complete and state.desired:
            return None
        if state.complete:
            return _no("ScaledToZero", f"0 {what} are asked for.")
        told = f"{state.ready} of {state.desired} {what} are ready, {state.updated} have the current template."
        if state.failure:
            return _no("NotProgressing", f"{told} {state.failure} {state.trouble}".rstrip())
        told = f"{told} {state.trouble}".rstrip()
        if state.broken:
            return _no("GroupBroken", told)
        return _no("GroupRestarting", told) if state.restarting else _no("Progressing", told)

    return check


def _router(facts: Facts) -> Verdict | None:
    if facts.router is None:
        return None
    return _rollout(lambda facts: facts.router, "routers")(facts)


def _engines_ready(facts: Facts) -> Verdict | None:
    count = facts.engine.desired if facts.engine else 0
    return Verdict("True", "AllReady", f"{count} of {count} engines are ready.")


# ------------------------------------------------------------------------------------------------------ GatewayReady


def _secrets_missing(facts: Facts) -> Verdict | None:
    return _no("SecretMissing", " ".join(facts.missing)) if facts.missing else None


def _no_client_keys(facts: Facts) -> Verdict | None:
    if not facts.no_keys:
        return None
    return _no("NoClientKeys", " ".join(["No client key is usable: every request is refused.", *facts.keys]))


def _revision(facts: Facts) -> Verdict | None:
    stale = {pod: files for pod, files in facts.served.stale.items() if files}
    if facts.served.silent:
        return _no("RevisionUnknown", f"No answer on the ops port of {', '.join(sorted(facts.served.silent))}.")
    asked, ready = len(facts.served.stale), facts.gateway.ready if facts.gateway else 0
    if asked < ready:
        return _no("RevisionUnknown", f"{asked} of {ready} gateways were asked what they serve.")
    if stale:
        pod, files = min(stale.items())
        return _no(
            "OldRevisionServed",
            f"{len(stale)} of {len(facts.served.stale)} gateways do not serve the current files; {pod} lacks"
            f" {', '.join(files)}. A rejected update keeps the last good one, revoked keys included.",
        )
    return None


def _unconnected(facts: Facts) -> Verdict | None:
    if not facts.served.unconnected or not facts.engine or not facts.engine.ready:
        return None
    return _no(
        "NoHealthyEngine",
        f"{', '.join(facts.served.unconnected)} found no healthy engine yet: DNS and health checks take seconds.",
    )


def _version(facts: Facts) -> Verdict | None:
    """The allowlist was made for a version; whether that runs, only the engines say.

    While engines are being replaced two versions run, which is no matter.
    """
    if not facts.running or facts.engine is None or not facts.engine.complete:
        return None
    said = {text: _release(text) for text in facts.running.split(", ")}
    old = sorted(text for text, version in said.items() if version is not None and version < catalogue.floor())
    if not facts.assumed and any(str(version) != facts.version for version in said.values()):
        return _no(
            "VersionMismatch",
            f"Engines say that they are vLLM {facts.running}, and the image's tag says {facts.version}: for that one"
            " routes, flags and sockets were chosen, and holes looked up. Use an image whose tag says what it holds, or"
            " name the version whose routes are meant: spec.vllmVersion.assume.",
        )
    if old and not facts.old_accepted:
        return _no(
            "VersionMismatch",
            f"Engines say that they are vLLM {', '.join(old)}: before {catalogue.floor()} it has known holes that no"
            " control of this operator covers. Use a newer image, or accept the risk in words: security: {accept:"
            " [{risk: vllmVersionBelowFloor, why: ...}]}.",
        )
    return None


def _release(text: str) -> catalogue.Version | None:
    try:
        return catalogue.Version.parse(text)
    except ValueError:
        return None


def _gateway_ready(facts: Facts) -> Verdict | None:
    count = len(facts.served.stale)
    claim = "assumed by the spec" if facts.assumed else "claimed by the image"
    version = (
        f"Engines are vLLM {facts.running}." if facts.running else f"vLLM {facts.version} is {claim}, not confirmed."
    )
    told = f"{count} of {count} gateways serve the current revision. {version}"
    if facts.keys:
        return Verdict("True", "SomeClientKeysRefused", " ".join([told, *facts.keys]))
    return Verdict("True", "ServingCurrentRevision", told)


# ---------------------------------------------------------------------------------------------------------- Isolated


def _network_devices(facts: Facts) -> Verdict | None:
    if not facts.devices:
        return None
    told = f"Engines have {', '.join(facts.devices)}: what crosses such a network, no NetworkPolicy sees"
    return _no("NetworkDevices", f"{told}. The spec accepted that.")


def _not_measured(facts: Facts) -> Verdict | None:
    if facts.verification == "Disabled":
        told = "spec.security.verification.mode is Disabled: nothing is measured."
        return Verdict("Unknown", "VerificationDisabled", told)
    return None


def _gate_held(facts: Facts) -> Verdict | None:
    if not facts.held:
        return None
    more = f" and {len(facts.held) - 1} more" if len(facts.held) > 1 else ""
    return _no(
        "PolicyNotEnforced",
        f"The gate of {facts.held[0]}{more} has held its engine back for more than 30 s. Most likely NetworkPolicies"
        " are not enforced: install a network plugin that does, such as Cilium or Calico. What it waits for:"
        f" kubectl logs {facts.held[0]} -c gate",
    )


def _gate_disabled(facts: Facts) -> Verdict | None:
    if not facts.gate_disabled:
        return None
    told = "Engines start without having seen their isolation, by spec.security.gate.disabled"
    return _no("GateDisabled", f"{told}: {facts.gate_disabled}")


def _foreign(facts: Facts) -> Verdict | None:
    if not facts.foreign:
        return None
    told = "NetworkPolicies add up, and others open what this operator closes"
    return _no("ForeignPolicy", f"{told}: {facts.foreign}. Narrow them, or declare the flow in the spec.")


def _measured(facts: Facts) -> Verdict | None:
    proof = facts.proof
    if proof is None:
        told = "The policies are applied; the first measurement is under way or waits for a Ready engine."
        return Verdict("Unknown", "NotMeasured", told)
    return Verdict(cast("Truth", proof.status), proof.reason, proof.message)


_CHECKS: Mapping[str, tuple[Check, ...]] = {
    "Accepted": (
        _spec_problems,
        lambda _: Verdict("True", "SpecAccepted", "The spec is valid and is what is reconciled."),
    ),
    "EnginesReady": (
        _failures_of("isolation"),
        _failures_of("operator"),  # what was accepted could not be kept: no workload is brought
        _failures_of(*(role.value for role in (*VLLM, Role.ROUTER))),
        _failures_of("fetch"),
        _suspended,
        _engine_secrets,
        _fetching,
        _rollout(lambda facts: facts.engine, "engines"),
        _router,
        _engines_ready,
    ),
    "GatewayReady": (
        _failures_of("isolation"),
        _failures_of("operator"),
        _failures_of("gateway"),
        _suspended,
        _secrets_missing,
        _no_client_keys,
        _rollout(lambda facts: facts.gateway, "gateways"),
        _revision,
        _unconnected,
        _version,
        _gateway_ready,
    ),
    "Isolated": (
        _failures_of("isolation"),
        _gate_held,
        _foreign,
        _network_devices,
        _gate_disabled,
        _not_measured,
        _measured,
    ),
}


def _decide(checks: Iterable[Check], facts: Facts) -> Verdict:
    return next(verdict for check in checks if (verdict := check(facts)) is not None)


def verdicts(facts: Facts) -> dict[str, Verdict]:
    """All conditions, in the order in which the status shows them."""
    found = {name: _decide(checks, facts) for name, checks in _CHECKS.items()}
    needed = ("Isolated",) if facts.verification == "Enforce" else ()
    for name in ("Accepted", "EnginesReady", "GatewayReady", *needed):
        if found[name].status != "True":
            found["Ready"] = _no(found[name].reason, f"{name}: {found[name].message}")
            break
    else:
        found["Ready"] = Verdict("True", "Serving", f"Clients find it at {facts.url}.")
    refused = found["Accepted"]
    # kstatus: a controller that cannot go on without the user says Stalled.
    found["Stalled"] = (
        Verdict("True", refused.reason, refused.message)
        if refused.status == "False"
        else _no("SpecAccepted", "The operator can go on by itself.")
    )
    return found


def merge(facts: Facts, previous: Iterable[Mapping[str, Any]], now: str, docs: str = DOCS) -> list[dict[str, Any]]:
    """metav1.Conditions.

    Args:
        facts: what was seen.
        previous: conditions as they are; ``lastTransitionTime`` moves only when ``status`` flips.
        now: RFC 3339, seconds, UTC.
        docs: where people find the pages, without a slash at the end.
    """
    before = {condition["type"]: condition for condition in previous}
    merged = []
    for name, verdict in verdicts(facts).items():
        old = before.get(name)
        kept = old is not None and old["status"] == verdict.status
        merged.append(
            {
                "type": name,
                "status": verdict.status,
                "reason": verdict.reason,
                "message": _with_page(verdict, docs),
                "observedGeneration": facts.generation,
                "lastTransitionTime": old["lastTransitionTime"] if kept and old else now,
            }
        )
    return merged


def _with_page(verdict: Verdict, docs: str) -> str:
    """The message, and where the way out is told, of what does not go by itself."""
    stop = "" if verdict.message.endswith((".", "!", "?")) else "."
    page = f"{stop} See {docs}/status.md#{verdict.reason.lower()}."
    if verdict.status != "False" or verdict.reason in {*_CALM, "SpecAccepted", "ScaledToZero"}:
        page = ""
    # Every message comes through here, so pages that its author named are found here, too.
    told = _PAGE.sub(lambda _: f"{docs}/", verdict.message)
    return told[: _MESSAGE_LIMIT - len(page)] + page


@dataclass(frozen=True)
class Transition:
    """A condition that changed its status or its reason: worth an Event."""

    reason: str
    message: str
    warning: bool


# Isolated=Unknown at creation and Stalled repeat what others say.
_TOLD = ("Accepted", "EnginesReady", "GatewayReady", "Isolated", "Ready")
_CALM = frozenset(
    {
        "Progressing",
        "GroupRestarting",
        "NotCreated",
        "FetchingModel",
        "Suspended",
        "RevisionUnknown",
        "OldRevisionServed",
        "NoHealthyEngine",
    }
)


def transitions(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> list[Transition]:
    """What to tell: changes of status or reason, never a repetition."""
    old = {condition["type"]: (condition["status"], condition["reason"]) for condition in before}
    found = []
    for condition in after:
        name, status, reason = condition["type"], condition["status"], condition["reason"]
        if name not in _TOLD or old.get(name) == (status, reason) or status == "Unknown":
            continue
        if name == "Ready" and status == "False" and old.get(name, ("False", ""))[0] == "False":
            continue  # the condition that it repeats has told it
        told = f"{name}={status}: {condition['message']}"
        found.append(Transition(reason, told, warning=status == "False" and reason not in _CALM))
    return found
