"""What an operator may set for the docker attestor: SPIRE's names, safe defaults, and what is refused."""

import pytest
from pydantic import ValidationError

from attestors.workload.docker import DockerSettings


@pytest.mark.parametrize(
    "wrong",
    [
        {"docker_socket_path": "tcp://127.0.0.1:2375"},
        {"docker_socket_path": "/var/run/docker.sock"},
        {"podman_socket_path": "unix://relative"},
        {"podman_socket_path_template": "unix:///run/podman.sock"},
        {"podman_socket_path_template": "unix:///run/%d/%s/podman.sock"},
        {"podman_socket_path_template": "unix:///run/%s/podman.sock"},
        {"podman_socket_path_template": "/run/%d/podman.sock"},
        {"docker_version": "1.43/../x"},
        {"docker_version": "1.43\n"},
        {"use_new_container_locator": False},
        {"container_id_cgroup_matchers": ["/docker/*"]},
        {"sigstore": {}},
        {"trusted_label_prefixes": [""]},
        {"trusted_kinds": []},
        {"trusted_kinds": ["labels"]},
        {"docker_host": "npipe:////./pipe/docker_engine"},
    ],
)
def test_settings_that_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        DockerSettings(**wrong)


def test_settings_have_spires_names_and_safe_defaults() -> None:
    settings = DockerSettings(use_new_container_locator=True)
    assert (settings.docker_socket_path, settings.podman_socket_path, settings.podman_socket_path_template) == (
        "unix:///var/run/docker.sock", "unix:///run/podman/podman.sock", "unix:///run/user/%d/podman/podman.sock",
    )  # fmt: skip
    assert (settings.use_rootless_podman, settings.require_runtime_label, settings.require_runtime_env) == (
        False,
        True,
        True,
    )
