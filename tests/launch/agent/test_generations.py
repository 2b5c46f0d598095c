"""Who goes on when processes are lost, join or leave: what the head decides, event by event."""

from __future__ import annotations

import random
import signal

from hvd_lb.launch.agent.generations import (
    NO_STATE,
    Ask,
    Begin,
    Dismiss,
    Generations,
    GiveUp,
    Order,
    Over,
    Wait,
    in_ranks,
)


def made(processes: int = 3, least: int = 1) -> Generations:
    return Generations(dict.fromkeys(range(processes), "h"), least)


def orders(generations: Generations) -> list[Order]:
    found = []
    while order := generations.order():
        found.append(order)
    return found


def test_who_is_furthest_is_rank_0_and_nobody_waits_for_the_dead() -> None:
    job = made(4)
    assert orders(job) == []
    job.lose(2, "killed")
    assert orders(job) == [Over(0)]
    job.ready(0, 0, 5, unfinished=False)
    job.ready(3, 0, 6, unfinished=True)
    assert orders(job) == []
    job.ready(1, 0, 6, unfinished=False)
    (begin,) = orders(job)
    assert begin == Begin(1, [("h", [3, 0, 1])], before=4, lost=["killed"], left=[], joined=0)
    assert job.members == [3, 0, 1]


def test_an_exchange_that_failed_ends_a_generation_though_nobody_is_lost() -> None:
    job = made(2)
    job.ready(1, 0, 7, unfinished=False)
    assert orders(job) == [Over(0)]
    job.ready(0, 0, 7, unfinished=False)
    (begin,) = orders(job)
    assert isinstance(begin, Begin)
    assert (begin.hosts, begin.lost) == ([("h", [0, 1])], [])


def test_a_second_loss_before_the_next_generation_and_one_in_it() -> None:
    job = made(4)
    job.lose(0, "a")
    assert orders(job) == [Over(0)]
    job.ready(1, 0, 3, unfinished=False)
    job.ready(2, 0, 3, unfinished=False)
    job.lose(3, "b")
    (begin,) = orders(job)
    assert isinstance(begin, Begin)
    assert (begin.hosts, begin.lost) == ([("h", [1, 2])], ["a", "b"])
    job.ready(1, 0, 3, unfinished=False)  # late, and of the generation before
    assert orders(job) == []
    job.begun(1)
    job.lose(1, "c")
    assert orders(job) == [Over(1)]
    job.ready(2, 1, 3, unfinished=False)
    assert orders(job) == [Begin(2, [("h", [2])], before=2, lost=["c"], left=[], joined=0)]


def test_losses_are_told_of_until_somebody_has_written_them_down() -> None:
    job = made(4)
    job.lose(0, "a")
    for member in (1, 2, 3):
        job.ready(member, 0, 3, unfinished=False)
    assert [type(order) for order in orders(job)] == [Over, Begin]
    job.lose(1, "b")  # it was to be rank 0
    for member in (2, 3):
        job.ready(member, 1, 3, unfinished=False)
    assert orders(job) == [Over(1), Begin(2, [("h", [2, 3])], before=4, lost=["a", "b"], left=[], joined=0)]
    job.begun(1)
    job.begun(2)
    job.lose(2, "c")
    job.ready(3, 2, 3, unfinished=False)
    assert orders(job) == [Over(2), Begin(3, [("h", [3])], before=2, lost=["c"], left=[], joined=0)]


def test_newcomers_join_after_a_step_and_take_the_state_of_another() -> None:
    job = made(2)
    job.lose(1, "a")
    assert orders(job) == [Over(0)]
    job.start(2, "h")
    job.ready(0, 0, 9, unfinished=False)
    assert [type(order) for order in orders(job)] == [Begin]
    job.begun(1)
    job.ready(2, NO_STATE, NO_STATE, unfinished=False)
    assert orders(job) == [Ask(0)]
    job.ready(0, 1, 11, unfinished=False)
    assert orders(job) == [Over(1), Begin(2, [("h", [0, 2])], before=1, lost=[], left=[], joined=1)]


