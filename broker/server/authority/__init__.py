"""The key room: who signs, what a signature may say, and when one authority follows another. Knows no HTTP and no gRPC."""
