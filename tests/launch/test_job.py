"""What ranks are told comes through the file as it was."""

from __future__ import annotations

import os
from pathlib import Path

from hvd_lb.launch.job import Job
from hvd_lb.recipe import Recipe


def test_a_job_is_read_as_it_was_written() -> None:
    recipe = Recipe(
        data=os.fsdecode(b"/data/\xff\xfe"), val="/é", crop_scale=(0.3, 1.0), model="resnet8", num_classes=10
    )
    job = Job(
        recipe=recipe,
        output=Path("/runs/x"),
        device="cpu",
        processes=2,
        threads=1,
        checkpoint=Path(os.fsdecode(b"/runs/\xe9/last")),
        data_fingerprint="a-b-c",
        starter="local",
        hosts=[("one", 2)],
        interfaces={"one": "lo"},
        environment={"NAME": os.fsdecode(b"\xe9")},
    )
    text = job.to_json()
    text.encode("utf-8", errors="strict")
    assert Job.from_json(text) == job
