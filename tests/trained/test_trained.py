"""What comes after training: evaluation to the same bits, predictions, exports that are loaded by other means."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from full_disk import room
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hvd_lb.data.dataset import open_dataset
from hvd_lb.recipe import Recipe
from hvd_lb.report.metrics import SilentObserver
from hvd_lb.trained.card import Loading, model_card
from hvd_lb.trained.evaluate import evaluate
from hvd_lb.trained.weights import metadata_of, open_trained
from hvd_lb.training.checkpoint import CheckpointStore
from hvd_lb.training.models import SmallResNet, build_model
from hvd_lb.training.trainer import Trainer
from hvd_lb.world.solo import Solo

CPU = torch.device("cpu")
CLASSES = [f"{number}" for number in range(10)]


def train(folder: Path, stop_after: int = 100, **changes: Any) -> Path:
    """A run directory with what the commands read; five steps on digits, or fewer by a signal, or what is left."""
    fields = {
        "data": "digits", "model": "resnet8", "image_size": 8, "eval_crop": 1.0, "gpus": 2, "per_gpu_batch": 32,
        "epochs": 1, "steps": 5, "warmup": "none", "num_classes": 10, "threads": 1, "together": 1,
        "channels_last": True,
    }  # fmt: skip
    recipe, data = Recipe(**{**fields, **changes}), open_dataset("digits")
    store = CheckpointStore(folder / "checkpoints", 3, metadata_of(recipe, data.train.classes))
    trainer = Trainer(
        recipe,
        data,
        Solo(),
        device=CPU,
        threads=1,
        observer=SilentObserver(),
        store=store,
        checkpoint=store.newest_intact()[0],
        stop_requested=lambda: 15 if trainer.step == stop_after - 1 else 0,
    )
    trainer.fit()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "environment.json").write_text(
        '{"processes": 1, "threads_per_process": 1, "versions": {"torch": "2"}}'
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("trained") / "run")


def test_equal_weights_are_equal_files_that_name_classes_and_recipe(run: Path, tmp_path: Path) -> None:
    file = run / "checkpoints" / "last" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["hvd_lb"])
    assert told["classes"] == CLASSES
    assert told["recipe"]["model"] == "resnet8"
    again = train(tmp_path / "again") / "checkpoints" / "last" / "model.safetensors"
    assert again.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("named", [".", "checkpoints/last", "model.safetensors"])
def test_evaluate_counts_what_training_counted(
    hvd_lb: Callable[..., Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    weights, more = run / named, ()
    if named == "model.safetensors":  # which is enough by itself
        weights = shutil.copy(run / "checkpoints" / "last" / named, tmp_path)
        more = ("--data", "digits", "--threads", 1)
    told = open_trained(run).checkpoint
    assert told
    expected = told.saved.evaluation
    assert expected
    assert expected["images"] == 359
    said = hvd_lb("evaluate", weights, *more, "--json")
    assert (said.status, said.err) == (0, "")
    found = json.loads(said.out)
    assert found["left_out"] == 0
    assert {name: found[name] for name in ("top1_error", "top5_error", "loss", "images")} == {
        name: expected[name] for name in ("top1_error", "top5_error", "loss", "images")
    }
    monkeypatch.setattr("hvd_lb_cli.output.progress._LINE_SECONDS", 0.0)
    table = hvd_lb("evaluate", weights, *more).out
    assert "images evaluated: 0 of 359 (0 %)\n" in table
    assert "images evaluated: 359 of 359 (100 %)\n" in table
    assert f"top-1 error: {expected['top1_error']:.2f} %\n" in table
    of_training = json.loads(hvd_lb("evaluate", weights, *more, "--json", "--split", "train").out)
    assert of_training["images"] == 1438


def test_weights_go_with_the_recipe_that_they_were_trained_by(run: Path, tmp_path: Path) -> None:
    """Not with a recipe.yaml that was edited since; the checkpoint knows."""
    edited = shutil.copytree(run, tmp_path / "run", symlinks=True) / "recipe.yaml"
    edited.write_text(edited.read_text().replace("eval_crop: 1.0", "eval_crop: 0.5"))
    assert open_trained(run).recipe.threads == 1  # which no checkpoint knows
    assert open_trained(edited.parent).recipe.eval_crop == 1.0


def errors_in_card(path: Path, averaged: bool = False) -> str | None:
    card = model_card(open_trained(path, averaged=averaged), Loading("torch", "logits = network(x)"))
    found = re.search(r"^\| ([0-9.]+) % \|", card, re.MULTILINE)
    assert bool(found) != ("No evaluation of these weights is known" in card)
    return found[1] if found else None


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["none", "backbone"])
def test_evaluate_compiles_what_training_compiled(
    freeze: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parts, in which what is rounded where is the same."""
    graphs: list[int] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    torch.compiler.reset()
    first = {"init_from": str(train(tmp_path / "first"))} if freeze == "backbone" else {}
    trained = open_trained(train(tmp_path / "run", compile=True, freeze=freeze, **first))
    of_training = list(graphs)
    graphs.clear()
    torch.compiler.reset()
    evaluate(trained, open_dataset("digits").val, "-", device=CPU, threads=1)
    assert graphs
    assert graphs == of_training[-len(graphs) :]


