"""A rank hangs: the run ends by itself and says which one, where, and by what."""

import json
import os
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
from real_runs import SMALL, Start, finish, processes_of

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod"),
]

# For every Python that starts; in the rank that is to hang, step 3 does.
SITE = """
    import ctypes, os, signal, sys, threading, time

    class Sleeper:
        def __next__(self):
            self.sleep_for_ever()

        def sleep_for_ever(self):
            time.sleep(1e6)

    def within_a_library():
        ctypes.PyDLL(None).pause()  # with Python's lock

    def hang_in_step_3():
        while not hasattr(sys.modules.get("hvd_lb.training.trainer"), "Trainer"):
            time.sleep(0.01)
        trainer = sys.modules["hvd_lb.training.trainer"].Trainer
        take = trainer.train_step

        def train_step(self, batches):
            if self.step == 3 and self.world.rank == self.world.size - 1:
                if HOW == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif HOW == "library":
                    within_a_library()
                else:
                    batches = Sleeper()
            return take(self, batches)

        trainer.train_step = train_step

    HOW = os.environ.get("HVD_LB_TEST_HANG")
    if HOW and any("rank.entry" in word for word in sys.orig_argv):
        threading.Thread(target=hang_in_step_3, daemon=True).start()
"""


@pytest.mark.parametrize(
    ("how", "processes", "words", "stack"),
    [
        ("loader", 3, "rank 2 on localhost has not arrived in step 3 (waiting for data)", "sleep_for_ever"),
        (
            "library",
            2,
            "rank 1 on localhost has not arrived in step 3 (within a library)",
            "within_a_library",
        ),
        ("stopped", 2, "rank 1 on localhost has not arrived in step 3 (stopped or unreachable)", None),
        ("loader", 1, "rank 0 on localhost does not go on in step 3 (waiting for data)", "sleep_for_ever"),
    ],
)
def test_the_one_that_hangs_is_named_and_the_run_ends(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    how: str, processes: int, words: str, stack: str | None,
) -> None:  # fmt: skip
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(textwrap.dedent(SITE))
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("HVD_LB_TEST_HANG", how)
    run = tmp_path / "run"
    words_typed = ("--gpus", 3, "--processes", processes, "--steps", 60, "--hang-timeout", 15)
    process = start("train", *SMALL, *words_typed, "--checkpoint-every", "2steps", "--output", run)
    _, err = finish(process, 1)
    assert f"hvd-lb: error: no step for 15 s: {words}; stacks in {run / 'logs'}\n" in err
    assert json.loads((run / "summary.json").read_text())["exit_reason"].startswith(
        "failed: no step for 15 s"
    )
    assert (run / "checkpoints" / "step-00000002" / "state.json").exists()
    assert not processes_of(run)
    log = (run / "logs" / f"rank-{processes - 1:04d}-localhost.log").read_text()
    assert (stack or "Traceback") in log if stack else "File " not in log
