"""timm: a network by name, timm's optimizer, schedule and averaged weights (EMA). The bundle loads without code.

    python examples/timm_train.py [--model test_resnet] [--macs 0.5] [--epochs 4] [--out FOLDER]

``dist-prune run`` takes timm's networks through recipes; this is the way for a training script of one's own.
"""

import argparse
import tempfile

import timm
import torch
from small_images import accuracy, small_images
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import dist_prune as dp


def train(model: nn.Module, loader: DataLoader, epochs: int, lr: float) -> nn.Module:
    """Train with AdamW, a warm-up and a cosine; return the averaged network."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=lr / 10, step_on_epochs=False,
        updates_per_epoch=len(loader),
    )  # fmt: skip
    ema, criterion, update = ModelEmaV3(model, decay=0.95), LabelSmoothingCrossEntropy(0.1), 0
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
            update += 1
            schedule.step_update(update)
            ema.update(model)
    return ema.module


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="test_resnet", help="a network of timm.list_models()")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the multiply-accumulates that is kept")
    parser.add_argument("--epochs", type=int, default=4, help="of the training, and of the finetuning")
    parser.add_argument("--images", type=int, default=2000, help="number of training images")
    parser.add_argument("--out", help="folder for the pruned network; default: a temporary one")
    given = parser.parse_args()
    torch.manual_seed(0)
    training, test = small_images(given.images)
    loader = DataLoader(training, 50, shuffle=True, drop_last=True)

    model = train(timm.create_model(given.model, num_classes=10), loader, given.epochs, lr=2e-3)
    dense = accuracy(model, test)

    graph = dp.trace(model, (3, 32, 32))
    scores = dp.score(model, graph, "taylor", training, images=500)
    plan = dp.select(scores, graph, target={"macs": given.macs})
    small = dp.prune(model, plan)
    cut = accuracy(small, test)
    small = train(small, loader, given.epochs, lr=1e-3)

    before, after = dp.costs(graph), dp.costs(graph, plan)
    print(f"dense      {dense:6.2f} %  {before['macs']:12,} MACs  {before['params']:10,} parameters")
    print(f"pruned     {cut:6.2f} %  {after['macs']:12,} MACs  {after['params']:10,} parameters")
    print(f"finetuned  {accuracy(small, test):6.2f} %")
    folder = dp.save(small, plan, given.out or tempfile.mkdtemp(), mean=[0.5] * 3, std=[0.5] * 3)
    print(f"loaded     {accuracy(dp.load(folder), test):6.2f} %  from {folder}")  # timm builds it by its name


if __name__ == "__main__":
    main()
