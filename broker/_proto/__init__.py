"""The wire: message classes generated from ``proto/``, and the binding of gRPC services to plain objects.

``broker._proto.<path below proto/>.<file>_pb2`` has the classes of one .proto file. All of it is private to this
product: nothing here enters protobuf's default pool.
"""
