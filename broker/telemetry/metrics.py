"""Metrics, all of them, in one registry that the program's ``app`` makes. Labels come from closed sets, never from callers."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from broker.version import __version__

DELAY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Seconds. The budgets of this product lie between 5 ms and 100 ms, so the buckets are dense there."""


class Metrics:
    """One program's metrics."""

    def __init__(self, component: str) -> None:
        """Make a registry of its own: nothing global, so that tests and programs do not meet."""
        self.registry = registry = CollectorRegistry()
        Gauge("broker_build_info", "Version and component", ["version", "component"], registry=registry).labels(
            __version__, component
        ).set(1)
        self.rpcs = Counter("broker_rpc_server_calls", "Calls", ["service", "method", "code"], registry=registry)
        self.attestations = Counter(
            "broker_workload_attestations", "Attestations of processes", ["outcome"], registry=registry
        )
        self.svids = Counter("broker_svids_issued", "SVIDs signed", ["kind"], registry=registry)
        self.exchanges = Counter("broker_token_exchanges", "Token exchanges", ["outcome", "reason"], registry=registry)
        self.claims = Counter(
            "broker_action_claims", "Claims of actions that are done once", ["result"], registry=registry
        )
        self.ends = Counter("broker_tasks_ended", "Ends of tasks", ["cause"], registry=registry)
        self.decisions = Counter(
            "broker_policy_evaluations", "Evaluations of the policy; an error denies", ["action", "effect"], registry=registry,
        )  # fmt: skip
        self.revocation_delay = Histogram(
            "broker_revocation_delay_seconds", "From the commit of an end to a verifier's acknowledgement",
            buckets=DELAY_BUCKETS, registry=registry,
        )  # fmt: skip

    def exposition(self) -> bytes:
        """Give the text format that Prometheus reads."""
        return generate_latest(self.registry)
