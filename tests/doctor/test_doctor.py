"""hvd-lb doctor: what each state of a machine is called, what fails, and that a broken library is only a finding."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from hvd_lb.doctor import libraries, machine
from hvd_lb.doctor.ask import ProbeError, ask
from hvd_lb.doctor.examine import examine
from hvd_lb.doctor.finding import Finding
from hvd_lb.doctor.selftest import TrialError, run_process, selftest, try_pixels, weight_difference
from hvd_lb.machine.limits import available_memory
from hvd_lb_cli.doctor.command import doctor

GONE = ProbeError("ModuleNotFoundError: No module named 'it'")
CPU_TORCH = {"version": "2.14.1+cu130", "cuda": "13.0", "devices": []}
GPU_TORCH = {**CPU_TORCH, "devices": [{"name": "H200", "works": True}] * 2}
GPUS = {"driver": "580.65", "cuda": "13.0", "names": ["H200", "H200"], "gib": [139.8, 139.8]}
HOROVOD = {"version": "0.28.1", "gloo": True, "mpi": False, "nccl": True}
BUILD = {"torch": "2.14.1+cu130"}


def states(*findings: Finding) -> list[tuple[str, bool]]:
    return [(finding.state, finding.prevents_training) for finding in findings]


def test_a_library_is_missing_or_broken() -> None:
    assert states(libraries.check_torch(CPU_TORCH)) == [("ok", False)]
    assert states(libraries.check_dali(GONE, None)) == [("missing", True)]
    assert states(libraries.check_dali({"version": "2.4.0", "works": False}, "2.4.0")) == [("wrong", True)]
    dali = {"version": "2.4.0", "works": True, "nvjpeg": [13, 0, 1]}
    assert states(libraries.check_dali(dali, "2.4.0")) == [("wrong", False)]  # slower
    assert states(libraries.check_dali({**dali, "nvjpeg": [13, 3, 2]}, "2.4.0")) == [("ok", False)]
    nms = ProbeError("RuntimeError: operator torchvision::nms does not exist")
    broken = libraries.check_torchvision(nms)
    assert states(broken) == [("wrong", True)]  # installed here
    assert "operator torchvision::nms" in broken.detail
    assert "pip install --upgrade torchvision" in broken.fix
    assert states(libraries.check_python((3, 10, 4)), libraries.check_python((3, 11, 0))) == [
        ("wrong", True),
        ("ok", False),
    ]


def horovod_states(
    horovod: Any = HOROVOD, installed: str | None = "0.28.1", build: Any = BUILD, torch: Any = CPU_TORCH
) -> list[tuple[str, bool]]:
    return states(*libraries.check_horovod(horovod, installed, build, torch, "/bin/horovodrun"))


def test_horovod_must_fit_torch_and_the_gpus() -> None:
    fine = [("ok", False)] * 4
    assert horovod_states() == fine
    assert horovod_states(build={}) == fine  # built by somebody else: who knows
    assert horovod_states(build={"torch": "2.14.1"}) == fine
    assert horovod_states(build={"torch": "2.13.0+cu130"}) == [("wrong", True), *fine[1:]]
    assert horovod_states({**HOROVOD, "gloo": False}) == [fine[0], ("wrong", True), *fine[2:]]
    no_nccl = {**HOROVOD, "nccl": False}
    assert horovod_states(no_nccl) == fine
    assert horovod_states(no_nccl, torch=GPU_TORCH) == [*fine[:2], ("wrong", True), fine[3]]
    assert horovod_states(GONE, None) == [("missing", False)]  # torch.distributed does it
    assert horovod_states(ProbeError("ImportError: libmpi.so.40"), "0.28.1") == [("wrong", True)]


def test_no_gpu_is_missing_without_failing() -> None:
    none = ProbeError("NVML Shared Library Not Found")
    assert (
        states(libraries.check_driver(none, CPU_TORCH), libraries.check_gpus(none, CPU_TORCH, None))
        == [("missing", False)] * 2
    )


def test_a_gpu_that_torch_cannot_use_is_wrong() -> None:
    assert states(libraries.check_gpus(GPUS, GPU_TORCH, None)) == [("ok", False)]
    assert states(libraries.check_gpus(GPUS, CPU_TORCH, None)) == [("wrong", True)]
    assert states(libraries.check_gpus(GPUS, GONE, None)) == [("wrong", True)]
    one_broken = {**CPU_TORCH, "devices": [{"name": "H200", "works": works} for works in (True, False)]}
    assert states(libraries.check_gpus(GPUS, one_broken, None)) == [("wrong", True)]
    assert states(libraries.check_driver({**GPUS, "cuda": "12.4"}, GPU_TORCH)) == [("wrong", True)]


def test_hidden_gpus_are_no_failure() -> None:
    assert states(libraries.check_gpus(GPUS, CPU_TORCH, "")) == [("missing", False)]
    one = {**CPU_TORCH, "devices": [{"name": "H200", "works": True}]}
    assert states(libraries.check_gpus(GPUS, one, "1")) == [("ok", False)]


def test_open_mpi_and_a_compiler_are_optional() -> None:
    found = (libraries.check_open_mpi(None, HOROVOD), machine.check_compiler(None, None))
    assert states(*found) == [("missing", False)] * 2
    assert "apt-get install g++ make" in found[1].fix


def test_room_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    planned = tmp_path / "not" / "yet"
    assert machine.check_disk("disk", planned, least=1).state == "ok"
    full = machine.check_disk("disk", planned, least=2**62)
    assert states(full) == [("wrong", True)]
    assert str(planned) in full.detail
    assert machine.check_memory(2**30).state == "wrong"
    assert machine.check_memory(available_memory(), least=1).state == "ok"
    # 64 MB, as in a container, matter between GPUs only
    small = {"least": 2**62}
    assert machine.check_shared_memory(tmp_path, GPU_TORCH, **small).prevents_training
    assert not machine.check_shared_memory(tmp_path, CPU_TORCH, **small).prevents_training


@pytest.fixture
def broken_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises, DALI ends the process, Horovod says nothing and exits."""
    bodies = {
        "torch": "raise OSError('libcudart.so.13: cannot open shared object file')",
        "nvidia": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "horovod": "import sys; sys.exit(3)",
    }
    for name, body in bodies.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("broken_libraries")
