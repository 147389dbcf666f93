"""Prune a network of your own in a plain PyTorch loop: train, score, select, prune, finetune, save.

    python examples/plain_pytorch.py [--macs 0.5] [--epochs 15] [--out FOLDER]

The images are the 1,797 handwritten digits that scikit-learn brings (8x8), the network is defined here. Half a minute
on two CPU cores. Under ``torchrun --nproc_per_node 2`` both ranks score their share and find the same plan.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import dist_prune as dp


def network() -> nn.Module:
    def block(wide: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(wide, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def digits() -> tuple[TensorDataset, TensorDataset]:
    body = load_digits()
    images = torch.tensor(body.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(body.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def train(model: nn.Module, loader: DataLoader, epochs: int, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return 100 * float((model.eval()(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--macs", type=float, default=0.5, help="share of the multiply-accumulates that is kept")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", help="folder for the pruned network")
    given = parser.parse_args()
    torch.manual_seed(0)
    training, test = digits()
    loader = DataLoader(training, batch_size=64, shuffle=True)

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    train(model, loader, given.epochs, optimizer)

    graph = dp.trace(model, (1, 8, 8))
    scores = dp.score(model, graph, "taylor", loader, images=500)
    plan = dp.select(scores, graph, target={"macs": given.macs})
    small = dp.prune(model, plan)
    cut = accuracy(small, test)
    train(small, loader, given.epochs, dp.carry(optimizer, model, small, plan))

    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in (model, small)]
    print(f"dense      {accuracy(model, test):6.2f} %  {sizes[0]:7,} parameters")
    print(f"pruned     {cut:6.2f} %  {sizes[1]:7,} parameters")
    print(f"finetuned  {accuracy(small, test):6.2f} %")
    if given.out:
        print(f"saved to {dp.save(small, plan, given.out)}: dp.load({given.out!r}, model=network)")


if __name__ == "__main__":
    main()
