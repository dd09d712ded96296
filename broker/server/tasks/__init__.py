"""The task half: delegations, tasks, tokens and the feed of their ends."""
