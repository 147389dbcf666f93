"""``dist-prune launch --kubernetes``, ``--skypilot``, ``--torchrun``: valid files, and the command that they start."""

import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dist_prune.cli.main import main
from dist_prune.distributed.start_node import torchrun

SCHEMAS = Path(__file__).parent / "schemas"
CLUSTER = ("--container", "registry/image:1", "--runs", "claim")


def printed(capsys: Any, *words: str) -> str:
    assert main(["launch", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def documents(capsys: Any, *words: str) -> dict[str, Any]:
    """Kind -> document, each valid."""
    schema = json.loads((SCHEMAS / "kubernetes.json").read_text())
    found = {}
    for document in yaml.safe_load_all(printed(capsys, "--kubernetes", *words)):
        one = {"$ref": f"#/$defs/{document['kind']}", "$defs": schema["$defs"]}
        jsonschema.validate(document, one)
        found[document["kind"]] = document
    return found


def task(capsys: Any, *words: str) -> dict[str, Any]:
    body = yaml.safe_load(printed(capsys, "--skypilot", *words))
    jsonschema.validate(body, json.loads((SCHEMAS / "skypilot.json").read_text()))
    return body


def test_the_schemas_refuse_what_is_wrong(capsys):
    body = task(capsys, "quickstart", "--gpus", "0", "--runs", "s3://bucket")
    schema = json.loads((SCHEMAS / "skypilot.json").read_text())
    body["resources"]["job_recovery"]["recover_on_exit_codes"] = [300]
    with pytest.raises(jsonschema.ValidationError, match="300"):
        jsonschema.validate(body, schema)
    jobset = documents(capsys, "quickstart", "--kind", "jobset", *CLUSTER)["JobSet"]
    jobset["spec"]["failurePolicy"]["restarts"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, json.loads((SCHEMAS / "kubernetes.json").read_text()))


def test_a_jobset_has_a_pod_for_each_node_and_starts_again_unless_the_error_would_repeat(capsys):
    words = ("quickstart", "--nodes", "2", "--gpus", "8", "--mem", "64G", "--restarts", "5", "--mount", "images:/data")
    (jobset,) = documents(capsys, *words, "data.workers=3", "--kind", "jobset", *CLUSTER).values()
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (2, 2, "Indexed", 0)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == {"cpu": "32", "memory": "65536Mi", "nvidia.com/gpu": "8"}
    claims = {one["name"]: one.get("persistentVolumeClaim", {}).get("claimName") for one in pod["volumes"]}
    places = {mount["mountPath"]: claims[mount["name"]] for mount in container["volumeMounts"]}
    assert places == {"/runs": "claim", "/data": "images", "/local": None, "/dev/shm": None}
    assert pod["terminationGracePeriodSeconds"] == 180 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    assert policy["rules"][0] | {"name": ""} == {
        "name": "", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"],
    }  # fmt: skip
    environment = {one["name"]: one.get("value", "") for one in container["env"]} | {"JOB_COMPLETION_INDEX": "1"}
    assert container["command"] == ["python", "-m", "dist_prune.distributed.start_node"]
    command, run_dir = torchrun(container["args"], environment)
    text = shlex.join(command)
    assert "--nnodes 2 --node_rank 1 --nproc_per_node 8 --master_addr quickstart-node-0-0.quickstart " in text
    assert text.endswith("-m dist_prune.run --recipe quickstart --run-dir /runs/quickstart data.workers=3")
    assert run_dir == Path("/runs/quickstart")


def test_a_trainjob_brings_its_runtime(capsys):
    found = documents(capsys, "quickstart", "--nodes", "2", "--gpus", "0", "--processes", "4", *CLUSTER)
    assert list(found) == ["TrainingRuntime", "TrainJob"]
    runtime, train = (found[kind]["spec"] for kind in found)
    assert train["runtimeRef"]["name"] == found["TrainingRuntime"]["metadata"]["name"]
    assert train["trainer"]["numNodes"] == runtime["mlPolicy"]["numNodes"] == 2
    assert train["trainer"]["resourcesPerNode"] == {"requests": {"cpu": "12"}}
    spec = runtime["template"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 20
    assert spec["replicatedJobs"][0]["template"]["metadata"]["labels"] == {
        "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
    }
    kubeflow = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "x-node-0-0.x", "PET_MASTER_PORT": "29400", "PET_NNODES": "2"}
    text = shlex.join(torchrun(train["trainer"]["args"], kubeflow)[0])
    assert "--nnodes 2 --node_rank 1 --nproc_per_node 4 --master_addr x-node-0-0.x --master_port 29400 " in text


def test_a_recipe_of_one_s_own_travels_as_a_config_map(capsys, tmp_path):
    file = tmp_path / "my own.yaml"
    text = Path("recipes/quickstart.yaml").read_text().replace("name: quickstart", "name: Mine_1.x")
    file.write_text(text)
    found = documents(capsys, str(file), *CLUSTER)
    assert list(found) == ["ConfigMap", "TrainingRuntime", "TrainJob"]
    assert found["ConfigMap"]["data"] == {"my_own.yaml": text}
    assert found["TrainJob"]["metadata"]["name"] == "mine-1-x"
    words = found["TrainJob"]["spec"]["trainer"]["args"]
    assert words[words.index("--recipe") + 1] == "/recipes/my_own.yaml"
    assert words[words.index("--run-dir") + 1] == "/runs/Mine_1.x"
    pod = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
        "spec"
    ]
    assert {"name": "recipe", "configMap": {"name": "mine-1-x"}} in pod["volumes"]


def test_kubernetes_fills_nothing_in(capsys):
    """It replaces $(NAME) by a variable and two dollars by one."""
    folder = "/images/$(A)/$$/${TMPDIR}"
    words = ("resnet56_cifar10_graph", f"data.root={folder}")
    trainer = documents(capsys, *words, *CLUSTER)["TrainJob"]["spec"]["trainer"]
    assert trainer["args"][-1] == "data.root=/images/$$(A)/$$$/${TMPDIR}"


def test_a_task_of_skypilot_recovers_by_our_exit_code(capsys, tmp_path):
    body = task(
        capsys, "quickstart", "--gpus", "8", "--gpu-type", "H100", "--spot", "--mem", "64G", "--runs", "s3://b/runs"
    )
    assert body["resources"]["accelerators"] == "H100:8" and body["resources"]["use_spot"] is True
    assert (body["resources"]["cpus"], body["resources"]["memory"]) == ("24+", "64+")
    assert body["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert body["file_mounts"] == {"/runs": {"source": "s3://b/runs", "mode": "MOUNT_CACHED"}}
    assert body["workdir"] == "." and "pip install" in body["setup"]
    program, flag, module, *words = shlex.split(body["run"])
    assert (program, flag, module) == ("python", "-m", "dist_prune.distributed.start_node")
    sky = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    assert "--nnodes 1 --node_rank 0 --nproc_per_node 8 --master_addr 127.0.0.1" in shlex.join(torchrun(words, sky)[0])
    file = tmp_path / "mine.yaml"
    file.write_text(Path("recipes/quickstart.yaml").read_text())
    words = (
        "--nodes",
        "2",
        "--gpus",
        "0",
        "--runs",
        "disk",
        "--container",
        "docker:x/y:1",
        "--mount",
        "s3://images:/data",
    )
    body = task(capsys, str(file), *words)
    assert body["volumes"] == {"/runs": "disk"} and "setup" not in body
    assert body["file_mounts"]["/data"] == {"source": "s3://images", "mode": "MOUNT"}
    assert body["file_mounts"]["/recipes/mine.yaml"] == str(file)
    assert body["resources"]["image_id"] == "docker:x/y:1"
    assert "--recipe /recipes/mine.yaml --run-dir /runs/quickstart" in body["run"]
    words = shlex.split(body["run"])[3:]
    assert "--nnodes 2 --node_rank 0 --nproc_per_node 1 --master_addr 10.0.0.1" in shlex.join(torchrun(words, sky)[0])


def test_two_lines_by_hand(capsys, tmp_path):
    text = printed(
        capsys, "--torchrun", "quickstart", "--gpus", "8", "--master", "node1", "--runs", str(tmp_path), "seed=2"
    )
    first, second = text.splitlines()
    assert second == first.replace("--node_rank 0", "--node_rank 1")
    assert "--nnodes 2 --node_rank 0 --nproc_per_node 8 --master_addr node1 --master_port 29500 " in first
    assert first.endswith(f"-m dist_prune.run --recipe quickstart --run-dir {tmp_path}/quickstart seed=2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kubernetes", "quickstart", "--runs", "c"), "--container: name the image"),
        (("--kubernetes", "quickstart", "--container", "i"), "--runs: name the PersistentVolumeClaim"),
        (("--kubernetes", *CLUSTER), "name a recipe"),
        (("--kubernetes", "quickstart", *CLUSTER, "--mount", "x"), "--mount: 'x': write CLAIM:/FOLDER"),
        (("--kubernetes", "quickstart", *CLUSTER, "--qos", "low"), "--qos: --kubernetes has no such setting; it goes"),
        (("--kubernetes", "quickstart", *CLUSTER, "--submit"), "--submit: --kubernetes has no such setting"),
        (("--kubernetes", "quickstart", *CLUSTER, "--mem", "much"), "--mem: 'much' is no size; write for example 64G"),
        (("--skypilot", "quickstart", "--gpus", "0"), "--runs: name what keeps the run directories"),
        (("--skypilot", "quickstart", "--runs", "s3://b"), "--gpu-type: name the GPU"),
        (("--skypilot", "quickstart", "--runs", "s3://b", "--gpus", "0", "--nodes", "2"), "take --nodes 1"),
        (("--torchrun", "quickstart", "--container", "i"), "--container: --torchrun has no such setting"),
        (("--torchrun", "quickstart", "--port", "70000"), "--port: 70000 is no port"),
        (("--torchrun", "quickstart", "--master", "a b"), "--master: 'a b' is no single word"),
        (("--torchrun", "quickstart", "--nodes", "0"), "--nodes: 0 is too few; at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(words, said, capsys):
    assert main(["launch", *words]) == 2
    assert said in capsys.readouterr().err
