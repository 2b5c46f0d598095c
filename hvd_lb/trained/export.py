"""Trained networks for other programs: written, loaded back by the other program's own means, and compared.

Each export is a folder with the network, `classes.txt` and a model card (`hvd_lb.trained.card`).
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn

from hvd_lb.errors import UserError
from hvd_lb.report.run_directory import replace_bytes, replace_text
from hvd_lb.report.text import printable
from hvd_lb.trained.card import Loading, model_card
from hvd_lb.trained.weights import Trained, metadata_of
from hvd_lb.training.checkpoint import load_tensors, save_tensors
from hvd_lb.training.models import SMALL_RESNETS, model_arguments

Format = Literal["torchvision", "torch-export", "onnx"]
FORMATS: tuple[Format, ...] = ("torchvision", "torch-export", "onnx")

Network = Callable[[Tensor], Tensor]

# Logits of float32 kernels that add in another order differ by so much of the largest one; a wrong network by far more.
_CLOSE = 1e-3
# Sizes of the batches that are compared: the network was traced with the first.
_BATCHES = (2, 1, 5)
_ONNX = ("onnx", "onnxscript", "onnxruntime")
# What a folder may hold that an export takes the place of.
_NAMES = {"README.md", "classes.txt", "model.safetensors", "model.pt2", "model.onnx"}


@dataclass(frozen=True)
class Exported:
    """What was written, and the largest difference of a logit, of `largest`, from those of the trained network."""

    folder: Path
    files: list[str]
    difference: float
    largest: float


def export(trained: Trained, form: Format, folder: Path) -> Exported:
    """Write `folder`, which is there as a whole or not at all. UserError where the format cannot take this network."""
    if form == "torchvision" and trained.recipe.model in SMALL_RESNETS:
        raise UserError(
            f"torchvision has no {trained.recipe.model}: give --format torch-export or onnx, which bring the network "
            "along"
        )
    if form == "onnx" and (missing := [name for name in _ONNX if find_spec(name) is None]):
        raise UserError(
            f"--format onnx needs {', '.join(missing)}: pip install 'hvd-lb[onnx]', or pip install {' '.join(missing)}"
        )
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= _NAMES):
        raise UserError(f"{printable(str(folder))} is something else than an export: choose another --output")
    model = trained.network(torch.device("cpu")).float().to(memory_format=torch.contiguous_format)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        try:
            loading, again = _WRITERS[form](trained, model, made)
            difference, largest = _compare(trained, model, again)
        except OSError:
            raise
        except Exception as error:  # whatever an exporter cannot take: nothing of it is ours to know
            raise UserError(
                f"--format {form} cannot take {trained.recipe.model}: {_first_line(error)}: nothing was written; give "
                "another --format"
            ) from error
        names = trained.classes or [str(label) for label in range(trained.outputs)]
        replace_text(made / "classes.txt", "".join(f"{printable(name)}\n" for name in names))
        replace_text(made / "README.md", model_card(trained, loading))
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return Exported(folder, sorted(path.name for path in folder.iterdir()), difference, largest)


def _compare(trained: Trained, model: nn.Module, again: Network) -> tuple[float, float]:
    """Largest difference of a logit, and the largest logit; ValueError where they are another network's."""
    size, random = trained.recipe.evaluation_size, torch.Generator().manual_seed(0)
    difference = largest = 0.0
    with torch.no_grad():
        for images in _BATCHES:
            x = torch.randn(images, 3, size, size, generator=random)
            mine, theirs = model(x), again(x)
            difference = max(difference, float((mine - theirs).abs().max()))
            largest = max(largest, float(mine.abs().max()))
    if not difference <= _CLOSE * max(1.0, largest):
        raise ValueError(f"read back it gives other logits, by up to {difference:.3g} of {largest:.3g}")
    return difference, largest


def _torchvision(trained: Trained, model: nn.Module, folder: Path) -> tuple[Loading, Network]:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # A recipe that was only named did not train them.
    told = metadata_of(trained.recipe, trained.classes or ()) if trained.own else {}
    save_tensors(tensors, folder / "model.safetensors", told)
    name, arguments = trained.recipe.model, model_arguments(trained.recipe.model)
    theirs = torchvision.models.get_model(name, weights=None, num_classes=trained.outputs, **arguments)
    theirs.load_state_dict(load_tensors(folder / "model.safetensors"))
    more = "".join(f", {key}={value}" for key, value in arguments.items())
    loading = Loading(
        "torchvision",
        "import torchvision\nfrom safetensors.torch import load_file\n\n"
        f'network = torchvision.models.get_model("{name}", weights=None, num_classes={trained.outputs}{more})\n'
        'network.load_state_dict(load_file("model.safetensors"))\n'
        "network.eval()\nlogits = network(x)",
    )
    return loading, theirs.eval()


def _torch_export(trained: Trained, model: nn.Module, folder: Path) -> tuple[Loading, Network]:
    file = folder / "model.pt2"
    size = trained.recipe.evaluation_size
    batch = torch.export.Dim("batch", min=1)
    with _quiet():
        program = torch.export.export(
            model, (torch.zeros(_BATCHES[0], 3, size, size),), dynamic_shapes=({0: batch},)
        )
        torch.export.save(program, whole := BytesIO())  # into a file, a full disk ends the process
        replace_bytes(file, whole.getvalue())
        again = torch.export.load(file).module()
    code = 'import torch\n\nnetwork = torch.export.load("model.pt2").module()\nlogits = network(x)'
    return Loading("torch.export", code), again


def _onnx(trained: Trained, model: nn.Module, folder: Path) -> tuple[Loading, Network]:
    import onnxruntime  # an extra

    file = folder / "model.onnx"
    size = trained.recipe.evaluation_size
    with _quiet():
        torch.onnx.export(
            model,
            (torch.zeros(_BATCHES[0], 3, size, size),),
            file,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=False,
            verbose=False,
        )
    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    code = (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
        'logits = session.run(["logits"], {"images": x.numpy()})[0]'
    )

    def again(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    return Loading("ONNX Runtime", code), again


def _first_line(error: Exception) -> str:
    """Exporters tell pages, the reason first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of their own affairs, and log and print pages of what they cannot take."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            redirect_stderr(StringIO()),
            redirect_stdout(StringIO()),
        ):
            yield
    finally:
        logging.disable(before)


_WRITERS: dict[Format, Callable[[Trained, nn.Module, Path], tuple[Loading, Network]]] = {
    "torchvision": _torchvision,
    "torch-export": _torch_export,
    "onnx": _onnx,
}
