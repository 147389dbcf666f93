"""A plain PyTorch loop: train, score, prune, finetune, save, load. On one process, or on several under torchrun.

    python examples/plain_pytorch.py [--macs 0.5] [--epochs 6] [--out FOLDER]
    torchrun --nproc_per_node 2 examples/plain_pytorch.py

Under torchrun the ranks train with DistributedDataParallel, each scores its share of the images, and all find the same
plan.
"""

import argparse
import os
import tempfile

import torch
from small_images import accuracy, small_images
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import dist_prune as dp


def network() -> nn.Module:
    def block(wide: int, out: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(wide, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32, 2), *block(32, 64), nn.MaxPool2d(2), *block(64, 96), nn.MaxPool2d(2), *block(96, 128),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def train(model: nn.Module, loader: DataLoader, epochs: int, optimizer: torch.optim.Optimizer, lr: float) -> None:
    model.train()
    for epoch in range(epochs):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - epoch / epochs)
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--macs", type=float, default=0.5, help="share of the multiply-accumulates that is kept")
    parser.add_argument("--epochs", type=int, default=6, help="of the training, and of the finetuning")
    parser.add_argument("--out", help="folder for the pruned network; default: a temporary one")
    parser.add_argument("--images", type=int, default=2000, help="number of training images")
    given = parser.parse_args()
    torch.manual_seed(0)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        distributed.init_process_group("gloo")  # "nccl" on GPUs
    first = world == 1 or distributed.get_rank() == 0
    training, test = small_images(given.images)
    sampler = DistributedSampler(training) if world > 1 else None
    loader = DataLoader(training, 64 // world, sampler=sampler, shuffle=sampler is None)

    model: nn.Module = network()
    if world > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    train(model, loader, given.epochs, optimizer, lr=0.05)
    dense = accuracy(model, test)

    graph = dp.trace(model, (3, 32, 32))
    scores = dp.score(model, graph, "taylor", loader, images=500)
    plan = dp.select(scores, graph, target={"macs": given.macs})
    small = dp.prune(model, plan)  # bare, also if the model was wrapped
    optimizer = dp.carry(optimizer, model, small, plan)  # with the momentum of the channels that stay
    cut = accuracy(small, test)
    train(DistributedDataParallel(small) if world > 1 else small, loader, given.epochs, optimizer, lr=0.02)

    print(f"plan       {plan.fingerprint}")  # the same on every rank
    if first:
        before, after = dp.costs(graph), dp.costs(graph, plan)
        print(f"dense      {dense:6.2f} %  {before['macs']:12,} MACs  {before['params']:10,} parameters")
        print(f"pruned     {cut:6.2f} %  {after['macs']:12,} MACs  {after['params']:10,} parameters")
        print(f"finetuned  {accuracy(small, test):6.2f} %")
        folder = dp.save(small, plan, given.out or tempfile.mkdtemp())
        print(f"loaded     {accuracy(dp.load(folder, model=network), test):6.2f} %  from {folder}")
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
