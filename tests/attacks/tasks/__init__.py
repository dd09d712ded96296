"""Attacks on the task half, through its real doors."""
