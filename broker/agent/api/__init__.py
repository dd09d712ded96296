"""What the agent's public socket offers, one module per service."""
