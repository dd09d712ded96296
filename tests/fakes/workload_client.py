"""A real client of the Workload API, for a test to put where it wants: into a container, a control group, under another user.

workload_client.py fetch SOCKET              one line: {"ids": […]} of verified X.509-SVIDs, or {"error": STATUS}
workload_client.py fetch-each SOCKET         the same for each line of standard input, on a new connection each time
workload_client.py hand-over SOCKET RELAY    connect, give that very connection to who listens at RELAY, and wait
"""

import asyncio
import socket
import sys
import time

import grpc
import grpc.aio

from broker._proto.spiffe import workload_pb2
from broker.clock import SystemClock
from broker.dev.lines import heard, say
from broker.sdk.endpoint import SECURITY_HEADER
from broker.spiffe import Bundle, BundleSet, SpiffeId
from broker.spiffe.x509svid import split_der, verify_x509_svid

PATH = "/SpiffeWorkloadAPI/FetchX509SVID"


async def fetch(path: str) -> dict[str, object]:
    """Take the first message on a new connection, and believe only what verifies."""
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
        call = channel.unary_stream(PATH, response_deserializer=workload_pb2.X509SVIDResponse.FromString)
        began = time.monotonic()
        try:
            message = await call(b"", metadata=SECURITY_HEADER, timeout=30).read()
        except grpc.aio.AioRpcError as error:
            return {"error": error.code().name, "said": error.details(), "seconds": time.monotonic() - began}
    return {"ids": sorted(_verified(svid) for svid in message.svids), "seconds": time.monotonic() - began}


def _verified(svid: workload_pb2.X509SVID) -> str:
    trust_domain = SpiffeId(svid.spiffe_id).trust_domain
    bundle = Bundle.from_workload_api(trust_domain, x509_der=svid.bundle)
    verified = verify_x509_svid(split_der(svid.x509_svid), BundleSet.of(bundle), now=SystemClock().now())
    assert str(verified.id) == svid.spiffe_id
    return svid.spiffe_id


def hand_over(path: str, relay: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection, socket.socket(socket.AF_UNIX) as receiver:
        connection.connect(path)
        receiver.connect(relay)
        socket.send_fds(receiver, [b"."], [connection.fileno()])
    time.sleep(3600)


async def main() -> None:
    act, path, *more = sys.argv[1:]
    if act == "fetch":
        say(await fetch(path))
    elif act == "fetch-each":
        async for _ in heard():
            say(await fetch(path))
    else:
        hand_over(path, *more)


if __name__ == "__main__":
    asyncio.run(main())