def test_who_has_no_state_cannot_go_on_alone() -> None:
    job = made(2)
    job.lose(1, "a")
    job.start(2, "h")
    job.ready(0, 0, 9, unfinished=False)
    job.ready(2, NO_STATE, NO_STATE, unfinished=False)
    assert [type(order) for order in orders(job)] == [Over, Begin]
    job.lose(0, "b")
    assert orders(job) == [Over(1)]
    job.ready(2, 1, NO_STATE, unfinished=False)
    assert orders(job) == [GiveUp("all processes that had the state of the run were lost")]
    assert orders(job) == []


def test_too_few_wait_for_newcomers_and_else_give_up() -> None:
    job = made(2, least=2)
    job.lose(1, "a")
    job.start(2, "h")
    job.ready(0, 0, 9, unfinished=False)
    over, wait = orders(job)
    assert over == Over(0)
    assert isinstance(wait, Wait)
    assert "1 of 2 processes are left, fewer than --min-processes 2" in wait.why
    job.lose(2, "b")
    (last,) = orders(job)
    assert last == Begin(
        1,
        [("h", [0])],
        2,
        lost=["a", "b"],
        left=[],
        joined=0,
        ends=signal.SIGTERM,
        gives_up=wait.why.split(":")[0],
    )
    job.finish(0)
    assert orders(job) == []


def test_a_job_that_gives_up_tries_only_once_to_save_what_it_has() -> None:
    for status in ("over again", "lost"):
        job = made(2, least=2)
        job.lose(1, "a")
        job.ready(0, 0, 9, unfinished=False)
        assert [type(order) for order in orders(job)] == [Over, Begin]
        if status == "lost":
            job.lose(0, "b")
        else:
            job.ready(0, 1, 9, unfinished=False)
        *_, gave_up = orders(job)
        assert gave_up == GiveUp("1 of 2 processes are left, fewer than --min-processes 2")
        assert orders(job) == []


def test_who_leaves_is_no_loss() -> None:
    job = made(2)
    job.ready(0, 0, 4, unfinished=False)
    assert orders(job) == [Over(0)]
    job.leave(1, "rank 1")
    assert orders(job) == [Begin(1, [("h", [0])], before=2, lost=[], left=["rank 1"], joined=0)]


def test_between_generations_who_has_notice_leaves_at_once() -> None:
    job = made(4, least=4)
    job.notice(1)  # it would leave after the present step, but that is given up
    job.lose(3, "a")
    for member in (0, 1, 2):
        job.ready(member, 0, 9, unfinished=False)
    job.start(4, "h")
    over, dismiss, wait = orders(job)
    assert (over, dismiss) == (Over(0), Dismiss([1]))
    assert isinstance(wait, Wait)
    assert "2 of 4 processes are left" in wait.why
    job.leave(1, "it has ended")
    job.notice(2)
    assert orders(job) == [Dismiss([2])]
    job.least = 2
    job.ready(4, NO_STATE, NO_STATE, unfinished=False)
    left = ["rank 1 on h", "rank 2 on h"]
    assert orders(job) == [Begin(1, [("h", [0, 4])], before=4, lost=["a"], left=left, joined=1)]


def test_the_last_with_the_state_leaves_by_ending_the_run_or_gives_it_to_others() -> None:
    for newcomers, ends in ((0, signal.SIGTERM), (1, signal.SIGTERM), (2, 0)):
        job = made(2, least=3)
        job.lose(1, "a")
        job.start(2, "h")
        job.start(3, "h")
        job.ready(0, 0, 9, unfinished=False)
        assert [type(order) for order in orders(job)] == [Over, Wait]
        for newcomer in range(2, 2 + newcomers):
            job.ready(newcomer, NO_STATE, NO_STATE, unfinished=False)
        if not ends:
            assert [type(order) for order in orders(job)] == [Begin]
            continue
        job.notice(0)
        assert orders(job) == [Begin(1, [("h", [0])], before=2, lost=["a"], left=[], joined=0, ends=ends)]


