import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_lb.launch.preflight import probe


def test_a_host_answers_in_json_and_writes_beside_the_marker(tmp_path: Path) -> None:
    marker = tmp_path / ".marker"
    marker.touch()
    request = {
        "hosts": ["me"],
        "interface": None,
        "grows": False,
        "data": str(tmp_path),
        "marker": str(marker),
        "environment": {},
    }
    command = [sys.executable, "-P", "-m", "hvd_lb.launch.preflight.probe", "me"]
    said = subprocess.run(
        command, input=json.dumps(request) + "\n", capture_output=True, text=True, check=True
    ).stdout
    answer = json.loads(said.removeprefix(probe.ANSWER))
    assert answer["hostname"] == socket.gethostname()
    assert answer["versions"]["torch"].startswith("2.")
    assert (answer["data"], answer["output"]) == (True, {})
    assert (tmp_path / ".marker.me").exists()


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'numpy', 'pydantic'}"
    code = f"import sys, hvd_lb.launch.preflight.probe; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_that_is_another_one_or_none(tmp_path: Path) -> None:
    assert "another folder" in probe.shares(str(tmp_path / "marker"), "me")["problem"]
    assert "no folder" in probe.shares(str(tmp_path / "none" / "marker"), "me")["problem"]


def test_the_interface_that_reaches_others() -> None:
    assert probe.interface(None, []) == {"name": "lo", "address": "127.0.0.1", "unreached": {}}
    assert probe.interface("lo", [])["name"] == "lo"
    assert "no interface ib9" in probe.interface("ib9", [])["problem"]
    found = probe.interface(None, ["no-such-host.invalid"])
    assert "cannot be reached" in found["unreached"]["no-such-host.invalid"]


def test_another_host_that_is_a_loopback_address_here_is_found() -> None:
    assert "loopback" in probe.interface(None, ["127.0.1.1"])["unreached"]["127.0.1.1"]
    said = probe.interface(None, ["localhost"])["unreached"]["localhost"]
    assert said.endswith("name that host as the others reach it")


def test_whom_a_machine_has_to_reach() -> None:
    """One on its own nobody, but by its name whoever may join it later; by `localhost` no other machine can."""
    for grows in (False, True):
        assert probe.peers(["h1", "h2", "h3"], {"h2"}, grows=grows) == ["h1", "h3"]
        assert probe.peers(["localhost"], {"localhost"}, grows=grows) == []
        assert probe.peers(["h1"], {"h1"}, grows=grows) == ["h1"] * grows


@pytest.mark.parametrize("address", ["127.0.1.1", "::1"])
def test_a_host_whose_own_name_is_a_loopback_address_is_of_no_use_to_others(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """As Debian's installer writes it into /etc/hosts."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert probe.unknown_to_itself() is None
    said = probe.unknown_to_itself(alone=False)
    assert said
    assert f"{socket.gethostname()}, is a loopback address there ({address})" in said


def test_a_host_whose_own_name_is_one_of_its_network_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert probe.unknown_to_itself(alone=False) is None


def test_what_nccl_was_told_decides_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        probe, "_addresses", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}
    )
    monkeypatch.setattr(probe, "address_towards", lambda peer: "10.0.0.1")
    assert probe.interface(None, ["h2"])["name"] == "eth0"
    assert probe.interface(None, ["h2"], "=eth0")["name"] == "eth0"
    assert probe.interface(None, ["h2"], "^lo,docker")["name"] == "eth0"
    assert probe.interface(None, ["h2"], "ib")["name"] == "ib0"
    assert probe.interface("eth0", ["h2"], "ib")["name"] == "eth0"
    assert "NCCL_SOCKET_IFNAME==ib leaves none" in probe.interface(None, ["h2"], "=ib")["problem"]
