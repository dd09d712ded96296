import subprocess
import sys
import time

import pytest

from broker.errors import Misconfigured, Unavailable
from broker.server import failpoints


@pytest.fixture(autouse=True)
def disarmed():
    yield
    failpoints.arm("", allowed=False)


def test_nothing_happens_where_nothing_is_armed():
    failpoints.reach("exchange.after_commit")


def test_an_armed_point_raises():
    failpoints.arm("a.b=error, c=sleep:20", allowed=True)
    with pytest.raises(Unavailable):
        failpoints.reach("a.b")
    start = time.monotonic()
    failpoints.reach("c")
    assert time.monotonic() - start >= 0.02
    failpoints.reach("other")


def test_an_armed_point_ends_the_process_at_once():
    text = (
        "import atexit; from broker.server import failpoints; atexit.register(print, 'clean');"
        "failpoints.arm('x=exit', allowed=True); failpoints.reach('x'); print('after')"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (failpoints.EXIT_STATUS, "")


def test_arming_replaces():
    failpoints.arm("a=error", allowed=True)
    failpoints.arm("", allowed=True)
    failpoints.reach("a")


def test_they_are_refused_where_they_are_not_allowed():
    with pytest.raises(Misconfigured) as caught:
        failpoints.arm("a=error", allowed=False)
    assert "allow_failpoints" in caught.value.hint
    failpoints.reach("a")
    failpoints.arm("", allowed=False)


@pytest.mark.parametrize(
    "text", ["a", "a=", "a=explode", "a=sleep", "a=sleep:x", "a=sleep:99999999", "A=exit", "a=exit\n=b"]
)
def test_what_is_not_understood_is_refused(text):
    with pytest.raises(Misconfigured):
        failpoints.arm(text, allowed=True)
