"""The product's own descriptor pool, and the making of message classes in it.

The SPIFFE standard gives its file no package, so its messages are global names: two libraries that bring them into
protobuf's default pool cannot live in one process. Ours live here instead, with our own copies of the well-known
types they refer to. This module knows nothing of any particular message.

A message of another pool (``google.protobuf.struct_pb2.Struct``) cannot be put into a field of ours: use the classes
of ``broker._proto.google.protobuf``, which have the same methods.
"""

from typing import Any, cast

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message
from google.protobuf.reflection import GeneratedProtocolMessageType

POOL = DescriptorPool()


def load(serialized: bytes, namespace: dict[str, Any]) -> FileDescriptor:
    """Add one file to the pool and put its classes and enums into a module's namespace; only generated code calls it.

    The descriptor alone is the generated part: no code of protoc's is, so no protobuf version is demanded by it.
    """
    file = POOL.AddSerializedFile(serialized)
    module: str = namespace["__name__"]
    for enum in file.enum_types_by_name.values():
        _publish(enum, namespace)
    for message in file.message_types_by_name.values():
        namespace[message.name] = _message_class(message, module, "")
    return file


def _publish(enum: EnumDescriptor, namespace: dict[str, Any]) -> None:
    namespace[enum.name] = EnumTypeWrapper(enum)
    for value in enum.values:
        namespace[value.name] = value.number


def _message_class(message: Descriptor, module: str, outer: str) -> type[Message]:
    # Inner classes first: the runtime links a class to its descriptor once, when it is made. The metaclass itself adds
    # fields and nested enums, and the helper methods of well-known types, which it knows by their full names.
    name = outer + message.name
    members: dict[str, Any] = {
        inner.name: _message_class(inner, module, f"{name}.") for inner in message.nested_types_by_name.values()
    }
    members |= {"DESCRIPTOR": message, "__module__": module, "__qualname__": name}
    return cast("type[Message]", GeneratedProtocolMessageType(message.name, (Message,), members))
