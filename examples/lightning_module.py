"""PyTorch Lightning: a module that is trained, pruned between two ``Trainer.fit`` calls, or by a callback inside one.

    python examples/lightning_module.py [--callback] [--macs 0.5] [--epochs 3] [--out FOLDER]

Lightning's own ``ModelPruning`` callback sets weights to zero by masks: the network keeps its size. ``ChannelPruning``
below is its structural counterpart: at the start of one epoch the channels are removed, and training goes on with the
optimizer's state cut along.
"""

import argparse
import logging
import tempfile
import warnings

import lightning as L
import torch
from small_images import accuracy, small_images
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dist_prune as dp


class Block(nn.Module):
    def __init__(self, wide: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(wide, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def network() -> nn.Module:
    return nn.Sequential(
        Block(3, 32, 2), Block(32, 64, 2), Block(64, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )


class Classifier(L.LightningModule):
    """Give it an optimizer to go on with that one; without, it makes a new one."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer | None = None):
        super().__init__()
        self.network, self.optimizer = network, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer or torch.optim.AdamW(self.network.parameters(), lr=2e-3, weight_decay=0.01)


class ChannelPruning(L.Callback):
    """Prunes ``module.network`` at the start of an epoch, for one device.

    Several devices hold the network in DistributedDataParallel, which keeps the parameters that it was made with: prune
    between two ``fit`` calls there.
    """

    def __init__(self, epoch: int, example: tuple[int, int, int], target: dict[str, float], method: str = "taylor"):
        self.epoch, self.example, self.target, self.method = epoch, example, target, method
        self.dense: nn.Module | None = None
        self.plan: dp.Plan | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch != self.epoch or self.plan is not None:
            return
        self.dense = dense = module.network
        graph = dp.trace(dense, self.example)
        scores = dp.score(dense, graph, self.method, trainer.train_dataloader, images=500)
        self.plan = dp.select(scores, graph, target=self.target)
        module.network = dp.prune(dense, self.plan)
        trainer.optimizers = [dp.carry(it, dense, module.network, self.plan) for it in trainer.optimizers]


def trainer(epochs: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--macs", type=float, default=0.5, help="share of the multiply-accumulates that is kept")
    parser.add_argument("--epochs", type=int, default=3, help="before the cut, and after it")
    parser.add_argument("--callback", action="store_true", help="prune inside one fit call")
    parser.add_argument("--out", help="folder for the pruned network; default: a temporary one")
    parser.add_argument("--images", type=int, default=2000, help="number of training images")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    training, test = small_images(given.images)
    loader = DataLoader(training, 50, shuffle=True)
    module, example, target = Classifier(network()), (3, 32, 32), {"macs": given.macs}

    if given.callback:
        pruning = ChannelPruning(given.epochs, example, target)
        trainer(2 * given.epochs, pruning).fit(module, loader)
        dense, plan, small = pruning.dense, pruning.plan, module.network
    else:
        first = trainer(given.epochs)
        first.fit(module, loader)
        dense = module.network
        graph = dp.trace(dense, example)
        plan = dp.select(dp.score(dense, graph, "taylor", loader, images=500), graph, target=target)
        small = dp.prune(dense, plan)
        # the first fit's optimizer goes on, its moments cut along; Classifier(small) alone would start a new one
        carried = dp.carry(first.optimizers[0], dense, small, plan)
        trainer(given.epochs).fit(Classifier(small, carried), loader)

    before, after, cut = dp.costs(plan.graph), dp.costs(plan.graph, plan), dp.prune(dense, plan)
    print(f"dense      {accuracy(dense, test):6.2f} %  {before['macs']:12,} MACs  {before['params']:10,} parameters")
    print(f"pruned     {accuracy(cut, test):6.2f} %  {after['macs']:12,} MACs  {after['params']:10,} parameters")
    print(f"finetuned  {accuracy(small, test):6.2f} %")
    folder = dp.save(small, plan, given.out or tempfile.mkdtemp())
    print(f"loaded     {accuracy(dp.load(folder, model=network), test):6.2f} %  from {folder}")


if __name__ == "__main__":
    main()
