"""How long ranks take to find each other: our head and agents, and Horovod's own rendezvous server, in one run.

Every rank is a real one: a process that calls `hvd.init()` and takes part in an allreduce. They are forked from one
process that has loaded torch and Horovod, so hundreds fit into one machine and nothing but the start is timed: from
the first fork to the end of the last `hvd.init()`. Hosts are names, with 16 ranks each (8, up to 64 ranks). Horovod's
server lets 1,024 connections wait here instead of 5, with which 64 ranks do not start at all. With the torch engine it
is `hvd_lb.init()`, and the peer is torch's own server, which asks nobody who he is.

    python benchmarks/startup.py [--engine torch] [--ranks 16 32 64]
    python benchmarks/startup.py --namespaces [--ranks 256]

With `--namespaces` (root) each host is a network namespace with an address of its own on a bridge, as 256 ranks need
more ports than one has; only ours is run, the ranks then train 3 steps of a small model, and agree on its weights.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from horovod.runner.common.util.hosts import HostInfo, get_host_assignments
from horovod.runner.http import http_server

from hvd_lb import SGD, DistributedOptimizer, init, parameter_groups
from hvd_lb.launch.agent import host as agent
from hvd_lb.launch.agent import ranks
from hvd_lb.launch.agent.channel import DESCRIPTOR, open_line, tell
from hvd_lb.launch.agent.head import Head
from hvd_lb.launch.agent.places import rank_environments
from hvd_lb.launch.launch_plan import process_environment

_BRIDGE, _NETWORK = "startup", "10.78.0"
_NEW_MOUNTS, _NEW_NAME = 0x20000, 0x4000000  # clone(2)
_PR_SET_TIMERSLACK, _SLACK_NANOSECONDS = 29, 20_000_000
_SECONDS = 900


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--namespaces", action="store_true")
    parser.add_argument("--engine", choices=["horovod", "torch"], default="horovod")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _Forked.rank = staticmethod(_rank_of_torch if arguments.engine == "torch" else _rank)
    SGD(
        [torch.nn.Parameter(torch.zeros(1))], lr=0.1
    )  # loads what a first optimizer loads: once, not in each rank
    for count in arguments.ranks or ([256] if arguments.namespaces else [16, 32, 64]):
        hosts = [(f"h{number}", size) for number, size in enumerate(_shares(count), 1)]
        print(f"{count} ranks on {len(hosts)} hosts", flush=True)
        with ExitStack() as stack:
            if arguments.namespaces:
                spaces = stack.enter_context(_network(len(hosts)))
                ours = _ours(hosts, spaces, _train)
                _show("ours", ours)
                print(f"  3 steps of training were done after {ours['worked']:.1f} s", flush=True)
                continue
            ours = _ours(hosts, None, lambda rank, size: None)
            _show("ours", ours)
            peer, make = ("torch's", _torchs) if arguments.engine == "torch" else ("Horovod's", _horovods)
            theirs = make(hosts)
            _show(peer, theirs)
            print(f"  ours / {peer}: {ours['seconds'] / theirs['seconds']:.2f} of the time, ", end="")
            print(f"{ours['cpu'] / theirs['cpu']:.2f} of the servers' CPU time", flush=True)


def _shares(count: int) -> list[int]:
    most = 8 if count <= 64 else 16
    return [min(most, count - first) for first in range(0, count, most)]


def _show(name: str, found: dict[str, float]) -> None:
    print(
        f"  {name + ':':11} {found['seconds']:6.1f} s, {found['requests']:,} requests, {found['cpu']:.1f} s of CPU in "
        f"{found['servers']:.0f} servers and {found['rank cpu']:.1f} s in the ranks, memory of the largest server "
        f"{found['memory'] / 2**20:.0f} MB, of a rank {found['rank memory'] / 2**20:.0f} MB of its own",
        flush=True,
    )


# Ranks


def _rank(environment: dict[str, str], results: int, work: Callable[[int, int], None]) -> None:
    """In a forked process: take part, and write when `hvd.init()` was done, what it cost in CPU seconds, this process's
    own memory in bytes, and when `work` was done."""
    # `hvd.init()` looks every millisecond whether it is done: 256 that do so take two cores for themselves.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NANOSECONDS)
    os.environ.clear()
    os.environ.update(environment)
    if DESCRIPTOR in environment:
        open_line()
        tell("arrived")
    hvd.init()
    done, used = time.monotonic(), time.process_time()
    total = hvd.allreduce(torch.ones(1), op=hvd.Sum, name="all").item()
    if total != hvd.size():
        raise RuntimeError(f"{total} of {hvd.size()} ranks took part")
    work(hvd.rank(), hvd.size())
    os.write(results, json.dumps([done, used, _own_memory(), time.monotonic()]).encode() + b"\n")
    hvd.barrier()
    hvd.shutdown()


def _rank_of_torch(environment: dict[str, str], results: int, work: Callable[[int, int], None]) -> None:
    """The same by the torch engine."""
    os.environ.clear()
    os.environ.update(environment)
    os.environ["GLOO_SOCKET_IFNAME"] = environment["HOROVOD_GLOO_IFACE"]
    if DESCRIPTOR in environment:
        open_line()
        tell("arrived")
    world = init("torch")
    done, used = time.monotonic(), time.process_time()
    total = world.allreduce(torch.ones(1), "all").item()
    if total != world.size:
        raise RuntimeError(f"{total} of {world.size} ranks took part")
    work(world.rank, world.size)
    os.write(results, json.dumps([done, used, _own_memory(), time.monotonic()]).encode() + b"\n")
    world.shutdown()


def _own_memory() -> int:
    """Of this process, in bytes."""
    rolled = Path("/proc/self/smaps_rollup").read_text().split()
    return sum(int(rolled[rolled.index(name) + 1]) for name in ("Private_Clean:", "Private_Dirty:")) * 1024


def _train(rank: int, size: int) -> None:
    """3 steps of a small model by the library's own optimizer; all processes have the same weights afterwards."""
    torch.manual_seed(rank)
    init()
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )
    optimizer = DistributedOptimizer(SGD(parameter_groups(model), lr=0.1), model)
    for _ in range(3):
        images, labels = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
        optimizer.backward(torch.nn.functional.cross_entropy(model(images), labels, reduction="sum"))
        optimizer.step(images=8 * size)
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    most, least = hvd.allreduce(torch.stack([weights, -weights]), op=hvd.Max, name="ends")
    if not torch.equal(most, -least):
        raise RuntimeError("the weights of the ranks differ")


