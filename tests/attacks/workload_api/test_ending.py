"""The agent ends, is killed, and comes back (W15, W16): callers lose their streams and nothing else."""

import os
import resource
import signal
import time
import warnings

import pytest

from tests.attacks.workload_api.frames import Connection
from tests.attacks.workload_api.rig import JWT, SERVICE, rig, wait_for
from tests.fakes.fake_server import entry_message

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its generated messages are older than the installed protobuf
    from spiffe import JwtSource, X509Source

X509 = SERVICE + "FetchX509SVID"
ME = f"unix:uid:{os.geteuid()}"
STOP = 10  # seconds that operators give
RESUME = 5  # seconds after the agent is back
SLACK = 10  # seconds more on a machine that is shared


@pytest.mark.bears("W16")
@pytest.mark.parametrize(
    "signals", [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGTERM] * 60], ids=["once", "hangup", "again and again"]
)
def test_it_ends_in_time_with_a_thousand_streams_open_and_takes_its_socket_along(signals: list[int]) -> None:
    with rig() as agent:
        assert agent.process is not None
        connections = [Connection(agent.socket, wait=10) for _ in range(10)]
        try:
            for one in connections:
                for _ in range(100):
                    one.open(X509)
                assert one.until(lambda one=one: all(each.messages for each in one.streams.values()), 30)
            began = time.monotonic()
            for number in signals:  # the last of many meet it on its way out
                agent.process.send_signal(number)
                time.sleep(0.02)
            assert agent.process.wait(STOP + SLACK) == 0
            assert time.monotonic() - began <= STOP
            assert all(one.wait_closed(5) for one in connections)
        finally:
            for one in connections:
                one.close()
        assert not agent.socket.exists()
        assert not agent.admin.exists()
        assert "Traceback" not in agent.said()


@pytest.mark.bears("W16")
def test_killed_it_leaves_a_socket_that_the_next_one_replaces() -> None:
    with rig() as agent:
        assert agent.process is not None
        was = agent.socket.stat().st_ino
        agent.process.kill()
        agent.process.wait()
        assert agent.socket.stat().st_ino == was
        with pytest.raises(ConnectionRefusedError):
            Connection(agent.socket)
        agent.start()
        with Connection(agent.socket) as one:
            assert one.call(SERVICE + "FetchJWTSVID", JWT).status == 0
        assert agent.stop() == 0


@pytest.mark.bears("W16")
def test_a_socket_of_somebody_who_lives_is_not_taken() -> None:
    with rig() as agent, rig() as other:
        assert other.process is not None
        assert other.stop() == 0
        other.socket.symlink_to(agent.socket)  # not even by way of a link
        assert other.spawn().wait(30) != 0
        assert "is not a socket of ours" in other.said()
        other.socket.unlink()
        with Connection(agent.socket) as one:
            assert one.call(SERVICE + "FetchJWTSVID", JWT).status == 0


@pytest.mark.bears("W15", "WA-03")
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_the_clients_of_py_spiffe_go_on_after_a_restart(how: str) -> None:
    with rig() as agent:
        assert agent.process is not None
        address = f"unix://{agent.socket}"
        x509 = X509Source(socket_path=address, timeout_in_seconds=30)
        jwt = JwtSource(socket_path=address, timeout_in_seconds=30)
        try:
            before = x509.get_x509_context().default_svid
            assert str(before.spiffe_id) == "spiffe://example.org/wl/me"
            if how == "stopped":
                agent.stop()
            else:
                agent.process.kill()
                agent.process.wait()
            agent.start()
            back = time.monotonic()
            agent.server.do(lambda fake: fake.put(entry_message("e1", "/wl/moved", [ME], revision=1)))
            wait_for(lambda: x509.get_x509_context().default_svid.spiffe_id.path == "/wl/moved", RESUME + SLACK)
            assert time.monotonic() - back <= RESUME + SLACK
            assert str(jwt.fetch_svid({"a"}).spiffe_id) == "spiffe://example.org/wl/moved"
        finally:
            x509.close()
            jwt.close()


@pytest.fixture(autouse=True)
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
