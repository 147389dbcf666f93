"""Values that can be worked out by hand: losses, rates, averages, clipping, statistics, augmentation's spread."""

import contextlib
import math
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_prune.config.training import Training
from dist_prune.data import augment, sampling
from dist_prune.data.loader import Batch
from dist_prune.distributed.communicator import Communicator
from dist_prune.training import optim
from dist_prune.training.bn_recalibration import recalibrate_bn
from dist_prune.training.engine import TrainEngine
from dist_prune.training.loss import TrainingLoss
from tests.support import tiny
from tests.training.test_training import trainer

MANY = 20_000
LIMIT = {2: 10.83, 5: 18.47, 9: 26.12, 10: 27.88}  # cells -> chi-square that one draw in a thousand exceeds


def chi_square(counts: np.ndarray) -> float:
    """Against equal shares."""
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def objective(teacher: nn.Module | None = None, **settings) -> TrainingLoss:
    return TrainingLoss(Training(**settings), 4, 0, teacher, contextlib.nullcontext)  # type: ignore[arg-type]


LOGITS = torch.tensor([[2.0, 0.5, -1.0, 0.0], [0.0, 3.0, 0.0, 1.0], [1.0, 1.5, 0.0, -2.0]])
LABELS = torch.tensor([0, 1, 0])
BATCH = Batch(torch.zeros(3, 1, 2, 2), LABELS, torch.arange(3))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_the_loss_is_cross_entropy_with_smoothed_labels(smoothing):
    found = objective(label_smoothing=smoothing)(lambda x: LOGITS, BATCH, 0, 0)
    logs = LOGITS - LOGITS.exp().sum(1, keepdim=True).log()
    own = -logs[torch.arange(3), LABELS]
    assert torch.allclose(found, (1 - smoothing) * own - smoothing * logs.mean(1), atol=1e-6)


def test_hits_are_counted_and_forgotten():
    loss = objective()
    loss(lambda x: LOGITS, BATCH, 0, 0)
    assert int(loss.hits()) == 2
    loss(lambda x: LOGITS, BATCH, 0, 0)
    loss(lambda x: LOGITS, BATCH, 0, 1)
    assert int(loss.hits()) == 4


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 4.0), (1.0, 2.0), (0.25, 1.0)])
def test_distillation_is_the_scaled_divergence(weight, temperature):
    class Teacher(nn.Module):
        def forward(self, x):
            return LOGITS.flip(1)

    found = objective(Teacher(), distill=weight, distill_temperature=temperature)(lambda x: LOGITS, BATCH, 0, 0)
    wanted = torch.softmax(LOGITS.flip(1) / temperature, 1)
    got = torch.softmax(LOGITS / temperature, 1)
    divergence = temperature**2 * (wanted * (wanted / got).log()).sum(1)
    expected = (1 - weight) * functional.cross_entropy(LOGITS, LABELS, reduction="none") + weight * divergence
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_mixed_images_have_mixed_labels():
    """Mixup's share of each image is the share of its label; the first image of a batch is mixed with the last."""
    loss = objective(mixup=1.0)
    images = torch.zeros(2, 1, 2, 2)
    images[1] = 1.0
    seen = []

    def forward(x):
        seen.append(x)
        return LOGITS[:2]

    found = loss(forward, Batch(images, torch.tensor([0, 1]), torch.arange(2)), 0, 0)
    share = 1 - float(seen[0][0].mean())  # of the first image in the first mixture
    assert 0.01 < share < 0.99
    logs = functional.log_softmax(LOGITS[:2], 1)
    target = torch.tensor([[share, 1 - share], [1 - share, share]])
    assert torch.allclose(found, -(target * logs[:, :2]).sum(1), atol=1e-5)
    other = []
    loss(lambda x: other.append(x) or LOGITS[:2], Batch(images, torch.tensor([0, 1]), torch.arange(2)), 0, 1)
    assert not torch.equal(seen[0], other[0]), "each step draws its own mixture"


