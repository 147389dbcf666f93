"""``dist-prune launch --kubernetes``: a run as a TrainJob of Kubeflow Trainer, or as a plain JobSet.

Both make one pod for each node. A pod runs ``start_node``, whose exit code tells the JobSet's policies whether the same
command is to be started again: 2 and 3 (an error that would repeat, a missed target) end the run, any other code and a
lost pod start all pods again, which resume from the run directory.
"""

import argparse
import re
from typing import Any

import yaml

from dist_prune.cli import launch_job
from dist_prune.cli.launch_job import Job
from dist_prune.errors import MISSED, PruneError, shown

KINDS = ("trainjob", "jobset")
RUNS, LOCAL, RECIPES = "/runs", "/local", "/recipes"  # folders in a pod
POD = "node"  # name of the replicated job and of its container; Kubeflow's runtimes use the same
TRAINER = "trainer.kubeflow.org/v1alpha1"
WIDTH = 10**6  # of a line of YAML: values are not broken
ATTEMPT = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
HEADER = """# {what} of {name}: dist-prune launch --kubernetes
# shared   claim {claim}, mounted at /runs: ReadWriteMany for more than one node
# local    /local, each pod's own (data.stage_to=/local copies shards there)
# start, or start again with the same state: kubectl apply -f FILE
"""


def manifests(arguments: argparse.Namespace) -> str:
    """The YAML documents that ``kubectl apply`` takes.

    Args:
        arguments: the verb's parsed command line.

    Raises:
        PruneError: if an image or a claim is missing, a mount is malformed, or the recipe is wrong.
    """
    if not arguments.container:
        raise PruneError("--container: name the image that the pods run, with dist_prune installed in it")
    if not arguments.runs:
        raise PruneError("--runs: name the PersistentVolumeClaim that keeps the run directories (ReadWriteMany)")
    job, kind = launch_job.read_job(arguments), arguments.kind or "trainjob"
    claims = [("runs", arguments.runs, RUNS), *_mounts(arguments.mount)]
    restarts = launch_job.RESTARTS if arguments.restarts is None else arguments.restarts
    documents = [_recipe_map(job)] if job.file else []
    if kind == "jobset":
        documents.append(_jobset(job, arguments.container, claims, restarts))
    else:
        documents += _trainjob(job, arguments.container, claims, restarts)
    what = "JobSet" if kind == "jobset" else "TrainJob and its TrainingRuntime"
    header = HEADER.format(what=what, name=job.recipe.name, claim=arguments.runs)
    return header + "---\n".join(yaml.safe_dump(document, sort_keys=False, width=WIDTH) for document in documents)


def _mounts(mounts: list[str]) -> list[tuple[str, str, str]]:
    """(name, claim, folder) of each ``--mount CLAIM:/FOLDER``."""
    found = []
    for number, mount in enumerate(mounts):
        claim, _, folder = mount.partition(":")
        if not claim or not folder.startswith("/"):
            raise PruneError(f"--mount: {shown(mount)}: write CLAIM:/FOLDER, a volume claim and its place in the pods")
        found.append((f"mount-{number}", claim, folder))
    return found


def _jobset(job: Job, image: str, claims: list[tuple[str, str, str]], restarts: int) -> dict[str, Any]:
    pod = _pod(job, image, claims)
    (container,) = pod["containers"]
    # of the headless service that a JobSet makes: JOBSET-REPLICATED_JOB-JOB-POD.JOBSET
    container["env"].append({"name": "MASTER_ADDR", "value": f"{job.name}-{POD}-0-0.{job.name}"})
    container["command"], container["args"] = _command(job)
    container["resources"] = _resources(job)
    spec = _jobset_spec(pod, restarts)
    (replicated,) = spec["replicatedJobs"]
    replicated["template"]["spec"] |= {"parallelism": job.nodes, "completions": job.nodes}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": job.name},
        "spec": {"network": {"enableDNSHostnames": True}, **spec},
    }  # fmt: skip


