"""How an explanation of the node agent looks: lines for people, the same facts as a row for programs.

Knows the message, and the wording of entries in ``broker.registry.explain``; asks nobody.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from broker.cli.output import Column, Shape, moment, timestamp

EXPLANATION: Final = Shape(
    "identity_explanation",
    "identity_explanations",
    (Column("result", "message"), Column("code", "code"), Column("most likely", "most_likely")),
    name="code",
)
DENIAL: Final = Shape("denial", "denials", EXPLANATION.columns)


def explanation_row(told: Any) -> dict[str, object]:
    """Give an explanation as JSON values."""
    return {
        "process": process_row(told.process) if told.HasField("process") else None,
        "attestors": [
            {
                "name": one.name,
                "state": one.state,
                "code": one.code,
                "selectors": strong(one.selectors, told.strengths),
                "reason": one.reason or None,
                "hint": one.hint or None,
            }
            for one in told.attestors
        ],
        "selectors": strong(told.selectors, told.strengths),
        "considered": told.considered if told.is_matched else None,
        "entries": [
            {
                "id": one.id,
                "spiffe_id": one.spiffe_id,
                "issued": one.code == "issued",
                "code": one.code,
                "lacks": strong(one.lacks, told.strengths),
                "note": one.note or None,
            }
            for one in told.entries
        ],
        "code": told.code,
        "message": told.message,
        "status": told.status,
        "most_likely": told.most_likely or None,
    }


def explanation_lines(told: Any) -> Iterator[str]:
    """Say it to a person."""
    from broker.registry.explain import Finding, finding_lines  # noqa: PLC0415 - imports cryptography by way of the package

    if told.HasField("process"):
        yield _process_line(told.process)
    if told.attestors:
        yield "attestors"
        width = max(len(one.name) for one in told.attestors)
        for one in told.attestors:
            yield f"  {one.state:<8}  {one.name:<{width}}  {_answer(one, told.strengths)}".rstrip()
    elif told.selectors:
        yield "selectors"
        yield from (f"  {one}  ({told.strengths.get(one, '')})" for one in told.selectors)
    if told.is_matched:
        yield f"entries of this agent: {len(told.entries)} of {told.considered} shown"
        found = [Finding(one.id, one.spiffe_id, one.code, tuple(one.lacks), one.note) for one in told.entries]
        yield from (f"  {line}" for line in finding_lines(found, lambda text: _labelled(text, told.strengths)))
    yield f"result: {told.message} ({_camel(told.status)})"
    if told.most_likely:
        yield f"most likely: {told.most_likely}"


def process_row(process: Any) -> dict[str, object]:
    """Give a process as JSON values."""
    return {
        "pid": process.pid,
        "uid": process.uid,
        "gid": process.gid,
        "executable": process.executable or None,
        "started_at": moment(process.started_at),
        "pidfd_held": process.is_held,
    }


def strong(selectors: Iterable[str], strengths: Mapping[str, str]) -> list[dict[str, str]]:
    """Give selectors with who vouches for each."""
    return [{"selector": one, "strength": strengths.get(one, "unknown")} for one in selectors]


def _process_line(process: Any) -> str:
    parts = [f"process {process.pid}", process.executable, f"uid {process.uid}"]
    if at := moment(process.started_at):
        parts.append(f"started {timestamp(at)}")
    parts.append(f"(pidfd held: {'yes' if process.is_held else 'no'})")
    return "  ".join(filter(None, parts))


def _answer(attestor: Any, strengths: Mapping[str, str]) -> str:
    if attestor.state == "fail":
        hint = f"  hint: {attestor.hint}" if attestor.hint else ""
        return f"{attestor.reason} ({attestor.code}){hint}"
    kinds: dict[str, list[str]] = {}
    for one in attestor.selectors:
        kinds.setdefault(strengths.get(one, "unknown"), []).append(one.removeprefix(f"{attestor.name}:"))
    groups = [f"{' '.join(texts)} ({kind})" for kind, texts in kinds.items()]
    return "; ".join(filter(None, (*groups, attestor.reason)))


def _labelled(text: str, strengths: Mapping[str, str]) -> str:
    return f"{text} ({strengths.get(text, 'unknown')})"


def _camel(status: str) -> str:
    return "".join(word.capitalize() for word in status.split("_")) if status != "OK" else status
