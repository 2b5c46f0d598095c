"""The processes of a job by torch.distributed: NCCL for CUDA tensors, Gloo for those on the CPU.

torch matches collectives by the order in which a process calls them, `World` by their names, as Horovod does: backward
fills buckets in another order where a branch of the network is not taken. So rank 0's order is everybody's. Before it
starts an exchange it tells the others which, by a broadcast of eight bytes; they start theirs when it is its turn. All
of that happens in Gloo's threads, so no process waits for it but where it waits for the sum itself.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import os
import socket
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (
    AllreduceOptions,
    BroadcastOptions,
    DistStoreError,
    PrefixStore,
    ProcessGroupGloo,
    ReduceOp,
    Store,
    Work,
)

from hvd_lb.errors import ExchangeError, UserError
from hvd_lb.world.gather import broadcast_bytes
from hvd_lb.world.launched import Place
from hvd_lb.world.lines import Lines, Patience
from hvd_lb.world.rendezvous import join

# Long enough for the slowest step, short enough that a hang does not last the night.
_WAIT = timedelta(seconds=1800)
# Between processes that are all there: one that dies meanwhile is to hold up the others no longer.
_CONNECT = timedelta(seconds=20)
# Where NCCL may be aborted. torch's thread that looks after it would end a process that has lost a peer; and a call
# that waits for peers, as when they are connected, keeps `abort` waiting for so many seconds.
_OF_NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_NONBLOCKING_TIMEOUT": "120"}
# Those that Horovod adds up, too, and bf16.
_NUMBERS = (torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
# All processes make equally many in a start.
_worlds: dict[str, Iterator[int]] = defaultdict(itertools.count)


class TorchHandle:
    """A collective that is under way, or waits for its turn; `lines` are given where they may be cut.

    Then the host waits for it, on a GPU, too: what is in a stream behind one that never ends would never end either.
    One that is `aborted` when they are cut ends without an error, with anything in its tensor.
    """

    def __init__(
        self,
        tensor: Tensor,
        name: str,
        lines: Lines | None = None,
        *,
        aborted: bool = False,
        patience: Patience | None = None,
    ) -> None:
        self._tensor, self._name, self._lines, self._aborted = tensor, name, lines, aborted
        self._patience = patience
        self._begun = threading.Event()
        self._work: Work | None = None
        self._error: Exception | None = None

    def begin(self, start: Callable[[], Work] | None) -> None:
        """Now it is its turn; None: there is nothing to do."""
        try:
            self._work = start() if start else None
        except RuntimeError as error:
            self._error = error
        self._begun.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._begun.set()

    @property
    def done(self) -> bool:
        return self._begun.is_set() and (self._work is None or self._work.is_completed())

    def wait(self) -> Tensor:
        """Sleeps until it is done. On a GPU only the present stream waits, as for any of its kernels."""
        if self._lines:
            self._lines.wait_for(lambda: self.done, self._patience)
        elif self._patience:
            self._wait_in_patience(self._patience)
        self._begun.wait()
        try:
            if self._error:
                raise self._error
            if self._work:
                self._work.wait()
            if self._aborted and self._lines and self._lines.are_cut:
                raise RuntimeError("its connections were cut")
        except RuntimeError as error:
            self._error = RuntimeError(*error.args)
            raise ExchangeError(
                f"{self._name}: another process has ended, or is not reached ({_first_line(error)})"
            ) from error
        finally:
            if not self._tensor.is_cuda:  # there a later call may come on another stream
                self._work = None  # it holds Gloo's connections, threads and descriptors
        return self._tensor

    def _wait_in_patience(self, patience: Patience) -> None:
        """The first part of the wait, where that is told which lasts."""
        if not self._begun.wait(patience.SECONDS):
            patience.tell()
        elif self._work and not self._tensor.is_cuda:
            try:
                self._work.wait(timedelta(seconds=patience.SECONDS))
            except RuntimeError:  # its own, which it will raise again, or for the time
                if not self._work.is_completed():
                    patience.tell()


class _OnStream:
    """A collective of NCCL that is done when its kernel is.

    torch's own `is_completed` is true as well where NCCL has found that a peer is gone, while the kernel still waits.
    """

    def __init__(self, work: Work, stream: Any):
        self._work = work
        work.wait()  # this stream does, which has nothing but collectives
        self._end = stream.record_event()

    def is_completed(self) -> bool:
        return bool(self._end.query())

    def wait(self) -> None:
        self._work.wait()


class Nccl:
    """The processes as NCCL connects them, on a device of each, at the first collective."""

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, *, may_be_aborted: bool):
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = _WAIT
        if may_be_aborted:
            for name, value in _OF_NCCL.items():
                os.environ.setdefault(name, value)
            options.config.blocking = 0  # else connecting to a peer that does not come could not be aborted
        self._group = ProcessGroupNCCL(store, rank, size, options)
        self._device, self._stream, self._may_be_aborted = device, torch.cuda.Stream(device), may_be_aborted

    def starting(self, collective: Callable[[Any], Work]) -> Callable[[], Work]:
        """What starts it, from any thread, after the kernels that the present stream has been given so far."""
        ready = torch.cuda.current_stream(self._device).record_event()

        def start() -> Work:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                work = collective(self._group)
                started: Any = _OnStream(work, self._stream) if self._may_be_aborted else work
                return started

        return start

    def abort(self) -> None:
        """End what is under way, wherever peers are; nothing can be started afterwards. It may take seconds."""
        self._group.abort()


class TorchWorld:
    """The `size` processes of which this one is at `place`.

    Which CUDA device a process uses is the caller's choice, as in a `HorovodWorld`; on a `device` that is told NCCL is
    there when this returns, else with the first collective. Raises `UserError` where the others do not come.
    `ExchangeError` surfaces where one of them has ended.
    """

    def __init__(
        self,
        place: Place,
        *,
        may_be_cut: bool = False,
        device: torch.device | None = None,
        watched: bool = False,
    ) -> None:
        self.rank, self.size = place.rank, place.size
        store, address = join(place)
        # torchrun's store outlives the processes, and ours generations of an elastic job.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(f"hvd_lb/{start}/{next(_worlds[start])}", store)
        hosts = _hosts(self._store, place)
        here = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        self.local_size = len(here)
        self.local_rank = here.index(self.rank) if place.local_rank is None else place.local_rank
        self._lines, self._may_be_cut, self._watched = Lines(), may_be_cut, watched
        with self._lines.while_joining():
            try:
                wait = _CONNECT if may_be_cut else _WAIT
                self._gloo: Any = _gloo(PrefixStore("gloo", self._store), self.rank, self.size, address, wait)
            except RuntimeError as error:
                raise ExchangeError(f"the processes are not connected ({_first_line(error)})") from error
        self._nccl: Nccl | None = None
        self._making = threading.Lock()  # of NCCL, which is not made any more when it would have been aborted
        self._aborting: threading.Thread | None = None
        self._changed = threading.RLock()
        self._waiting: dict[int, tuple[TorchHandle, Callable[[], Work]]] = {}  # for their turn, by key
        self._turn: int | None = None  # the key of what rank 0 has started and this process has not come to
        self._asking = False
        self._last: list[TorchHandle] = []
        self._pid = os.getpid()
        atexit.register(self._end)
        if device and device.type == "cuda":
            try:
                self.allreduce(torch.zeros(1, device=device), "hvd_lb.joined")
            except Exception:
                self.cut()
                self.abandon()
                raise

    def room(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    def allreduce_async(self, tensor: Tensor, name: str) -> TorchHandle:
        return self._reduce(tensor, name, ReduceOp.SUM)

    def maximum_async(self, tensor: Tensor, name: str) -> TorchHandle:
        return self._reduce(tensor, name, ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, name: str, operation: Any) -> TorchHandle:
        if tensor.dtype not in _NUMBERS:
            raise ValueError(f"{name}: a reduction of {tensor.dtype}; expected one of {_NUMBERS}")
        options = AllreduceOptions()
        options.reduceOp, options.timeout = operation, _WAIT
        return self._start(tensor, name, lambda group: group.allreduce([tensor], options))

    def allreduce(self, tensor: Tensor, name: str) -> Tensor:
        return self.allreduce_async(tensor, name).wait()

    def broadcast(self, tensor: Tensor, name: str) -> Tensor:
        # The same memory as bytes, so any dtype will do. (What is not contiguous is refused, not copied.)
        data = tensor.detach()
        data = data.reshape(-1).view(torch.uint8) if data.is_contiguous() else data
        self._start(data, name, lambda group: group.broadcast([data], _from_rank_0())).wait()
        return tensor

    def broadcast_bytes(self, data: bytes, name: str) -> bytes:
        return broadcast_bytes(self, data, name)

    def barrier(self) -> None:
        self.allreduce(torch.zeros(1), "hvd_lb.barrier")

    def shutdown(self) -> None:
        """Returns when all processes have called it, or one has ended."""
        with suppress(ExchangeError):
            self.barrier()
        self.abandon()

    def wait_for(self, done: Callable[[], bool], name: str) -> None:
        """Sleep until something is done that others have a part in; ExchangeError where connections are cut."""
        self._lines.wait_for(done, self._patience(name))

    def _patience(self, name: str) -> Patience | None:
        return None if self._watched else Patience(self.rank, name)

    def cut(self) -> None:
        """From any thread, and at once: NCCL is aborted in another one."""
        self._lines.cut()
        self._abort()

    def _abort(self) -> None:
        with self._making:
            if self._nccl and not self._aborting:
                self._aborting = threading.Thread(target=self._nccl.abort, name="abort", daemon=True)
                self._aborting.start()

    def abandon(self) -> None:
        atexit.unregister(self._end)
        if self._may_be_cut:
            self._abort()
        if self._aborting:
            self._aborting.join()
        with self._changed:
            self._waiting.clear()
            self._last.clear()
        self._gloo = self._nccl = None

    def _start(self, tensor: Tensor, name: str, collective: Callable[[Any], Work]) -> TorchHandle:
        """Starts a collective, or notes it until it is its turn."""
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: the tensor has gaps or is transposed; expected a contiguous one")
        nccl = self._nccl_for(tensor) if tensor.numel() else None
        handle = TorchHandle(
            tensor,
            name,
            self._lines if self._may_be_cut else None,
            aborted=nccl is not None,
            patience=self._patience(name),
        )
        if not tensor.numel():
            handle.begin(None)
            return handle
        start = nccl.starting(collective) if nccl else partial(collective, self._gloo)
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
        with self._changed:
            self._last = [*(other for other in self._last if not other.done), handle]
            if self.rank == 0:
                self._gloo.broadcast([torch.tensor([key])], _from_rank_0())
                handle.begin(start)
            elif self._turn == key:
                self._turn = None
                handle.begin(start)
                self._ask()
            elif key in self._waiting:
                raise ValueError(
                    f"{name} is under way already: a name is free again when its sum was waited for"
                )
            else:
                self._waiting[key] = handle, start
                self._ask()
        return handle

    def _ask(self) -> None:
        """Have `_told` called with what rank 0 starts next, if this process has something that waits for its turn."""
        if self._waiting and self._turn is None and not self._asking:
            self._asking = True
            key = torch.zeros(1, dtype=torch.int64)
            self._gloo.broadcast([key], _from_rank_0()).get_future().add_done_callback(
                partial(self._told, key)
            )

    def _told(self, key: Tensor, future: Any) -> None:
        with self._changed:
            self._asking = False
            try:
                future.value()
            except RuntimeError as error:
                for handle, _ in self._waiting.values():
                    handle.fail(error)
                self._waiting.clear()
                return
            self._turn = int(key)
            if self._turn in self._waiting:
                handle, start = self._waiting.pop(self._turn)
                self._turn = None
                handle.begin(start)
                self._ask()

    def _nccl_for(self, tensor: Tensor) -> Nccl | None:
        """What exchanges it; None: Gloo does."""
        if not tensor.is_cuda:
            return None
        with self._making:
            if self._may_be_cut and self._lines.are_cut:
                raise ExchangeError("the connections were cut")
            if self._nccl is None:
                store = PrefixStore("nccl", self._store)
                self._nccl = Nccl(store, self.rank, self.size, tensor.device, may_be_aborted=self._may_be_cut)
            return self._nccl

    def _end(self) -> None:
        """At the end of the program: one that leaves in the middle of an exchange ends at once.

        The others wait for it, and Gloo's threads here for them: none would end. Else those threads end here, before
        the interpreter: it ends a thread that comes back to Python after it, by what C++ takes for a crash (SIGABRT).
        """
        if os.getpid() != self._pid:  # a fork, where none of Gloo's threads are
            return
        if any(not handle.done for handle in self._last):
            print(f"rank {self.rank} ends in the middle of an exchange with the others", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        self.abandon()


def _from_rank_0() -> BroadcastOptions:
    options = BroadcastOptions()
    options.rootRank, options.rootTensor, options.timeout = 0, 0, _WAIT
    return options


def _hosts(store: Store, place: Place) -> list[str]:
    """The host of each rank, once all have come. UserError that names those that do not."""
    keys = [f"host/{rank}" for rank in range(place.size)]
    store.set(keys[place.rank], socket.gethostname())
    patience: timedelta = store.timeout  # type: ignore[attr-defined]  # torch's stubs say nothing of it
    try:
        store.wait(keys, patience)
    except DistStoreError:
        absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise UserError(
            f"{len(absent)} of {place.size} ranks did not come within {patience.total_seconds():.0f} s: "
            f"{', '.join(absent[:20])}"
            f"{' …' if len(absent) > 20 else ''}; where {place.launcher}'s variables are left from another job, unset "
            "them"
        ) from None
    return [host.decode() for host in store.multi_get(keys)]


def _gloo(store: Store, rank: int, size: int, address: str, wait: timedelta) -> Any:
    """Gloo's processes, connected on GLOO_SOCKET_IFNAME, or else on the interface of `address`."""
    gloo: Any = ProcessGroupGloo  # of which torch's types tell less than there is
    options = gloo._Options()
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    where = {"interface": interface} if interface else {"hostname": address}
    options._devices, options._timeout = [gloo.create_device(**where)], wait
    return gloo(store, rank, size, options)


def _first_line(error: Exception) -> str:
    """Without torch's general advice."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).partition(". This is ")[0]
