"""What every act is handed: the recipe, the machine, the run directory, and the objects that they imply."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_prune import replay
from dist_prune.errors import PruneError
from dist_prune.ledger import Ledger, file_digest
from dist_prune.methods.method import Method
from dist_prune.pruning import surgeon
from dist_prune.pruning.channels import Channels
from dist_prune.pruning.choose import Request
from dist_prune.pruning.narrow import narrowed
from dist_prune.pruning.plan import Plan
from dist_prune.pruning.rounds import scheduled
from dist_prune.recipe import Recipe, Training
from dist_prune.runtime import backbones, checkpoint, stopping
from dist_prune.runtime.data.arrays import check_sides
from dist_prune.runtime.data.backends import Opened, open_split
from dist_prune.runtime.data.dealing import deal, held_out, micro_batches
from dist_prune.runtime.data.feed import Feed, Look
from dist_prune.runtime.data.numbering import numbered, told
from dist_prune.runtime.data.random_access import ImageSource
from dist_prune.runtime.data.sources import check, check_figures, only, same_classes
from dist_prune.runtime.machine import Machine
from dist_prune.runtime.tracking import Tracker
from dist_prune.stages.order import at
from dist_prune.stages.sharing import Shelf

Tensors = dict[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]  # file -> (named tensors, meta)


@dataclass
class Made:
    """What an act made.

    Attributes:
        facts: figures for the ledger and the report (plain JSON values).
        tensors: file -> (named tensors, meta), written as safetensors.
        texts: file -> text.
        drop: files that are no longer needed once the rest is written.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


