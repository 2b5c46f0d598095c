"""CUDA graphs: the kernels of a network's forward and backward, recorded once for a shape of its images, and replayed.

A GPU may be done with a small microbatch before its host has launched the thousand kernels of one. A graph is launched
at once, and hooks, buckets and the exchange, which stay outside, run while the GPU works. The kernels are those that
would have been launched. Backward is one graph: no gradient comes, and nothing is exchanged, before its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

# cuDNN tries its kernels in the first, and torch makes what it makes once.
_WARM_UPS = 3

# Each keeps a copy of the gradients; sizes of images change, and groups are tried, one after the other.
_MOST = 3
# Of either way that is tried, of which the first one does not count.
_TURNS = 3

Work = Callable[[], Sequence[Tensor]]


class Recorder(Protocol):
    """What records work; on GPUs a `GraphRecorder`."""

    def aside(self) -> AbstractContextManager[None]:
        """Inside, work runs as it does while it is recorded, but is not."""

    def __call__(self, work: Work) -> tuple[Sequence[Tensor], Callable[[], None]]:
        """The tensors that some work makes, and what makes them anew, in place, from what that reads by then."""


class Forwards(Protocol):
    """What modules keep of a forward besides tensors, which a replayed one does not tell them: batch norm's does."""

    def forget_forward(self) -> None:
        """The forwards that were made last do not count."""

    def noted(self) -> Any:
        """What they have left, for `note`."""

    def note(self, noted: Any) -> None:
        """The same forwards were made again, in the same tensors."""


class GraphRecorder:
    """Records work on a GPU, in memory that all recordings share: what one makes lasts until the next is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def __call__(self, work: Work) -> tuple[Sequence[Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a loader's) go on calling CUDA.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            made = work()
        return made, graph.replay


class Recording:
    """Forward and backward of a network in training mode, for images of one shape; `__call__` is a forward.

    `images` are to be filled before each call. Parameters stay where they are. RuntimeError where the network cannot be
    recorded: it waits for the GPU, draws random numbers on the host, or has a parameter that it does not use.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        recorder: Recorder,
        autocast: Callable[[], AbstractContextManager[None]],
        forwards: Forwards,
    ) -> None:
        self.images, self._forwards = images, forwards
        learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._parameters = list(learning.values())
        self._places = self._find()
        # The parameters' own nodes of autograd belong to another stream, which recorded work may not wait for.
        aliases = {name: p.detach().requires_grad_() for name, p in learning.items()}
        self.turn = 0  # forwards so far

        def forward() -> list[Tensor]:
            with autocast():
                self._output = functional_call(network, aliases, (images,))
            return [self._output.detach()]

        def backward() -> Sequence[Tensor]:
            return torch.autograd.grad(self._output, list(aliases.values()), self._gradient)

        with recorder.aside():
            host = torch.get_rng_state()
            for _ in range(_WARM_UPS):
                forwards.forget_forward()
                self._gradient = torch.zeros_like(forward()[0])
                backward()
            if images.is_cuda and not torch.equal(host, torch.get_rng_state()):
                raise RuntimeError("it draws random numbers on the host")
        forwards.forget_forward()
        (self._logits,), self._forward = recorder(forward)
        self._noted = forwards.noted()
        forwards.forget_forward()
        self.gradients, self._backward = recorder(backward)

    def _find(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    @property
    def in_place(self) -> bool:
        """Whether the parameters are where they were."""
        return self._places == self._find()

    def __call__(self) -> Tensor:
        """The logits of `images`; backward from them, once and before the next call, is the recorded one."""
        return _Replay.apply(self, *self._parameters)

    def forward(self) -> Tensor:
        self.turn += 1
        self._forward()
        self._forwards.note(self._noted)
        return self._logits.clone()

    def backward(self, gradient: Tensor) -> Sequence[Tensor]:
        self._gradient.copy_(gradient)
        self._backward()
        return [of.detach() for of in self.gradients]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, *parameters: Tensor) -> Tensor:
        logits = recording.forward()
        ctx.recording, ctx.turn = recording, recording.turn
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if ctx.turn != ctx.recording.turn:
            raise RuntimeError(
                "backward of a recorded forward after the next one, which has taken its memory"
            )
        return None, *ctx.recording.backward(gradient)


class Trial:
    """Whether it is faster to replay, or to launch kernels one by one and exchange what is there beside backward.

    Both are tried, one after the other, from `begin` to `end`; then `replays` is the faster one.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._to_try = [False] * _TURNS + [True] * (_TURNS + 2)  # one to be known, one to record
        self._seconds: dict[bool, list[float]] = {False: [], True: []}
        self._began: float | None = None

    @property
    def replays(self) -> bool:
        """What is to be done, or tried, now."""
        if self._to_try:
            return self._to_try[0]
        launched, replayed = (min(seconds[-_TURNS + 1 :]) for seconds in self._seconds.values())
        return replayed < launched

    def begin(self) -> None:
        self._began = self._now() if self._to_try else None

    def end(self) -> None:
        if self._began is not None:
            self._seconds[self._to_try.pop(0)].append(self._now() - self._began)
            self._began = None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


class Recordings:
    """Recordings of a network, by what their kernels depend on; those that were used last are kept."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Recording | None] = {}
        self._left_out: set[Hashable] = set()

    def of(self, key: Hashable, record: Callable[[], Recording]) -> Recording | None:
        """None when it is asked for the first time, as what comes once is not worth it, and of what is left out."""
        if key in self._left_out:
            return None
        known = key in self._made
        found = self._made.pop(key, None)
        if known and (found is None or not found.in_place):
            found = record()
        self._made[key] = found
        while len(self._made) > _MOST:
            del self._made[next(iter(self._made))]
        return found

    def leave_out(self, key: Hashable) -> None:
        self._left_out.add(key)

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Only those, if there are any: memory that all recordings share must not be without one."""
        kept = {key: made for key, made in self._made.items() if wanted(key)}
        if any(kept.values()):
            self._made = kept
