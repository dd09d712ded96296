"""Which services a socket serves, and their descriptors: ``grpc.reflection``, v1 and v1alpha, for tools.

Answers from the files of the services that it was given and what those import, and from nothing else: the private pool
also holds what other sockets serve.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final

import grpc
from google.protobuf.descriptor import Descriptor, FileDescriptor

from broker._proto.grpc.reflection.v1 import reflection_pb2
from broker._proto.grpc.reflection.v1alpha import reflection_pb2 as alpha_pb2
from broker._proto.service import Context, ServiceBinding

V1: Final = ServiceBinding.of(reflection_pb2.DESCRIPTOR, "ServerReflection")
V1ALPHA: Final = ServiceBinding.of(alpha_pb2.DESCRIPTOR, "ServerReflection")
_NOT_FOUND: Final = grpc.StatusCode.NOT_FOUND.value[0]


class Catalogue:
    """The files of some services, by file name and by the full names in them; immutable."""

    def __init__(self, services: Iterable[str], files: Iterable[FileDescriptor]) -> None:
        """``services``: full names; ``files``: where they are declared."""
        self.services = tuple(sorted(services))
        self._files = {file.name: file for root in files for file in _with_imports(root)}
        self._symbols = {symbol: file for file in self._files.values() for symbol in _symbols(file, self.services)}

    def of_file(self, name: str) -> list[bytes] | None:
        """Give a file with everything that it imports, serialized, itself first; None where it is not public."""
        file = self._files.get(name)
        return None if file is None else [one.serialized_pb for one in _with_imports(file)]

    def of_symbol(self, name: str) -> list[bytes] | None:
        """Give the same for the file that declares a service, method, message or enum."""
        file = self._symbols.get(name)
        return None if file is None else self.of_file(file.name)


class ReflectionApi:
    """The one method of ``ServerReflection``; extensions do not exist here."""

    def __init__(self, catalogue: Catalogue, binding: ServiceBinding) -> None:
        """``binding``: V1 or V1ALPHA, whose messages are the same but in name."""
        self._catalogue = catalogue
        self._response: Any = binding.methods["ServerReflectionInfo"].response

    async def ServerReflectionInfo(  # noqa: N802 - the RPC's name
        self, requests: AsyncIterator[Any], context: Context, caller: object
    ) -> AsyncIterator[Any]:
        """Answer each question of a stream."""
        async for request in requests:
            yield self._answer(request)

    def _answer(self, request: Any) -> Any:
        response = self._response(valid_host=request.host, original_request=request)
        kind = request.WhichOneof("message_request")
        files: list[bytes] | None = None
        if kind == "list_services":
            for name in self._catalogue.services:
                response.list_services_response.service.add(name=name)
            return response
        if kind == "file_by_filename":
            files = self._catalogue.of_file(request.file_by_filename)
        elif kind == "file_containing_symbol":
            files = self._catalogue.of_symbol(request.file_containing_symbol)
        if files is None:
            response.error_response.error_code = _NOT_FOUND
            response.error_response.error_message = "no such thing is served here"
        else:
            response.file_descriptor_response.file_descriptor_proto.extend(files)
        return response


def _with_imports(file: FileDescriptor) -> Iterator[FileDescriptor]:
    """Give a file and all that it imports, each behind everything that imports it."""
    found: dict[str, FileDescriptor] = {}

    def visit(one: FileDescriptor) -> None:
        if one.name not in found:
            for imported in one.dependencies:
                visit(imported)
            found[one.name] = one

    visit(file)
    yield from reversed(found.values())


def _symbols(file: FileDescriptor, services: tuple[str, ...]) -> Iterator[str]:
    for service in file.services_by_name.values():
        if service.full_name in services:
            yield service.full_name
            yield from (method.full_name for method in service.methods)
    yield from (enum.full_name for enum in file.enum_types_by_name.values())
    for message in file.message_types_by_name.values():
        yield from _within(message)


def _within(message: Descriptor) -> Iterator[str]:
    yield message.full_name
    yield from (enum.full_name for enum in message.enum_types)
    for inner in message.nested_types:
        yield from _within(inner)
