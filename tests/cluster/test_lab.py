"""The lab itself: hosts that reach each other over ssh and Horovod, and fail as hosts do."""

import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hosts import PORTS, Host, lab

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with lab(["h1", "h2"]) as hosts:
        yield hosts


def ssh(port: int, target: str, *command: str) -> list[str]:
    return ["ssh", "-o", "StrictHostKeyChecking=accept-new", "-p", str(port), target, *command]


def test_hosts_have_names_and_addresses_and_reach_each_other(hosts: list[Host]) -> None:
    for port in PORTS:
        for target in ("h2", "10.77.0.2"):
            assert hosts[0].run(ssh(port, target, "hostname")).stdout == "h2\n"
    assert hosts[1].run(["hostname"]).stdout == "h2\n"
    assert subprocess.run(["hostname"], capture_output=True, text=True).stdout not in ("h1\n", "h2\n")


def test_each_has_processes_of_its_own_and_signals_reach_them(hosts: list[Host]) -> None:
    process = hosts[0].start(["sleep", "1000"])
    assert "sleep 1000" in hosts[0].run(["ps", "axo", "args"]).stdout
    assert "sleep 1000" not in hosts[1].run(["ps", "axo", "args"]).stdout
    process.terminate()
    assert process.wait(10) == -15


def test_keys_are_refused_and_changed(hosts: list[Host]) -> None:
    first, second = hosts
    second.refuse_key()
    assert "Permission denied" in first.run(ssh(22, "h2", "true"), check=False).stderr
    second.accept_key()
    first.run(ssh(22, "h2", "true"))
    second.change_host_key()
    assert "IDENTIFICATION HAS CHANGED" in first.run(ssh(22, "h2", "true"), check=False).stderr
    first.known_hosts.unlink()
    strict = ["-o", "StrictHostKeyChecking=yes"]
    assert first.run(["ssh", *strict, "h2", "true"], check=False).returncode == 255
    first.know(second)
    for port in PORTS:
        first.run(["ssh", *strict, "-p", str(port), "h2", "true"])


def test_a_folder_is_hidden_on_one_host(hosts: list[Host], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    hosts[1].hide(tmp_path)
    assert [host.run(["ls", tmp_path]).stdout for host in hosts] == ["file\n", ""]
    hosts[1].put_back(tmp_path)
    assert hosts[1].run(["ls", tmp_path]).stdout == "file\n"


def test_a_link_is_cut_and_mended_and_a_host_dies_and_comes_back(hosts: list[Host]) -> None:
    first, second = hosts
    first.known_hosts.unlink(missing_ok=True)
    no = ssh(22, "h2", "true")
    no[1:1] = ["-o", "ConnectTimeout=1"]
    second.cut()
    assert first.run(no, check=False).returncode == 255
    second.fix()
    first.run(ssh(22, "h2", "true"))
    session = first.start(ssh(22, "h2", "sleep", "1000"), stderr=subprocess.DEVNULL)
    time.sleep(1)
    second.kill()
    assert first.run(no, check=False).returncode == 255
    session.kill()
    second.boot()
    assert first.run(ssh(22, "h2", "hostname")).stdout == "h2\n"


@pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod")
def test_horovodrun_starts_a_job_over_both(hosts: list[Host], tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import socket, torch, horovod.torch as hvd\n"
        "hvd.init()\n"
        "total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0]), op=hvd.Sum).item()\n"
        "print('REPLY', socket.gethostname(), hvd.rank(), total)\n"
    )
    command = [
        *(sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2", "-H", "h1:1,h2:1"),
        *(
            "-p",
            "12345",
            "--network-interface",
            "eth0",
            "--gloo-timeout-seconds",
            "300",
            sys.executable,
            script,
        ),
    ]
    out = hosts[0].run(command, timeout=300).stdout
    replies = sorted(line.partition("REPLY ")[2] for line in out.splitlines() if "REPLY" in line)
    assert replies == ["h1 0 3.0", "h2 1 3.0"]


def test_a_link_is_slowed_down(hosts: list[Host]) -> None:
    first, second = hosts
    second.slow_down("8mbit")
    first.known_hosts.unlink(missing_ok=True)
    began = time.monotonic()
    sent = first.run(ssh(22, "h2", "head", "-c", "2000000", "/dev/zero")).stdout
    assert len(sent) == 2_000_000
    assert time.monotonic() - began > 1.5
