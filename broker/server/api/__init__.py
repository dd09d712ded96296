"""The faces of the server: who may call what, and the translation between wire and use cases. No decision is made here."""