def rates(epochs: int, per_epoch: int, **settings) -> list[float]:
    keys = Training(epochs=epochs, lr=0.8, **settings)
    optimizer = optim.create_optimizer([nn.Parameter(torch.zeros(1))], keys)
    schedule = optim.LearningRate(optimizer, keys, per_epoch)
    found = []
    for update in range(epochs * per_epoch):
        schedule.set_for(update)
        found.append(schedule.rate)
    return found


def test_rates_of_every_schedule():
    assert rates(2, 3, schedule="constant") == pytest.approx([0.8] * 6)
    cosine = [0.1 + 0.5 * 0.7 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    assert rates(2, 4, schedule="cosine", min_lr=0.1) == pytest.approx(cosine)
    assert rates(5, 2, schedule="step", step_size=2, gamma=0.5) == pytest.approx([0.8] * 4 + [0.4] * 4 + [0.2] * 2)
    assert rates(4, 2, schedule="multistep", milestones=(1, 3), gamma=0.1) == pytest.approx(
        [0.8] * 2 + [0.08] * 4 + [0.008] * 2
    )
    assert rates(2, 4, schedule="linear") == pytest.approx([0.8 * (1 - t / 8) for t in range(8)])


def test_a_warm_up_climbs_from_its_own_rate():
    found = rates(4, 2, schedule="constant", warmup_epochs=2, warmup_lr=0.2)
    assert found[:4] == pytest.approx([0.2, 0.35, 0.5, 0.65])
    assert found[4:] == pytest.approx([0.8] * 4)


def test_one_cycle_climbs_to_the_full_rate_and_falls():
    found = rates(5, 4, schedule="onecycle", warmup_lr=0.08)
    assert found[0] == pytest.approx(0.08)
    assert found.index(max(found)) == 6  # 0.3 of 20 updates
    assert max(found) == pytest.approx(0.8)
    assert found[6:] == pytest.approx([0.4 * (1 + math.cos(math.pi * t / 14)) for t in range(14)])


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 1), nn.BatchNorm1d(1)


@pytest.mark.parametrize("everything", [False, True])
def test_what_decays(everything):
    model = Pair()
    found = {
        name: group["weight_decay"]
        for group in optim.parameter_groups(model, Training(weight_decay=0.3, decay_norm_bias=everything))
        for name, parameter in model.named_parameters() if any(parameter is p for p in group["params"])
    }  # fmt: skip
    spared = 0.3 if everything else 0.0
    assert found == {"linear.weight": 0.3, "linear.bias": spared, "norm.weight": spared, "norm.bias": spared}


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_update_by_hand(nesterov):
    """v = m v + (g + d w); w -= lr v, or lr (g + d w + m v) with Nesterov."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    keys = Training(lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.2)
    optimizer = optim.create_optimizer([weight], keys)
    value, speed = weight.detach().clone(), torch.zeros(2)
    for grad in (torch.tensor([0.3, 0.1]), torch.tensor([-0.2, 0.4])):
        weight.grad = grad.clone()
        optimizer.step()
        step = grad + 0.2 * value
        speed = 0.5 * speed + step
        value = value - 0.1 * (step + 0.5 * speed if nesterov else speed)
        assert torch.allclose(weight.detach(), value, atol=1e-6)


def test_clipping_shortens_gradients_that_are_too_long():
    for length, limit in ((5.0, 2.5), (5.0, 10.0)):
        weight = nn.Parameter(torch.zeros(2))
        optimizer = optim.create_optimizer([weight], Training(lr=1.0, momentum=0.0, weight_decay=0.0))
        drive = TrainEngine(tiny.machine(), optimizer, None)
        weight.grad = torch.tensor([3.0, 4.0])
        assert float(drive.step(limit, False)) == pytest.approx(length)  # type: ignore[arg-type]
        factor = min(1.0, limit / length)
        assert torch.allclose(weight.detach(), -factor * torch.tensor([3.0, 4.0]), atol=1e-4)
    assert drive.step(None, False) is None


def test_averaged_weights_warm_up():
    """timm's ModelEmaV3: no memory at the first update, then 1 - (1 + n) ** (-2/3), the recipe's decay at most."""
    for decay in (0.999, 0.4):
        found, seen = trainer(None, ema=decay, epochs=1, images=128, recalibrate_bn=0), []
        plain = found._after

        def after(found=found, plain=plain, seen=seen) -> None:
            plain()
            weight = dict(found.model.named_parameters())["linear.weight"]
            seen.append((weight.detach().clone(), found.ema.module.linear.weight.detach().clone()))

        found._after = after  # type: ignore[method-assign]
        found.run()
        average = None
        for number, (weight, averaged) in enumerate(seen):
            factor = 0.0 if number == 0 else min(decay, 1 - (1 + number) ** (-2 / 3))
            average = weight if average is None else factor * average + (1 - factor) * weight
            assert torch.allclose(averaged, average, rtol=1e-9, atol=1e-12), number
        assert len(seen) == 4


def test_recalibrated_norms_by_hand():
    """Means and unbiased variances of each micro-batch, weighted by its images."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)).double()
    feed, ids = tiny.digits_feed(), np.arange(10)
    assert recalibrate_bn(model, feed, ids, 4, Communicator()) == 1
    x = next(feed.batches([ids])).images.flatten(1)
    parts = [x[:4], x[4:8], x[8:]]
    shares = [0.4, 0.4, 0.2]
    mean = sum(share * part.mean(0) for share, part in zip(shares, parts, strict=True))
    var = sum(share * part.var(0) for share, part in zip(shares, parts, strict=True))
    assert torch.allclose(model[1].running_mean, mean)
    assert torch.allclose(model[1].running_var, var)


