"""Why a task or a workload session ended: closed sets, for records, frames and answers. What follows is not known here."""

from enum import StrEnum


class Cause(StrEnum):
    """What ended or stopped a task. The value is stable: it stands in the audit log and on the feed."""

    COMPLETED = "completed"
    """The agent said that the work is done."""
    CANCELLED = "cancelled"
    """The agent gave up."""
    PAUSED = "paused"
    """The agent itself, or one above it in the chain, stopped it for a while."""
    RESUME_LIMIT = "resume_limit"
    """It was taken up again too often: an operator has to look."""
    EXPIRED = "expired"
    """The task's time was over."""
    PROCESS_EXITED = "process_exited"
    """The process that an attached task was started by is gone."""
    LEASE_LAPSED = "lease_lapsed"
    """The heartbeat stopped: the supervisor's, the attached process's, or that of the node agent that watches over it."""
    SESSION_ENDED = "session_ended"
    """The workload session is over for another reason: its selectors changed, or its node is gone."""
    USER_LOGOUT = "user_logout"
    """The user's own session ended."""
    USER_DISABLED = "user_disabled"
    USER_CHANGED = "user_changed"
    """The user's credentials or claims are others now: the word given before does not count."""
    USER_UNCONFIRMED = "user_unconfirmed"
    """Nothing was heard of the user's session for too long."""
    DELEGATION_WITHDRAWN = "delegation_withdrawn"
    DELEGATION_EXPIRED = "delegation_expired"
    APPROVAL_WITHDRAWN = "approval_withdrawn"
    ENTRY_DELETED = "entry_deleted"
    """The registration entry of the agent is gone, or no longer lets it start tasks."""
    AGENT_BANNED = "agent_banned"
    """The node agent that vouched for the workload was banned, or evicted."""
    SVID_REVOKED = "svid_revoked"
    """The X.509-SVID of the agent was revoked."""
    AUTHORITY_TAINTED = "authority_tainted"
    """The authority that signed the agent's SVID or the token is no longer trusted."""
    POLICY_DENIED = "policy_denied"
    BUDGET_EXHAUSTED = "budget_exhausted"
    PARENT_ENDED = "parent_ended"
    HANDED_OFF = "handed_off"
    """Another task took over the work."""
    OPERATOR = "operator"
    """A person of the platform team ended it."""


class SessionEnd(StrEnum):
    """What ended a workload session. The value is stable: it stands in the audit log, and in the node agent's."""

    PROCESS_EXITED = "process_exited"
    PROCESS_CHANGED = "process_changed"
    """It is another program, user, control group or namespace than the one that was attested."""
    SELECTORS_CHANGED = "selectors_changed"
    """It is described otherwise now, and no longer has all that the entry asks for."""
    ENTRY_GONE = "entry_gone"
    """The entry was deleted, has expired, or is another SPIFFE ID's."""
    ATTESTATION_REFUSED = "attestation_refused"
    """An attestor was asked again and said that what it had said does not hold."""
    ATTESTATION_LAPSED = "attestation_lapsed"
    """An attestor gave no answer for too long."""
    AGENT_STOPPED = "agent_stopped"
    """The node agent stopped, or is another run of it: what it had attested before is known to nobody."""
    AGENT_LOST = "agent_lost"
    """The node agent was silent for too long."""
    AGENT_BANNED = "agent_banned"
    """The node agent was banned, evicted or forgotten."""
    AUTHORITY_TAINTED = "authority_tainted"
    """The authority that signed its X.509-SVID is no longer trusted."""
    SVID_REVOKED = "svid_revoked"
    """Its X.509-SVID was revoked; a process that is still entitled goes on as another session."""
    OTHER = "other"
    """The node agent is newer, and gave a cause that is not known here."""

    @property
    def of_tasks(self) -> Cause:
        """Give the cause of the tasks that end with the session."""
        match self:
            case SessionEnd.PROCESS_EXITED:
                return Cause.PROCESS_EXITED
            case SessionEnd.ENTRY_GONE:
                return Cause.ENTRY_DELETED
            case SessionEnd.SVID_REVOKED:
                return Cause.SVID_REVOKED
            case SessionEnd.AGENT_LOST:
                return Cause.LEASE_LAPSED
            case SessionEnd.AGENT_BANNED:
                return Cause.AGENT_BANNED
            case SessionEnd.AUTHORITY_TAINTED:
                return Cause.AUTHORITY_TAINTED
            case _:
                return Cause.SESSION_ENDED
