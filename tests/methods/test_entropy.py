"""The entropy method on real networks: options and aliases, what is read where, ranks, resume, curves, programs."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dist_prune import models
from dist_prune.distributed import tensor_files
from dist_prune.errors import PruneError
from dist_prune.methods.entropy.method import Entropy, l1_counts
from dist_prune.methods.entropy.options import DEPRECATED, REFUSED, SAMPLINGS, Options
from dist_prune.models.lenet_tanh import LeNetTanh
from dist_prune.pruning.hooks.activations import group_inputs, group_outputs
from dist_prune.pruning.hooks.gating import gate, gate_off, gate_points
from dist_prune.pruning.information import bandwidth
from dist_prune.pruning.information.aligned_estimators import PolynomialEstimator
from dist_prune.pruning.information.group_samples import GroupSamples, batches_of
from dist_prune.pruning.information.information_plane import InformationPlane
from dist_prune.pruning.information.renyi import distances, gaussian_kernel, kernel_entropy, label_kernel, renyi_entropy
from dist_prune.pruning.selection import cost
from dist_prune.pruning.selection.ranking import SelectionRequest, cost_share
from dist_prune.pruning.surgery.verified_trace import trace_groups
from tests.support import tiny
from tests.support.activations import mixtures, vectors
from tests.support.launch import ACCELERATE, PYTHON, SMALL, finish, report, run

INNER = ("conv1", "layer2*", "layer3*")  # what small tests leave alone
SLOW = pytest.mark.slow
FAST = {"alpha": 2.0}


def method(**options) -> Entropy:
    return Entropy(Options.model_validate(options))


def small_bench(ranks=None, exclude=INNER, model=None, **more):
    bench = tiny.bench(model or tiny.network(), ranks, **more)
    bench.graph = bench.graph.exclude(exclude)
    return bench


def orders(bench, **options) -> dict:
    chosen = method(**options)
    return dict(chosen.orders(chosen.score(bench), bench.graph, SelectionRequest()))


# options


def test_the_released_program_s_names():
    for name in SAMPLINGS:
        fidelity = "as_released" if name in DEPRECATED else "correct"
        resolved = Options(sampling=name, fidelity=fidelity).resolved()
        assert resolved == {**Options().resolved(), "width": resolved["width"], **SAMPLINGS[name]}
    for name in DEPRECATED:
        with pytest.raises(ValidationError, match="as_released"):
            Options(sampling=name)
    for name in REFUSED:
        with pytest.raises(ValidationError, match="no working code"):
            Options(sampling=name)
    with pytest.raises(ValidationError, match="unknown sampling"):
        Options(sampling="renyi2")
    with pytest.raises(ValidationError, match="leave"):
        Options(sampling="bin", alpha=2)
    assert Options(fidelity="as_released").resolved()["width"] == "aligned"
    with pytest.raises(ValidationError, match="method.criterion=joint of the recipe stands in the way"):
        Options(fidelity="as_released", criterion="joint")
    with pytest.raises(ValidationError, match="cmi_label"):
        Options(criterion="cmi_label", width="aligned")
    with pytest.raises(ValidationError, match="mi_all"):
        Options(criterion="mi_all")
    with pytest.raises(ValidationError, match="the estimator binning in all layers"):
        Options(criterion="mi_all", estimator="binning", by_layer={"layer1*": "renyi"})
    assert Options(criterion="mi_all", estimator="binning", by_layer={"layer1*": "binning"})
    with pytest.raises(ValidationError, match="relevance needs a label kernel"):
        Options(criterion="relevance", width="polynomial")


def wick_scores(z: torch.Tensor) -> list[float]:
    """I(Z_k; Z_rest) as the released program's variant takes it, written out: (n, K, d) -> K numbers. Every kernel is
    exp(-D^2 / s^2), the anchor's too; s by alignment on 75 points from 0.1; Shannon's entropy of the eigenvalues."""
    n, whole = len(z), z.flatten(1)

    def square(x: torch.Tensor) -> torch.Tensor:
        return (x[:, None] - x[None]).square().sum(-1)

    def bits(kernel: torch.Tensor) -> float:
        values = torch.linalg.eigvalsh(kernel / n).clamp(min=1e-300)
        return -float((values * values.log2()).sum())

    anchor = torch.exp(-square(whole) / bandwidth.scaled_rule(n, whole.shape[1]) ** 2)

    def aligned(x: torch.Tensor) -> torch.Tensor:
        far = square(x)
        tries = torch.linspace(0.1, 10 * float(far.sqrt().mean()), 75, dtype=torch.float64)
        kernels = torch.exp(-far / tries[:, None, None] ** 2)
        likeness = (kernels * anchor).sum((1, 2)) / kernels.square().sum((1, 2)).sqrt()
        return kernels[int(likeness.argmax())]

    found = []
    for k in range(z.shape[1]):
        one, rest = aligned(z[:, k]), aligned(z[:, [j for j in range(z.shape[1]) if j != k]].flatten(1))
        found.append(bits(one) + bits(rest) - bits(one * rest))
    return found


def test_renyi_wick_has_one_form_of_kernel_for_anchor_and_scores():
    """In the main method the anchor is exp(-D^2 / 2 s^2); here the 2 is missing everywhere."""
    z, anchor = vectors(), distances(vectors()).sum(0)
    for name, halved in (("renyi_wick", False), ("reyei_uns", True)):
        subject = GroupSamples(
            "conv1", [z], torch.arange(8), [torch.arange(8)], method(sampling=name).estimator("conv1")
        )
        wanted = gaussian_kernel(anchor, bandwidth.scaled_rule(8, 12), halved)
        assert torch.allclose(subject.reference_kernel(0, 0), wanted, atol=1e-14)
    spec = method(sampling="renyi_wick").estimator("conv1")
    subject = GroupSamples("conv1", [z], torch.arange(8), [torch.arange(8)], spec)
    panel = subject.estimator_bank([subject.combine_bandwidths([subject.batch_bandwidths(0, 0)])])
    panel.begin(range(4))
    panel.evaluate("alone", range(4))  # makes the judge
    panel.search_bandwidths(range(4))
    ((found,),) = panel.evaluate("score", range(4))
    assert found.tolist() == pytest.approx(wick_scores(z), abs=1e-9)


WIDTHS = ("fix", "all", "remain", "label", "median", "knn", "scale_rule_std")
EVERY: list[dict] = [{"sampling": name, "fidelity": "as_released", "grid": "coarse"} for name in SAMPLINGS]
EVERY += [{"width": width, **FAST, "grid": "coarse"} for width in WIDTHS]
EVERY += [{"criterion": "cmi_label", **FAST}, {"criterion": "joint", "precision": "float32", **FAST}]


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_every_name_and_width_gives_an_order(options):
    found = orders(small_bench(images=24), **options)
    assert {tuple(sorted(order)) for order in found.values()} == {tuple(range(16))}


def test_layers_may_be_estimated_otherwise():
    bench = small_bench(images=24, exclude=("conv1", "layer3*"))
    plain, mixed = orders(bench, **FAST), orders(bench, **FAST, by_layer={"layer1*": "binning"})
    binned = orders(bench, **FAST, estimator="binning")
    assert mixed["layer1.0.conv1"] == binned["layer1.0.conv1"] != plain["layer1.0.conv1"]
    assert mixed["layer2.0.conv1"] == plain["layer2.0.conv1"] != binned["layer2.0.conv1"]


# where channels are read


def test_taps_lie_behind_activations_and_sums():
    """An inner layer where it is consumed; a stream at each block's output; a flattened map channel by channel."""
    model = tiny.network()
    channels = trace_groups(model, tiny.example()[:1])
    seen = {g.name: [tap.point.name for tap in group_inputs(channels, g)] for g in channels.free}
    assert seen["layer1.0.conv1"] == ["layer1.0.conv2:in"]
    assert set(seen["layer3.0.downsample.0"]) == {"pool:in"}
    assert "layer1.0.conv1:in" in seen["conv1"]
    assert "layer2.0.conv1:in" in seen["conv1"]
    lenet = LeNetTanh((2, 3), (5, 4), torch.nn.Tanh, img_size=16).eval()
    lenet.pool2 = torch.nn.Identity()  # type: ignore[assignment]
    lenet.fc1 = torch.nn.Linear(3 * 2 * 2, 5)
    channels = trace_groups(lenet, torch.randn(1, 1, 16, 16))
    tap = group_inputs(channels, channels.group("conv2"))[0]
    assert tap.positions.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    rows = torch.arange(24.0).view(2, 12, 1)
    assert tap.take(rows).tolist()[1] == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]