def test_draws_are_uniform_and_apart():
    found = sampling.uniform_from_ids(3, 7, np.arange(MANY), 3, 2).numpy()
    for column in found.T:
        assert chi_square(np.bincount((column * 10).astype(int), minlength=10)) < LIMIT[10]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(found[:, one], found[:, other])[0, 1]) < 0.025
    for key in ((4, 7, 2), (3, 8, 2), (3, 7, 1)):
        other = sampling.uniform_from_ids(key[0], key[1], np.arange(MANY), 3, key[2]).numpy()
        assert abs(np.corrcoef(found[:, 0], other[:, 0])[0, 1]) < 0.025


def marked(side: int) -> torch.Tensor:
    """(MANY, 1, side, side) images whose pixels say where they were."""
    return torch.arange(1, side * side + 1, dtype=torch.int32).view(1, 1, side, side).expand(MANY, 1, side, side)


def test_crops_and_flips_are_spread_evenly():
    side, pad = 8, 2
    found = augment.shift_and_flip(marked(side), (0, 1), np.arange(MANY), True, pad)[:, 0].numpy()
    middle = found[:, 4, 3:5]  # inside the picture whatever the crop
    mirrored = middle[:, 0] > middle[:, 1]
    assert chi_square(np.bincount(mirrored.astype(int), minlength=2)) < LIMIT[2]
    row = (middle[:, 0] - 1) // side - 4
    column = np.where(mirrored, (middle[:, 0] - 1) % side - 4, (middle[:, 0] - 1) % side - 3)
    for place in (row, column):
        assert place.min() == -pad and place.max() == pad
        assert chi_square(np.bincount(place + pad, minlength=2 * pad + 1)) < LIMIT[5]
    assert abs(np.corrcoef(row, column)[0, 1]) < 0.025 and abs(np.corrcoef(row, mirrored)[0, 1]) < 0.025
    corner = found[(row == -pad) & (column == -pad) & ~mirrored][0]
    assert (corner[:pad] == 0).all() and (corner[:, :pad] == 0).all() and corner[pad, pad] == 1
    plain = augment.shift_and_flip(marked(side), (0, 1), np.arange(MANY), False, pad)[:, 0].numpy()
    assert (plain[:, 4, 3] < plain[:, 4, 4]).all()
    default = augment.shift_and_flip(marked(side)[:200], (0, 1), np.arange(200), False)[:, 0].numpy()
    assert set((default[:, 4, 4] - 1) // side - 4) == {-1, 0, 1}, "an eighth of the side"
    large = augment.shift_and_flip(marked(32)[:400], (0, 1), np.arange(400), False)[:, 0].numpy()
    assert set((large[:, 16, 16] - 1) // 32 - 16) == set(range(-4, 5)), "4 of 32, as on CIFAR-10"


def test_windows_have_the_areas_and_aspects_that_are_asked_for():
    scale, ratio, side = (0.25, 0.75), (0.8, 1.25), 256
    chances = augment.window_uniforms((0, 0), np.arange(MANY))
    found = np.array([augment.crop_window(side, side, chance, scale, ratio) for chance in chances])
    top, left, height, width = found.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= side).all() and (left + width <= side).all()
    share = (height * width / side**2 - scale[0]) / (scale[1] - scale[0])
    assert chi_square(np.bincount((share.clip(0, 0.9999) * 10).astype(int), minlength=10)) < 2 * LIMIT[10]  # rounded
    aspect = (np.log(width / height) - math.log(ratio[0])) / (math.log(ratio[1]) - math.log(ratio[0]))
    assert abs(float(aspect.mean()) - 0.5) < 0.01 and abs(float(aspect.std()) - 12**-0.5) < 0.01
    for start, length in ((top, height), (left, width)):
        place = start / (side - length + 1)
        assert chi_square(np.bincount((place * 9).astype(int), minlength=9)) < 2 * LIMIT[9]
    assert augment.crop_window(10, 40, [0.999] * 23, (1.0, 1.0), (0.9, 1.1)) == (0, 14, 10, 11), "none fits: the middle"
    assert augment.crop_window(40, 10, [0.999] * 23, (1.0, 1.0), (0.9, 1.1)) == (14, 0, 11, 10)


def test_rectangles_are_erased_as_often_and_as_large_as_asked():
    from dist_prune.data.loader import TransformConfig

    side, share = 32, 0.4
    look = TransformConfig(side, (0.0,), (1.0,), erasing=share, erasing_mode="const")
    images = torch.ones(MANY, 1, side, side)
    augment.erase(images, (0, 0), np.arange(MANY), look)
    gone = (images[:, 0] == 0).float().mean((1, 2)).numpy()
    hit = gone > 0
    assert abs(hit.mean() - share) < 0.015
    area = gone[hit]
    assert area.min() > 0.01 and area.max() < 0.36
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.01
    rows = (images[:, 0] == 0).any(2).float().sum(1).numpy()[hit]
    columns = (images[:, 0] == 0).any(1).float().sum(1).numpy()[hit]
    assert abs(float(np.log(rows / columns).mean())) < 0.03
    assert float(np.log(rows / columns).std()) > 0.5


def test_pieces_and_the_smallest_batch_that_is_taken():
    from dist_prune.errors import PruneError

    assert [
        sampling.accumulation_steps(*given) for given in ((8, 1, 1), (8, 4, 2), (12, 8, 1), (3, 4, 1), (9, 2, 3))
    ] == [
        1,
        2,
        6,
        1,
        1,
    ]
    sampling.check_batch_size(4, 4, 2, "train")  # two images for each of two processes
    with pytest.raises(PruneError, match="train.batch: 3"):
        sampling.check_batch_size(3, 3, 2, "train")


def test_figures_of_an_epoch_agree_with_one_another():
    start = time.perf_counter()
    line = trainer(None, epochs=1).run()[0]
    assert 0 < line["seconds"] <= time.perf_counter() - start
    assert line["images_per_s"] == pytest.approx(200 / line["seconds"])
    assert 0 <= line["data_wait"] <= 1
    assert 0 <= line["top1"] <= 100 and 0 < line["loss"] < 100 and line["grad_norm"] > 0
