"""What the ranks are told comes to them as it was."""

from pathlib import Path

from hvd_lb.launch.job import Job
from hvd_lb.recipe import make_recipe


def test_a_job_is_read_as_it_was_written() -> None:
    job = Job(
        recipe=make_recipe({"data": "/data/\udcff", "crop_scale": (0.1, 1.0), "learning_rate": 0.1 + 0.2}),
        output=Path("/runs/a\nb [c] \udcff ü"),
        device="cpu",
        processes=2,
        threads=1,
        pin=True,
        checkpoint=Path("/runs/\udcff/checkpoints/last"),
        data_fingerprint="f",
        engine="torch",
        starter="ssh",
        hosts=[("h1", 2)],
        interfaces={"h1": "eth0"},
        environment={"SECRET": "ß\udcff"},
    )
    text = job.to_json()
    assert text.isascii()
    assert Job.from_json(text) == job
