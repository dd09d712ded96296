"""Run by another program of the same user: asks the Workload API for everything, and prints what it was told, as JSON."""

import json
import sys
from typing import Any

import grpc

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD


def main(socket: str) -> None:
    requests: dict[str, Any] = {
        "FetchX509SVID": workload_pb2.X509SVIDRequest(),
        "FetchX509Bundles": workload_pb2.X509BundlesRequest(),
        "FetchJWTSVID": workload_pb2.JWTSVIDRequest(audience=["tests"]),
        "FetchJWTBundles": workload_pb2.JWTBundlesRequest(),
    }
    told = {}
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        stub = Stub(channel, WORKLOAD)
        for name, request in requests.items():
            try:
                call = getattr(stub, name)(request, metadata=(("workload.spiffe.io", "true"),), timeout=30)
                for _ in [call] if WORKLOAD.methods[name].streams_out is False else call:
                    break
                told[name] = ["OK", ""]
            except grpc.RpcError as error:
                told[name] = [error.code().name, error.details()]
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
