"""The HTTP door: OAuth's endpoints and a task's own, one module per resource."""
