"""Node attestors: each file holds both halves, the node's evidence and the server's judgement."""
