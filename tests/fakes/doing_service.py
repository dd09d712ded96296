"""A service that begins what is to be done once, says so, and never comes back: for a test that kills it.

It hears in one line of JSON where the agent's socket is, who it goes by, what was shown to it by whom, and which step it is.
"""

import asyncio
import base64
import json
import sys

from broker.sdk import Workload
from broker.sdk.verify import TokenVerifier


async def main() -> None:
    told = json.loads(sys.stdin.readline())
    async with Workload.connect(told["socket"], spiffe_id=told["spiffe_id"]) as me:
        verifier = await TokenVerifier.discover(told["issuer"], audience=told["audience"], workload=me, timeout=30)
        caller = await verifier.verify(told["token"], [base64.b64decode(one) for one in told["chain"]])
        async with caller.action(told["action"], step=told["step"]) as doing:
            print(json.dumps({"id": doing.id, "is_duplicate": doing.is_duplicate}), flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
