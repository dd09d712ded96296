"""SPIRE's ``Logger``, of server and of agent: how much is logged, changed while the program runs.

Both services have the same methods over the same messages but for their packages.
"""

from collections.abc import Callable, Mapping
from typing import Final, Generic, TypeVar

from broker._proto.service import Context
from broker._proto.spire.api.agent.logger.v1 import logger_pb2 as agent_pb2
from broker._proto.spire.api.server.logger.v1 import logger_pb2 as server_pb2
from broker._proto.spire.api.types import logger_pb2 as types_pb2
from broker.errors import Invalid
from broker.telemetry.log import LogLevels, get_logger

SEVERITIES: Final[Mapping[types_pb2.LogLevel, int]] = {
    types_pb2.PANIC: 60,
    types_pb2.FATAL: 50,
    types_pb2.ERROR: 40,
    types_pb2.WARN: 30,
    types_pb2.INFO: 20,
    types_pb2.DEBUG: 10,
    types_pb2.TRACE: 5,
}
"""SPIRE's levels in the numbers of Python's ``logging``: less than these is not written."""
_LEVELS: Final = {severity: level for level, severity in SEVERITIES.items()}

C = TypeVar("C")
log = get_logger("logger")


class LoggerService(Generic[C]):
    """The service, over the process's one threshold."""

    def __init__(self, levels: LogLevels, name_of: Callable[[C], str]) -> None:
        """``name_of`` names a caller for the log."""
        self._levels = levels
        self._name_of = name_of

    async def GetLogger(  # noqa: N802  # the name on the wire
        self, request: server_pb2.GetLoggerRequest | agent_pb2.GetLoggerRequest, context: Context, caller: C
    ) -> types_pb2.Logger:
        """Tell the level of now, and the one at start."""
        return self._now()

    async def SetLogLevel(  # noqa: N802
        self, request: server_pb2.SetLogLevelRequest | agent_pb2.SetLogLevelRequest, context: Context, caller: C
    ) -> types_pb2.Logger:
        """Change the level; raises Invalid."""
        if request.new_level == types_pb2.UNSPECIFIED:
            raise Invalid("newLevel value cannot be LogLevel_UNSPECIFIED", code="invalid_log_level")
        severity = SEVERITIES.get(request.new_level)
        if severity is None:
            raise Invalid("unsupported log level", code="invalid_log_level")
        self._change(severity, caller)
        return self._now()

    async def ResetLogLevel(  # noqa: N802
        self, request: server_pb2.ResetLogLevelRequest | agent_pb2.ResetLogLevelRequest, context: Context, caller: C
    ) -> types_pb2.Logger:
        """Go back to the level at start."""
        self._change(self._levels.at_start, caller)
        return self._now()

    def _change(self, severity: int, caller: C) -> None:
        # Told at the level that shows more of the two, so that turning the log off is in the log.
        log.warning("log_level_changing", state=types_pb2.LogLevel.Name(_LEVELS[severity]), peer=self._name_of(caller))
        self._levels.current = severity

    def _now(self) -> types_pb2.Logger:
        return types_pb2.Logger(
            current_level=_LEVELS[self._levels.current], launch_level=_LEVELS[self._levels.at_start]
        )
