"""Workload attestors: each describes one process by selectors."""
