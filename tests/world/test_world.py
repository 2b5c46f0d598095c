"""Which world a process finds itself in, and what it is told when Horovod does not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hvd_lb.world
from hvd_lb.errors import UserError
from hvd_lb.world.solo import Solo


@pytest.fixture(autouse=True)
def plain_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOROVOD", "OMPI_COMM_WORLD", "PMI"):
        monkeypatch.delenv(f"{name}_SIZE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    monkeypatch.setattr(hvd_lb.world, "_current", None)


def test_solo_is_its_own_sum() -> None:
    world = Solo()
    tensor = torch.arange(3)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    assert world.allreduce_async(tensor, "a").wait() is tensor
    assert world.allreduce(tensor, "a") is tensor
    assert world.broadcast(tensor, "a").tolist() == [0, 1, 2]
    assert world.broadcast_bytes(b"abc", "a") == b"abc"
    world.barrier()


def test_init_is_remembered_until_shutdown() -> None:
    with pytest.raises(RuntimeError, match=r"hvd_lb.init\(\)"):
        hvd_lb.world.current()
    world = hvd_lb.world.init()
    assert isinstance(world, Solo)
    assert hvd_lb.world.init() is world is hvd_lb.world.current()
    hvd_lb.world.shutdown()
    hvd_lb.world.shutdown()
    with pytest.raises(RuntimeError):
        hvd_lb.world.current()


@pytest.mark.slow
def test_solo_imports_nothing_of_horovod() -> None:
    code = (
        "import sys, hvd_lb.world as w; w.init(); sys.exit(any(m.startswith('horovod') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_world_that_is_smaller_than_what_was_started_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As Horovod without MPI is under mpirun."""
    one = "\n".join(f"def {name}(): return {value}" for name, value in
                    {"init": None, "rank": 0, "size": 1, "local_rank": 0, "local_size": 1}.items())  # fmt: skip
    TestHorovodThatDoesNotFit().place(monkeypatch, tmp_path, one)
    with pytest.raises(UserError, match="2 processes were started, and Horovod found 1"):
        hvd_lb.world.init()
    for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
        del sys.modules[name]


class TestHorovodThatDoesNotFit:
    """Stand-in packages named horovod at the front of the path."""

    def place(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, source: str, record: object = None
    ) -> None:
        package = folder / "horovod"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "torch.py").write_text(source)
        if record is not None:
            (package / "hvd_lb_build.json").write_text(json.dumps(record))
        for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("HOROVOD_RANK", "0")
        monkeypatch.setenv("HOROVOD_SIZE", "2")

    @pytest.fixture(autouse=True)
    def _forget(self) -> object:
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
            del sys.modules[name]

    def test_built_for_another_torch(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.place(monkeypatch, tmp_path, "raise AssertionError('imported')", {"torch": "1.0.0"})
        with pytest.raises(UserError, match=rf"torch 1\.0\.0.*{torch.__version__.split('+')[0]}.*make train"):
            hvd_lb.world.init()

    def test_that_does_not_load(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.place(monkeypatch, tmp_path, "raise OSError('undefined symbol: _ZN3c10\\nmore')")
        with pytest.raises(UserError, match=r"undefined symbol: _ZN3c10\).*make train") as caught:
            hvd_lb.world.init()
        assert "\n" not in str(caught.value)

    @pytest.mark.filterwarnings("ignore:sys.meta_path is empty:ImportWarning")
    def test_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOROVOD_RANK", "0")
        monkeypatch.setenv("HOROVOD_SIZE", "2")
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.setattr(sys, "meta_path", [])
        for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
            monkeypatch.delitem(sys.modules, name)
        from hvd_lb.world.horovod import HorovodWorld

        with pytest.raises(UserError, match=r"not installed.*build-horovod\.sh"):
            HorovodWorld()
