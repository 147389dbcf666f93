"""The library with other people's objects: prepared, sharded, half, wrapped, interrupted."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import dist_prune
import dist_prune as dp
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from tests.support.launch import ROOT, environment
from tests.test_api import CLASSES, COUNT, SIDE, dataset, network, plan_with

SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset
import dist_prune as dp
from tests.test_api import COUNT, SIDE, dataset, network

accelerator = Accelerator(cpu=True, mixed_precision=sys.argv[1])
torch.manual_seed(100 + accelerator.process_index)  # no rank shuffles as another
images, labels = dataset().tensors

class Stream(IterableDataset):
    def __iter__(self):
        return iter([(images[i], labels[i]) for i in range(COUNT)])

for kind in ("whole", "shuffle", "drop_last", "stream"):
    bare = network()
    source = Stream() if kind == "stream" else dataset()
    more = {} if kind == "stream" else {"shuffle": kind == "shuffle", "drop_last": kind == "drop_last"}
    model, loader = accelerator.prepare(bare, DataLoader(source, batch_size=4, **more))
    graph = dp.trace(model, (3, SIDE, SIDE))
    scores = dp.score(model, graph, "taylor", loader, micro_batch=5)
    plan = dp.select(scores, graph, target={"macs": 0.5})
    same = torch.equal(dp.prune(model, plan)(images), dp.prune(network(), plan)(images))
    sys.stdout.write(f"plan {kind} {plan.fingerprint} {same}\\n")
"""


@pytest.mark.parametrize(("world", "precision"), [(1, "bf16"), pytest.param(2, "no", marks=pytest.mark.slow)])
def test_prepared_objects_under_real_launchers(world, precision, tmp_path):
    """DistributedDataParallel under torchrun; mixed precision, whose forward must not stay that of the dense one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if world == 2 else []
    found = subprocess.run(
        [sys.executable, *start, str(tmp_path / "script.py"), precision],
        cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    lines = re.findall(r"plan (\w+) ([0-9a-f]{64}) (\w+)", found.stdout)
    assert len(lines) == 4 * world
    assert {(plan, same) for _, plan, same in lines} == {(plan_with(dataset()).fingerprint, "True")}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([dataset()[i] for i in range(COUNT)])


class Pictures(Dataset):
    """Items as transformers' data sets have them."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image, label = dataset()[index]
        return {"pixel_values": image, "labels": int(label)}


def test_more_forms_of_a_loader_give_the_same_plan():
    images, labels = dataset().tensors
    batches = [(images[i : i + 7], labels[i : i + 7]) for i in range(0, COUNT, 7)]
    loaders = {
        "stream": Stream(),
        "loader of a stream": DataLoader(Stream(), batch_size=4),
        "workers of a stream": DataLoader(Stream(), batch_size=4, num_workers=2),
        "drop_last": DataLoader(dataset(), batch_size=4, shuffle=True, drop_last=True),
        "mappings": DataLoader(Pictures(), batch_size=4),
        "items that are batches": DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        "no batches": DataLoader(dataset(), batch_size=None),
        "lists of labels": [(images, labels.tolist())],
    }
    found = {name: plan_with(loader).fingerprint for name, loader in loaders.items()}
    assert set(found.values()) == {plan_with(dataset()).fingerprint}, found


@pytest.mark.parametrize(("change", "words"), [
    (lambda x, y: [(x, nn.functional.one_hot(y, CLASSES))], "expected are class numbers"),
    (lambda x, y: [(x, y.float())], "expected are class numbers"),
    (lambda x, y: [(x, y + CLASSES)], "the network has 5 classes"),
    (lambda x, y: [(x, y - 1)], "labels are 0 to 4"),
    (lambda x, y: [(x[:, :1], y)], "have 1 channels"),
    (lambda x, y: "folder", "the loader is 'folder'"),
    (lambda x, y: 3, "the loader is 3"),
])  # fmt: skip
def test_what_is_wrong_is_told(change, words):
    with pytest.raises(PruneError, match=words):
        plan_with(change(*dataset().tensors))


