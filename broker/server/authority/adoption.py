"""Authorities in our bundle that are not ours: what comes in, what goes, and what stays tainted or revoked whatever is told."""

from collections.abc import Iterable
from dataclasses import replace

from broker.server.store.ports import Writer
from broker.server.store.rows import AdoptedAuthority, AuthorityKind, Source

Wanted = dict[tuple[AuthorityKind, str], AdoptedAuthority]


def differs(there: Iterable[AdoptedAuthority], wanted: Wanted, *, all_from_above: bool) -> bool:
    """Say whether :func:`adopt` would change anything of what is there."""
    known = {(row.kind, row.id): row for row in there}
    return any(_merged(known.get(key), row) != known.get(key) for key, row in wanted.items()) or (
        all_from_above and any(_is_from_above(row) and key not in wanted for key, row in known.items())
    )


def adopt(writer: Writer, wanted: Wanted, *, all_from_above: bool) -> bool:
    """Write what is wanted into the bundle, in the caller's transaction; say whether anything changed."""
    known = {(row.kind, row.id): row for row in writer.published().adopted}
    changed = False
    for key, row in wanted.items():
        merged = _merged(known.get(key), row)
        if merged != known.get(key):
            writer.put_adopted(merged)
            changed = True
    if all_from_above:
        for kind, name in [key for key, row in known.items() if _is_from_above(row) and key not in wanted]:
            writer.remove_adopted(kind, name)
            changed = True
    return changed


def _merged(known: AdoptedAuthority | None, told: AdoptedAuthority) -> AdoptedAuthority:
    # Taint does not go away, and what was revoked here does not come back with the next look above.
    if known is None:
        return told
    source = Source.REVOKED if known.source is Source.REVOKED else told.source
    return replace(told, tainted=known.tainted or told.tainted, source=source)


def _is_from_above(row: AdoptedAuthority) -> bool:
    return row.source in (Source.UPSTREAM, Source.REVOKED)
