"""Kubeconfigs as tools write them: the ones that can be followed, and each way in which one cannot."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.attestation.kubeconfig import MAX_DEPTH, MAX_KUBECONFIG, read_kubeconfig
from broker.attestation.kubernetes import Fault, Server
from broker.attestation.pods import KubernetesObject
from broker.attestation.reads import Deadline
from broker.clock import SystemClock
from tests.fakes.kubelet import TOKEN, FakeAuthority, FakeKubernetes

MAX_ANSWER = 1 << 20

# What kubectl, kind and minikube write, with nothing left out.
WHOLE = """\
apiVersion: v1
clusters:
- cluster:
    certificate-authority: {directory}/account/ca.crt
    extensions:
    - extension:
        last-update: Mon, 05 Jan 2026 10:11:12 UTC
        provider: minikube.sigs.k8s.io
        version: v1.37.0
      name: cluster_info
    server: https://localhost:{port}
  name: minikube
- cluster:
    certificate-authority-data: LS0t
    server: https://127.0.0.1:6443
  name: kind-kind
contexts:
- context:
    cluster: minikube
    extensions:
    - extension:
        last-update: Mon, 05 Jan 2026 10:11:12 UTC
      name: context_info
    namespace: default
    user: minikube
  name: minikube
- context:
    cluster: kind-kind
    user: kind-kind
  name: kind-kind
current-context: minikube
kind: Config
preferences: {{}}
users:
- name: kind-kind
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1
      command: aws-iam-authenticator
      args: [token, -i, kind]
      interactiveMode: Never
- name: minikube
  user:
    client-certificate: {certificate}
    client-key: {key}