def test_a_card_has_the_errors_of_its_own_weights(tmp_path: Path) -> None:
    run = train(tmp_path / "run", stop_after=5, eval_every="3steps", ema=0.9, steps=8)
    stopped, best = (open_trained(run / "checkpoints" / name).checkpoint for name in ("last", "best"))
    assert stopped
    assert best
    assert (stopped.step, stopped.saved.evaluated_at, stopped.evaluation) == (5, 3, None)
    assert stopped.saved.evaluation
    assert errors_in_card(run) is errors_in_card(run, averaged=True) is None
    for averaged, name in ((False, "top1_error"), (True, "ema_top1_error")):
        assert best.evaluation
        assert errors_in_card(best.path, averaged) == f"{best.evaluation[name]:.2f}"
    train(tmp_path / "run", eval_every="3steps", ema=0.9, steps=8)
    ended = open_trained(run).checkpoint
    assert ended
    assert ended.evaluation
    assert errors_in_card(run) == f"{ended.evaluation['top1_error']:.2f}"


def test_numbers_that_are_none_are_null_in_json(
    hvd_lb: Callable[..., Any], run: Path, folder: Path, tmp_path: Path
) -> None:
    """NaN and Infinity are no JSON."""
    file = run / "checkpoints" / "last" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        save_file(
            {**tensors, "fc.weight": tensors["fc.weight"] * math.nan}, tmp_path / "f", opened.metadata()
        )
    for words in (("evaluate", "--data", "digits", "--json"), ("predict", folder / "1")):
        lines = hvd_lb(words[0], tmp_path / "f", *words[1:]).out.splitlines()
        assert lines
        for line in lines:
            json.loads(line, parse_constant=pytest.fail)
    assert json.loads(lines[0])["top"][0]["probability"] is None