def test_dead_filters_go_first_unless_nothing_skips_them():
    model = tiny.network()
    norm = model.get_submodule("layer1.0.bn1")
    with torch.no_grad():
        for k in (11, 4):
            norm.weight[k], norm.bias[k] = 0, -1  # type: ignore[index, operator]
    bench = small_bench(model=model)
    assert orders(bench, **FAST)["layer1.0.conv1"][:2] == [4, 11]
    last = orders(bench, **FAST, skip_zero=None)["layer1.0.conv1"][-3:]
    assert {4, 11} & set(last[1:]), "they tell nothing and so nobody tells about them"


def test_removed_is_masked():
    """To 1e-5 on outputs, the batch norm's shift included; and many masks at once are each of them alone."""
    model = tiny.network()
    bench = tiny.bench(model)
    chosen = method(**FAST)
    plan = chosen.select(chosen.score(bench), bench.graph, SelectionRequest(keep_ratio=0.4))
    x = tiny.example()
    with torch.no_grad():
        small = tiny.cut(model, bench.graph, plan)(x)
        with gate_off(model, bench.graph, plan.removed):
            assert torch.allclose(model(x), small, atol=1e-5)
        stays = torch.rand(3, 32, generator=torch.Generator().manual_seed(0)) < 0.5
        name = "layer2.0.downsample.0"
        with gate(model, gate_points(bench.graph, name), {name: stays}):
            together = model(x.repeat(3, 1, 1, 1)).view(3, len(x), -1)
        for row, found in zip(stays, together, strict=True):
            off = [k for k, stay in enumerate(row.tolist()) if not stay]
            with gate_off(model, bench.graph, {name: off}):
                assert torch.allclose(model(x), found, atol=1e-12)


