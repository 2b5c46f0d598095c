"""A Slurm job that has lost the node of its batch script, and was asked not to end with a node (--no-kill).

Slurm takes the node out of the job, and lets the rest run on until the time limit, although nobody is there any more
who would start anything. So it is up to those on the other nodes to put the job back into the queue.
"""

from __future__ import annotations

import re
import subprocess
import time

_PAUSE_SECONDS = 20.0
_SLURM_SECONDS = 60.0
# Longer than any site waits for a node that is silent (SlurmdTimeout, 300 s by default).
_PATIENCE_SECONDS = 3600.0


def put_back_without_script(job: str) -> None:
    """Returns when the job was put back, or ended where it is not to come back; or once that is not needed.

    It is needed when the node of its script is none of its nodes any more, which Slurm has to find out first.
    """
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        said = line_of_job(_said("scontrol", "show", "job", "--oneliner", job), job)
        fields = dict(re.findall(r"(?<!\S)(\w+)=(\S*)", said))
        if said and (fields.get("JobState") != "RUNNING" or fields.get("BatchFlag") != "1"):
            return
        nodes = _said("scontrol", "show", "hostnames", fields.get("NodeList", "")).split()
        if nodes and fields["BatchHost"] not in nodes:
            print(
                f"{fields['BatchHost']}, where the script was, is lost to job {job}: it is put back",
                flush=True,
            )
            _said(*(("scontrol", "requeue") if fields.get("Requeue") == "1" else ("scancel",)), job)
            return
        time.sleep(_PAUSE_SECONDS)


def line_of_job(said: str, job: str) -> str:
    """Of what `scontrol --oneliner show job` said, the line of this job.

    One task of an array has the array's own number, and for that all tasks are shown.
    """
    return next((line for line in said.splitlines() if line.startswith(f"JobId={job} ")), said)


def _said(*command: str) -> str:
    """Nothing where the controller, or the command, cannot be reached."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SLURM_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
