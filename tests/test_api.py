"""The library: any network, any loader, the same plan on any number of ranks."""

import copy
import json
import math
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, TensorDataset

import dist_prune
import dist_prune as dp
from dist_prune.data.sample_loader import SampleLoader, split_batch
from dist_prune.distributed.communicator import Communicator
from dist_prune.errors import PruneError
from dist_prune.pruning.network_output import logits_of
from dist_prune.pruning.plan.plan import Plan
from tests.support.launch import ROOT

CPU = torch.device("cpu")
COUNT, SIDE, CLASSES = 23, 16, 5  # a number that no world divides


class Twice(nn.Module):
    """A network that timm does not know: a residual block, a concatenation, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.first = nn.Conv2d(8, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 8, 3, padding=1)
        self.wide = nn.Conv2d(16, 10, 1)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, images):
        stem = self.stem(images)
        block = torch.relu(stem + self.second(torch.relu(self.first(stem))))
        wide = torch.relu(self.wide(torch.cat([stem, block], 1)))
        return self.head(wide.mean((2, 3)))


def network() -> Twice:
    torch.manual_seed(0)
    return Twice().eval()


def dataset() -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(COUNT, 3, SIDE, SIDE, generator=draw)
    return TensorDataset(images, torch.randint(0, CLASSES, (COUNT,), generator=draw))


def plan_with(loader, method: str = "taylor", group=None, **options) -> Plan:
    model = network()
    graph = dp.trace(model, (3, SIDE, SIDE))
    scores = dp.score(model, graph, method, loader, micro_batch=5, group=group, **options)
    return dp.select(scores, graph, target={"macs": 0.5})


def test_five_lines_make_a_smaller_network():
    model = network()
    before = copy.deepcopy(model.state_dict())
    graph = dp.trace(model, torch.randn(4, 3, SIDE, SIDE))
    assert {"stem.0", "first", "wide"} <= {group.name for group in graph.free}
    scores = dp.score(model, graph, "taylor", DataLoader(dataset(), batch_size=4))
    plan = dp.select(scores, graph, target={"macs": 0.5}, min_channels=2)
    small = dp.prune(model, plan)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    assert small(torch.randn(2, 3, SIDE, SIDE)).shape == (2, CLASSES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.grad is None for parameter in (*model.parameters(), *small.parameters()))
    again = dp.prune(model, Plan.from_json(plan.to_json()), graph)
    images = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(again(images), small(images))
    with pytest.raises(PruneError, match="a plan from a file does not know its network"):
        dp.prune(model, Plan.from_json(plan.to_json()))
    assert dp.prune_(model, plan) is model
    assert torch.equal(model(images), small(images))


@pytest.mark.parametrize("method", ["l1", "taylor", "hrank", "fisher", "apoz"])
def test_every_form_of_a_loader_gives_the_same_plan(method):
    """A shuffling sampler, another batch size, a list of batches, a mapping, the data set itself."""
    data = dataset()
    images, labels = data.tensors
    batches = [(images[i : i + 7], labels[i : i + 7]) for i in range(0, COUNT, 7)]
    mappings = [{"pixel_values": pixels, "labels": numbers} for pixels, numbers in batches]
    state = torch.random.get_rng_state()
    loaders = (
        data, DataLoader(data, batch_size=4), DataLoader(data, batch_size=6, shuffle=True, num_workers=2), batches,
        iter(batches), DataLoader(mappings, batch_size=None),  # type: ignore[arg-type]
    )  # fmt: skip
    found = {plan_with(loader, method).fingerprint for loader in loaders[:5]}
    assert len(found) == 1
    torch.random.set_rng_state(state)
    SampleLoader(loaders[2], Communicator(), CPU, torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)  # the sampler drew from a copy


def on_a_rank(ranks: Communicator, form: str) -> str:
    data = dataset()
    torch.manual_seed(100 + ranks.rank)
    if form == "sharded":
        sampler = DistributedSampler(data, ranks.world, ranks.rank, shuffle=True)  # pads 23 images to a multiple
        loader = DataLoader(data, batch_size=3, sampler=sampler)
    else:
        images, labels = data.tensors
        loader = [(images[i : i + 7], labels[i : i + 7]) for i in range(0, COUNT, 7)]
    return plan_with(loader, group=ranks.group).fingerprint


@pytest.mark.parametrize("form", ["sharded", "whole list"])
def test_one_two_and_three_ranks_give_one_plan(pool, form):
    wanted = plan_with(dataset()).fingerprint
    for world in (2, 3):
        assert pool.run(world, on_a_rank, form) == [wanted] * world


def trained_in_parallel(ranks: Communicator) -> tuple[str, Tensor]:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Twice().train(), process_group=ranks.group)
    images, _ = dataset().tensors
    model(images[ranks.rank :: 2]).sum().backward()  # each rank's batch norms have seen their own images
    graph = dp.trace(model, (3, SIDE, SIDE))
    scores = dp.score(model, graph, "taylor", dataset(), micro_batch=5, group=ranks.group)
    plan = dp.select(scores, graph, target={"macs": 0.5})
    return plan.fingerprint, dp.prune(model, plan).stem[1].running_mean


def test_batch_norms_of_a_parallel_network_are_the_first_rank_s(pool):
    """DistributedDataParallel brings them together before a forward pass, so after the last step they differ."""
    (plan, mean), (other, other_mean) = pool.run(2, trained_in_parallel)
    assert plan == other
    assert torch.equal(mean, other_mean)
    torch.manual_seed(0)
    alone = Twice().train()
    alone(dataset().tensors[0][::2])
    kept = [i for i, value in enumerate(alone.stem[1].running_mean) if value in mean]
    assert torch.equal(alone.stem[1].running_mean[kept], mean)


def refused_on_ranks(ranks: Communicator, what: str) -> str:
    data = dataset()
    images, labels = data.tensors
    model = network()
    if what == "weights":
        with torch.no_grad():
            model.head.weight[0, 0] += ranks.rank
    graph = dp.trace(model, (3, SIDE, SIDE))
    mine = [(images[ranks.rank :: 2], labels[ranks.rank :: 2])] if what == "shards" else [(images, labels)]
    with pytest.raises(PruneError) as error:
        dp.score(model, graph, "taylor", mine, group=ranks.group)
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "words"), [("shards", "shards cannot be put together"), ("weights", "other weights on other ranks")]
)
def test_ranks_that_disagree_are_told(pool, what, words):
    assert all(words in text for text in pool.run(2, refused_on_ranks, what))


def test_calibration_images_are_drawn_by_the_seed():
    plain, drawn = (plan_with(dataset(), images=count).fingerprint for count in (None, 10))
    assert drawn == plan_with(dataset(), images=10, seed=0).fingerprint
    assert plan_with(dataset(), images=COUNT).fingerprint == plain


def test_methods_that_need_no_images_need_no_loader():
    assert plan_with(None, "l1").fingerprint == plan_with(dataset(), "l1").fingerprint
    with pytest.raises(PruneError, match="give dist_prune.score a loader"):
        plan_with(None, "hrank")
    images, _ = dataset().tensors
    assert plan_with([images], "hrank").fingerprint == plan_with(dataset(), "hrank").fingerprint
    with pytest.raises(PruneError, match="needs labels"):
        plan_with([images], "taylor")


class Broken(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return "no image", 0


@pytest.mark.parametrize(("loader", "words"), [
    ([], "gives no image"),
    ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], "torch.uint8"),
    ([{"text": 1}], "with the keys text"),
    ([(torch.zeros(2, 3, 4, 4), torch.zeros(3, dtype=torch.int64))], r"\(3,\) for 2 images"),
    ([(torch.zeros(2, 3, 4, 4), torch.zeros(2))], "expected are class numbers"),
    ([torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 5, 5)], "several sizes"),
    (DataLoader(dataset(), sampler=RandomSampler(dataset(), replacement=True)), "with replacement"),
    (DataLoader(Broken(), batch_size=2), "whose images are"),
])  # fmt: skip
def test_a_loader_that_cannot_be_read_is_told_so(loader, words):
    with pytest.raises(PruneError, match=words):
        found = SampleLoader(loader, Communicator(), CPU, torch.float32)
        next(found.batches([found.ids[:1]]))


def test_forms_of_a_batch():
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2], dtype=torch.int32)
    for batch in ((images, labels), [images, labels, "more"], {"image": images, "label": labels}):
        found = split_batch(batch)
        assert found[0] is images
        assert found[1] is not None
        assert found[1].tolist() == [1, 2]
        assert found[1].dtype == torch.int64
    assert split_batch(images)[1] is None


def test_errors_name_the_key_and_the_nearest_name():
    model = network()
    graph = dp.trace(model, (3, SIDE, SIDE))
    with pytest.raises(PruneError, match="unknown method 'tailor'. Did you mean 'taylor'"):
        dp.score(model, graph, "tailor", dataset())
    with pytest.raises(PruneError, match="taylor.forms: unknown key. Did you mean 'form'"):
        dp.score(model, graph, "taylor", dataset(), forms="gate")
    scores = dp.score(model, graph, "l1")
    with pytest.raises(PruneError, match="cannot be reached"):
        dp.select(scores, graph, target={"macs": 0.0001})
    with pytest.raises(PruneError, match="round_too"):
        dp.select(scores, graph, target={"macs": 0.5}, round_too=8)
    with pytest.raises(PruneError, match="one target at a time"):
        dp.select(scores, graph, target={"macs": 0.5, "params": 0.5})
    with pytest.raises(PruneError, match="times are measured, so the network is needed"):
        dp.select(scores, graph, target={"latency": 0.5})
    with pytest.raises(PruneError, match="it has to be the result of dist_prune.score"):
        dp.select(dict(scores), graph, target={"macs": 0.5})  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="another network"):
        dp.score(torchvision.models.resnet18(weights=None), graph, "l1")
    with pytest.raises(PruneError, match="no parameters"):
        dp.trace(nn.ReLU(), (3, 4, 4))


@pytest.mark.parametrize("wrapped", ["compiled", "parallel", "half", "inference", "frozen"])
def test_wrapped_half_and_frozen_networks(wrapped):
    model: nn.Module = network()
    wanted = plan_with(dataset(), "l1").fingerprint
    if wrapped == "compiled":
        model = torch.compile(model)  # type: ignore[assignment]
    elif wrapped == "parallel":
        model = nn.DataParallel(model)
    elif wrapped == "half":
        model = model.bfloat16()
    elif wrapped == "frozen":
        model.requires_grad_(False)
    with torch.inference_mode(wrapped == "inference"):
        graph = dp.trace(model, (3, SIDE, SIDE))
        plan = dp.select(dp.score(model, graph, "l1"), graph, target={"macs": 0.5})
        taylor = dp.select(dp.score(model, graph, "taylor", dataset()), graph, target={"macs": 0.5})
        small = dp.prune(model, taylor)
    assert wrapped == "half" or plan.fingerprint == wanted
    assert not isinstance(small, nn.DataParallel)
    assert next(small.parameters()).dtype == next(model.parameters()).dtype
    assert all(p.requires_grad == (wrapped != "frozen") for p in small.parameters())


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "foreach": lambda groups: torch.optim.Adam(groups, lr=0.01, foreach=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.9, centered=True),
}


def trained(make, named: bool = False):
    """A network, its plan, and an optimizer of two groups after one step."""
    model, (images, labels) = network().train(), dataset().tensors
    graph = dp.trace(model, (3, SIDE, SIDE))
    plan = dp.select(dp.score(model, graph, "l1"), graph, target={"macs": 0.6})
    stem = model.stem.named_parameters() if named else model.stem.parameters()
    head = ("head.weight", model.head.weight) if named else model.head.weight
    optimizer = make([{"params": [head], "lr": 0.5, "name": "head"}, {"params": list(stem)}])
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return model, plan, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_is_carried_along(kind):
    """Its state is cut as the weights are; the short call, the long one and the one after prune_ agree."""
    model, plan, optimizer = trained(OPTIMIZERS[kind])
    head, stem = model.head.weight, model.stem[0].weight
    small = dp.prune(model, plan)
    both = [dp.carry(optimizer, plan), dp.carry(optimizer, model, small, plan)]
    dense_states = {name: dict(optimizer.state[tensor]) for name, tensor in (("head", head), ("stem", stem))}
    dp.prune_(model, plan)
    after = dp.carry(optimizer, plan)
    pairs = [(carried, small) for carried in both] + [(after, model)]
    for carried, left in pairs:
        assert type(carried) is type(optimizer)
        assert [group["lr"] for group in carried.param_groups] == [0.5, 0.01]
        assert carried.param_groups[0]["name"] == "head"
        kept = {"stem": plan.kept("stem.0"), "head": plan.kept("wide")}
        for key, value in dense_states["stem"].items():
            wanted = value[kept["stem"]] if value.dim() else value
            assert torch.equal(carried.state[left.stem[0].weight][key], wanted), key
        for key, value in dense_states["head"].items():
            wanted = value[:, kept["head"]] if value.dim() else value
            assert torch.equal(carried.state[left.head.weight][key], wanted), key
    images, labels = dataset().tensors
    nn.functional.cross_entropy(small(images), labels).backward()
    both[0].step()
    assert all(torch.isfinite(parameter).all() for parameter in small.parameters())


def test_a_plan_is_for_the_dense_network_alone():
    """The cell of a notebook that runs twice, the small network, another network with layers of the same names."""
    model = network()
    graph = dp.trace(model, (3, SIDE, SIDE))
    plan = dp.select(dp.score(model, graph, "l1"), graph, keep_ratio=0.7)
    small, wide = dp.prune(model, plan), nn.Sequential(nn.Linear(3, 4))
    widths = [len(parameter) for parameter in small.parameters()]
    for other in (small, wide):
        for cut in (dp.prune, dp.prune_):
            with pytest.raises(PruneError, match="the graph was traced on another network"):
                cut(other, plan)
    with pytest.raises(PruneError, match="was it cut already"):
        dp.prune_(small, plan)
    assert [len(parameter) for parameter in small.parameters()] == widths


def test_an_optimizer_of_named_parameters_keeps_its_names():
    model, plan, optimizer = trained(OPTIMIZERS["adamw"], named=True)
    dp.prune_(model, plan)
    carried = dp.carry(optimizer, plan)
    assert carried.param_groups[0]["param_names"] == ["head.weight"]


def test_what_cannot_be_carried_is_refused():
    model, plan, optimizer = trained(OPTIMIZERS["sgd"])
    with pytest.raises(PruneError, match="no network of this optimizer was cut by this plan"):
        dp.carry(optimizer, plan)
    dp.prune(model, plan)  # gone at once
    with pytest.raises(PruneError, match="keep what it returns"):
        dp.carry(optimizer, plan)
    small = dp.prune(model, plan)
    with pytest.raises(PruneError, match="not of the dense network"):
        dp.carry(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), model, small, plan)
    model, plan, optimizer = trained(lambda groups: torch.optim.Adafactor(groups, lr=0.01))
    small = dp.prune(model, plan)
    with pytest.raises(PruneError, match="Adafactor keeps 'row_var'"):
        dp.carry(optimizer, plan)


def test_a_torchvision_network_on_real_weights_of_any_size():
    model = torchvision.models.mobilenet_v3_small(weights=None, num_classes=7).eval()
    graph = dp.trace(model, (3, 32, 32))
    plan = dp.select(dp.score(model, graph, "l1"), graph, target={"params": 0.6})
    small = dp.prune(model, plan)
    count = [sum(p.numel() for p in net.parameters()) for net in (model, small)]
    assert math.isclose(count[1] / count[0], 0.6, abs_tol=0.02)
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_the_package_offers_the_library_and_imports_it_late():
    code = (
        "import sys, time; start = time.perf_counter(); import dist_prune as dp; took = time.perf_counter() - start; "
        "assert 'torch' not in sys.modules; assert {'trace', 'score', 'select', 'prune', 'load'} <= set(dir(dp)); "
        "assert took < 1; dp.trace; assert 'torch' in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_ids_are_positions_in_the_data_set():
    loader = SampleLoader(DataLoader(dataset(), batch_size=4, sampler=[5, 3, 3, 9]), Communicator(), CPU, torch.float32)
    assert loader.ids.tolist() == [3, 5, 9]
    batch = next(loader.batches([np.array([9, 3])]))
    assert torch.equal(batch.images, dataset().tensors[0][[9, 3]])
    assert batch.ids.tolist() == [9, 3]
    assert loader.labels[[3, 5, 9]].tolist() == dataset().tensors[1][[3, 5, 9]].tolist()
    assert loader.labels[4] == -1


def test_a_bundle_of_a_network_that_timm_does_not_know(tmp_path):
    model, images = network(), torch.randn(3, 3, SIDE, SIDE)
    graph = dp.trace(model, (3, SIDE, SIDE))
    plan = dp.select(dp.score(model, graph, "l1"), graph, target={"macs": 0.5})
    small = dp.prune(model, plan)
    folder = dp.save(small, plan, tmp_path / "bundle", classes=list("abcde"), figures={"pruned": {"top1": 20.0}})
    assert {file.name for file in folder.iterdir()} == {"bundle.json", "model.safetensors"}
    assert torch.equal(dist_prune.load(folder, model=Twice)(images), small(images))
    with pytest.raises(PruneError, match=r"made by tests.test_api:Twice, .* model=Twice"):
        dist_prune.load(folder)
    with pytest.raises(PruneError, match="another network"):
        dist_prune.load(folder, model=lambda: torchvision.models.resnet18(weights=None))
    body = json.loads((folder / "bundle.json").read_text())
    assert (body["classes"], body["backbone"]["num_classes"]) == (list("abcde"), CLASSES)
    with pytest.raises(PruneError, match="2 names for 5 logits"):
        dp.save(small, plan, tmp_path, classes=["a", "b"])


def test_a_network_that_the_plan_does_not_leave_is_not_saved(tmp_path):
    model = network()
    graph = dp.trace(model, (3, SIDE, SIDE))
    plan = dp.select(dp.score(model, graph, "l1"), graph, keep_ratio=0.7)
    with pytest.raises(PruneError, match=r"save: the network is not the one that this plan leaves: .* has the shape"):
        dp.save(model, plan, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    assert dp.save(dp.prune(model, plan), plan, tmp_path / "small").is_dir()


def test_a_bundle_of_timm_s_network_loads_anywhere(tmp_path):
    model = timm.create_model("resnet18", num_classes=4).eval()
    graph = dp.trace(model, (3, 32, 32))
    plan = dp.select(dp.score(model, graph, "l1"), graph, target={"macs": 0.5}, round_to=8)
    small = dp.prune(model, plan)
    folder = dp.save(small, plan, tmp_path / "bundle")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(dist_prune.load(folder)(images), small(images))
    assert json.loads((folder / "bundle.json").read_text())["image"]["mean"] == pytest.approx([0.485, 0.456, 0.406])


def test_what_is_no_classifier_is_not_saved(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    graph = dp.trace(model, (3, 9, 9))
    plan = dp.select(dp.score(model, graph, "l1"), graph, target={"channels": 0.5})
    with pytest.raises(
        PruneError, match="task: the network gives .* a classifier that is trained here gives one tensor"
    ):
        dp.save(dp.prune(model, plan), plan, tmp_path)


class Named(nn.Module):
    """A network whose output is an object or a mapping with ``logits``, as transformers' and torchvision's are."""

    def __init__(self, form):
        super().__init__()
        self.inner = network()
        self.form = form

    def forward(self, images):
        return self.form(logits=self.inner(images), loss=None)


@pytest.mark.parametrize("form", [dict, types.SimpleNamespace, lambda logits, loss: (logits, loss)])
@pytest.mark.parametrize("method", ["taylor", "shapley", "fisher"])
def test_an_output_with_logits_is_that_of_a_classifier(form, method, tmp_path):
    def plan_of(model: nn.Module) -> Plan:
        graph = dp.trace(model, (3, SIDE, SIDE))
        return dp.select(dp.score(model, graph, method, dataset(), micro_batch=5), graph, target={"macs": 0.5})

    model, images = Named(form).eval(), torch.randn(2, 3, SIDE, SIDE)
    plan = plan_of(model)
    assert plan.fingerprint == plan_of(Named(lambda logits, loss: logits).eval()).fingerprint
    assert not isinstance(model(images), Tensor)  # outside of scoring the output is whole
    small = dp.prune(model, plan)
    folder = dp.save(small, plan, tmp_path / "bundle")
    expected = logits_of(small(images))
    for fold in (False, True):
        again = dist_prune.load(folder, model=lambda: Named(form), fold=fold)(images)
        assert torch.allclose(logits_of(again), expected, atol=1e-5)


def test_costs_are_those_of_the_networks():
    model = network()
    graph = dp.trace(model, (3, SIDE, SIDE))
    plan = dp.select(dp.score(model, graph, "l1"), graph, target={"macs": 0.5})
    small = dp.prune(model, plan)
    assert dp.costs(graph)["params"] == sum(p.numel() for p in model.parameters())
    assert dp.costs(graph, plan)["params"] == sum(p.numel() for p in small.parameters())
    assert dp.costs(graph, plan) == dp.costs(dp.trace(small, (3, SIDE, SIDE)))
    assert dp.costs(graph, plan)["macs"] <= 0.5 * dp.costs(graph)["macs"]


def test_a_method_that_trains_evaluates_on_held_out_images():
    """Images of a user's own loader have a shape, as those of a run's have."""
    model = network()
    graph = dp.trace(model, (3, SIDE, SIDE))
    scores = dp.score(model, graph, "sensitivity", dataset(), epochs=1, holdout=0.3)
    small = dp.prune(model, dp.select(scores, graph, target={"macs": 0.5}), scores=scores)
    assert small(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, CLASSES)
    with pytest.raises(PruneError, match="leave out the quirk padding_32"):
        dp.score(model, graph, "sensitivity", dataset(), epochs=1, quirks=["padding_32"])


def test_the_page_s_lines_run(tmp_path, monkeypatch):
    text = (ROOT / "docs/library.md").read_text()
    block = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, "docs/library.md", "exec"), names)
    images = torch.zeros(1, 3, 64, 64)
    assert torch.equal(names["again"](images), names["small"](images))  # type: ignore[operator]


def test_a_graph_prints_its_groups():
    text = str(dp.trace(network(), (3, SIDE, SIDE)))
    assert "4 channel groups" in text
    assert re.search(r"^stem\.0 +8 .*second", text, re.M)
    assert "head" in text
