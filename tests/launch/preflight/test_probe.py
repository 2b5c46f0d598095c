import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_lb.launch.preflight import probe


def test_a_host_answers_in_json_and_writes_beside_the_marker(tmp_path: Path) -> None:
    marker = tmp_path / ".marker"
    marker.touch()
    request = {"hosts": ["me"], "interface": None, "data": str(tmp_path), "marker": str(marker)}
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


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("", []), ("0", [0]), ("2,0", [0, 2]), ("GPU-b", [1]), ("GPU-a,GPU-c1", [0, 2]), ("x", [])],
)
def test_gpus_hidden_by_cuda_visible_devices(visible: str, expected: list[int]) -> None:
    uuids = ["GPU-a0", "GPU-b0", "GPU-c1"]
    assert [i for i, uuid in enumerate(uuids) if probe._is_visible(i, uuid, visible)] == expected


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia"), reason="has GPUs")
def test_no_gpus_are_no_error() -> None:
    assert probe.gpus() == []
