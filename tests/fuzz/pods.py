"""A kubelet's list of pods: any bytes are a list or a fault, and what is found in a list is what was looked for."""

import json

from tests.fuzz import engine

with engine.instrumented(__name__):
    from pydantic import ValidationError

    from broker.attestation.containers import Container
    from broker.attestation.contract import AttestorFailed
    from broker.attestation.kubernetes import MAX_DEPTH, Fault
    from broker.attestation.pods import PodList, found, indexed
    from broker.errors import Invalid
    from broker.spiffe.strictjson import loads

from tests.fakes.kubelet import pod, status

ID, UID = "0123456789abcdef" * 4, "11111111-2222-3333-4444-555555555555"
SOUGHT = Container(ID, None, UID, None, ())
SEEDS = tuple(
    json.dumps({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}).encode()
    for items in (
        None,
        [pod(UID, ID)],
        [pod(UID, ""), pod("other", ID)],
        [pod(UID, "x", initContainerStatuses=[status(ID, "init", "terminated")], ephemeralContainerStatuses=[])],
        [pod(UID, "", containerStatuses=None)],
    )
)


def target(data: bytes) -> None:
    """Read a list and look for a container in it."""
    try:
        pods = indexed(PodList.model_validate(loads(data, max_depth=MAX_DEPTH)))
    except (Invalid, ValidationError, Fault):
        return
    for is_pod_enough in (False, True):
        try:
            there, one = found(pods, SOUGHT, is_pod_enough=is_pod_enough)
        except AttestorFailed:
            continue
        assert there.metadata.uid == UID
        assert (one is None and is_pod_enough) or (one is not None and one.container_id.endswith(f"://{ID}"))


if __name__ == "__main__":
    engine.run("pods", target, list(SEEDS))