def _trainjob(job: Job, image: str, claims: list[tuple[str, str, str]], restarts: int) -> list[dict[str, Any]]:
    """A runtime of its own: a TrainJob has no policy for failures and, from release to release, other volumes."""
    spec = _jobset_spec(_pod(job, image, claims), restarts)
    (replicated,) = spec["replicatedJobs"]
    replicated["template"]["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    command, words = _command(job)
    runtime = {
        "apiVersion": TRAINER, "kind": "TrainingRuntime",
        "metadata": {"name": job.name, "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": job.nodes, "torch": {}}, "template": {"spec": spec}},
    }  # fmt: skip
    train = {
        "apiVersion": TRAINER, "kind": "TrainJob", "metadata": {"name": job.name},
        "spec": {
            "runtimeRef": {"apiGroup": TRAINER.partition("/")[0], "kind": "TrainingRuntime", "name": job.name},
            "trainer": {
                "image": image, "command": command, "args": words, "numNodes": job.nodes,
                "resourcesPerNode": _resources(job),
            },
        },
    }  # fmt: skip
    return [runtime, train]


def _jobset_spec(pod: dict[str, Any], restarts: int) -> dict[str, Any]:
    """The policies: all pods end with one, and start again unless its exit code says that the error would repeat."""
    codes = {"containerName": POD, "operator": "In", "values": [PruneError.code, MISSED]}
    repeats = {"action": "FailJob", "onExitCodes": codes}
    return {
        "failurePolicy": {
            "maxRestarts": restarts,
            "rules": [
                {"name": "repeats", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
            ],
        },
        "replicatedJobs": [
            {
                "name": POD, "replicas": 1,
                "template": {
                    "spec": {
                        "backoffLimit": 0, "completionMode": "Indexed", "podFailurePolicy": {"rules": [repeats]},
                        "template": {"spec": pod},
                    },
                },
            }
        ],
    }  # fmt: skip


def _pod(job: Job, image: str, claims: list[tuple[str, str, str]]) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}} for name, claim, _ in claims
    ]
    mounts = [{"name": name, "mountPath": folder} for name, _, folder in claims]
    volumes += [{"name": "local", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts += [{"name": "local", "mountPath": LOCAL}, {"name": "shm", "mountPath": "/dev/shm"}]
    if job.file:
        volumes.append({"name": "recipe", "configMap": {"name": job.name}})
        mounts.append({"name": "recipe", "mountPath": RECIPES})
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": launch_job.GRACE_S,
        "containers": [
            {
                "name": POD, "image": image, "volumeMounts": mounts,
                "env": [
                    {"name": "TMPDIR", "value": LOCAL},
                    # pods of an earlier start are refused by those of this one
                    {"name": "DIST_PRUNE_LAUNCH", "valueFrom": {"fieldRef": {"fieldPath": ATTEMPT}}},
                ],
            }
        ],
        "volumes": volumes,
    }  # fmt: skip


def _command(job: Job) -> tuple[list[str], list[str]]:
    """Command and arguments of a container; Kubernetes would fill in ``$(NAME)``, which no recipe means."""
    words = job.command(RUNS, f"{RECIPES}/{_key(job)}" if job.file else None)
    escaped = [re.sub(r"\$(?=[$(])", "$$", word) for word in words]
    return escaped[:3], escaped[3:]


def _resources(job: Job) -> dict[str, Any]:
    requests: dict[str, str] = {"cpu": str(job.cpus)}
    limits: dict[str, str] = {}
    if job.memory_gib is not None:
        requests["memory"] = limits["memory"] = f"{round(job.memory_gib * 1024)}Mi"
    if job.gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = str(job.gpus)
    return {"requests": requests, **({"limits": limits} if limits else {})}


def _recipe_map(job: Job) -> dict[str, Any]:
    """The recipe's file as a ConfigMap: the image does not have it."""
    assert job.file is not None
    return {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": job.name},
        "data": {_key(job): job.file.read_text(encoding="utf-8")},
    }  # fmt: skip


def _key(job: Job) -> str:
    return re.sub(r"[^\w.-]", "_", job.file.name, flags=re.ASCII) if job.file else ""