class Named(nn.Module):
    """A network that answers as transformers' do."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, pixel_values):
        return {"logits": self.inner(pixel_values)}


def test_outputs_with_logits_are_read():
    model = Named().eval()
    graph = dp.trace(model, (3, SIDE, SIDE))
    plan = dp.select(dp.score(model, graph, "taylor", dataset(), micro_batch=5), graph, target={"macs": 0.5})
    wanted = plan_with(dataset())
    assert {name.removeprefix("inner."): gone for name, gone in plan.removed.items()} == dict(wanted.removed)
    assert set(dp.prune(model, plan)(torch.zeros(1, 3, SIDE, SIDE))) == {"logits"}


def test_a_network_without_logits_says_so():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    graph = dp.trace(model, (3, SIDE, SIDE))
    with pytest.raises(PruneError, match="labels need logits"):
        dp.score(model, graph, "taylor", dataset())


@pytest.mark.parametrize("method", ["hrank", "apoz", "taylor"])
def test_half_floats_are_scored(method):
    model = network().half()
    graph = dp.trace(model, (3, SIDE, SIDE))
    scores = dp.score(model, graph, method, dataset())
    assert next(dp.prune(model, dp.select(scores, graph, target={"macs": 0.5})).parameters()).dtype == torch.float16


def test_weights_made_in_inference_mode_are_scored():
    with torch.inference_mode():
        model = network()
    graph = dp.trace(model, (3, SIDE, SIDE))
    plan = dp.select(dp.score(model, graph, "taylor", dataset(), micro_batch=5), graph, target={"macs": 0.5})
    assert plan.fingerprint == plan_with(dataset()).fingerprint


class Interrupted(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index > 10:
            raise KeyboardInterrupt
        return dataset()[index]


def test_an_interrupted_score_leaves_the_network_whole():
    model = network().train()
    model.first.eval()
    graph = dp.trace(model, (3, SIDE, SIDE))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            dp.score(model, graph, "taylor", Interrupted(), micro_batch=5)
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert model.training
    assert not model.first.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plan = dp.select(dp.score(model, graph, "taylor", dataset(), micro_batch=5), graph, target={"macs": 0.5})
    assert plan.fingerprint == plan_with(dataset()).fingerprint
    assert not torch.distributed.is_initialized()


def with_own_method(ranks: Communicator) -> tuple[str, int]:
    """The page's method on these ranks: the fingerprint of its plan, and how often the first channel was positive."""
    text = (ROOT / "docs/library.md").read_text()
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.S)[1], "docs/library.md", "exec"), names)
    model = network()
    graph = dp.trace(model, (3, SIDE, SIDE))
    scores = dp.score(model, graph, names["method"], dataset(), micro_batch=5, group=ranks.group)
    return dp.select(scores, graph, target={"macs": 0.5}).fingerprint, int(scores["first"][0])


def test_the_page_s_own_method_gives_one_plan_on_any_number_of_ranks(pool):
    wanted = with_own_method(Communicator())
    model, seen = network(), []
    model.first.register_forward_hook(lambda _module, _inputs, output: seen.append(int((output[:, 0] > 0).sum())))
    model(dataset().tensors[0])
    assert abs(wanted[1] - seen[0]) <= 2  # micro-batches round a sum near zero in another way
    assert pool.run(2, with_own_method) == [wanted] * 2


def test_the_package_is_a_command_with_a_version():
    words = [sys.executable, "-m", "dist_prune", "--version"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout == f"dist-prune {dist_prune.__version__}\n", found.stderr


def test_dir_names_what_is_there_and_import_is_light():
    public = {name for name in dir(dist_prune) if not name.startswith("__")}
    assert public == {name for name in dist_prune.__all__ if not name.startswith("__")}
    assert all(getattr(dist_prune, name) is not None for name in dir(dist_prune))
    code = "import sys, dist_prune; dir(dist_prune); print({'torch', 'timm', 'pydantic', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout == "set()\n"
    assert (ROOT / "dist_prune/py.typed").is_file()
