"""Whole runs, tracked by real stores: MLflow's files, W&B offline."""

import json
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_runs import SMALL, finish, records, until

Start = Callable[..., subprocess.Popen[str]]
RUN = (*SMALL, "--gpus", 2, "--per-gpu-batch", 32, "--log-every", 1, "--epochs", 2, "--warmup-epochs", 0)

pytestmark = pytest.mark.long


@pytest.mark.filterwarnings("ignore")  # of libraries that it loads
def test_mlflow_keeps_one_run_over_a_stop(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes many seconds to be made
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "mlruns").as_uri()
    run = tmp_path / "a-run"
    command = ("train", *RUN, "--processes", 2, "--output", run, "--track", f"mlflow:{uri}")
    first = start(*command, cwd=tmp_path)
    until(lambda: (run / "metrics.jsonl").exists() and len(records(run)) > 3)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGINT, out + err
    client = mlflow.MlflowClient(uri)
    [told] = client.search_runs([client.get_experiment_by_name("hvd-lb").experiment_id])
    assert told.info.status == "KILLED"
    finish(start(*command, cwd=tmp_path))
    [told] = client.search_runs([client.get_experiment_by_name("hvd-lb").experiment_id])
    assert (told.info.run_name, told.info.status) == ("a-run", "FINISHED")
    assert told.data.params["model"] == "resnet8"
    assert told.data.tags["hvd_lb.processes"] == "2"
    losses = [record for record in records(run) if record["kind"] == "train"]
    history = client.get_metric_history(told.info.run_id, "train/loss")
    found = {point.step: point.value for point in history}
    assert found == {record["step"]: record["loss"] for record in losses}
    errors = client.get_metric_history(told.info.run_id, "eval/top1_error_percent")
    assert errors[-1].value == json.loads((run / "summary.json").read_text())["final"]["top1_error"]
    files = {file.path for file in client.list_artifacts(told.info.run_id)}
    assert files == {"recipe.yaml", "events.txt", "README.md"}
    card = mlflow.artifacts.load_text(f"{told.info.artifact_uri}/README.md")
    assert card.startswith("# resnet8, trained on digits")
    events = mlflow.artifacts.load_text(f"{told.info.artifact_uri}/events.txt")
    assert "resume: went on at step" in events


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "a-run"
    finish(start("simulate", *RUN, "--run", "--output", run, "--track", "wandb:cats", cwd=tmp_path))
    identity = json.loads((run / "tracking.json").read_text())["wandb:cats"]["id"]
    [kept] = (run / "wandb").glob(f"offline-run-*-{identity}")
    assert (kept / "files" / "README.md").read_text().startswith("# resnet8, trained on digits")
    losses = [record["loss"] for record in records(run) if record["kind"] == "train"]
    assert [point["train/loss"] for point in _history(kept) if "train/loss" in point] == losses


def _history(folder: Path) -> list[dict[str, Any]]:
    """Points in W&B's own file."""
    from wandb.proto import wandb_internal_pb2

    [file] = folder.glob("*.wandb")
    points = []
    for data in _log_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            points.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    return points


def _log_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log: parts of records, each after checksum, length and kind, in blocks of 32 kB, after 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
