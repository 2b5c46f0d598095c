"""Horovod as it is installed: what it was built with, and whether it fits the torch that runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from hvd_lb.errors import UserError

HOW_TO_BUILD = "run `make train` or docker/build-horovod.sh to build it"


def built_with() -> dict[str, Any]:
    """What Horovod was built with (`torch`, `cuda`, ...), as recorded by docker/build-horovod.sh.

    Empty when Horovod is missing or was built otherwise. Nothing of Horovod is imported.
    """
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return {}
    record = Path(spec.origin).with_name("hvd_lb_build.json")
    return json.loads(record.read_text()) if record.is_file() else {}


def joins_again() -> bool:
    """Whether a process may join again in which both cycle time and fusion threshold were set, as in an elastic run.

    Another Horovod 0.28.1 ends it by SIGSEGV (docker/horovod.patch, part 8).
    """
    return _patch_parts() >= 8


def begins_at_once() -> bool:
    """Whether sums wait for no cycle, but a millisecond for each other, where nothing is fused (part 7)."""
    return _patch_parts() >= 7


def tells_of_cut_messages() -> bool:
    """Whether who waits for the rest of a message has an error when the connection ends (part 9)."""
    return _patch_parts() >= 9


def _patch_parts() -> int:
    return int(built_with().get("patch_parts", 0))


def import_horovod() -> Any:
    """The module horovod.torch; `UserError` when it is missing, built for another torch or does not load."""
    import torch

    if importlib.util.find_spec("horovod") is None:
        raise UserError(f"Horovod is not installed, but several processes need it: {HOW_TO_BUILD}")
    built = str(built_with().get("torch", torch.__version__))
    if built != torch.__version__:
        raise UserError(
            f"Horovod was built for torch {built}, but torch {torch.__version__} runs: {HOW_TO_BUILD} again"
        )
    try:
        return importlib.import_module("horovod.torch")
    except Exception as error:  # a wrong build fails in many ways: ImportError, OSError, VersionMismatchError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"Horovod does not load with torch {torch.__version__} ({reason}): {HOW_TO_BUILD} again"
        ) from error
