"""The examples of docs/other-launchers.md: documents that their systems take, and commands that hvd-lb understands."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from hvd_lb_cli.train import train

PAGE = (Path(__file__).parents[2] / "docs" / "other-launchers.md").read_text("utf-8")
DOCUMENTS = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)]


def commands() -> list[list[str]]:
    """What follows `hvd-lb train` in each, its options."""
    lines = re.sub(r" \\\n\s*", " ", PAGE).splitlines()
    found = [
        line.strip() for line in lines if re.match(r"    +\S*(torchrun|srun|mpirun|horovodrun|flux)\b", line)
    ]
    found += [
        line.strip() for text in (document.get("run") for document in DOCUMENTS) for line in [text or ""]
    ]
    words = [
        shlex.split(re.sub(r"\\\n", "", line).replace("$(which hvd-lb)", "hvd-lb")) for line in found if line
    ]
    words.append([*job()["spec"]["trainer"]["command"], *job()["spec"]["trainer"]["args"]])
    return [line[line.index("train") + 1 :] for line in words if "train" in line]


def job() -> dict[str, Any]:
    (document,) = [document for document in DOCUMENTS if document.get("kind") == "TrainJob"]
    return copy.deepcopy(document)


def test_the_options_are_those_of_train() -> None:
    assert len(commands()) >= 7
    for options in commands():
        context = train.make_context("train", options)
        assert context.params["data"]


def test_kubeflows_models_take_the_trainjob() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    assert models.TrainerV1alpha1TrainJob.from_dict(job()).to_dict() == job()


def test_the_skypilot_task_has_the_fields_of_its_documentation() -> None:
    (task,) = [document for document in DOCUMENTS if "accelerators" in document.get("resources", {})]
    assert task.keys() <= {"name", "workdir", "num_nodes", "resources", "envs", "file_mounts", "setup", "run"}
    assert task["file_mounts"]["/runs"].keys() <= {"name", "source", "store", "mode"}
    used = set(re.findall(r"\$(SKYPILOT_\w+)", task["run"]))
    assert used == {
        "SKYPILOT_NUM_NODES",
        "SKYPILOT_NUM_GPUS_PER_NODE",
        "SKYPILOT_NODE_RANK",
        "SKYPILOT_NODE_IPS",
    }


def test_the_ray_program_is_python() -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    compile(program, "ray", "exec")