def _fork(work: Callable[[], int | None]) -> int:
    """A process that does this work, and ends with the status that it gives."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        status = work() or 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


class _Forked:
    """In place of subprocess.Popen: the rank is a fork of this process."""

    results: int
    rank: Callable[..., None]
    work: Callable[[int, int], None]

    def __init__(self, command: Sequence[str], *, env: dict[str, str], **_: object) -> None:
        del command
        environment = {**env, "HOROVOD_GLOO_IFACE": os.environ["STARTUP_INTERFACE"]}
        self.pid = _fork(lambda: type(self).rank(environment, self.results, type(self).work))
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


# Servers


def _ours(
    hosts: list[tuple[str, int]], spaces: list[int] | None, work: Callable[[int, int], None]
) -> dict[str, float]:
    """A head and an agent for each host, all of them processes of their own."""
    count = sum(size for _, size in hosts)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "logs").mkdir()
        (Path(folder) / "meeting").touch()
        job_file = Path(folder) / "job.json"
        # Far more ranks than cores: they are to look for work less often than every millisecond.
        environment = {**process_environment(1), "HOROVOD_CYCLE_TIME": "50"}
        job = {"hosts": hosts, "processes": count, "output": folder, "environment": environment}
        job_file.write_text(json.dumps(job))
        results, write_results = os.pipe()
        costs, write_costs = os.pipe()
        _Forked.results, _Forked.work = write_results, staticmethod(work)

        def head() -> int:
            _enter(spaces, 0, folder)
            address = f"{_NETWORK}.1" if spaces else "127.0.0.1"
            # What stands for srun hands the line for the agents on by a file.
            keep = ["sh", "-c", 'exec cat > "$0"', f"{folder}/meeting"]
            status = asyncio.run(Head(job, job_file, "all", keep).run(address))
            _cost(write_costs, 0)
            return status

        def on_host(number: int) -> int:
            _enter(spaces, number, folder)
            os.environ["STARTUP_INTERFACE"] = "eth0" if spaces else "lo"
            ranks.subprocess.Popen = _Forked  # type: ignore[attr-defined]
            while not (line := (Path(folder) / "meeting").read_text()).endswith("\n"):
                time.sleep(0.01)
            serving = []
            make = agent.Agent.__init__

            def remember(self: agent.Agent, *arguments: Any) -> None:
                make(self, *arguments)
                serving.append(self)

            agent.Agent.__init__ = remember  # type: ignore[method-assign]
            status = asyncio.run(agent.serve(job_file, hosts[number][0], json.loads(line)))
            _cost(write_costs, serving[0].rendezvous.requests)
            return status

        pids = [_fork(head)]
        while not (Path(folder) / "meeting").read_text().endswith("\n"):
            time.sleep(0.01)
        began = time.monotonic()
        pids += [_fork(lambda number=number: on_host(number)) for number in range(len(hosts))]
        os.close(write_results)
        os.close(write_costs)
        return _found(began, pids, count, results, costs)


def _horovods(hosts: list[tuple[str, int]]) -> dict[str, float]:
    """Horovod's server in a process of its own."""
    count, requests = sum(size for _, size in hosts), 0

    def listen() -> tuple[int, object]:
        parse = http_server.RendezvousHandler.parse_request

        def count_requests(self: Any) -> bool:
            nonlocal requests
            requests += 1
            return bool(parse(self))

        http_server.RendezvousHandler.parse_request = count_requests
        http_server.RendezvousHTTPServer.request_queue_size = 1024
        server = http_server.RendezvousServer()
        port = server.start()
        server.init(get_host_assignments([HostInfo(*host) for host in hosts], count, count))
        return port, server

    def told(port: str) -> dict[str, str]:
        return {
            "HOROVOD_CYCLE_TIME": "50",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
            "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
        }

    return _theirs(hosts, listen, lambda: requests, told, _rank)


