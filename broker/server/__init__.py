"""The server: the identity half, the task half, and the store they share."""
