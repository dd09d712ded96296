"""One module per gRPC service. Each translates and calls a use case; access was decided before."""