def test_a_stop_ends_a_run_that_waits() -> None:
    job = made(3, least=3)
    job.lose(2, "a")
    job.start(3, "h")
    for member in (0, 1):
        job.ready(member, 0, 9, unfinished=False)
    assert [type(order) for order in orders(job)] == [Over, Wait]
    job.stop(signal.SIGINT)
    (begin,) = orders(job)
    assert isinstance(begin, Begin)
    assert (begin.hosts, begin.ends) == ([("h", [0, 1])], signal.SIGINT)
    job.finish(0)
    job.finish(1)
    assert orders(job) == []


def test_at_the_end_of_the_run_nobody_is_waited_for() -> None:
    job = made(3)
    job.finish(0)
    job.finish(1)
    job.lose(2, "killed at the very end")
    assert orders(job) == []
    job = made(2)
    job.finish(0)
    job.ready(1, 0, 30, unfinished=False)
    assert [type(order) for order in orders(job)] == [Over, Begin]


def test_a_step_that_nobody_can_take_ends_the_job() -> None:
    job = made(20)
    for generation in range(20):
        job.lose(generation, "killed by its data")
        for member in job.members:
            job.ready(member, generation, 5, unfinished=False)
        *_, last = orders(job)
        assert isinstance(last, Begin)
        if last.ends:
            break
    assert generation == 8
    why = "step 5 could not be taken by 8 sets of processes (lost at last: killed by its data)"
    assert (last.ends, last.gives_up) == (signal.SIGTERM, why)


def test_ranks_of_a_host_follow_each_other() -> None:
    hosts = {0: "a", 1: "a", 2: "b", 3: "b", 4: "a"}
    assert in_ranks(2, [0, 1, 2, 3, 4], hosts) == [("b", [2, 3]), ("a", [0, 1, 4])]


def test_whatever_happens_the_members_of_a_generation_live_and_have_the_newest_state() -> None:
    """Random events; the processes are played by a table of their steps."""
    for seed in range(300):
        draw = random.Random(seed)
        job, steps, generation, most = made(draw.randint(1, 5)), {}, {}, 0
        steps = dict.fromkeys(job.members, 0)
        generation = dict.fromkeys(job.members, 0)
        told_over, started = -1, len(steps)
        for _ in range(60):
            for order in orders(job):
                if isinstance(order, Over):
                    told_over = order.generation
                elif isinstance(order, Begin):
                    members = [member for _, there in order.hosts for member in there]
                    assert set(members) <= set(steps)
                    assert steps[members[0]] == most
                    for member in members:
                        steps[member], generation[member] = most, order.generation
                elif isinstance(order, Dismiss):
                    for member in order.members:
                        del steps[member]
                    # Who is furthest may be gone, and then a step is taken again.
                    most = max(steps.values(), default=NO_STATE)
                    assert most != NO_STATE
                elif isinstance(order, GiveUp):
                    assert all(steps.get(member, NO_STATE) == NO_STATE for member in job.members) or (
                        job._in_vain >= 8
                    )
                    break
            event = draw.random()
            if event < 0.25 and steps:
                member = draw.choice(list(steps))
                had_joined = member in job.members
                del steps[member]
                job.lose(member, "lost")
                most = max(steps.values(), default=NO_STATE)
                if had_joined:
                    steps[started] = NO_STATE
                    job.start(started, "h")
                    started += 1
            elif event < 0.3 and job.members:
                job.notice(draw.choice(job.members))
            elif event < 0.45 and (new := [member for member in job.newcomers if member not in job._places]):
                job.ready(new[0], NO_STATE, NO_STATE, unfinished=False)
            elif told_over == job.number:
                if waited := [member for member in job.members if member not in job._places]:
                    job.ready(waited[0], job.number, steps[waited[0]], unfinished=False)
            elif job.members and all(generation.get(member) == job.number for member in job.members):
                most += 1
                for member in job.members:
                    steps[member] = most
