"""Which engine a job gets."""

from __future__ import annotations

import re

import pytest

from hvd_lb.errors import UserError
from hvd_lb.world import engine, init
from hvd_lb.world.engine import choose_engine, refuse_unsummed
from hvd_lb.world.launched import Place


@pytest.fixture
def no_horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("Horovod is not installed, but several processes need it: build it")

    monkeypatch.setattr(engine, "import_horovod", missing)


@pytest.fixture
def horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "import_horovod", lambda: None)


@pytest.mark.usefixtures("horovod")
def test_horovod_is_the_default_wherever_it_can_connect_processes() -> None:
    assert choose_engine("auto", None) == ("horovod", "")
    for launcher in ("horovodrun", "mpirun", "srun --mpi=pmix"):
        assert choose_engine("auto", Place(launcher, 0, 2))[0] == "horovod"
    for launcher in ("torchrun", "srun", "RANK and WORLD_SIZE"):
        assert choose_engine("auto", Place(launcher, 0, 2)) == ("torch", f"started by {launcher}")
        with pytest.raises(
            UserError, match=rf"^engine horovod, but {launcher} started .*use engine torch, or .*-np 2"
        ):
            choose_engine("horovod", Place(launcher, 0, 2))
    assert choose_engine("torch", Place("horovodrun", 0, 2))[0] == "torch"


def test_a_world_has_no_other_engine() -> None:
    for wrong, near in (("Torch", "; did you mean 'torch'"), (None, "")):
        with pytest.raises(
            UserError, match=f"engine {wrong!r}: expected one of auto, horovod, torch{re.escape(near)}"
        ):
            init(wrong)  # type: ignore[arg-type]


def test_bf16_is_refused_where_horovod_exchanges() -> None:
    with pytest.raises(UserError, match="--compress bf16, but Horovod .* use --engine torch"):
        refuse_unsummed("horovod", "bf16")
    for engine_and_type in (("horovod", "fp16"), ("horovod", "none"), ("torch", "bf16")):
        refuse_unsummed(*engine_and_type)


@pytest.mark.usefixtures("no_horovod")
def test_without_horovod_it_is_torch() -> None:
    for place in (None, Place("mpirun", 0, 2)):
        assert choose_engine("auto", place) == ("torch", "Horovod is not installed")
        with pytest.raises(UserError, match="not installed"):
            choose_engine("horovod", place)
    with pytest.raises(UserError, match="not installed"):  # horovodrun is Horovod's own
        choose_engine("auto", Place("horovodrun", 0, 2))
