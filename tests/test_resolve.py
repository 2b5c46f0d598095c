"""From what was typed to a run: recipe and options together, and data by their very names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_lb.data.images import ArrayImages, Dataset
from hvd_lb.data.spec import absolute_spec
from hvd_lb.errors import UserError
from hvd_lb.machine.cpu import describe_cpu, is_slow_in
from hvd_lb.machine.placement import DeviceName, Placement
from hvd_lb.recipe import Recipe, load_values, make_recipe, preset_names
from hvd_lb.resolve import check_options, check_with_data, explain, resolve

DIGITS = {"data": "digits", "gpus": 2}
CPU = Placement("cpu", 1, 1)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HVD_LB_CACHE", str(tmp_path / "cache"))


def written(text: str) -> str:
    Path("mine.yaml").write_text(f"model: resnet8\nimage_size: 8\n{text}\n")
    return "mine.yaml"


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("nesterov: false", {"momentum": 0.0}),
        ("momentum: 0.0", {"nesterov": False}),
        ("momentum_form: 9\nmomentum_correction: false", {"momentum_form": 10}),
        ("momentum_correction: false\nnesterov: false\nmomentum: 0", {}),
        ("schedule: cosine", {"schedule": "step", "drop_epochs": (10.0, 20.0)}),
        ("schedule: step", {"drop_epochs": (10.0, 20.0)}),
        ("schedule: cosine\ndrop_epochs: [10, 20]\npower: 3", {"power": 3.0, "schedule": "polynomial"}),
        ("warmup_epochs: 99\nepochs: 3", {"epochs": 200}),
    ],
)
def test_what_is_right_together(file: str, options: dict[str, Any]) -> None:
    recipe = resolve({**DIGITS, **options}, recipe=written(file), default_gpus=2).recipe
    assert {name: getattr(recipe, name) for name in options} == options


@pytest.mark.parametrize(
    ("file", "options", "told"),
    [
        (
            "momentum: 0",
            {},
            "mine.yaml: momentum = 0 with nesterov = True by default: nesterov needs a momentum",
        ),
        (
            "nesterov: true",
            {"momentum": 0.0},
            "--momentum 0.0 with mine.yaml: nesterov = True: nesterov needs",
        ),
        (
            "momentum_form: 9",
            {"momentum_correction": False},
            "--no-momentum-correction with mine.yaml: momentum_form",
        ),
        ("flip: 2", {"flip": 0.5}, "mine.yaml: flip = 2: input should be less than or equal to 1"),
        ("flip: 0.5", {"flip": 2.0}, "--flip 2.0: input should be"),
        ("schedule: cosine", {"drop_epochs": (10.0,)}, "--drop-epochs has no effect with schedule cosine"),
        ("schedule: step", {"power": 3.0}, "--power has no effect with schedule step"),
        ("lr_rule: none", {"reference_batch": 32}, "--reference-batch has no effect with lr-rule none"),
        ("warmup: none", {"warmup_epochs": 3.0}, "--warmup-epochs has no effect with warmup none"),
        ("flip: 0", {"max_bad_images": 0.1}, "--max-bad-images has no effect with on-bad-image fail"),
    ],
)
def test_what_is_wrong_together_is_told_with_where_it_is_from(
    file: str, options: dict[str, Any], told: str
) -> None:
    recipe = written(file)
    for check in (
        lambda: check_options(options, recipe),
        lambda: resolve({**DIGITS, **options}, recipe=recipe, default_gpus=2),
    ):
        with pytest.raises(UserError) as error:
            check()
        assert told in str(error.value)


def test_options_alone_are_refused_where_no_preset_goes_with_them() -> None:
    with pytest.raises(UserError, match="--momentum 0.0 with nesterov = True by default"):
        check_options({"momentum": 0.0}, None)
    with pytest.raises(UserError, match="--power has no effect"):
        check_options({"power": 2.0}, None)
    # goyal-resnet50 decays in steps; for digits, with cosine, it is refused as soon as the data are known
    check_options({"drop_epochs": (10.0,)}, None)
    with pytest.raises(UserError, match="--drop-epochs has no effect with schedule cosine"):
        resolve({**DIGITS, "drop_epochs": (10.0,)}, recipe=None, default_gpus=2)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_becomes_a_run(name: str) -> None:
    resolved = resolve(dict(DIGITS), recipe=name, default_gpus=2)
    assert resolved.preset == name
    assert resolved.total_steps > 0
    rows = dict(explain(resolved, CPU))
    assert ("without --init-from" in rows.get("advice", "")) == (name == "fine-tune")


@pytest.mark.parametrize(
    ("name", "gpus", "minibatch", "rate"),
    [
        ("torchvision-resnet50", 8, 1024, 0.5),
        ("lars-resnet50", 256, 32768, 32.0),
        ("goyal-resnet50", 256, 8192, 3.2),
    ],
)
def test_minibatch_and_rate_are_those_published(name: str, gpus: int, minibatch: int, rate: float) -> None:
    recipe = make_recipe({**load_values(name), "gpus": gpus}, name)
    assert recipe.global_batch == minibatch
    schedule = recipe.lr_schedule(1_281_167 // minibatch)
    assert schedule.peak == pytest.approx(rate)
    assert schedule(schedule.warmup_steps) == pytest.approx(rate)


def folder(name: str) -> None:
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            path = Path(name, split, label)
            path.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (40, 30), (number * 9, 20, 30)).save(path / f"{number}.png")


@pytest.mark.parametrize(
    "name", ["synthetic_faces", "synthetic2", "digits_backup", "fashion-mnist-v2", "images", "goyal-resnet50"]
)
def test_a_folder_whose_name_is_like_that_of_a_built_in_set(name: str) -> None:
    folder(name)
    resolved = resolve({"data": name, "gpus": 1, "per_gpu_batch": 4}, recipe=None, default_gpus=1)
    assert (resolved.preset, resolved.recipe.data) == ("small-images", str(Path(name).absolute()))


def test_a_folder_with_the_name_of_a_built_in_set() -> None:
    folder("digits")
    built_in = resolve({"data": "digits"}, recipe=None, default_gpus=1)
    assert len(built_in.dataset.train) == 1438
    assert ("", "the built-in data set; what lies here by that name would be --data ./digits") in explain(
        built_in, CPU
    )
    own = resolve({"data": "./digits", "per_gpu_batch": 4}, recipe=None, default_gpus=1)
    assert len(own.dataset.train) == 8
    assert own.preset == "small-images"
    by_name = resolve({"data": "./digits", "per_gpu_batch": 4}, recipe="digits", default_gpus=1)
    assert by_name.why == "the preset; what lies here by that name would be --recipe ./digits"


def test_data_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_LB_DATA", "nowhere")
    with pytest.raises(UserError, match="^HVD_LB_DATA: nowhere"):
        resolve({}, recipe=None, default_gpus=1)
    with pytest.raises(UserError, match="^nowhere"):
        resolve({"data": "nowhere"}, recipe=None, default_gpus=1)


def test_a_cache_that_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folder("own")
    monkeypatch.setenv("HVD_LB_CACHE", "/dev/null/cache")
    with pytest.raises(UserError, match="HVD_LB_CACHE is /dev/null/cache, and /dev/null is no folder"):
        resolve({"data": "own"}, recipe=None, default_gpus=1)


def test_a_link_is_told_as_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other hosts it may lead elsewhere."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "data").symlink_to("scratch")
    monkeypatch.chdir(tmp_path)
    assert absolute_spec("data") == absolute_spec("./data/") == str(tmp_path / "data")
    assert absolute_spec("digits") == "digits"


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cuda", {}, "--precision bf16 --channels-last uses"),
        ("cuda", {"channels_last": True}, "--precision bf16 uses"),
        ("cuda", {"precision": "fp32"}, None),
        ("cuda", {"precision": "tf32"}, None),
        ("cpu", {}, None),
    ],
)
def test_on_a_gpu_a_faster_precision_is_named_unless_one_was_chosen(
    device: DeviceName, options: dict[str, Any], expected: str | None
) -> None:
    resolved = resolve({**DIGITS, **options}, recipe=None, default_gpus=1)
    notes = [
        sentence
        for topic, sentence in explain(resolved, Placement(device, 1, 1))
        if "tensor cores" in sentence
    ]
    assert len(notes) == (expected is not None)
    assert all((expected or "") in note for note in notes)


@pytest.mark.parametrize(
    ("features", "slow"),
    [
        (["avx", "avx2", "fma"], ["bf16", "fp16"]),
        (["avx2", "avx512bw", "avx512dq", "avx512f", "avx512vl"], ["fp16"]),
        (["avx512_fp16", "avx512bw", "avx512dq", "avx512f", "avx512vl"], []),
        (["avx2", "avx_ne_convert"], []),
        ([], []),  # not known
    ],
)
def test_a_precision_that_the_cpu_has_no_kernels_for_is_told(features: list[str], slow: list[str]) -> None:
    placement = Placement("cpu", 2, 1, first_host={"machine": "x86_64", "cpu_features": features})
    told = []
    for precision in ("fp32", "bf16", "fp16", "fp64"):
        resolved = resolve({**DIGITS, "precision": precision}, recipe=None, default_gpus=1)
        told += [precision for _, sentence in explain(resolved, placement) if "slow kernels" in sentence]
        elsewhere = replace(placement, first_host={"machine": "aarch64", "cpu_features": features})
        assert "slow kernels" not in str(explain(resolved, elsewhere))
        assert "slow kernels" not in str(explain(resolved, replace(placement, device="cuda")))
    assert told == slow


def test_which_cpus_have_them_is_what_torch_says_of_this_one() -> None:
    here = describe_cpu()
    if here["machine"] == "x86_64" and torch.backends.mkldnn.is_available():
        assert is_slow_in("bf16", here) != torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert is_slow_in("fp16", here) != torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_a_recipe_that_names_its_precision_has_chosen_it() -> None:
    resolved = resolve(DIGITS, recipe=written("precision: fp32"), default_gpus=1)
    assert "tensor cores" not in str(explain(resolved, Placement("cuda", 1, 1)))


def test_weights_of_classes_without_images() -> None:
    """Told before anything is started, and not by the ranks."""
    pixels = np.zeros((8, 8, 8, 3), np.uint8)
    images = ArrayImages(pixels, np.arange(8) % 2, ["a", "b", "none"], "made")
    recipe = Recipe(
        model="resnet8", image_size=8, gpus=1, per_gpu_batch=2, class_weights=(0.0, 0.0, 1.0), epochs=1
    )
    with pytest.raises(UserError, match="all images are of classes of weight 0"):
        check_with_data(recipe, Dataset("made", images, images))
    check_with_data(
        recipe.model_copy(update={"class_weights": (0.0, 1.0, 1.0)}), Dataset("made", images, images)
    )
