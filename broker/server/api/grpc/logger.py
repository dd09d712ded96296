"""``spire.api.server.logger.v1.Logger``: how much is logged, changed while the server runs."""

from typing import Final

from broker._proto.service import ServiceBinding
from broker._proto.spire.api.server.logger.v1 import logger_pb2
from broker.server.api.access import Caller, name_of
from broker.telemetry.log import LogLevels
from broker.transport.logger import LoggerService

BINDING: Final = ServiceBinding.of(logger_pb2.DESCRIPTOR, "Logger")


class Logger(LoggerService[Caller]):
    """The service, over the process's one threshold."""

    def __init__(self, levels: LogLevels) -> None:
        super().__init__(levels, name_of)
