"""A job's Kubernetes objects, as plain values and as YAML.

    job         a headless Service, which gives every pod a name, and an Indexed Job with a pod for each machine
    trainjob    a TrainJob of Kubeflow's Trainer (2.2 or newer), which makes both by its runtime torch-distributed

A pod's number is JOB_COMPLETION_INDEX, which Kubernetes sets; pod 0 of a Job is called NAME-0.NAME in its namespace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from ..errors import EXIT_PREEMPTED, EXIT_USER

PORT = 29500
RETRIES = 3  # of a failed machine; when machine 0 fails, all do
NAME = re.compile(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?")  # leaves room for the pod's number in a label of 63 characters


@dataclass(frozen=True)
class Pods:
    """What all pods of a job have in common."""

    name: str
    count: int
    image: str
    pvc: str
    mount_path: str
    gpus: int
    cpus: int
    grace: int  # seconds between SIGTERM and SIGKILL
    env: dict[str, str]
    script: str  # for sh; `$` of what it quotes is doubled, see `escaped`
    namespace: str | None = None

    @property
    def metadata(self) -> dict[str, str]:
        return {"name": self.name, **({"namespace": self.namespace} if self.namespace else {})}

    @property
    def resources(self) -> dict[str, Any]:
        limits = {"limits": {"nvidia.com/gpu": self.gpus}} if self.gpus else {}
        return {"requests": {"cpu": self.cpus}, **limits}

    @property
    def environment(self) -> list[dict[str, str]]:
        return [{"name": key, "value": escaped(value)} for key, value in self.env.items()]

    @property
    def volumes(self) -> list[dict[str, Any]]:
        """The claim, and shared memory, of which a container has 64 MiB by itself."""
        return [
            {"name": "data", "persistentVolumeClaim": {"claimName": self.pvc}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ]

    @property
    def mounts(self) -> list[dict[str, str]]:
        return [{"name": "data", "mountPath": self.mount_path}, {"name": "shm", "mountPath": "/dev/shm"}]


def escaped(text: str) -> str:
    """Text that Kubernetes leaves as it is, where it would replace $(NAME) by a variable."""
    return text.replace("$", "$$")


def indexed_job(pods: Pods) -> list[dict[str, Any]]:
    """A headless Service and an Indexed Job.

    Exit code 2 (the input is wrong) fails the job at once; 75 (stopped after a checkpoint) and a pod that the cluster
    takes away are replaced and not counted; every other failure is, up to RETRIES for each machine.
    """
    rules = [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [EXIT_USER]}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [EXIT_PREEMPTED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    container = {
        "name": "node",
        "image": pods.image,
        "command": ["sh", "-c", pods.script],
        "env": pods.environment,
        "resources": pods.resources,
        "volumeMounts": pods.mounts,
    }
    pod = {
        "subdomain": pods.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": pods.grace,
        "containers": [container],
        "volumes": pods.volumes,
    }
    # The machines look for each other before they are ready. Kubernetes sets the label job-name.
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": pods.name}}
    job = {
        "completionMode": "Indexed",
        "completions": pods.count,
        "parallelism": pods.count,
        "backoffLimit": RETRIES * pods.count,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": pods.metadata, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": pods.metadata, "spec": job},
    ]


def train_job(pods: Pods) -> list[dict[str, Any]]:
    """A TrainJob. How often it is tried again, and how long a pod may save, is up to the runtime."""
    trainer = {
        "image": pods.image,
        "command": ["sh", "-c", pods.script],
        "env": pods.environment,
        "numNodes": pods.count,
        "resourcesPerNode": pods.resources,
    }
    patch = {"containers": [{"name": "node", "volumeMounts": pods.mounts}], "volumes": pods.volumes}
    node = {"name": "node", "template": {"spec": {"template": {"spec": patch}}}}
    spec = {
        "runtimeRef": {"name": "torch-distributed"},
        "trainer": trainer,
        "runtimePatches": [
            {"manager": "manyrank", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}}}
        ],
    }
    return [
        {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": pods.metadata, "spec": spec}
    ]


class _Dumper(yaml.SafeDumper):
    """YAML for Kubernetes, whose parser takes y and n for yes and no, too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("[yYnN]$"), list("yYnN"))


def as_yaml(documents: list[dict[str, Any]]) -> str:
    """Objects as one file."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