def test_broken_libraries_are_answers() -> None:
    for library, reason in (("torch", "libcudart"), ("dali", "SIGSEGV"), ("horovod", "exit code 3")):
        with pytest.raises(ProbeError, match=reason):
            ask(library)


@pytest.mark.slow
def test_a_library_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pynvml.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ProbeError, match="no answer within 1 s"):
        ask("gpus", timeout=1)


@pytest.mark.usefixtures("broken_libraries")
def test_doctor_works_and_fails_when_nothing_else_works() -> None:
    command = [sys.executable, "-m", "hvd_lb_cli.main", "doctor"]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}, check=False
    )
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    found = {line[8:24].strip(): line[:8].strip() for line in run.stdout.splitlines()}
    assert found["torch"] == found["DALI"] == found["Horovod"] == "wrong"
    assert found["Python"] == found["cores"] == "ok"
    assert "torch" in run.stdout.splitlines()[-1]


def test_the_printed_lines_and_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [
        Finding("torch", "ok", "2.14.1", required=True),
        Finding("GPUs", "missing", "none", "buy [one]"),
    ]
    monkeypatch.setattr("hvd_lb_cli.doctor.command.examine", lambda: iter(findings))
    run = CliRunner().invoke(doctor, standalone_mode=False)
    assert run.return_value == 0
    assert run.output == "ok      torch             2.14.1\nmissing GPUs              none; fix: buy [one]\n"
    findings.append(Finding("DALI", "missing", "not installed", "install it", required=True))
    run = CliRunner().invoke(doctor, standalone_mode=False)
    assert run.return_value == 1
    assert run.output.endswith("cannot run here as it is: DALI\n")


def test_weights_are_compared_relative_to_their_norm(tmp_path: Path) -> None:
    def save(run: str, **tensors: torch.Tensor) -> Path:
        folder = tmp_path / run / "checkpoints" / "last"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors")
        return tmp_path / run

    a = save("a", weight=torch.tensor([3.0, 4.0]), steps=torch.tensor(7))
    b = save("b", weight=torch.tensor([3.0, 4.5]), steps=torch.tensor(9))
    c = save("c", other=torch.tensor([3.0, 4.0]))
    assert weight_difference(a, a) == 0
    assert weight_difference(b, a) == pytest.approx(0.1)
    with pytest.raises(TrialError, match="different tensors"):
        weight_difference(a, c)
    with pytest.raises(TrialError, match="`hvd-lb d` left no"):
        weight_difference(a, tmp_path / "d")


def test_a_failed_trial_says_its_last_line() -> None:
    with pytest.raises(TrialError, match="^ValueError: so$"):
        run_process([sys.executable, "-c", "raise ValueError('so')"], seconds=30)
    with pytest.raises(TrialError, match="still running"):
        run_process([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.2)


@pytest.mark.slow
def test_this_environment_can_train() -> None:
    assert [finding for finding in examine() if finding.prevents_training] == []


@pytest.mark.slow
def test_dali_pixels_are_those_of_torchvision() -> None:
    assert "mean difference 0." in try_pixels("cpu")


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_selftest_passes_on_gpus() -> None:
    assert [finding for finding in selftest() if finding.state != "ok"] == []
