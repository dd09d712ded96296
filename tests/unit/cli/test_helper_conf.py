"""Settings of spiffe-helper, and the command that does the same."""

import json
import shlex
from pathlib import Path

import pytest

from broker.cli.helper_conf import MAX_BYTES, equivalent, read
from broker.cli.main import main
from broker.errors import Invalid

WHOLE = """
# as its README has it
agent_address = "/tmp/agent.sock"
cmd = "/usr/bin/envoy"   // the program
cmd_args = "-c envoy.yaml \\"two words\\" \\"a \\"\\"quote\\"\\"\\""
pid_file_name = "/run/other.pid"
cert_dir = "certs"
renew_signal = "SIGUSR1"
svid_file_name = "tls.crt"
svid_key_file_name = "tls.key"
svid_bundle_file_name = "ca.pem"
cert_file_mode = 0444
key_file_mode = 0440
jwt_bundle_file_name = "bundle.json"
jwt_svids = [
  {jwt_audience="a", jwt_extra_audiences=["b", "c"], jwt_svid_file_name="one.token"},
  {jwt_audience="d", jwt_svid_file_name="two.token"},
]
add_intermediates_to_bundle = true
omit_expired = true
include_federated_domains = false
hint = "inside"
health_checks {
  listener_enabled = true
  bind_port = 8082
  liveness_path = "/alive"
}
/* no longer
   there */
"""


def test_the_whole_of_it() -> None:
    found = equivalent(read(WHOLE))
    assert found.argv == shlex.split(
        "broker svid watch --socket unix:///tmp/agent.sock --dir certs --svid-file tls.crt --key-file tls.key"
        " --bundle-file ca.pem --jwt-bundle-file bundle.json --hint inside --cert-mode 0444 --key-mode 0440"
        " --add-intermediates-to-bundle --omit-expired --jwt-svid one.token a --jwt-svid one.token b"
        " --jwt-svid one.token c --jwt-svid two.token d --renew-signal SIGUSR1 --pid-file /run/other.pid --health 8082"
        """ -- /usr/bin/envoy -c envoy.yaml 'two words' 'a "quote"'"""
    )
    assert found.notes == ["health_checks: liveness_path /alive: it is /live here"]


def test_its_older_names_are_the_same() -> None:
    found = equivalent(read('agentAddress = "/s"\ncertDir = "d"\nsvidFileName = "s"\nsvidKeyFileName = "k"\nsvidBundleFileName = "b"\ndaemonMode = false'))  # fmt: skip
    assert found.words == shlex.split("--socket unix:///s --dir d --svid-file s --key-file k --bundle-file b --once")


def test_what_has_no_counterpart_is_named() -> None:
    found = equivalent(read('cert_dir = "d"\nsvid_file_name = "s"\nrenew_signal = "SIGHUP"\nfuture = 1\n'))
    assert found.words == ["--dir", "d", "--svid-file", "s"]
    assert found.notes == [
        "svid_key_file_name, svid_bundle_file_name: not set; the file has its usual name here",
        "renew_signal: nobody is to get it",
        "future: there is no such setting here",
    ]
    tokens_alone = equivalent(read('jwt_svids = [{jwt_audience = "a", jwt_svid_file_name = "t"}]'))
    assert tokens_alone.words == ["--dir", ".", "--no-x509", "--jwt-svid", "t", "a"]


@pytest.mark.parametrize(
    "text",
    [
        "cert_dir",
        'cert_dir = "a',
        "cert_dir = ",
        "cert_dir = [",
        'cert_dir = "a" }',
        'cert_dir = "a"\ncert_dir = "b"',
        "cert_dir = maybe",
        "cert_dir = 1.5",
        "cert_file_mode = 08",
        'a = "${env.HOME}\n"',
        "a = <<EOF\nx\nEOF",
        "a = " + "[" * 2000,
        "\u017f = 1",
        "cert_dir = 1",
        'omit_expired = "yes"',
        "cert_file_mode = true",
        "jwt_svids = {}",
        'jwt_svids = ["a"]',
        'cmd = "x"\ncmd_args = "a \\"b"',
        "#" * (MAX_BYTES + 1),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(Invalid) as refused:
        equivalent(read(text))
    assert refused.value.reason == "bad_helper_conf"


def test_the_verb_prints_it_and_what_it_prints_can_be_run(tmp_path: Path, capsys) -> None:
    file = tmp_path / "helper.conf"
    file.write_text(WHOLE)
    assert main(["svid", "watch", "--from-helper-conf", str(file)]) == 0
    said = capsys.readouterr()
    command = shlex.split(said.out)
    assert command[:3] == ["broker", "svid", "watch"]
    assert "liveness_path" in said.err
    assert main([*command[1 : command.index("--")], "--dry-run"]) in {0, 2}  # the pid file is one of this machine
    capsys.readouterr()
    assert main(["svid", "watch", "--from-helper-conf", str(file), "-o", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["arguments"]) == ("command", command[1:])
    file.write_text("cert_dir = [")
    assert main(["svid", "watch", "--from-helper-conf", str(file)]) == 2
    assert "line 1" in capsys.readouterr().err
    file.write_bytes(b'cert_dir = "\xff"')
    assert main(["svid", "watch", "--from-helper-conf", str(file)]) == 2
    assert main(["svid", "watch"]) == 2
    assert "--dir" in capsys.readouterr().err
