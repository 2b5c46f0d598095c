"""Who belongs to which generation of an elastic job: what its head decides, without processes or connections.

A *member* is a process of the job; its number is never given again. A *generation* is a set of members that exchange
tensors, each with a rank. It is over when one of them is lost, or when they have ended it together after a step; then
all that are left say how far they are, and the next one begins. Rank 0 is who has got furthest, and so the one from
whom all take the state. Members that are not in a generation yet are *newcomers*: they have no state.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: The step of who has no state.
NO_STATE = -1
# After so many generations that have not taken a step between them it is not bad luck.
_MOST_IN_VAIN = 8


@dataclass(frozen=True)
class Over:
    """All of this generation have to leave it."""

    generation: int


@dataclass(frozen=True)
class Ask:
    """This member, of rank 0, has to end its generation after the present step, as others want to join."""

    member: int


@dataclass(frozen=True)
class Wait:
    """Too few are left; newcomers are starting."""

    why: str


@dataclass(frozen=True)
class Dismiss:
    """These members have notice and leave now, as no step is under way; others have the state."""

    members: list[int]


@dataclass(frozen=True)
class Begin:
    """The next generation: its members by host in the order of their ranks, and what has changed."""

    generation: int
    hosts: list[tuple[str, list[int]]]
    before: int  #: processes of the last one
    lost: list[str]  #: whom, and how
    left: list[str]  #: who went as it was asked to
    joined: int
    ends: int = 0  #: by which signal the run ends there, with a checkpoint and before a step; 0: it goes on
    gives_up: str = ""  #: why it has failed, where it ends by that


@dataclass(frozen=True)
class GiveUp:
    """The job cannot go on, not even to a checkpoint; from the newest one it can be started again."""

    why: str


Order = Over | Ask | Wait | Dismiss | Begin | GiveUp


@dataclass(frozen=True)
class _Place:
    """How far a member is: steps done, and whether something of the last one (records, an evaluation) is left to do."""

    step: int
    unfinished: bool


@dataclass
class Generations:
    """Members by host at first; afterwards told what happens to them. `order` says what is to be done, until None."""

    hosts: dict[int, str]  #: of each member that lives
    least: int = 1
    members: list[int] = field(init=False)  #: of the present generation, living ones, by rank
    number: int = 0
    coming: set[str] = field(default_factory=set)  #: hosts that are away, and may come back

    def __post_init__(self) -> None:
        self.members = list(self.hosts)
        self._before = self._of_begun = len(self.members)
        self._over = self._asked = self._given_up = False
        self._told_over = self._told_to_wait = False
        self._places: dict[int, _Place] = {}
        # Whom nobody has written down yet, and how many of them the present generation was told of.
        self._lost: list[str] = []
        self._left: list[str] = []
        self._told = 0, 0
        self._began_at, self._in_vain = NO_STATE, 0
        self._goes_on = True  # its rank 0 has written down that it does
        self._noticed: set[int] = set()
        self._stopped_by = 0
        self._gives_up = ""  # why, while the last generation saves what there is
        self.finished = False  #: a member has come to the end of the run

    def start(self, member: int, host: str) -> None:
        """A newcomer, who will say that it is ready."""
        self.hosts[member] = host

    def ready(self, member: int, generation: int, step: int, unfinished: bool) -> None:
        """It has left that generation, or is there, and has done so many steps."""
        if member not in self.hosts or (member in self.members and generation != self.number):
            return
        self._over = self._over or member in self.members
        self._places[member] = _Place(step, unfinished)

    def begun(self, generation: int) -> None:
        """Its rank 0 has written down that it goes on, and who was lost before."""
        if generation == self.number:
            self._goes_on = True
            lost, left = self._told
            self._lost, self._left, self._told = self._lost[lost:], self._left[left:], (0, 0)
            self._before = self._of_begun

    def lose(self, member: int, how: str = "") -> None:
        """Its process has ended, or is not reached any more; that is told where it says how."""
        if self._end(member):
            self._over = True
        if how:
            self._lost.append(how)

    def notice(self, member: int) -> None:
        """It has been asked to leave, and does so after the present step, or at once where there is none."""
        self._noticed.add(member)

    def stop(self, number: int) -> None:
        """The run has been asked to end by this signal: who takes steps has heard of it, and others begin none."""
        self._stopped_by = number

    def leave(self, member: int, who: str) -> None:
        """Its process has ended as it was asked to; the others have heard of that from itself."""
        if member in self.hosts:  # else it was dismissed
            self._end(member)
            self._left.append(who)

    def finish(self, member: int) -> None:
        """Its process has ended at the end of the run."""
        self._end(member)
        self.finished = True

    def _end(self, member: int) -> bool:
        """Whether it was of the present generation."""
        self.hosts.pop(member, None)
        self._places.pop(member, None)
        if member not in self.members:
            return False
        self.members.remove(member)
        return True

    @property
    def newcomers(self) -> list[int]:
        return [member for member in self.hosts if member not in self.members]

    @property
    def loading(self) -> list[int]:
        """Newcomers that are not ready to join yet."""
        return [member for member in self.newcomers if member not in self._places]

    @property
    def awaited(self) -> list[int]:
        """Members for whom the others wait: to say how far they are, or for a generation to begin."""
        if self._told_over:
            return [member for member in self.members if member not in self._places]
        return [] if self._goes_on else list(self.members)

    def end(self) -> None:
        """Have the present generation end, though nobody is lost: its members wait for each other in vain."""
        self._over = True

    def order(self) -> Order | None:
        """What is to be done next."""
        if self._given_up or (self.finished and not self.members):
            return None
        if not self.members:
            return self._give_up("all processes that had the state of the run were lost")
        arrived = [member for member in self.newcomers if member in self._places]
        if not self._over:
            if arrived and not self._asked:
                self._asked = True
                return Ask(self.members[0])
            return None
        if not self._told_over:
            self._told_over = True
            return Over(self.number)
        if any(member not in self._places for member in self.members):
            return None
        if all(self._places[member].step == NO_STATE for member in self.members):
            return self._give_up("all processes that had the state of the run were lost")
        if self.finished:
            return self._begin([])
        leaving = [member for member in self.members if member in self._noticed]
        if leaving and any(self._places[member].step != NO_STATE for member in {*self.members} - {*leaving}):
            for member in leaving:
                self.leave(member, f"rank {member} on {self.hosts[member]}")
            return Dismiss(leaving)
        there = len(self.members) + len(arrived)
        # Who leaves has the state, and nobody else: in a step others take it, if they may take one.
        lost = bool(leaving) and (there < self.least or there == len(leaving))
        if ends := self._stopped_by or lost * signal.SIGTERM:
            return self._begin([], ends)
        if there < self.least:
            few = f"{there} of {self._before} processes are left, fewer than --min-processes {self.least}"
            if len(arrived) == len(self.newcomers) and not self.coming:
                return self._end_saved(few)
            if self._told_to_wait:
                return None
            self._told_to_wait = True
            return Wait(f"{few}: waiting for those that are starting")
        return self._begin(arrived)

    def _begin(self, arrived: list[int], ends: int = 0) -> Order:
        # Of those that are furthest who has most to do: what is done twice is written once.
        first = max(
            self.members,
            key=lambda member: (
                self._places[member].step,
                self._places[member].unfinished,
                -self.members.index(member),
            ),
        )
        step = self._places[first].step
        self._in_vain = self._in_vain + 1 if step == self._began_at else 0
        self._began_at = step
        if self._in_vain >= _MOST_IN_VAIN and not self._gives_up:
            last = f" (lost at last: {self._lost[-1]})" if self._lost else ""
            return self._end_saved(
                f"step {step} could not be taken by {_MOST_IN_VAIN} sets of processes{last}"
            )
        hosts = in_ranks(first, [*self.members, *arrived], self.hosts)
        begin = Begin(
            *(self.number + 1, hosts, self._before, [*self._lost], [*self._left], len(arrived)),
            *(ends, self._gives_up),
        )
        self._told = len(self._lost), len(self._left)
        self.number += 1
        self.members = [member for _, there in hosts for member in there]
        self._of_begun = len(self.members)
        self._over = self._told_over = self._asked = self._told_to_wait = self._goes_on = False
        self._places = {}
        return begin

    def _end_saved(self, why: str) -> Order:
        """The job cannot go on, but there is the state of its last step: one generation more, which saves that."""
        if self._gives_up:
            return self._give_up(why)
        self._gives_up = why
        return self._begin([], signal.SIGTERM)

    def _give_up(self, why: str) -> GiveUp:
        self._given_up = True
        return GiveUp(self._gives_up or why)


def in_ranks(first: int, members: Sequence[int], hosts: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Members in the order of their ranks: `first` is rank 0, and ranks of a host follow each other."""
    found: dict[str, list[int]] = {}
    for member in (first, *members):
        there = found.setdefault(hosts[member], [])
        if member not in there:
            there.append(member)
    return list(found.items())
