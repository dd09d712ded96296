"""What the product does in a second on this machine, beside what the machine can do at all (DESIGN §11)."""