def digits(count: int) -> tuple[np.ndarray, list[int]]:
    images = open_dataset("digits").val
    decoded = np.stack([images.read(np.array([i]))[0] for i in range(count)]).reshape(count, 8, 8, -1)[
        ..., :1
    ]
    return decoded.repeat(3, 3), images.labels[:count].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files, in the folders of their classes but for those of 0: labels are others than in training."""
    root = tmp_path_factory.mktemp("pictures")
    for number, (pixels, label) in enumerate(zip(*digits(60), strict=True)):
        if label:
            (root / str(label)).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / str(label) / f"{number:02d}.png")
    return root


def logits_of(run: Path, files: list[Path]) -> torch.Tensor:
    """By torch alone."""
    recipe = Recipe()
    model = build_model("resnet8", 10, seed=1)
    model.load_state_dict(load_file(run / "checkpoints" / "last" / "model.safetensors"))
    pixels = (
        torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2) / 255
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    with torch.no_grad():
        return model.eval()((pixels - mean) / std)


def test_evaluate_finds_classes_by_their_names(hvd_lb: Callable[..., Any], run: Path, folder: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    labels = torch.tensor([int(file.parent.name) for file in files])
    wrong = int((logits_of(run, files).argmax(1) != labels).sum())
    found = json.loads(hvd_lb("evaluate", run, "--data", folder, "--json").out)
    assert found["images"] == len(files)
    assert found["top1_error"] == pytest.approx(100 * wrong / len(files))
    shutil.copy(files[0], folder / "stray.png")
    told = hvd_lb("evaluate", run, "--data", folder, "--json")
    (folder / "stray.png").unlink()
    assert json.loads(told.out) == found
    assert "images beside the class folders, which are not used: 1, such as stray.png\n" in told.err
    (folder / "eleven").mkdir()
    shutil.copy(files[0], folder / "eleven")
    refused = hvd_lb("evaluate", run, "--data", folder)
    shutil.rmtree(folder / "eleven")
    assert (refused.status, refused.out) == (2, "")
    assert "eleven" in refused.err


@pytest.mark.slow
def test_a_network_that_asks_for_the_version_of_its_weights(tmp_path: Path) -> None:
    """MNASNet: a run goes on, averages are evaluated, and what was trained is found again and trained on."""
    of = {"model": "mnasnet0_5", "image_size": 32, "ema": 0.9, "per_gpu_batch": 16}
    first = open_trained(train(tmp_path / "run", stop_after=2, **of)).checkpoint
    assert first
    assert first.step == 2
    trained = open_trained(train(tmp_path / "run", **of))
    assert trained.checkpoint
    assert trained.checkpoint.evaluation
    found = evaluate(trained, open_dataset("digits").val, "-", device=CPU, threads=1).figures
    assert found.loss == trained.checkpoint.evaluation["loss"]
    begun = open_trained(train(tmp_path / "more", init_from=str(tmp_path / "run"), **of))
    assert begun.tensors.keys() == trained.tensors.keys()


def test_images_that_cannot_be_decoded_are_left_out_where_that_is_asked_for(
    hvd_lb: Callable[..., Any], run: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "set")
    whole = json.loads(hvd_lb("evaluate", run, "--data", tmp_path / "set", "--json").out)
    for file, content in (("one.png", b""), ("two.png", next((folder / "1").iterdir()).read_bytes()[:-30])):
        (tmp_path / "set" / "1" / file).write_bytes(content)
        said = hvd_lb("evaluate", run, "--data", tmp_path / "set")
        assert (said.status, said.out) == (2, "")
        assert re.search(r"(one|two)\.png: cannot be decoded .* --on-bad-image skip\n$", said.err)
    skipping = ("evaluate", run, "--data", tmp_path / "set", "--on-bad-image", "skip")
    found = json.loads(hvd_lb(*skipping, "--json").out)
    assert (found["images"], found["left_out"]) == (whole["images"], 2)
    assert found["top1_error"] == pytest.approx(whole["top1_error"])
    assert f"images: {whole['images']}, 2 left out\n" in hvd_lb(*skipping).out


def test_nothing_to_evaluate_on(hvd_lb: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    said = hvd_lb("evaluate", run, "--data", tmp_path)
    assert (said.status, said.out) == (2, "")
    assert f"{tmp_path}: holds no images" in said.err
    assert said.err.count("\n") == 1


def test_weights_that_do_not_say_how_many_classes_they_tell_apart(
    hvd_lb: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    """The last layer does, which need not be the last tensor of a file."""
    file, recipe = tmp_path / "theirs.safetensors", tmp_path / "recipe.yaml"
    save_file(load_file(run / "checkpoints" / "last" / "model.safetensors"), file)
    recipe.write_text("model: resnet8\nimage_size: 8\neval_crop: 1.0\n")
    words = ("--data", "digits", "--recipe", recipe, "--json")
    found = json.loads(hvd_lb("evaluate", file, *words).out)
    expected = json.loads(hvd_lb("evaluate", run, "--json").out)
    assert found["top1_error"] == expected["top1_error"]
    tensors = load_file(file)
    save_file({name: of for name, of in tensors.items() if not name.endswith("num_batches_tracked")}, file)
    assert json.loads(hvd_lb("evaluate", file, *words).out) == found  # a file of old
    nine = {name: of[:9] if name.startswith("fc.") else of for name, of in tensors.items()}
    save_file(nine, file)
    assert "10 classes for a network of 9 outputs" in hvd_lb("evaluate", file, *words).err
    save_file({"conv1.weight": torch.zeros(4, 3, 1, 1)}, file)
    said = hvd_lb("evaluate", file, *words)
    assert (said.status, said.out) == (2, "")
    assert "does not hold the weights of resnet8 (it has no fc.weight)" in said.err


def test_some_of_the_classes_where_nothing_names_the_outputs(
    hvd_lb: Callable[..., Any], run: Path, folder: Path, tmp_path: Path
) -> None:
    """As of torchvision's weights for 1,000 classes on ten of them: folders 3 and 7 are not outputs 0 and 1."""
    file, recipe = tmp_path / "theirs.safetensors", tmp_path / "recipe.yaml"
    save_file(load_file(run / "checkpoints" / "last" / "model.safetensors"), file)
    recipe.write_text("model: resnet8\nimage_size: 8\neval_crop: 1.0\nnum_classes: 10\nchannels_last: true\n")
    words = ("evaluate", file, "--recipe", recipe, "--threads", 1, "--json", "--data")
    for name in "37":
        shutil.copytree(folder / name, tmp_path / "some" / name)
    said = hvd_lb(*words, tmp_path / "some")
    assert (said.status, said.out) == (2, "")
    assert "does not name its 10 outputs, so which of them the 2 classes 3, 7 are is not known" in said.err
    expected = json.loads(hvd_lb("evaluate", run, "--data", tmp_path / "some", "--json").out)
    records = [f"{path},{path.parent.name}\n" for path in sorted((tmp_path / "some").rglob("*.png"))]
    (tmp_path / "train.csv").write_text("".join(records))
    for name in set("0123456789") - set("37"):
        (tmp_path / "some" / name).mkdir()
    for data in (tmp_path / "train.csv", tmp_path / "some"):
        found = json.loads(hvd_lb(*words, data).out)
        assert found["top1_error"] == expected["top1_error"]
        assert found["loss"] == pytest.approx(expected["loss"])


