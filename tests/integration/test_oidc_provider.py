"""A certified OpenID Provider that nobody here wrote: sign in, exchange, work at a real service; sign out there, and it is over here.

Set ``BROKER_TEST_OIDC=1`` to run it: it needs Node.js 20 and fetches ``oidc-provider`` from npm, by the lock file beside it.
"""

import asyncio
import json
import os
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from broker.client import Tasks, dial_socket
from broker.dev import demo_identity, estate
from broker.dev.certificates import Files, prepare
from broker.dev.configuration import Plan, Ports
from broker.dev.layout import Layout
from broker.dev.stage import Stage, _free_port
from broker.spiffe.jose import parse_compact

pytestmark = [
    pytest.mark.skipif(os.environ.get("BROKER_TEST_OIDC") != "1", reason="BROKER_TEST_OIDC is not 1: needs npm"),
    pytest.mark.timeout(240),
]

HERE = Path(__file__).parent / "oidc_provider"
SECRET = "of the test's own client, on loopback"
REDIRECT = "https://localhost/signed-in"
BOUND = 5.0
"""Seconds from the sign-out to the first refusal: a hundred times what it takes, for a machine that is busy."""


@dataclass
class IdentityProvider:
    """The provider's process, and a browser with its cookies."""

    process: asyncio.subprocess.Process
    issuer: str
    browser: httpx2.AsyncClient

    async def sign_in(self, user: str) -> str:
        """Go through the pages as a person would, and redeem the code as the application would; give the ID token."""
        wanted = {"client_id": "broker", "response_type": "code", "scope": "openid", "redirect_uri": REDIRECT}
        answer = await self.browser.get(f"{self.issuer}/auth", params=wanted)
        for form in ({"prompt": "login", "login": user, "password": "anything"}, {"prompt": "consent"}):
            answer = await self.browser.post(await self._page(answer), data=form)
        while not (place := str(answer.headers.get("location", ""))).startswith(REDIRECT):
            answer = await self.browser.get(self._absolute(place))
        redeemed = await self.browser.post(
            f"{self.issuer}/token",
            data={
                "grant_type": "authorization_code",
                "code": parse_qs(urlsplit(place).query)["code"][0],
                "redirect_uri": REDIRECT,
            },
            auth=httpx2.BasicAuth("broker", SECRET.replace(" ", "+").replace(",", "%2C").replace("'", "%27")),
        )
        assert redeemed.status_code == 200, redeemed.text
        token: str = redeemed.json()["id_token"]
        return token

    async def sign_out(self) -> None:
        """Say so at the provider, which asks once more; its answer comes once the broker was told."""
        page = await self.browser.get(f"{self.issuer}/session/end")
        xsrf = re.search(r'name="xsrf" value="([^"]+)"', page.text)
        assert xsrf is not None, page.text
        confirmed = {"xsrf": xsrf[1], "logout": "yes"}
        answer = await self.browser.post(f"{self.issuer}/session/end/confirm", data=confirmed)
        assert answer.status_code in (200, 302, 303), answer.text

    async def _page(self, answer: Any) -> str:
        """Follow to the next page that asks something; give where its form goes."""
        while answer.status_code in (302, 303):
            where = self._absolute(answer.headers["location"])
            answer = await self.browser.get(where)
        return str(answer.url)

    def _absolute(self, place: str) -> str:
        return place if place.startswith("https:") else self.issuer + place


