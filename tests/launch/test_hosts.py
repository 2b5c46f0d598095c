from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_lb.errors import UserError
from hvd_lb.launch.hosts import Host, assign, host_of_rank, in_words, parse_hosts, read_hostfile


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("h1:8,h2:8", [Host("h1", 8), Host("h2", 8)]),
        ("h1, h2:2", [Host("h1"), Host("h2", 2)]),
        ("10.0.0.7:4", [Host("10.0.0.7", 4)]),
        ("gpu-1.cluster_a:1", [Host("gpu-1.cluster_a", 1)]),
        ("h1:2,h2:1,h1:3", [Host("h1", 5), Host("h2", 1)]),
    ],
)
def test_named_hosts(text: str, hosts: list[Host]) -> None:
    assert parse_hosts(text) == hosts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h1,,h2",
        "h1:",
        "h1:0",
        "h1:x",
        "h1:inf",
        f"h1:{'9' * 5000}",
        "h1:-1",
        "h1:1:2",
        "h1:2000",
        "me@h1:2",
        "-oProxyCommand=touch${IFS}x:1",
        "h1;reboot:1",
        "h1 h2",
        "$(reboot):1",
        "h1\nh2",
        "hé:1",
        "h1,h1:2",
    ],
)
def test_what_is_no_host_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_hosts(text)
    assert "\n" not in str(error.value)
    assert "--hosts" in str(error.value)


def test_hostfiles_of_open_mpi_and_of_horovod(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("\ufeff# four hosts\nh1 slots=8\nh2:4\n\nh3   slots=2 max_slots=2 # old\nh4\n")
    assert read_hostfile(file) == [Host("h1", 8), Host("h2", 4), Host("h3", 2), Host("h4")]


@pytest.mark.parametrize(
    "text", ["", "# nobody\n", "h1 slots=8 gpus=2\n", "h1 8\n", "h1 slots=\n", "h1;x slots=1\n", "h" * 254]
)
def test_damaged_hostfiles_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError, match=str(file)):
        read_hostfile(file)


def test_unreadable_hostfiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00h1")
    with pytest.raises(UserError, match="not text"):
        read_hostfile(tmp_path / "binary")


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        (["a", "b:8"], "a, b:8"),
        ([f"h{i}:8" for i in range(1, 33)], "h[1-32]:8 (32 hosts)"),
        ([f"gpu{i:02}.site1.org" for i in (*range(8, 12), *range(20, 26), 31)],
         "gpu[08-11].site1.org, gpu[20-25].site1.org, gpu31.site1.org (11 hosts)"),
        ([f"10.0.0.{i}" for i in range(95, 105)], "10.0.0.[95-104] (10 hosts)"),
        ([*"abcdefghij"], "a, b, c, d, e, f, g, h, … (10 hosts)"),
        (["h1:4", *[f"h{i}:8" for i in range(2, 10)]], "h1:4, h[2-9]:8 (9 hosts)"),
    ],
)  # fmt: skip
def test_many_hosts_are_few_words(hosts: list[str], words: str) -> None:
    assert in_words(hosts) == words


def test_hostfiles_of_batch_systems(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("h2\nh1\nh2\nh2\n")  # PBS
    assert read_hostfile(file) == [Host("h2", 3), Host("h1", 1)]
    file.write_text(
        "h1 8 gpu.q@h1 UNDEFINED\nh2.org 4 gpu.q@h2 <NULL>\nh1 2 all.q@h1 UNDEFINED\n"
    )  # Grid Engine
    assert read_hostfile(file) == [Host("h1", 10), Host("h2.org", 4)]
    file.write_text("h1\nh1 slots=2\n")
    with pytest.raises(UserError, match="h1 is named twice"):
        read_hostfile(file)


def test_hosts_are_filled_in_order_and_the_rest_is_left_out() -> None:
    hosts = [Host("a", 2), Host("b", 1), Host("c", 3)]
    assert assign(hosts, 6) == hosts
    assert assign(hosts, 4) == [Host("a", 2), Host("b", 1), Host("c", 1)]
    assert assign(hosts, 1) == [Host("a", 1)]
    with pytest.raises(UserError, match="7 processes are asked for and a:2, b:1, c:3 take 6"):
        assign(hosts, 7)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_ranks_are_where_horovod_puts_them(slots: list[int], data: st.DataObject) -> None:
    horovod = pytest.importorskip("horovod.runner.common.util.hosts")
    processes = data.draw(st.integers(1, sum(slots)))
    hosts = assign([Host(f"h{i}", count) for i, count in enumerate(slots)], processes)
    plan = horovod.get_host_assignments(horovod.parse_hosts(",".join(map(str, hosts))), processes)
    assert [slot.hostname for slot in plan] == [host_of_rank(hosts, rank) for rank in range(processes)]
    with pytest.raises(ValueError, match="more processes"):
        host_of_rank(hosts, processes)
