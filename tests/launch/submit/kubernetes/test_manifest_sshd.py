"""The sshd of an MPIJob's workers, run for real: on keys that lie as Kubernetes mounts them, as root and as a user."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pods import mounted_secret

from hvd_lb.launch.submit.kubernetes.mpijob import SSH_PORT, sshd_command


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running_sshd(prefix: list[str], keys: Path, port: int) -> Iterator[None]:
    Path("/run/sshd").mkdir(exist_ok=True)  # the image has it; Debian's init script makes it elsewhere
    words = [word.replace(str(SSH_PORT), str(port)) for word in sshd_command(str(keys))]
    with subprocess.Popen([*prefix, *words], stderr=subprocess.PIPE) as sshd:
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert sshd.poll() is None, sshd.stderr and sshd.stderr.read()
                time.sleep(0.1)
            yield
        finally:
            sshd.terminate()


def accounts() -> list[pwd.struct_passwd]:
    """root, and someone who is not, with a shell."""
    others = [user for user in pwd.getpwall() if user.pw_uid >= 1000 and user.pw_shell.endswith("sh")]
    return [pwd.getpwuid(0), *others[:1]]


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/usr/sbin/sshd").exists() or shutil.which("setpriv") is None,
    reason="needs root, sshd and setpriv",
)
@pytest.mark.parametrize("user", accounts(), ids=lambda user: "root" if user.pw_uid == 0 else "user")
def test_a_workers_sshd_admits_the_jobs_key_alone(
    tmp_path_factory: pytest.TempPathFactory, user: pwd.struct_passwd
) -> None:
    folder = tmp_path_factory.mktemp("worker")
    for above in (folder, *folder.parents):  # pytest's own are root's alone
        if above.is_relative_to(tempfile.gettempdir()) and above != Path(tempfile.gettempdir()):
            above.chmod(0o755)
    keys = folder / ".ssh"
    mounted_secret(keys, "/root/.ssh" if user.pw_uid == 0 else "/home/hvd-lb/.ssh")
    other = folder / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    os.chown(other, user.pw_uid, user.pw_gid)
    as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    if user.pw_uid:  # as the manifest's security context has it
        as_user += ["--no-new-privs", "--bounding-set=-all"]
    port = free_port()
    # The host key is the job's key too, so that it can be checked.
    known = f'KnownHostsCommand=/usr/bin/sed "s/^/* /" {keys}/id_rsa.pub'
    ssh = [
        *(
            *as_user,
            "ssh",
            "-F",
            "/dev/null",
            "-p",
            str(port),
            "-o",
            "BatchMode=yes",
            "-o",
            "IdentitiesOnly=yes",
        ),
        *("-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile=/dev/null", "-o", known),
    ]
    with running_sshd(as_user, keys, port):
        let_in = subprocess.run(
            [*ssh, "-i", str(keys / "id_rsa"), "127.0.0.1", "id -u"],
            capture_output=True,
            text=True,
            check=False,
        )
        refused = subprocess.run(
            [*ssh, "-i", str(other), "127.0.0.1", "id -u"], capture_output=True, text=True, check=False
        )
    assert let_in.stdout.strip() == str(user.pw_uid), let_in.stderr
    assert refused.returncode == 255
    assert "Permission denied (publickey)" in refused.stderr