def test_predictions_are_those_of_torch(hvd_lb: Callable[..., Any], run: Path, folder: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    said = hvd_lb("predict", run, folder, "--top", 3)
    assert (said.status, said.err) == (0, "")
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["image"] for line in lines] == list(map(str, files))
    shares, likeliest = logits_of(run, files).softmax(1).topk(3)
    assert [[one["label"] for one in line["top"]] for line in lines] == likeliest.tolist()
    assert [[one["class"] for one in line["top"]] for line in lines] == [
        list(map(str, of)) for of in likeliest.tolist()
    ]
    found = torch.tensor([[one["probability"] for one in line["top"]] for line in lines])
    assert found == pytest.approx(shares.numpy(), abs=1e-5)


def test_a_folder_stands_for_the_images_that_a_class_folder_has(
    hvd_lb: Callable[..., Any], run: Path, folder: Path, tmp_path: Path
) -> None:
    def told() -> list[str]:
        lines = hvd_lb("predict", run, tmp_path / "photos").out.splitlines()
        return [str(Path(json.loads(line)["image"]).relative_to(tmp_path / "photos")) for line in lines]

    file = next((folder / "1").iterdir())
    for place in (".", "deeper", ".thumbnails", "@eaDir/a.png"):
        (tmp_path / "photos" / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "photos" / place / "a.png")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(file, tmp_path / "elsewhere" / "b.png")
    (tmp_path / "photos" / "deeper" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    assert told() == ["a.png", "deeper/a.png", "deeper/linked/b.png"]
    for name, reason in (("c.gif", "GIF is not read"), ("gone.png", "leads to nothing")):
        odd = tmp_path / "photos" / "deeper" / name
        odd.symlink_to(file if name == "c.gif" else tmp_path / "nowhere")
        said = hvd_lb("predict", run, tmp_path / "photos")
        odd.unlink()
        assert (said.status, said.out) == (2, "")
        assert f"{odd}: {reason}" in said.err
        assert said.err.count("\n") == 1


def test_images_are_predicted_at_the_size_of_evaluations(
    hvd_lb: Callable[..., Any], run: Path, folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: resnet8\nimage_size: 16\neval_size: 8\neval_crop: 1.0\nchannels_last: true\n")
    said = hvd_lb("predict", run, folder / "1", "--recipe", recipe)
    assert (said.status, said.out) == (0, hvd_lb("predict", run, folder / "1").out)
    assert "not the one that these weights bring: eval_size: None → 8; image_size: 8 → 16" in said.err


def test_another_recipe_than_that_of_the_weights_is_told(
    hvd_lb: Callable[..., Any], run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("model: resnet8\nimage_size: 8\n")
    told = "weights bring" + ".*eval_crop: 1.0 → 0.875"
    said = hvd_lb("evaluate", run, "--recipe", other, "--data", "digits")
    assert said.status == 0
    assert re.search(told, said.err)
    assert not hvd_lb("evaluate", run, "--recipe", run / "recipe.yaml").err
    refused = hvd_lb("export", run, "--recipe", other, "--format", "torch-export", "--output", tmp_path / "e")
    assert (refused.status, (tmp_path / "e").exists()) == (2, False)
    assert re.search(told, refused.err)


def test_a_table_for_a_person(
    hvd_lb: Callable[..., Any], run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    file = next(folder.rglob("*.png"))
    lines = hvd_lb("predict", run, file).out.splitlines()
    assert sum(" % " in f"{line} " for line in lines) == 5


def test_what_cannot_be_predicted(hvd_lb: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "empty").mkdir()
    whole = tmp_path / "b.png"
    Image.new("RGB", (9, 9)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:-30])
    for name, wrong in (
        ("a.png", "a.png"), ("a.txt", "a.txt"), ("empty", "holds no image files"), ("none.png", "is not there"),
        ("cut.png", "cut.png"),
    ):  # fmt: skip
        said = hvd_lb("predict", run, whole, tmp_path / name)
        assert said.status == 2, name
        assert wrong in said.err
        assert said.err.count("\n") == 1


FORMATS = ["torch-export", pytest.param("onnx", marks=pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnxscript") is None, reason="the extra is not installed"
))]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_an_export_brings_the_network_along(
    hvd_lb: Callable[..., Any], run: Path, tmp_path: Path, form: str
) -> None:
    said = hvd_lb("export", run, "--format", form, "--output", tmp_path / "e")
    assert said.status == 0, said.err
    assert "loaded back: logits differ by at most" in said.out
    x = torch.randn(7, 3, 8, 8)
    model = build_model("resnet8", 10, seed=1)
    model.load_state_dict(load_file(run / "checkpoints" / "last" / "model.safetensors"))
    with torch.no_grad():
        expected = model.eval()(x)
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / "e" / "model.onnx")
        found = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    else:
        with torch.no_grad():
            found = torch.export.load(tmp_path / "e" / "model.pt2").module()(x)
    assert found == pytest.approx(expected.numpy(), abs=1e-4)
    assert (tmp_path / "e" / "classes.txt").read_text().splitlines() == CLASSES
    card = (tmp_path / "e" / "README.md").read_text()
    evaluation = open_trained(run).checkpoint.saved.evaluation  # type: ignore[union-attr]
    for text in (
        "resnet8",
        f"| {evaluation['top1_error']:.2f} %",
        "hvd-lb train --recipe",
        "model: resnet8",
        "torch 2",
    ):
        assert text in card, text


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fault", ["depends on its data", "other logits"])
def test_a_network_that_cannot_be_exported(
    hvd_lb: Callable[..., Any],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    fault: str,
) -> None:
    """The exporter's pages become a line, and what was there before stays."""
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "classes.txt").write_text("before")
    plain = SmallResNet.forward

    def forward(self: SmallResNet, images: torch.Tensor) -> torch.Tensor:
        if fault == "other logits":
            return plain(self, images * (2.0 if torch.compiler.is_exporting() else 1.0))
        return plain(self, images if images.sum() > 0 else -images)

    monkeypatch.setattr(SmallResNet, "forward", forward)
    said = hvd_lb("export", run, "--format", form, "--output", tmp_path / "e")
    assert (said.status, said.out) == (2, "")
    assert f"--format {form} cannot take resnet8: " in said.err
    assert said.err.count("\n") == 1
    assert len(said.err) < 600
    assert [path.name for path in tmp_path.rglob("*")] == ["e", "classes.txt"]


