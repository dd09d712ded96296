"""What a workload and a service need: identities, tasks, tokens, and the verification of tokens.

Depends on cryptography, pyjwt, grpcio and protobuf alone; ``task.http()`` needs the extra ``http``.
"""

from broker.sdk.task import Task
from broker.sdk.workload import Identity, Workload

__all__ = ["Identity", "Task", "Workload"]
