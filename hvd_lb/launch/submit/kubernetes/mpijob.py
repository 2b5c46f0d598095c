"""A run as an MPIJob of Kubeflow's MPI operator (kubeflow.org/v2beta1).

The operator makes a launcher pod and one worker pod per node, names these in /etc/mpi/hostfile of the launcher pod and
mounts one key pair, made for this job, in all pods. Worker pods run the image's sshd and wait; the launcher runs
`hvd-lb train ... --launcher ssh`, which finds that file.
"""

from __future__ import annotations

from collections.abc import Sequence

from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.kubernetes import pod
from hvd_lb.launch.submit.kubernetes.kinds import MPIJOB
from hvd_lb.launch.submit.kubernetes.names import job_name, run_annotations
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions
from hvd_lb.launch.submit.kubernetes.pod import Manifest
from hvd_lb.launch.submit.kubernetes.volumes import (
    Volume,
    checked_volumes,
    output_place,
    pod_volumes,
    volume_mounts,
)

#: Where the sshd of worker pods listens: no port below 1024, so no root is needed.
SSH_PORT = 12345


def mpijob(submission: Submission, options: KubernetesOptions) -> Manifest:
    """The MPIJob of a run; UserError when the run could not work that way."""
    volumes = checked_volumes(submission, options.volumes)
    output = output_place(submission, volumes)
    command = launcher_command(submission)
    return {
        "apiVersion": MPIJOB.api_version,
        "kind": MPIJOB.name,
        "metadata": pod.job_metadata(
            job_name(submission.name, output), options, run_annotations(submission.name, output, command)
        ),
        "spec": {
            "slotsPerWorker": pod.slots(submission),
            "mpiImplementation": "OpenMPI",
            "sshAuthMountPath": f"{pod.home(options)}/.ssh",
            "launcherCreationPolicy": "WaitForWorkersReady",
            # Not tried again by itself: the same command goes on from the last checkpoint.
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 0},
            "mpiReplicaSpecs": {
                "Launcher": {
                    "replicas": 1,
                    "restartPolicy": "Never",
                    "template": pod.pod(
                        launcher_container(submission, options, volumes, "launcher"),
                        options,
                        pod_volumes(volumes),
                        {},
                    ),
                },
                "Worker": {
                    "replicas": submission.nodes,
                    # The operator makes a pod that is gone again; one whose sshd has failed begins again.
                    "restartPolicy": "OnFailure" if submission.elastic else "Never",
                    "template": pod.pod(
                        worker_container(submission, options, volumes, "worker"),
                        options,
                        pod.computing_volumes(volumes, options),
                        pod.computing(options),
                    ),
                },
            },
        },
    }


def launcher_container(
    submission: Submission, options: KubernetesOptions, volumes: Sequence[Volume], name: str
) -> Manifest:
    """What starts the ranks: it needs no GPU."""
    more = {
        "envFrom": [{"secretRef": {"name": secret}} for secret in options.secrets],
        "command": [pod.literal(word) for word in launcher_command(submission)],
        "resources": {"requests": {"cpu": "2", "memory": "4Gi"}},
        "volumeMounts": volume_mounts(volumes),
    }
    return pod.container(submission, options, name, more)


def worker_container(
    submission: Submission, options: KubernetesOptions, volumes: Sequence[Volume], name: str
) -> Manifest:
    """A host for ranks: an sshd that waits for them."""
    more = {
        "command": sshd_command(f"{pod.home(options)}/.ssh"),
        # Ready, and with a host name that resolves, when sshd answers. Never asked again: it may be slow under load.
        "startupProbe": {"tcpSocket": {"port": SSH_PORT}, "periodSeconds": 2, "failureThreshold": 60},
        "lifecycle": pod.ending_well(submission),
        "resources": pod.computing_resources(submission, options),
        "volumeMounts": pod.computing_mounts(volumes),
    }
    return pod.container(submission, options, name, more)


def launcher_command(submission: Submission) -> list[str]:
    """What runs in the launcher pod. sshd gives sessions none of a pod's variables: the launcher hands them on."""
    variables = [word for name in submission.environment for word in ("--env", name)]
    return ["hvd-lb", *submission.arguments, *variables, "--launcher", "ssh", "--ssh-port", str(SSH_PORT)]


def sshd_command(keys: str) -> list[str]:
    """The command of a worker pod: an sshd that admits the job's key alone and has it as its own host key as well.

    `keys` is where the operator mounts it. StrictModes has to be off: a mounted Secret is a folder of links that all
    may write to. The image's sshd_config holds for all that is not said here.
    """
    options = {
        "HostKey": f"{keys}/id_rsa",
        "AuthorizedKeysFile": f"{keys}/authorized_keys",
        "StrictModes": "no",
        "PidFile": "none",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        # horovodrun opens a session per process, all at once; of more than 10 the default turns some away.
        "MaxStartups": "1024",
    }
    words = ["/usr/sbin/sshd", "-D", "-e", "-p", str(SSH_PORT)]
    for key, value in options.items():
        words += ["-o", f"{key}={value}"]
    return words