def test_an_image_size_that_the_network_cannot_take(hvd_lb: Callable[..., Any], tmp_path: Path) -> None:
    """Of a file of others, whose recipe is what a user says: an error in a line, before anything is computed."""
    file, recipe = tmp_path / "theirs.safetensors", tmp_path / "recipe.yaml"
    save_file(torchvision.models.squeezenet1_1(num_classes=10).state_dict(), file)
    recipe.write_text("model: squeezenet1_1\nimage_size: 8\n")
    for words in (
        ("evaluate", file, "--data", "digits"),
        ("export", file, "--format", "torch-export", "--output", tmp_path / "e"),
    ):
        said = hvd_lb(*words, "--recipe", recipe)
        assert (said.status, said.out) == (2, "")
        assert "squeezenet1_1 cannot take images of 8×8 pixels" in said.err
        assert said.err.count("\n") == 1


@pytest.mark.slow
def test_each_network_of_a_run_is_exported_into_a_folder_of_its_own(
    hvd_lb: Callable[..., Any], tmp_path: Path
) -> None:
    run = train(tmp_path / "run", ema=0.9)
    for weights, more, folder in (
        (run, (), "torch-export"),
        (run, ("--ema",), "torch-export-ema"),
        (run / "checkpoints" / "best", (), "torch-export-best"),
        (run / "checkpoints" / "step-00000005", ("--ema",), "torch-export-step-00000005-ema"),
    ):
        said = hvd_lb("export", weights, "--format", "torch-export", *more)
        assert said.status == 0, said.err
        assert f"{run / 'exported' / folder}: README.md, classes.txt, model.pt2" in said.out
    assert len(list((run / "exported").iterdir())) == 4