"""


class Thing(KubernetesObject):
    kind: str


@pytest.fixture
def kube(tmp_path):
    with FakeKubernetes(tmp_path / "account") as fake:
        fake.things = {"/thing": {"kind": "Thing"}}
        yield fake


def config(kube: FakeKubernetes, **user: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "preferences": {},
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "x"}}],
        "clusters": [
            {"name": "c", "cluster": {"server": f"https://localhost:{kube.port}", "certificate-authority": "account/ca.crt"}}
        ],
        "users": [{"name": "u", "user": user}, {"name": "other", "user": {"token": "x"}}],
    }  # fmt: skip


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def asked(server: Server, path: str = "/thing") -> str:
    return server.ask(Thing, path, Deadline(SystemClock().monotonic() + 10, lambda: False)).kind


@pytest.mark.parametrize(
    "write", [json.dumps, yaml.safe_dump, lambda value: yaml.safe_dump(value, default_flow_style=True)]
)
def test_credentials_of_every_kind(kube, tmp_path, write: Callable[[object], str]) -> None:
    path = tmp_path / "kubeconfig"
    certificate, key = kube.authority.leaf("broker", "broker")
    users = (
        {"token": TOKEN},
        {"tokenFile": "account/token"},
        {"token": TOKEN, "client-certificate": str(certificate), "client-key": "account/broker.key"},
        {"client-certificate-data": encoded(certificate), "client-key-data": encoded(key)},
    )
    for user in users:
        if "token" not in user and "tokenFile" not in user:
            kube.want_certificate()
        path.write_text(write(config(kube, **user)))
        assert asked(read_kubeconfig(path, MAX_ANSWER)) == "Thing"


def test_a_whole_one(kube, tmp_path) -> None:
    certificate, key = kube.authority.leaf("minikube", "minikube")
    kube.want_certificate()
    path = tmp_path / "config"
    path.write_text(WHOLE.format(directory=tmp_path, port=kube.port, certificate=certificate, key=key))
    assert asked(read_kubeconfig(path, MAX_ANSWER)) == "Thing"


def test_the_name_and_the_path_of_the_api_server(kube, tmp_path) -> None:
    path = tmp_path / "kubeconfig"
    given = config(kube, token=TOKEN)
    about = given["clusters"][0]["cluster"]
    about.update({"server": f"https://127.0.0.1:{kube.port}/clusters/a/", "tls-server-name": "localhost"})
    about["certificate-authority-data"] = encoded(kube.authority.path)
    kube.things = {"/clusters/a/thing": {"kind": "Thing"}}
    path.write_text(json.dumps(given))
    assert asked(read_kubeconfig(path, MAX_ANSWER)) == "Thing"


def test_the_machines_own_authorities_do_not_know_ours(kube, tmp_path) -> None:
    given = config(kube, token=TOKEN)
    del given["clusters"][0]["cluster"]["certificate-authority"]
    (tmp_path / "kubeconfig").write_text(json.dumps(given))
    with pytest.raises(Fault) as fault:
        asked(read_kubeconfig(tmp_path / "kubeconfig", MAX_ANSWER))
    assert fault.value.kind == "untrusted" and kube.requests == []


@pytest.mark.parametrize(
    ("spoil", "hint"),
    [
        (lambda one: one.pop("current-context"), "kubectl config view"),
        (lambda one: one.update({"current-context": "there"}), "kubectl config view"),
        (lambda one: one.update(users=[]), "kubectl config view"),
        (lambda one: one.update(clusters="x"), "kubectl config view"),
        (lambda one: one["users"].append(one["users"][0]), "kubectl config view"),
        (lambda one: one["users"][0]["user"].update(exec={"command": "aws"}), "exec runs a program"),
        (lambda one: one["users"][0]["user"].update({"auth-provider": {"name": "oidc"}}), "auth-provider needs a program"),
        (lambda one: one["users"][0]["user"].update(username="admin", password="hunter2"), "passwords"),
        (lambda one: one["users"][0]["user"].update({"as": "admin"}), "impersonation"),
        (lambda one: one["users"][0]["user"].update(token="a\r\nb: c"), "kubectl config view"),
        (lambda one: one["users"][0]["user"].update(token=7), "kubectl config view"),
        (lambda one: one["users"][0]["user"].update(tokenFile="missing"), "kubectl config view"),
        (lambda one: one["users"][0]["user"].update({"client-certificate-data": "aHVudGVyMg=="}), "kubectl config view"),
        (lambda one: one["clusters"][0]["cluster"].update({"insecure-skip-tls-verify": True}), "certificate-authority-data"),
        (lambda one: one["clusters"][0]["cluster"].update({"proxy-url": "http://x"}), "proxies"),
        (lambda one: one["clusters"][0]["cluster"].update(server="http://localhost"), "kubectl config view"),
        (lambda one: one["clusters"][0]["cluster"].update(server="https://me@localhost"), "kubectl config view"),
        (lambda one: one["clusters"][0]["cluster"].update(server="https://localhost:99999999"), "kubectl config view"),
        (lambda one: one["clusters"][0]["cluster"].update(server="https://localhost/a b"), "kubectl config view"),
        (lambda one: one["clusters"][0]["cluster"].update({"certificate-authority-data": "***"}), "kubectl config view"),
    ],
)  # fmt: skip
def test_one_that_cannot_be_followed(kube, tmp_path, spoil, hint) -> None:
    path = tmp_path / "kubeconfig"
    given = config(kube, token=TOKEN)
    spoil(given)
    for text in (json.dumps(given), yaml.dump(given)):
        path.write_text(text)
        with pytest.raises(Fault) as fault:
            read_kubeconfig(path, MAX_ANSWER)
        assert fault.value.kind == "credentials" and hint in fault.value.hint
        told = f"{fault.value} {fault.value.what} {fault.value.hint} {fault.value.__cause__!r}"
        assert TOKEN not in told and "hunter2" not in told
    assert kube.requests == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"hunter2",
        b"\xff\xfe",
        b"a: [",
        b"a: 1\na: 2\n",
        b"1: a\n",
        b"? [a]\n: b\n",
        b"a: &x {b: c}\nd: *x\n",
        b"a: &x {b: c}\nd: {<<: *x}\n",
        b"a: {<<: {b: c}}\n",
        b"a: !!python/object/apply:os.system [id]\n",
        b"a: !own 1\n",
        b"a: 2026-13-45\n",
        b"a: " + b"9" * 5000,
        b"--- a: 1\n--- b: 2\n",
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b"[" * 100_000,
        b"#" * (MAX_KUBECONFIG + 1),
    ],
    ids=range(18),
)
def test_a_text_that_is_no_kubeconfig(tmp_path, text) -> None:
    (tmp_path / "kubeconfig").write_bytes(text)
    with pytest.raises(Fault) as fault:
        read_kubeconfig(tmp_path / "kubeconfig", MAX_ANSWER)
    assert fault.value.kind == "credentials" and "hunter2" not in f"{fault.value.what} {fault.value.hint}"


def test_a_file_that_is_not_there(tmp_path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(Fault) as fault:
            read_kubeconfig(path, MAX_ANSWER)
        assert fault.value.kind == "credentials" and str(path) not in fault.value.what


def test_another_authority_is_not_believed(kube, tmp_path) -> None:
    given = config(kube, token=TOKEN)
    given["clusters"][0]["cluster"]["certificate-authority"] = str(FakeAuthority(tmp_path / "other").path)
    (tmp_path / "kubeconfig").write_text(yaml.dump(given))
    with pytest.raises(Fault) as fault:
        asked(read_kubeconfig(tmp_path / "kubeconfig", MAX_ANSWER))
    assert fault.value.kind == "untrusted" and kube.requests == []
