"""Who is where, as Horovod's own launcher has it."""

import pytest

from hvd_lb.launch.agent.places import name_ranks, rank_environments, ranks_by_host

HOSTS = [("h1", 2), ("h2", 3), ("h3", 1)]


def test_hosts_are_filled_in_order() -> None:
    assert ranks_by_host(HOSTS) == {"h1": range(2), "h2": range(2, 5), "h3": range(5, 6)}


@pytest.mark.parametrize("hosts", [HOSTS, [("a", 1)], [("a", 4), ("b", 4)]])
def test_ranks_are_told_what_horovodrun_tells_them(hosts: list[tuple[str, int]]) -> None:
    pytest.importorskip("horovod")
    from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
    from horovod.runner.gloo_run import create_slot_env_vars

    count = sum(slots for _, slots in hosts)
    plan = get_host_assignments([HostInfo(name, slots) for name, slots in hosts], count, count)
    ours = [env for name, _ in hosts for env in rank_environments(hosts, name).values()]
    assert ours == [create_slot_env_vars(slot) for slot in plan]


def test_ranks_are_named_by_host() -> None:
    assert name_ranks(HOSTS, {1, 3, 4, 5}) == "h1 rank 1, h2 ranks 3, 4, h3 rank 5"
    assert name_ranks(HOSTS, {0, 2, 4}) == "h1 rank 0, h2 ranks 2, 4"
    assert name_ranks([("h17", 16)], {3, 4, 5, 9}) == "h17 ranks 3…5, 9"
    many = [(f"h{number}", 1) for number in range(20)]
    assert name_ranks(many, range(20), most=2) == "h0 rank 0, h1 rank 1 and 18 more hosts"
