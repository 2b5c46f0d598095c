"""What a new machine must get right, tried for real: `hvd-lb doctor --selftest`.

On the CPU and, where there are any, on all GPUs: a sum over real Horovod processes, DALI's pixels against
torchvision's, and ten training steps of several processes against the same steps simulated by one: to rounding, and in
the reproducible mode in every bit.
Each trial runs in processes of its own (hvd_lb.doctor.trials), so that a library that crashes is a finding too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from hvd_lb.doctor.ask import ProbeError, ask, last_line
from hvd_lb.doctor.finding import Finding
from hvd_lb.doctor.libraries import installed_version

#: Largest relative difference of the weights after ten fp32 steps. Rounding alone gives 1e-7; GPU kernels may
#: add in any order and use TF32.
WEIGHT_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3}
#: Mean and largest difference of a pixel, of 255. GPUs decode JPEG with arithmetic of their own.
PIXEL_TOLERANCE = {"cpu": (0.5, 8.0), "cuda": (2.0, 64.0)}
STEPS = 10
_FIX = "report this with the output of `hvd-lb doctor`"


class TrialError(Exception):
    """Why a trial did not succeed, in one line."""


def selftest() -> Iterator[Finding]:
    """One finding a trial, each as soon as it is known; all are required."""
    try:
        gpus = len(ask("torch")["devices"])
    except ProbeError as error:
        yield Finding("selftest", "wrong", f"torch does not work: {error}", "see torch above", required=True)
        return
    for device, processes in (("cpu", 2), ("cuda", gpus)):
        if processes == 0:
            continue
        where = "CPU" if device == "cpu" else "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        yield attempt(f"allreduce, {where}", partial(try_allreduce, device, processes))
        yield attempt(f"DALI pixels, {where}", partial(try_pixels, device))
        yield attempt(f"train = simulate, {where}", partial(try_training, device, processes))
        yield attempt(f"reproducible, {where}", partial(try_reproducible, device, processes))


def attempt(name: str, trial: Callable[[], str]) -> Finding:
    """The finding of one trial, which returns what it measured or raises TrialError."""
    try:
        return Finding(name, "ok", trial(), required=True)
    except TrialError as error:
        return Finding(name, "wrong", str(error), _FIX, required=True)


def try_allreduce(device: str, processes: int) -> str:
    """Every process adds its own numbers; all must get the sum, also of a tensor larger than a buffer."""
    if installed_version("horovod"):
        launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", str(processes)]
        launcher += ["-H", f"localhost:{processes}", "--network-interface", "lo", sys.executable]
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(processes)]
    run_process([*launcher, "-m", "hvd_lb.doctor.trials", "allreduce", device], seconds=180)
    return f"{processes} processes agree"


def try_pixels(device: str) -> str:
    """The differences of DALI's and torchvision's pixels, within PIXEL_TOLERANCE."""
    output = run_process([sys.executable, "-m", "hvd_lb.doctor.trials", "pixels", device], seconds=180)
    mean, largest = json.loads(output.splitlines()[-1])
    found = f"mean difference {mean:.2f} of 255, largest {largest:.0f}"
    if mean > PIXEL_TOLERANCE[device][0] or largest > PIXEL_TOLERANCE[device][1]:
        limits = "mean {:.1f}, largest {:.0f}".format(*PIXEL_TOLERANCE[device])
        raise TrialError(f"{found}; expected at most {limits}")
    return found


def try_training(device: str, processes: int) -> str:
    """The difference of the weights of `train` and `simulate` after the same steps."""
    with tempfile.TemporaryDirectory(prefix="hvd-lb-selftest-") as folder:
        difference = weight_difference(*train_and_simulate(device, processes, Path(folder), []))
    found = f"relative difference {difference:.1e} after {STEPS} steps"
    if not difference <= WEIGHT_TOLERANCE[device]:  # also when it is NaN
        raise TrialError(f"{found}; expected at most {WEIGHT_TOLERANCE[device]:.0e}")
    return found


def try_reproducible(device: str, processes: int) -> str:
    """That the same steps with --reproducible leave the same bytes."""
    with tempfile.TemporaryDirectory(prefix="hvd-lb-selftest-") as folder:
        runs = train_and_simulate(device, processes, Path(folder), ["--reproducible"])
        if len({model_file(run).read_bytes() for run in runs}) > 1:
            difference = weight_difference(*runs)
            raise TrialError(
                f"relative difference {difference:.1e} after {STEPS} steps; expected the same bits"
            )
    return f"the same bits after {STEPS} steps"


def train_and_simulate(device: str, processes: int, folder: Path, more: list[str]) -> tuple[Path, Path]:
    """The run directories of `train` on these processes and `simulate` on one. TrialError when one failed."""
    gpus = max(2, processes)
    options = ["--data", "digits", "--gpus", str(gpus), "--per-gpu-batch", "8", "--steps", str(STEPS)]
    options += ["--device", device, *more]
    runs = folder / "train", folder / "simulate"
    for run, extra in zip(runs, (["--processes", str(processes)], []), strict=True):
        command = [sys.executable, "-m", "hvd_lb_cli.main", run.name, *options, *extra, "--output", str(run)]
        run_process(command, seconds=600)
    return runs


def model_file(run: Path) -> Path:
    """The weights of a run's last checkpoint; TrialError when there are none."""
    file = run / "checkpoints" / "last" / "model.safetensors"
    if not file.is_file():
        raise TrialError(f"`hvd-lb {run.name}` left no {file.relative_to(run)}")
    return file


def weight_difference(left: Path, right: Path) -> float:
    """Norm of the difference of the last checkpoints' floating tensors, relative to that of the right one."""
    from safetensors.torch import load_file

    a, b = load_file(model_file(left)), load_file(model_file(right))
    if a.keys() != b.keys():
        raise TrialError("train and simulate saved different tensors")
    floating = [name for name in b if b[name].is_floating_point()]
    squares = sum(float((a[name].double() - b[name].double()).square().sum()) for name in floating)
    total = sum(float(b[name].double().square().sum()) for name in floating)
    return (squares / total) ** 0.5


def run_process(command: list[str], seconds: float) -> str:
    """Standard output of a command that must succeed; TrialError with the last thing it said otherwise."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise TrialError(f"still running after {seconds:.0f} s") from None
    finally:
        if process.poll() is None:  # with all it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise TrialError(last_line(errors) or last_line(output) or f"exit code {process.returncode}")
    return output