# ranks and resume


def ranked_on(ranks, options) -> dict:
    bench = small_bench(ranks, exclude=("conv1", "layer3*"))
    chosen = method(**options)
    return {key: table.tolist() for key, table in chosen.score(bench).items()}


@pytest.mark.parametrize(
    "options",
    [FAST, pytest.param({}, marks=SLOW), pytest.param({"width": "aligned", "grid": "coarse", **FAST}, marks=SLOW)],
    ids=str,
)
def test_every_kind_of_sharing_gives_the_same_scores(options, pool):
    options = {**options, "batch": 17}
    found = [ranked_on(tiny.machine().comm, options)]
    for parallel in ("layers", "batches", "candidates"):
        for world in (2, 3):
            if world == 3 and parallel == "layers":
                continue  # the laws'
            found += pool.run(world, ranked_on, {**options, "parallel": parallel})
    assert all(scores == found[0] for scores in found)


class Stopped(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("parallel", ["layers", "candidates"])
def test_stopped_inside_an_elimination(parallel, tmp_path, monkeypatch):
    from dist_prune.pruning.information import backward_elimination, group_orders

    legs = backward_elimination.Elimination.advance
    monkeypatch.setattr(
        backward_elimination.Elimination,
        "advance",
        lambda self, panel, alone, course, steps=5: legs(self, panel, alone, course, 5),
    )
    options = {**FAST, "parallel": parallel}
    whole = orders(small_bench(), **options)
    made = []

    def dying(self, panel, alone, course, steps=5):
        if len(made) == 2:
            raise Stopped
        made.append(len(course.order))
        return legs(self, panel, alone, course, 5)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(group_orders.Elimination, "advance", dying)
        orders(small_bench(partial=tmp_path), **options)
    assert made == [0, 5]
    again = []

    def going_on(self, panel, alone, course, steps=5):
        again.append(len(course.order))
        return legs(self, panel, alone, course, 5)

    with monkeypatch.context() as patch:
        patch.setattr(group_orders.Elimination, "advance", going_on)
        assert orders(small_bench(partial=tmp_path), **options) == whole
    assert again[0] == 10, "it resumes after the ten deletions that were kept"


# selection


def test_counts_and_budgets_cut_the_same_order():
    bench = tiny.bench(tiny.network())
    chosen = method(**FAST)
    scores = chosen.score(bench)
    channels = bench.graph
    plan = chosen.select(scores, channels, SelectionRequest(counts={"layer2.0.conv1": 5}))
    assert plan.counts == {g.name: 5 if g.name == "layer2.0.conv1" else g.width for g in channels.groups}
    assert set(plan.kept("layer2.0.conv1")) == set(scores["layer2.0.conv1:order"][-5:].tolist())
    kept = {}
    for share in (0.7, 0.4):
        plan = chosen.select(scores, channels, SelectionRequest(target=("params", share)))
        assert cost_share(channels, "params", plan.counts) <= share
        for group in channels.free:
            stays = set(plan.kept(group.name))
            assert stays <= kept.get(group.name, stays)
            kept[group.name] = stays


def test_the_program_s_l1_budget_leaves_the_stem_whole():
    channels = tiny.bench(tiny.network()).graph
    request = SelectionRequest(target=("params", 0.5))
    counts = l1_counts(channels, request)
    assert counts["conv1"] == 16
    assert 0.45 < cost_share(channels, "params", counts) <= 0.5
    with pytest.raises(PruneError, match="uniform"):
        l1_counts(channels, SelectionRequest(target=("params", 1e-3)))
    scores = {f"{g.name}:order": torch.arange(g.width) for g in channels.free}
    plan = method(distribution="l1").select(scores, channels, request)
    assert {g.name: plan.counts[g.name] for g in channels.free} == counts


def test_saturation_is_told():
    bench = small_bench()
    wide, narrow = method(**FAST), method(**FAST, width="fix", entropy_target=0.5)
    assert wide.warnings(wide.score(bench), bench.graph) == []
    scores = narrow.score(bench)
    name = bench.graph.free[0].name
    scores[f"{name}:joint"] = torch.full((16,), 0.99).double() * torch.log2(scores[f"{name}:samples"].double())
    (text,) = narrow.warnings(scores, bench.graph)
    assert name in text
    assert "99.0% of log2 n" in text
    assert "entropy_target" in text


def test_saturation_of_bins_is_of_all_their_images():
    """Five batches are counted together: the entropy may be that of 53 images, not of 10."""
    binned = method(estimator="binning", criterion="joint", batch=10)
    bench = small_bench()
    scores = binned.score(bench)
    used = sum(map(len, batches_of(bench.images, 10, bench.generator("entropy", "batches"))))
    assert used >= 50
    for group in bench.graph.free:
        assert int(scores[f"{group.name}:samples"]) == used
        assert float(scores[f"{group.name}:joint"].max()) <= math.log2(int(scores[f"{group.name}:samples"])) + 1e-9
    for text in binned.warnings(scores, bench.graph):
        assert "the bins tell all samples apart" in text
        assert "fewer method.bins" in text
        assert "entropy_target" not in text


def test_the_polynomial_kernel_knows_what_it_is_asked():
    """joint deletes first whose absence leaves the largest entropy, by brute force."""
    bench = small_bench(images=24)
    found = orders(bench, width="polynomial", criterion="joint", alpha=2, batch=24, skip_zero=None)
    other = orders(bench, width="polynomial", criterion="mi_rest", alpha=2, batch=24, skip_zero=None)
    assert found != other
    x = torch.rand(12, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judge = PolynomialEstimator(x, "joint", range(3), 2.0)
    judge.begin(range(3))
    for k, score in enumerate(judge.score([0, 1, 2]).tolist()):
        flat = x[:, [j for j in range(3) if j != k]].flatten(1)
        assert score == pytest.approx(float(renyi_entropy((1 + flat @ flat.T) ** 2, 2.0)))


# networks and numbers of the paper


@pytest.mark.parametrize(("name", "side", "params", "macs"), [
    ("lenet6_16", 28, 45_106, 282_304), ("lenet20_50_800_500", 28, 1_071_880, 2_933_000),
    ("vgg19_fc_cifar", 32, 20_109_962, 398_205_568),
])  # fmt: skip
def test_dense_counts_of_the_paper_s_networks(name, side, params, macs):
    shape = (1, 1 if side == 28 else 3, side, side)
    channels = trace_groups(models.create(name, 10, shape[1]).eval(), torch.randn(shape))
    assert (cost.params(channels), cost.macs(channels)) == (params, macs)


def test_pools_and_activations_are_the_programs_own():
    """The two larger LeNets have max pools; the one of 128 and 64 has tanh convolutions, ranked before the tanh."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 28, 28)
    for name, activation in (("lenet20_50_800_500", torch.relu), ("lenet20_50_128_64", torch.tanh)):
        model = models.create(name, 10, 1).eval()
        first, second, heads = model.conv1, model.conv2, (model.fc1, model.fc2)
        y = torch.nn.functional.max_pool2d(activation(first(x)), 2)
        y = torch.nn.functional.max_pool2d(activation(second(y)), 2).flatten(1)
        for layer in heads:
            y = activation(layer(y))
        assert torch.allclose(model(x), model.head(y), atol=1e-6)
        channels = trace_groups(model, x[:1])
        seen = {group.name: group_outputs(channels, group)[0] for group in channels.free}
        assert {name: tap.point.name for name, tap in seen.items()} == {n: n for n in ("conv1", "conv2", "fc1", "fc2")}
        assert seen["conv2"].positions.tolist() == [[i] for i in range(50)]
    small = models.create("lenet6_16", 10, 1).eval()
    assert isinstance(small.pool1, torch.nn.AvgPool2d)


def test_ranking_outputs_before_the_activation_is_another_order():
    plain, raw = (orders(small_bench(images=24), **FAST, taps=taps, skip_zero=None) for taps in ("consumed", "output"))
    assert plain["layer1.0.conv1"] != raw["layer1.0.conv1"]


@pytest.mark.parametrize(("counts", "params", "macs"), [
    ((1, 3, 19, 14, 3), (1_400, 0.0310), (20_450, 0.0724)), ((1, 16, 30, 21, 4), (8_941, 0.198), (48_434, 0.172)),
])  # fmt: skip
def test_pruned_counts_of_the_paper_s_lenet(counts, params, macs):
    channels = trace_groups(models.create("lenet6_16", 10, 1).eval(), torch.randn(1, 1, 28, 28))
    kept = dict(zip(("conv1", "conv2", "fc1", "fc2", "fc3"), counts, strict=True))
    assert cost.params(channels, kept) == params[0]
    assert cost.macs(channels, kept) == macs[0]
    assert cost_share(channels, "params", kept) == pytest.approx(params[1], abs=5e-4)
    assert cost_share(channels, "macs", kept) == pytest.approx(macs[1], abs=5e-4)


# curves


def test_the_information_plane_by_its_definition():
    """I(X;Z), I(Z;Y) and total correlation of what is kept, from kernels made one by one; fixed single widths."""
    x, maps, labels = torch.rand(20, 30), mixtures(20, 3), torch.arange(20) % 4
    plane = InformationPlane(batch=20, alpha=2, sigma_method="fix")
    found = plane.curve(x, labels, maps, [2, 0, 1], [3, 2, 1])

    def h(*kernels):
        return float(kernel_entropy(torch.stack(list(kernels)).prod(0), 20, 2))

    from dist_prune.pruning.information import bandwidth
    from dist_prune.pruning.information.information_plane import GRID

    table = distances(maps)
    images = gaussian_kernel(((x[:, None].double() - x[None]) ** 2).sum(-1)[tuple(torch.triu_indices(20, 20, 1))], 8.0)
    classes, rule = label_kernel(labels), bandwidth.scaled_rule(20, 4)
    for row, kept in zip(found, ([2, 0, 1], [0, 1], [1]), strict=True):
        whole = table[kept].sum(0)
        z = gaussian_kernel(
            whole, float(bandwidth.align_bandwidths(whole[None], classes, 20, 0, GRID)[0]), halved=False
        )
        singles = [gaussian_kernel(table[k], rule) for k in kept]
        wanted = [h(images) + h(z) - h(images, z), h(z) + h(classes) - h(z, classes)]
        wanted += [sum(map(h, singles)) - h(*singles), h(images), h(classes)]
        assert row.tolist() == pytest.approx(wanted, abs=1e-9)
    for sigma_method in ("all", "remain"):
        other = InformationPlane(batch=7, sigma_method=sigma_method).curve(x, labels, maps, [2, 0, 1], [3, 1])
        assert bool((other[:, :3] >= -1e-9).all())
        assert float(other[1, 2]) == pytest.approx(0, abs=1e-9), "one filter has no total correlation"


# whole runs

ENTROPY = (
    *SMALL, "method.name=entropy", "method.alpha=2", "score.images=60", "information.curves=all",
    "information.images=60", "information.batch=30", "information.layers=[layer1*,layer2.0.conv1]",
    "finetune.only_if_drop=0", "train.epochs=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return finish(ACCELERATE, tmp_path_factory.mktemp("entropy") / "run", *ENTROPY)


@pytest.mark.slow
def test_curves_of_a_run(finished):
    folder, _ = finished
    lines = list(csv.DictReader((folder / "curves.csv").read_text().splitlines()))
    assert [int(line["kept"]) for line in lines if line["group"] == "layer1.0.conv1"] == list(range(16, 0, -1))
    assert {line["group"] for line in lines} == {"layer1.0.conv1", "layer2.0.conv1"}
    scores, _ = tensor_files.read_tensors(folder / "round_1/scores.safetensors")
    first = next(line for line in lines if line["group"] == "layer1.0.conv1" and line["kept"] == "15")
    assert int(first["deleted"]) == int(scores["layer1.0.conv1:order"][0])
    whole = {line["top1"] for line in lines if line["kept"] == line["width"]}
    assert len(whole) == 1, "nothing is cut at the full width"
    assert float(lines[0]["hy"]) > 3
    assert "I(X;Z)" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_curves_do_not_depend_on_ranks(finished):
    folder, _ = finished
    before = (folder / "curves.csv").read_bytes()
    code, output = run(PYTHON, folder, *ENTROPY, "evaluate.batch=77", "finetune.epochs=0")
    assert code == 0, output
    assert (folder / "curves.csv").read_bytes() == before
    assert "curves: every number" in output


@pytest.mark.slow
def test_finetuned_only_where_it_was_needed(finished, tmp_path):
    folder, _ = finished
    code, output = run(PYTHON, folder, *ENTROPY, "finetune.only_if_drop=100", "information.curves=none")
    assert code == 0, output
    assert "left as it is" in output
    body = report(folder)
    assert body["finetuned"]["top1"] == body["pruned"]["top1"]
    assert any(event["event"] == "not needed" for event in body["events"])


@pytest.mark.slow
def test_a_bundle_is_finetuned(finished, tmp_path):
    """The program ``only``: nothing is scored or cut, the given network's own weights are trained on."""
    folder, _ = finished
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in (folder / "export").iterdir():
        (bundle / file.name).write_bytes(file.read_bytes())
    words = [w for w in ENTROPY if not w.startswith("finetune.only")]
    words += ["target.macs=", f"select.plan={bundle}", f"backbone.checkpoint={folder / 'dense.safetensors'}"]
    words += ["train.epochs=0"]
    code, output = run(PYTHON, tmp_path / "only", *words, "finetune.epochs=1")
    assert code == 0, output
    assert "is a bundle" in output
    small, _ = tensor_files.read_tensors(tmp_path / "only/round_1/pruned.safetensors")
    given, _ = tensor_files.read_tensors(Path(bundle) / "model.safetensors")
    assert small.keys() == given.keys()
    assert all(torch.equal(small[name], given[name]) for name in given)
    assert report(tmp_path / "only")["plan"]["fingerprint"] == report(folder)["plan"]["fingerprint"]
    assert json.loads((tmp_path / "only/export/bundle.json").read_text())["plan"]


def test_legacy_checkpoints(tmp_path):
    """state_dict with the prefix "model." beside tensors of images; a data set beside them is left out."""
    model = models.create("lenet6_16", 10, 1)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    extra = {"last_epoch_imgs": torch.zeros(2, 3, 4, 4), "filter_delete_order_bin_conv1": [2, 0, 1]}
    torch.save({"state_dict": weights, **extra}, tmp_path / "a.pth")
    found = tensor_files.read_weights(tmp_path / "a.pth")
    assert found.keys() == model.state_dict().keys()
    torch.save({"state_dict": weights, "test_dataset": torch.utils.data.TensorDataset()}, tmp_path / "b.pth")
    said: list[str] = []
    assert tensor_files.read_weights(tmp_path / "b.pth", say=said.append).keys() == model.state_dict().keys()
    assert said == ["checkpoint: left out of b.pth, data sets as objects of a program: test_dataset"]
    torch.save({"state_dict": weights, "sampler": torch.utils.data.TensorDataset()}, tmp_path / "c.pth")
    with pytest.raises(PruneError, match="TensorDataset"):
        tensor_files.read_weights(tmp_path / "c.pth")
