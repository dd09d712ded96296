"""Attestors, one file each: what the kernel, the runtime or the platform says of a process or a node."""
