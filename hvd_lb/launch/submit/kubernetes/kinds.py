"""The kinds of jobs that a run can be, as `follow` meets them in a cluster: their pods, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hvd_lb.launch.submit.kubernetes.pod import Manifest

Object = dict[str, Any]


@dataclass(frozen=True)
class JobKind:
    """`leader` is the pod whose log is the run's and whose exit status is, too."""

    name: str
    api_version: str
    operator: str  #: what has to be installed for it
    job_label: str  #: of pods: the job's name
    leader_job: str  #: the Job with the leader, by the `name`
    is_leader: Callable[[Object], bool]
    computes: Callable[[Object], bool]  #: whether a pod has ranks
    nodes: Callable[[Object], int]  #: how many have
    suspended: Callable[[Object], bool]
    ends: tuple[str, ...]  #: the conditions that end it

    @property
    def resource(self) -> str:
        return resource({"kind": self.name, "apiVersion": self.api_version})

    def ending(self, job: Object) -> str | None:
        """How a job ended, or None while it has not."""
        for condition in job.get("status", {}).get("conditions", []):
            if condition["type"] in self.ends and condition["status"] == "True":
                return f"{condition['type']}, {one_line(condition.get('message'))}"
        return None


def _label(pod: Object, name: str) -> str:
    return str(pod["metadata"].get("labels", {}).get(name))


def _role(pod: Object) -> str:
    return _label(pod, "training.kubeflow.org/job-role")


MPIJOB = JobKind(
    name="MPIJob",
    api_version="kubeflow.org/v2beta1",
    operator="the MPI operator, release 0.5 or newer",
    job_label="training.kubeflow.org/job-name",
    leader_job="{name}-launcher",
    is_leader=lambda pod: _role(pod) == "launcher",
    computes=lambda pod: _role(pod) == "worker",
    nodes=lambda job: int(job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]),
    suspended=lambda job: bool(job["spec"].get("runPolicy", {}).get("suspend")),
    ends=("Succeeded", "Failed"),
)


_REPLICATED = "jobset.sigs.k8s.io/replicatedjob-name"
TRAINJOB = JobKind(
    name="TrainJob",
    api_version="trainer.kubeflow.org/v1alpha1",
    operator="Kubeflow Trainer 2",
    job_label="jobset.sigs.k8s.io/jobset-name",
    leader_job="{name}-launcher-0",
    is_leader=lambda pod: _label(pod, _REPLICATED) == "launcher",
    computes=lambda pod: _label(pod, _REPLICATED) == "node",
    nodes=lambda job: int(job["spec"]["trainer"]["numNodes"]),
    suspended=lambda job: bool(job["spec"].get("suspend")),
    ends=("Complete", "Failed"),
)


def kind_of(job: Manifest) -> JobKind:
    return {kind.name: kind for kind in (MPIJOB, TRAINJOB)}[job["kind"]]


def resource(document: Manifest) -> str:
    """What kubectl calls its kind, with its version."""
    group, _, version = document["apiVersion"].partition("/")
    return f"{document['kind'].lower()}s.{version}.{group}"


def one_line(text: object) -> str:
    return " ".join(str(text or "no message").split())
