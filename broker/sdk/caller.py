"""Who calls a service, for whom and within what; and what the service asks of it before it acts."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from broker.errors import Refused, Unavailable
from broker.sdk.action import ActionBlock, ActionCalls
from broker.spiffe import SpiffeId
from broker.tasks import Authority, AuthorizationDetail, BindingMatch, VerifiedToken
from broker.tasks.action import is_single_use


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, for whom, within what: the answer of :meth:`broker.sdk.verify.TokenVerifier.verify`."""

    user: str
    agent: SpiffeId
    task: str
    token: VerifiedToken
    binding: BindingMatch
    authority: Authority
    _calls: ActionCalls | None = field(default=None, repr=False, compare=False)
    _shown: str = field(default="", repr=False, compare=False)
    """The token as it was shown: whoever is asked about it judges it anew."""

    async def check(
        self, action: str, *, resource: str | None = None, enforced: Iterable[str] = ()
    ) -> AuthorizationDetail:
        """Require that the task's authority reaches this action, on the thing named ``resource``; give what allows it.

        ``enforced`` names the constraints that the service judges itself: a detail with others allows nothing.

        Raises:
            PolicyDenied: it does not reach that far (``insufficient_authorization``).
            Refused: the token serves one action and no other (``single_use``).
        """
        if is_single_use(self.token.claims):
            # NOTE(security): nothing here could know that it was used already.
            raise Refused(
                "this token serves one action only", code="single_use", hint="use caller.action, which uses it up"
            )
        return self.authority.require(action, self.token.claims.aud, resource, enforced=enforced)

    def action(
        self,
        action: str,
        *,
        resource: str | None = None,
        step: str,
        parameters: object = None,
        enforced: Iterable[str] = (),
    ) -> ActionBlock:
        """Do something once: ``async with caller.action(…) as doing``. Checks what :meth:`check` does, at the broker.

        ``step`` is the agent's own name for this piece of work, the same when it tries again; ``parameters`` is a JSON value of all that
        shapes what is done. When the block is left, it counts as done; when an error leaves it, nobody knows.

        Entering raises:
            Refused: the token, its task or the policy does not let it happen (any more); or nobody knows whether it was done before
                (``action_indeterminate``): settle that by :meth:`broker.sdk.verify.TokenVerifier.settle_action`.
            Conflict: it is done at this moment (``action_in_progress``), or the step stands for something else.
            Unavailable: nobody can tell now. It is not to be done.
        """
        if self._calls is None:
            raise Unavailable("this caller was not made by a verifier", code="actions_unknown")
        return ActionBlock(
            self._calls,
            token=self._shown,
            action=action,
            resource=resource,
            step=step,
            parameters=parameters,
            enforced=enforced,
        )
