"""What Kubernetes and the MPI operator do to the pods of an MPIJob, done to processes and folders of this machine.

As pkg/controller/mpi_job_controller.go of kubeflow/mpi-operator does it, at commit
cbe4f8aab9445f80bdae60868a040f59a3863c81.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any


def mounted_secret(folder: Path, mount_path: str) -> None:
    """The job's keys as kubelet mounts the operator's Secret: root's, links to a hidden folder that all may write to.

    The operator gives the files a mode of its own where root logs in; else they have Kubernetes' default.
    """
    data = folder / "..2025_11_24_09_00_00"
    data.mkdir(parents=True)
    key = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", "", "-f", str(data / "id_rsa")]
    subprocess.run(key, check=True)
    (data / "authorized_keys").write_bytes((data / "id_rsa.pub").read_bytes())
    (folder / "..data").symlink_to(data.name)
    for file in data.iterdir():
        file.chmod(0o600 if mount_path == "/root/.ssh" else 0o644)
        (folder / file.name).symlink_to(f"..data/{file.name}")
    folder.chmod(0o1777)


def worker_names(job: dict[str, Any]) -> list[str]:
    """The workers' names in the cluster's DNS."""
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    replicas = job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"]
    return [f"{name}-worker-{i}.{name}.{namespace}.svc" for i in range(replicas)]


def hostfile(job: dict[str, Any]) -> str:
    """/etc/mpi/hostfile of the launcher, for Open MPI."""
    return "".join(f"{name} slots={job['spec']['slotsPerWorker']}\n" for name in worker_names(job))


def launcher_environment(job: dict[str, Any]) -> dict[str, str]:
    """The variables of the launcher: its own, and what the operator adds."""
    (container,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    return {
        **{one["name"]: one["value"] for one in container.get("env", [])},
        "K_MPI_JOB_ROLE": "launcher",
        "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
        "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
        "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
        "OMPI_MCA_orte_set_default_slots": str(job["spec"]["slotsPerWorker"]),
        "NVIDIA_VISIBLE_DEVICES": "",
        "NVIDIA_DRIVER_CAPABILITIES": "",
    }
