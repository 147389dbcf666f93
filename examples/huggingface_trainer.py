"""Hugging Face transformers: a ViT or a ResNet trained by ``Trainer``, pruned, and finetuned by ``Trainer`` again.

    python examples/huggingface_trainer.py [--model resnet] [--macs 0.6] [--epochs 4] [--out FOLDER]
    python examples/huggingface_trainer.py --model vit

Batches are dicts (``pixel_values``, ``labels``), and the output's ``logits`` are the classifier's. In a ViT the hidden
layer of every MLP is cut, and whole heads of the attention. Left whole, as the graph says, is the residual stream: it
runs through the position embeddings, a bare parameter, whose channels cannot be cut one by one.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from small_images import small_images
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.utils import logging

import dist_prune as dp

logging.disable_progress_bar()


class Images(Dataset):
    def __init__(self, data: TensorDataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = self.data[index]
        return {"pixel_values": image, "labels": label}


def network(name: str) -> PreTrainedModel:
    """Random weights of a small configuration; ``from_pretrained(...)`` takes its place where there is a network."""
    if name == "vit":
        sizes = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384}
        return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **sizes))
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1]}
    return ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=10, **sizes))


def count_right(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": 100 * float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def trainer(model: nn.Module, training: Dataset, test: Dataset, epochs: int, lr: float) -> Trainer:
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=epochs, learning_rate=lr, per_device_train_batch_size=50,
        per_device_eval_batch_size=250, warmup_steps=20, weight_decay=0.01, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    made = Trainer(model, arguments, train_dataset=training, eval_dataset=test, compute_metrics=count_right)
    made.remove_callback(PrinterCallback)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("resnet", "vit"), default="resnet")
    parser.add_argument("--macs", type=float, default=0.6, help="share of the multiply-accumulates that is kept")
    parser.add_argument("--epochs", type=int, default=4, help="of the training, and of the finetuning")
    parser.add_argument("--images", type=int, default=2000, help="number of training images")
    parser.add_argument("--out", help="folder for the pruned network; default: a temporary one")
    given = parser.parse_args()
    set_seed(0)
    training, test = map(Images, small_images(given.images))

    model = network(given.model)
    dense = trainer(model, training, test, given.epochs, lr=1e-3)
    dense.train()
    results = {"dense": dense.evaluate()["eval_accuracy"]}

    graph = dp.trace(model, (3, 32, 32))
    for group in graph.groups:
        print(f"{group.name}: {group.width} {group.unit}s, {group.protected or 'free'}")
    scores = dp.score(model, graph, "taylor", dense.get_train_dataloader(), images=500)
    plan = dp.select(scores, graph, target={"macs": given.macs})
    small = dp.prune(model, plan)

    tuned = trainer(small, training, test, given.epochs, lr=5e-4)
    results["pruned"] = tuned.evaluate()["eval_accuracy"]
    tuned.train()
    results["finetuned"] = tuned.evaluate()["eval_accuracy"]

    out = Path(given.out or tempfile.mkdtemp())
    dp.save(small, plan, out)
    small.save_pretrained(out / "transformers")  # config.json describes the dense network
    config = type(model.config).from_pretrained(out / "transformers")
    again = dp.load(out, model=lambda: type(model)(config))
    results["loaded"] = trainer(again, training, test, 0, lr=0).evaluate()["eval_accuracy"]

    before, after = dp.costs(graph), dp.costs(graph, plan)
    sizes = {"dense": before, "pruned": after}
    for name, right in results.items():
        counts = f"  {sizes[name]['macs']:12,} MACs  {sizes[name]['params']:10,} parameters" if name in sizes else ""
        print(f"{name:<10} {right:6.2f} %{counts}")
    print(f"saved to {out}")


if __name__ == "__main__":
    main()
