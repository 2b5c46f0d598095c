"""`horovodrun` with three habits changed: `… -m hvd_lb.launch.starters.horovodrun ADDRESS SSH... -- ITS OPTIONS`.

Horovod's own one writes the whole environment, secrets too, into the command line of every rank, logs in with host
keys unchecked, and lets anyone who reaches any interface of this machine write into its rendezvous. Here ranks get
the few variables that Python needs to start (the rest is in the job's file), ssh is called as `SSH...` says, and the
rendezvous listens on ADDRESS alone.
"""

from __future__ import annotations

import os
import shlex
import sys

from horovod.runner import launch
from horovod.runner.common.util import env as env_util
from horovod.runner.util import remote

from hvd_lb.launch.starters.rendezvous import bind_rendezvous

# What an interpreter reads before it runs anything; PYTHONUNBUFFERED is set by Horovod.
_ON_COMMAND_LINES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONUNBUFFERED")


def main(arguments: list[str]) -> None:
    end = arguments.index("--")
    address, ssh = arguments[0], arguments[1:end]
    bind_rendezvous(address)
    remote.SSH_COMMAND_PREFIX = shlex.join(ssh)
    env_util.is_exportable = lambda name: name in _ON_COMMAND_LINES
    # Where it sees an LSF job, horovodrun looks for hosts and interfaces on its own, and does not find any.
    os.environ.pop("LSB_JOBID", None)
    # It puts the working directory into a shell's command line without quotes.
    os.chdir("/")
    sys.argv = ["horovodrun", *arguments[end + 1 :]]
    launch.run_commandline()


if __name__ == "__main__":
    main(sys.argv[1:])
