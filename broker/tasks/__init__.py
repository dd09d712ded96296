"""The task rules: a task's states, what it may do, and the one short-lived token for it. Pure rules over values."""

from broker.tasks.authority import Authority, AuthorizationDetail
from broker.tasks.binding import Accepted, BindingMatch, Confirmation, PeerEvidence, check_binding
from broker.tasks.causes import Cause
from broker.tasks.claims import TaskClaims, issue_claims
from broker.tasks.delegation import Delegation
from broker.tasks.dpop import Expected, NonceWanted, ShownProof, verify_proof
from broker.tasks.lineage import (
    act_chain,
    lineage_epoch,
    lineage_state,
    require_lineage_active,
    start_child,
    start_successor,
    start_task,
)
from broker.tasks.reference import TaskReference
from broker.tasks.resource import Resource
from broker.tasks.task import (
    MAX_ACT_DEPTH,
    State,
    Supervision,
    Task,
    activate,
    effective_state,
    end,
    require_active,
    suspend,
)
from broker.tasks.verify import LEEWAY, VerifiedToken, verify_task_token

__all__ = [
    "LEEWAY",
    "MAX_ACT_DEPTH",
    "Accepted",
    "Authority",
    "AuthorizationDetail",
    "BindingMatch",
    "Cause",
    "Confirmation",
    "Delegation",
    "Expected",
    "NonceWanted",
    "PeerEvidence",
    "Resource",
    "ShownProof",
    "State",
    "Supervision",
    "Task",
    "TaskClaims",
    "TaskReference",
    "VerifiedToken",
    "act_chain",
    "activate",
    "check_binding",
    "effective_state",
    "end",
    "issue_claims",
    "lineage_epoch",
    "lineage_state",
    "require_active",
    "require_lineage_active",
    "start_child",
    "start_successor",
    "start_task",
    "suspend",
    "verify_proof",
    "verify_task_token",
]