def _torchs(hosts: list[tuple[str, int]]) -> dict[str, float]:
    """torch's server in a process of its own; what it was asked it does not count."""

    def listen() -> tuple[int, object]:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port = listener.getsockname()[1]
        words = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
        server = torch.distributed.TCPStore("127.0.0.1", port, **words)
        return server.port, server

    def told(port: str) -> dict[str, str]:
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}

    return _theirs(hosts, listen, lambda: 0, told, _rank_of_torch)


def _theirs(
    hosts: list[tuple[str, int]],
    listen: Callable[[], tuple[int, object]],
    requests: Callable[[], int],
    told: Callable[[str], dict[str, str]],
    rank: Callable[..., None],
) -> dict[str, float]:
    """A server in a process of its own: `listen` gives its port, and ranks are `told` that."""
    results, write_results = os.pipe()
    costs, write_costs = os.pipe()
    ports, write_ports = os.pipe()
    done, release = os.pipe()

    def serve() -> None:
        port, kept = listen()
        os.write(write_ports, str(port).encode())
        os.close(release)
        os.read(done, 1)
        _cost(write_costs, requests())
        del kept

    server = _fork(serve)
    os.close(write_costs)
    common = {**process_environment(1), "HOROVOD_GLOO_IFACE": "lo", **told(os.read(ports, 100).decode())}
    began = time.monotonic()
    pids = [
        _fork(lambda place=place: rank({**common, **place}, write_results, lambda rank, size: None))
        for name, _ in hosts
        for place in rank_environments(hosts, name).values()
    ]
    os.close(write_results)
    for pid in pids:
        os.waitpid(pid, 0)
    os.close(release)
    return _found(began, [server], sum(size for _, size in hosts), results, costs)


def _cost(stream: int, requests: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    os.write(stream, json.dumps([requests, used.ru_utime + used.ru_stime, _own_memory()]).encode() + b"\n")


def _found(began: float, pids: list[int], count: int, results: int, costs: int) -> dict[str, float]:
    signal.alarm(_SECONDS)
    with open(results) as lines:
        told = [json.loads(line) for line in lines]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    signal.alarm(0)
    if any(statuses) or len(told) != count:
        raise SystemExit(f"{len(told)} of {count} ranks have come through; exit statuses {statuses}")
    with open(costs) as lines:
        spent = [json.loads(line) for line in lines]
    return {
        "seconds": max(done for done, *_ in told) - began,
        "worked": max(worked for *_, worked in told) - began,
        "rank cpu": sum(used for _, used, *_ in told),
        "requests": sum(requests for requests, _, _ in spent),
        "cpu": sum(seconds for _, seconds, _ in spent),
        "servers": len(spent),
        "memory": max(own for _, _, own in spent),
        "rank memory": sum(own for *_, own, _ in told) / count,
    }


# Hosts


@contextmanager
def _network(count: int) -> Iterator[list[int]]:
    """Descriptors of the network namespaces of so many hosts on a bridge; all are gone with their processes."""

    def ip(*words: str, inside: int | None = None) -> None:
        enter = ["nsenter", f"--net=/proc/{inside}/ns/net"] if inside else []
        subprocess.run([*enter, "ip", *words], check=True)

    def keeper() -> int:
        process = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"], stdout=subprocess.PIPE
        )
        assert process.stdout
        process.stdout.readline()
        processes.append(process)
        return process.pid

    processes: list[subprocess.Popen[bytes]] = []
    spaces: list[int] = []
    try:
        switch = keeper()
        ip("link", "add", _BRIDGE, "type", "bridge", inside=switch)
        ip("link", "set", _BRIDGE, "up", inside=switch)
        for number in range(1, count + 1):
            host = keeper()
            ip(
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                f"h{number}",
                "netns",
                str(switch),
                inside=host,
            )
            ip("link", "set", f"h{number}", "master", _BRIDGE, "up", inside=switch)
            ip("addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0", inside=host)
            ip("link", "set", "eth0", "up", inside=host)
            ip("link", "set", "lo", "up", inside=host)
            spaces.append(os.open(f"/proc/{host}/ns/net", os.O_RDONLY))
        yield spaces
    finally:
        for space in spaces:
            os.close(space)
        for process in processes:
            process.kill()
            process.wait()


def _enter(spaces: list[int] | None, number: int, folder: str) -> None:
    """Become a host with a network and a name of its own, if there are any; Gloo looks its address up by its name."""
    if spaces is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(spaces[number], 0) or libc.unshare(_NEW_MOUNTS | _NEW_NAME):
        raise OSError(ctypes.get_errno(), "namespaces")
    socket.sethostname(f"h{number + 1}")
    hosts = Path(folder) / f"hosts-{os.getpid()}"
    hosts.write_text("".join(f"{_NETWORK}.{other + 1} h{other + 1}\n" for other in range(len(spaces))))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", hosts, "/etc/hosts"], check=True)


if __name__ == "__main__":
    main()
