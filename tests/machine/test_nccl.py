from pathlib import Path

import pytest

from hvd_lb.machine.nccl import allows, socket_interfaces


@pytest.mark.parametrize(
    ("said", "allowed"),
    [
        ("eth", {"eth0", "eth1", "eth10"}),
        ("=eth1", {"eth1"}),
        ("eth0,ib", {"eth0", "ib0"}),
        ("=eth0,ib0", {"eth0", "ib0"}),
        ("^docker,lo", {"eth0", "eth1", "eth10", "ib0"}),
        ("^=eth1", {"eth0", "eth10", "ib0", "docker0", "lo"}),
        ("", {"eth0", "eth1", "eth10", "ib0", "docker0", "lo"}),
    ],
)
def test_interfaces_are_allowed_as_nccl_reads_it(said: str, allowed: set[str]) -> None:
    there = ("eth0", "eth1", "eth10", "ib0", "docker0", "lo")
    assert {name for name in there if allows(said, name)} == allowed


def test_it_is_said_in_the_environment_or_in_a_file(tmp_path: Path) -> None:
    assert socket_interfaces({"NCCL_SOCKET_IFNAME": "=ib0"}) == "=ib0"
    (tmp_path / ".nccl.conf").write_text("# a site's\nNCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME=^docker\n")
    assert socket_interfaces({"HOME": str(tmp_path)}) == "^docker"
    (tmp_path / "other").write_text("NCCL_DEBUG=WARN\n")
    assert socket_interfaces({"HOME": str(tmp_path), "NCCL_CONF_FILE": str(tmp_path / "other")}) is None
