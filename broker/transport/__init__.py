"""Who is calling: accept, identify by kernel or TLS, hand the bytes on with that caller attached.

Knows sockets, TLS and gRPC plumbing. Refuses to know what a caller may do: that is the access table of whoever builds
a server.
"""
