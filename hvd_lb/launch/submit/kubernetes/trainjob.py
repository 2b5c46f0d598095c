"""A run as a TrainJob of Kubeflow Trainer 2 (trainer.kubeflow.org/v1alpha1), with a TrainingRuntime of its own.

The runtime has all that is said of pods; what a TrainJob itself may say of them is called differently from release to
release. Its MPI policy makes what the MPI operator makes: a launcher pod, one pod per node, /etc/mpi/hostfile and a key
pair. So the same two commands run as in an MPIJob (`mpijob`).
"""

from __future__ import annotations

from hvd_lb.errors import UserError
from hvd_lb.launch.submit.command import Submission
from hvd_lb.launch.submit.kubernetes import pod
from hvd_lb.launch.submit.kubernetes.kinds import TRAINJOB
from hvd_lb.launch.submit.kubernetes.mpijob import (
    launcher_command,
    launcher_container,
    worker_container,
)
from hvd_lb.launch.submit.kubernetes.names import job_name, run_annotations
from hvd_lb.launch.submit.kubernetes.options import KubernetesOptions
from hvd_lb.launch.submit.kubernetes.pod import Manifest
from hvd_lb.launch.submit.kubernetes.volumes import checked_volumes, output_place, pod_volumes

# Trainer knows jobs and containers by these names.
_LAUNCHER, _NODE = "launcher", "node"
_RUNTIME = "TrainingRuntime"


def trainjob(submission: Submission, options: KubernetesOptions) -> list[Manifest]:
    """The TrainingRuntime and the TrainJob of a run; UserError when the run could not work that way."""
    if options.root:
        raise UserError(
            "--k8s-root with --k8s-kind trainjob: Trainer mounts keys that a group may read, which root's ssh refuses; "
            "use --k8s-kind mpijob"
        )
    if submission.elastic:
        raise UserError(
            "--elastic with --k8s-kind trainjob: what becomes of the other pods when one is lost is not known; use "
            "--k8s-kind mpijob"
        )
    volumes = checked_volumes(submission, options.volumes)
    output = output_place(submission, volumes)
    said = run_annotations(submission.name, output, launcher_command(submission))
    metadata = pod.job_metadata(job_name(submission.name, output), options, said)
    launcher = pod.pod(
        launcher_container(submission, options, volumes, _NODE),
        options,
        pod_volumes(volumes),
        {"restartPolicy": "Never"},
    )
    node = pod.pod(
        worker_container(submission, options, volumes, _NODE),
        options,
        pod.computing_volumes(volumes, options),
        {"restartPolicy": "Never", **pod.computing(options)},
    )
    size = {"numNodes": submission.nodes}
    runtime = {
        "apiVersion": TRAINJOB.api_version,
        "kind": _RUNTIME,
        "metadata": {**metadata, "labels": {**pod.LABELS, **options.labels}},
        "spec": {
            "mlPolicy": {
                **size,
                "mpi": {
                    "numProcPerNode": pod.slots(submission),
                    "mpiImplementation": "OpenMPI",
                    "sshAuthMountPath": f"{pod.home(options)}/.ssh",
                },
            },
            "template": {
                "spec": {
                    "network": {"publishNotReadyAddresses": True},
                    "successPolicy": {"operator": "All", "targetReplicatedJobs": [_LAUNCHER]},
                    "replicatedJobs": [
                        {"name": _NODE, "template": _job(node)},
                        {
                            "name": _LAUNCHER,
                            # When sshd answers in all of them.
                            "dependsOn": [{"name": _NODE, "status": "Ready"}],
                            "template": {
                                "metadata": {
                                    "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
                                },
                                **_job(launcher),
                            },
                        },
                    ],
                }
            },
        },
    }
    job = {
        "apiVersion": TRAINJOB.api_version,
        "kind": TRAINJOB.name,
        "metadata": metadata,
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": _RUNTIME,
                "name": metadata["name"],
            },
            "trainer": {**size, "numProcPerNode": pod.slots(submission)},
        },
    }
    return [runtime, job]


def _job(template: Manifest) -> Manifest:
    """Not tried again by itself: the same command goes on from the last checkpoint."""
    return {"spec": {"backoffLimit": 0, "template": template}}