def _install(directory: Path) -> Path:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("there is no Node.js, or no npm")
    for name in ("package.json", "package-lock.json", "provider.mjs"):
        shutil.copy(HERE / name, directory / name)
    done = subprocess.run(
        [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=directory, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(node)


@dataclass
class House:
    """An estate whose only subject issuer is the provider."""

    stage: Stage
    provider: IdentityProvider


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    node = await asyncio.to_thread(_install, tmp_path)
    files, port = Files(tmp_path), _free_port()
    prepare(files, datetime.now(UTC))
    issuer = f"https://localhost:{port}"
    written = estate.server_toml

    def with_provider(layout: Layout, ports: Ports, plan: Plan) -> str:
        text = written(layout, ports, plan).replace(ports.issuer_url, issuer)
        return text.replace(str(layout.issuer / "ca.pem"), str(files.ca))

    monkeypatch.setattr(estate, "server_toml", with_provider)
    async with Stage() as stage:
        await demo_identity.estate(stage)
        server = stage.estate.require_record().ports.server_url
        settings = {
            "port": port,
            "cert": str(files.leaf),
            "key": str(files.leaf_key),
            "clientSecret": SECRET,
            "redirectUri": REDIRECT,
            "logoutUri": f"{server}/backchannel-logout",
        }
        log = (tmp_path / "provider.log").open("wb")
        process = await asyncio.create_subprocess_exec(
            node,
            "provider.mjs",
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "NODE_EXTRA_CA_CERTS": str(stage.estate.layout.bundle)},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        async with asyncio.timeout(30):
            assert json.loads(await process.stdout.readline())["port"] == port, (tmp_path / "provider.log").read_text()
        trust = ssl.create_default_context(cafile=files.ca)
        try:
            async with httpx2.AsyncClient(verify=trust, trust_env=False, timeout=30) as browser:
                yield House(stage, IdentityProvider(process, issuer, browser))
        finally:
            process.stdin.close()
            try:
                async with asyncio.timeout(30):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
            log.close()


@pytest.mark.bears("TX20", "RV11")
async def test_signing_out_at_the_provider_ends_the_work_here(house: House, record_property: Any) -> None:
    stage, provider = house.stage, house.provider
    await demo_identity.entries(stage)
    await demo_identity.attestation(stage)
    token = await provider.sign_in("alice")
    claims = parse_compact(token).payload
    assert claims["aud"] == "broker"
    assert {"sid", "auth_time"} <= claims.keys()

    pod, url = stage.kept["pod"], stage.service_url
    details = [{"type": "api", "locations": [url], "actions": ["ticket.read"]}]
    start = {"purpose": "triage", "authorization_details": details, "ttl": 600}
    started = await pod.do("start", user_token=token, **start)
    assert (started["user"], started["state"]) == ("alice", "active")
    task_token = (await pod.do("token", resource=url))["token"]
    answer = await pod.do("get", url=f"{url}/tickets/4711")
    assert (answer["status"], answer["body"]["user"]) == (200, "alice")

    async def until_refused() -> tuple[float, Any]:
        while True:
            seen = await pod.do("present", url=url, method="GET", path="/tickets/4711", token=task_token)
            if seen["status"] != 200:
                return time.monotonic(), seen
            await asyncio.sleep(0)

    watching = asyncio.create_task(until_refused())
    began = time.monotonic()
    await provider.sign_out()
    async with asyncio.timeout(BOUND):
        refused_at, seen = await watching
    record_property("seconds_to_refusal", refused_at - began)
    print(f"from the sign-out to the first refusal at the service: {(refused_at - began) * 1000:.0f} ms")
    assert seen["status"] == 401

    channel = dial_socket(stage.estate.layout.server_socket)
    try:
        (task,) = await Tasks(channel).list(user="alice")
    finally:
        await channel.close()
    assert (task.state, task.cause) == ("revoked", "user_logout")
    # The same ID token is good for an hour yet, and starts nothing any more; a new sign-in does.
    again = await pod.try_("start", user_token=token, **start)
    assert again["error"]["code"] == "user_session_ended"
    async with asyncio.timeout(BOUND):
        # Its sign-in is told in seconds: one in the second of the sign-out counts as before it.
        await asyncio.sleep(1.1)
        anew = await provider.sign_in("alice")
    assert parse_compact(anew).payload["sid"] != claims["sid"]
    assert (await pod.do("start", user_token=anew, **start))["state"] == "active"
