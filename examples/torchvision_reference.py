"""The training of torchvision's reference script: warm-up, label smoothing, mixed precision, averaged weights (EMA).

    python examples/torchvision_reference.py [--model mobilenet_v3_small] [--macs 0.5] [--epochs 4] [--out FOLDER]

The functions have the shape of the reference (``train_one_epoch``, ``evaluate``), with few lines inserted between two
trainings. The averaged network is cut by the same plan, so the average goes on.
"""

import argparse
import tempfile

import torch
import torchvision
from small_images import small_images
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import dist_prune as dp


def train_one_epoch(
    model: nn.Module, ema: AveragedModel, criterion: nn.Module, optimizer: torch.optim.Optimizer,
    schedule: LRScheduler, loader: DataLoader, amp: bool,
) -> None:  # fmt: skip
    model.train()
    for images, labels in loader:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)


@torch.inference_mode()
def evaluate(model: nn.Module, criterion: nn.Module, test: TensorDataset) -> tuple[float, float]:
    """Top-1 in percent, and the loss."""
    model.eval()
    logits = torch.cat([model(images) for images, _ in DataLoader(test, 250)])
    labels = test.tensors[1]
    return 100 * float((logits.argmax(1) == labels).float().mean()), float(criterion(logits, labels))


def sgd(model: nn.Module, lr: float) -> torch.optim.SGD:
    """Norms and biases decay less than weights, as ``--norm-weight-decay 0 --bias-weight-decay 0`` of the reference."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def schedule_of(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    warmup = max(steps // 10, 1)
    parts = [LinearLR(optimizer, 0.1, total_iters=warmup), CosineAnnealingLR(optimizer, max(steps - warmup, 1))]
    return SequentialLR(optimizer, parts, [warmup])


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet18", help="a classifier of torchvision.models")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the multiply-accumulates that is kept")
    parser.add_argument("--epochs", type=int, default=4, help="of the training, and of the finetuning")
    parser.add_argument("--images", type=int, default=2000, help="number of training images")
    parser.add_argument("--amp", action="store_true", help="mixed precision (bfloat16)")
    parser.add_argument("--out", help="folder for the pruned network; default: a temporary one")
    given = parser.parse_args()
    torch.manual_seed(0)
    training, test = small_images(given.images)
    loader = DataLoader(training, 50, shuffle=True, drop_last=True)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def network() -> nn.Module:
        made = torchvision.models.get_model(given.model, num_classes=10)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # mobilenets have 0.01, which a short training does not fill
        return made

    model = network()
    ema, optimizer = averaged(model), sgd(model, lr=0.05)
    schedule = schedule_of(optimizer, given.epochs * len(loader))
    for _ in range(given.epochs):
        train_one_epoch(model, ema, criterion, optimizer, schedule, loader, given.amp)
    dense = evaluate(ema.module, criterion, test)

    # dist_prune: the averaged network is scored, and both are cut by its plan
    graph = dp.trace(ema.module, (3, 32, 32))
    scores = dp.score(ema.module, graph, "taylor", training, images=500)
    plan = dp.select(scores, graph, target={"macs": given.macs}, round_to=8)
    model, ema = dp.prune(model, plan), averaged(dp.prune(ema.module, plan))
    cut = evaluate(ema.module, criterion, test)

    optimizer = sgd(model, lr=0.02)
    schedule = schedule_of(optimizer, given.epochs * len(loader))
    for _ in range(given.epochs):
        train_one_epoch(model, ema, criterion, optimizer, schedule, loader, given.amp)
    small = ema.module

    before, after = dp.costs(graph), dp.costs(graph, plan)
    print(f"dense      {dense[0]:6.2f} %  {before['macs']:12,} MACs  {before['params']:10,} parameters")
    print(f"pruned     {cut[0]:6.2f} %  {after['macs']:12,} MACs  {after['params']:10,} parameters")
    print(f"finetuned  {evaluate(small, criterion, test)[0]:6.2f} %")
    folder = dp.save(small, plan, given.out or tempfile.mkdtemp())
    again = dp.load(folder, model=network)
    print(f"loaded     {evaluate(again, criterion, test)[0]:6.2f} %  from {folder}")


if __name__ == "__main__":
    main()