@dataclass
class Work:
    """One run of one recipe in one folder."""

    recipe: Recipe
    machine: Machine
    tracker: Tracker
    folder: Path
    method: Method
    events: list[dict[str, Any]] = field(default_factory=list)
    identity: str = ""  # fingerprint of the stage at work
    round: int = 1  # the one it belongs to
    lineage: str = ""  # what single measurements of the score stage belong to
    shelf: Shelf | None = None  # where the tasks of a sweep share artifacts
    # sample id -> why it was left out, of the training and of the evaluation images, on this rank, in the stage at work
    skipped: dict[bool, dict[int, str]] = field(default_factory=lambda: {True: {}, False: {}})
    _feeds: dict[bool, Feed] = field(default_factory=dict)

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The resolved recipe as plain values."""
        return self.recipe.resolved()

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    @cached_property
    def opened(self) -> dict[bool, Opened]:
        """The training and the evaluation split."""
        data, out, plain = self.recipe.data, {}, {}
        for train in (True, False):
            what = f"{'training' if train else 'evaluation'} images"
            split = data.train_split if train else data.eval_split
            found = open_split(
                data.backend, data.source, data.root, split, train, self.tracker.say,
                lambda source, train=train: self._resized(source, train), data.layout,
            )  # fmt: skip
            plain[train] = only(found.source, data.classes)
            out[train] = replace(found, source=numbered(plain[train], data.class_order, data.class_map))
            check(out[train].source, f"the {what} of {data.source}")
            self.tracker.say(f"data: {what} come through the {found.backend} backend ({found.why})")
        same_classes(plain[True], plain[False])
        classes = out[True].source.classes
        empty = len(classes) - len(np.unique(out[True].source.labels))
        if data.source == "imagefolder":
            said = told(classes, empty, len(plain[True].classes), data.class_order, data.class_map)
            self.tracker.say(f"data: {said}")
        elif empty:
            self.tracker.say(f"data: {len(classes)} classes, {empty} of which have no training image")
        return out

    @property
    def classes(self) -> tuple[str, ...]:
        return self.opened[True].source.classes

    @property
    def in_chans(self) -> int:
        return self.opened[True].source.in_chans

    def fresh(self) -> nn.Module:
        """The dense backbone, weights from the recipe's seed (or timm's, where asked for and no file names others)."""
        torch.manual_seed(self.recipe.seed)
        spec = self.recipe.backbone
        fetched = spec.pretrained and not spec.checkpoint
        return backbones.create(spec.name, len(self.classes), self.in_chans, fetched, spec.kwargs)

    def shell(self) -> nn.Module:
        """The dense backbone without meaningful weights: to be filled or traced."""
        spec = self.recipe.backbone
        return backbones.create(spec.name, len(self.classes), self.in_chans, False, spec.kwargs)

    def dense(self) -> nn.Module:
        """The backbone with the dense weights of this run."""
        model = self.shell()
        model.load_state_dict(self.tensors("dense.safetensors"))
        return model

    def small(self, file: str, number: int | None = None) -> nn.Module:
        """The network that a round (the one at work) left, with the weights of an artifact."""
        return surgeon.rebuild(self.shell(), self.plan_of(number or self.round), self.tensors(file))

    def before(self) -> nn.Module:
        """The network that the round at work scores and cuts."""
        return self.dense() if self.round == 1 else self.small(at(self.round - 1, "tuned.safetensors"), self.round - 1)

    def here(self, file: str) -> str:
        """A file of the round at work."""
        return at(self.round, file)

    def tensors(self, file: str) -> dict[str, Tensor]:
        return checkpoint.read(self.folder / file)[0]

    def plan_of(self, number: int) -> Plan:
        """What rounds 1 to ``number`` cut, in dense coordinates."""
        return Plan.from_json((self.folder / at(number, "plan.json")).read_text())

    @property
    def plan(self) -> Plan:
        """What the rounds up to the one at work cut."""
        return self.plan_of(self.round)

    @cached_property
    def look(self) -> Look:
        """The evaluation look: the model's own figures, overridden by the recipe's."""
        return self._look_at(self.opened[True].source)

    def _look_at(self, source: ImageSource) -> Look:
        data, spec = self.recipe.data, self.recipe.backbone
        shell = backbones.create(spec.name, len(source.classes), source.in_chans, False, spec.kwargs)
        config = backbones.image_config(shell, source.in_chans)
        if source.fixed_size is not None:
            check_sides(*source.fixed_size, data.image_size)
            for key in ("crop", "crop_mode", "interpolation"):
                if getattr(data, key) is not None:
                    raise PruneError(
                        f"data.{key} is for image files; arrays are used whole (data.image_size resizes them)"
                    )
            config |= {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}
        native = source.fixed_size[0] if source.fixed_size else config["input_size"][1]
        check_figures(data.mean, data.std, source.in_chans)
        size = data.image_size or native
        if data.padding is not None and data.padding > size:
            raise PruneError(f"data.padding: {data.padding} pixels around images of side {size}; at most {size}")
        return Look(
            size, data.mean or tuple(config["mean"]), data.std or tuple(config["std"]),
            data.crop or config["crop_pct"], data.interpolation or config["interpolation"], data.augment,
            data.crop_mode or config["crop_mode"], data.exif, data.crop_scale, data.crop_ratio, data.auto_augment,
            data.random_erasing, data.random_erasing_mode, tuple(sorted(data.resize_schedule.items())), data.padding,
        )  # fmt: skip

    def _resized(self, source: ImageSource, train: bool) -> int:
        """The side that the recipe resizes shorter sides to before it crops, the largest of a schedule."""
        look = self._look_at(source)
        return max(math.floor(look.size / look.crop), *(size for _, size in look.schedule if train), 0)

    def feed(self, train: bool) -> Feed:
        """The training or the evaluation images: one feed for a whole stage, so that its workers stay."""
        if train not in self._feeds:
            opened, data = self.opened[train], self.recipe.data
            self._feeds[train] = Feed(
                opened.source, self.look, self.machine.device, data.workers, backend=opened.backend,
                on_error=data.on_error, skipped=self.skipped[train],
            )  # fmt: skip
        return self._feeds[train]

    def close_feeds(self) -> None:
        """The end of a stage: loader workers go home."""
        for feed in self._feeds.values():
            feed.close()
        self._feeds.clear()

    def held(self) -> tuple[np.ndarray, list[str]]:
        """Ids of the training images that ``train.holdout`` holds out; the trainings that learn from some of them."""
        recipe, feed = self.recipe, self.feed(True)
        ids = np.arange(min(len(feed), recipe.train.images or len(feed)))
        seen = [
            name for name, section in (("train", recipe.train), ("finetune", recipe.finetune))
            if section.epochs and (section.selection != "holdout" or section.holdout < recipe.train.holdout)
        ]  # fmt: skip
        return held_out(ids, recipe.train.holdout, recipe.seed)[1], seen

    def scoring(self, ids: np.ndarray, method: Method) -> tuple[Feed, np.ndarray]:
        """The images as a method looks at them (no schedule of sizes), and those of ``ids`` that can be read."""
        return self.readable(replace(self.feed(method.sees != "test"), look=replace(self.look, schedule=())), ids)

    def readable(self, feed: Feed, ids: np.ndarray) -> tuple[Feed, np.ndarray]:
        """Those of ``ids`` that can be read, and a feed that insists on them.

        With ``data.on_error: skip`` all of them are read once before, and unreadable ones are taken out on every rank:
        statistics are addressed by image, so what is scored has to be known before.
        """
        if not feed.skips:
            return feed, ids
        ranks, lists = self.machine.ranks, micro_batches(ids, self.recipe.score.micro_batch)
        batches = feed.batches(deal(lists, ranks.rank, ranks.world))
        for _ in range(-(-len(lists) // ranks.world)):
            if stopping.poll(ranks)[0]:
                raise stopping.leave("while images were checked")
            next(batches, None)
        bad = {sample for part in ranks.gather(sorted(feed.skipped)) for sample in part}
        if bad:
            self.tracker.say(f"  {len(bad & set(ids.tolist()))} of {len(ids)} images cannot be read and are left out")
        return replace(feed, exact=True), ids[~np.isin(ids, sorted(bad))]

    def left_out(self, stage: str) -> dict[str, Any]:
        """The images that any rank left out in the stage that ends here, for its ledger line; notes an event."""
        if self.recipe.data.on_error == "fail":
            return {}
        out = []
        for train, what in ((True, "training"), (False, "evaluation")):
            parts = self.machine.ranks.gather(dict(self.skipped[train]))
            self.skipped[train].clear()
            whole = {sample: why for part in parts for sample, why in part.items()}
            source = self.opened[train].source
            for sample, why in sorted(whole.items()):
                out.append({"images": what, "id": sample, "file": source.location(sample), "why": why})
            if whole:
                self.events.append(
                    {"stage": stage, "event": f"{len(whole)} {what} image(s) could not be read, left out"}
                )
        return {"skipped_images": out} if out else {}

    @property
    def images(self) -> dict[str, Any]:
        """For the report: who served the images, and what they looked like to the network."""
        body = asdict(self.look)
        shown = ("size", "mean", "std", "crop", "crop_mode", "interpolation", "exif")
        training = {key: value for key, value in body.items() if key not in shown}
        backends_used = {name: self.opened[name == "train"].backend for name in ("train", "eval")}
        return {"backend": backends_used, "eval_transform": {key: body[key] for key in shown}, "training": training}

    @property
    def example(self) -> Tensor:
        """One input of the network's size, (1, C, H, W)."""
        return torch.randn(
            (1, self.in_chans, self.look.size, self.look.size), generator=torch.Generator().manual_seed(0)
        )

    @cached_property
    def channels(self) -> Channels:
        """Layers and groups of the dense backbone that the method can judge."""
        return self.method.limits(surgeon.sites_of(self.shell().eval(), self.example))

    @cached_property
    def request(self) -> Request:
        """What the recipe's select and target sections ask for."""
        return Request.of(self.recipe)

    def left(self, channels: Channels) -> Channels:
        """What of the dense network's ``channels`` the rounds before the one at work have left."""
        return channels if self.round == 1 else narrowed(channels, self.plan_of(self.round - 1))

    def asked(self, channels: Channels) -> Request:
        """What the round at work is asked for of the ``channels`` that it cuts."""
        schedule = self.recipe.schedule
        return scheduled(self.request, channels, self.round, schedule.rounds, schedule.spacing)

    def replayed(self) -> Plan:
        """The plan that ``select.plan`` names; PruneError where another key asks for something beside it."""
        spec, asked = self.recipe.select, self.request
        given = {
            "select.threshold": asked.threshold, "select.keep_ratio": asked.keep_ratio,
            "select.counts": asked.counts, "target": asked.target,
            "select.exclude": spec.exclude, "select.round_to": spec.round_to > 1,
            "select.min_channels": spec.min_channels > 1, "select.include": spec.include,
            "select.keep_ratios": spec.keep_ratios, "select.max_ratio": spec.max_ratio,
        }  # fmt: skip
        others = [key for key, value in given.items() if value not in (None, (), False, {})]
        if others:
            raise PruneError(
                f"select.plan: a plan that is replayed leaves nothing to choose; leave out {' and '.join(others)} "
                "(on the command line: key= with nothing behind it)"
            )
        return replay.read(Path(str(spec.plan)).expanduser(), self.channels)

    def dealt(self, settings: Training) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the images that a training learns from, and of those it is judged by."""
        count = len(self.opened[True].source.labels)
        share = settings.holdout if settings.selection == "holdout" else 0.0
        return held_out(np.arange(min(count, settings.images or count)), share, self.recipe.seed)

    def outside(self, stage: str) -> dict[str, str]:
        """Digests of what a stage reads from outside the run directory: images and labels, the checkpoint file."""
        scored = (self.method.sees != "test",)
        reads = {
            "train": (True, False), "many": (True, False), "finetune": (True, False), "score": scored,
            "evaluate": (False,), "curves": (False,),
        }  # fmt: skip
        found = {("train" if train else "eval"): self.opened[train].source.identity for train in reads.get(stage, ())}
        if stage == "train" and self.checkpoint is not None:
            found["checkpoint"] = file_digest(self.checkpoint) if self.checkpoint.is_file() else "missing"
        return found

    @property
    def checkpoint(self) -> Path | None:
        """The recipe's checkpoint of the dense network."""
        place = self.recipe.backbone.checkpoint
        return Path(place).expanduser() if place else None
