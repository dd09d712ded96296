"""What the programs say about themselves: logs, metrics, health. Never what they hold."""