@pytest.mark.long
def test_an_export_onto_a_full_disk(hvd_lb: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    with room(50_000):
        said = hvd_lb("export", run, "--format", "torch-export", "--output", tmp_path / "e")
    assert (said.status, said.err.count("\n")) == (1, 1)
    assert "File too large" in said.err
    assert not list(tmp_path.iterdir())


def test_torchvision_takes_its_own_networks(hvd_lb: Callable[..., Any], tmp_path: Path) -> None:
    """One of torchvision's that mixes with others' weights: a file, and a recipe that is named."""
    refused = hvd_lb("export", train(tmp_path / "run"), "--format", "torchvision")
    assert (refused.status, refused.out) == (2, "")
    assert "torchvision has no resnet8" in refused.err
    file, recipe = tmp_path / "theirs.safetensors", tmp_path / "recipe.yaml"
    theirs = torchvision.models.squeezenet1_1(num_classes=3)
    save_file(theirs.state_dict(), file)
    assert "does not say which network it is of" in hvd_lb("export", file, "--format", "torchvision").err
    recipe.write_text("model: squeezenet1_1\nimage_size: 64\nnum_classes: 3\n")
    words = ("export", file, "--format", "torchvision", "--recipe", recipe)
    assert "is in no run directory: give --output" in hvd_lb(*words).err
    said = hvd_lb(*words, "--output", tmp_path / "e")
    assert said.status == 0, said.err
    card = (tmp_path / "e" / "README.md").read_text()
    assert "How it was trained, and on what, its file does not say." in card
    assert "epochs" not in card
    again: nn.Module = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=3)
    again.load_state_dict(load_file(tmp_path / "e" / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), theirs.parameters(), strict=True))
    (tmp_path / "e" / "model.onnx").write_bytes(b"of a former export")
    assert hvd_lb(*words, "--output", tmp_path / "e").status == 0  # in place of the other
    assert not (tmp_path / "e" / "model.onnx").exists()
    (tmp_path / "e" / "thesis.tex").write_text("")
    kept = hvd_lb(*words, "--output", tmp_path / "e")
    assert kept.status == 2
    assert "is something else than an export" in kept.err
    assert (tmp_path / "e" / "thesis.tex").exists()
    in_a_file = hvd_lb(*words, "--output", tmp_path / "e" / "thesis.tex" / "f")
    assert (in_a_file.status, in_a_file.err.count("\n")) == (2, 1)
    assert "thesis.tex is no folder that may be written into" in in_a_file.err
    recipe.write_text("model: squeezenet1_1\nimage_size: 64\nnum_classes: 4\n")
    other = hvd_lb("export", file, "--format", "torchvision", "--recipe", recipe, "--output", tmp_path / "f")
    assert (other.status, other.out) == (2, "")
    assert "does not hold the weights of squeezenet1_1 with 4 outputs" in other.err


def test_what_holds_no_weights(hvd_lb: Callable[..., Any], tmp_path: Path, run: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    (tmp_path / "failed").mkdir()
    shutil.copy(run / "recipe.yaml", tmp_path / "failed")
    damaged = shutil.copytree(run / "checkpoints" / "step-00000005", tmp_path / "step-00000005")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    for name, wrong in (
        ("a.safetensors", "is no safetensors file"), ("none", "is not there"), ("new", "has no checkpoint yet"),
        ("failed", "has no checkpoint yet: nothing is trained in it"),
        (".", "is neither a run nor a checkpoint"),
        ("step-00000005", "step-00000005"),
    ):  # fmt: skip
        said = hvd_lb("evaluate", tmp_path / name)
        assert (said.status, said.out) == (2, ""), name
        assert wrong in said.err
        assert said.err.count("\n") == 1
