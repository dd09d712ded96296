"""Who may be who, with the reasons: entries, how selectors match them, and which agent may serve them. Pure rules."""

from broker.registry.authorized import AgentScope, Effect, EntryTree, authorized_ids
from broker.registry.entry import Entry
from broker.registry.matching import Considered, Decision, EntryIndex, Vouched, match, oldest_of_each_hint

__all__ = [
    "AgentScope",
    "Considered",
    "Decision",
    "Effect",
    "Entry",
    "EntryIndex",
    "EntryTree",
    "Vouched",
    "authorized_ids",
    "match",
    "oldest_of_each_hint",
]
