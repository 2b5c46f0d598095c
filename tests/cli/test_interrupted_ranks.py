"""torchrun ends the other processes of a job by SIGTERM when one has failed: that one alone says what was wrong."""

import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("rank", "said"), [("0", "hvd-lb: error: interrupted by SIGTERM\n"), ("1", "")])
def test_rank_0_tells_of_it(rank: str, said: str) -> None:
    """As soon as signals are handled, whatever has been loaded by then."""
    program = "import hvd_lb_cli.main as m, os, signal; m._Signals(); os.kill(os.getpid(), signal.SIGTERM)"
    variables = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "RANK": rank, "WORLD_SIZE": "2"}
    ended = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, said)
