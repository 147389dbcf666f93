"""Training of a network on all ranks: loss, averaged weights, masks, checkpoints, selection of the best epoch."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from dist_prune.data import sampling
from dist_prune.data.loader import Batch
from dist_prune.distributed.communicator import Communicator
from dist_prune.distributed.preemption import PreemptedError
from dist_prune.tasks.base import Task
from dist_prune.tasks.classification import CLASSIFICATION
from dist_prune.training import deepspeed_engine, optim
from dist_prune.training.acceleration import AcceleratedModel
from dist_prune.training.bn_recalibration import freeze_batch_norms
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.engine import TrainEngine
from dist_prune.training.loop import Loop, Losses, Progress, gradient_averager
from dist_prune.training.loss import TrainingLoss
from dist_prune.training.optimizer_state import CarriedOptimizerState

Evaluate = Callable[[nn.Module], Mapping[str, float]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Trainer:
    """One training of one bare model. Every rank has a trainer and calls ``run``.

    Attributes:
        model: bare, trained in place; it is wrapped for the ranks during ``run``.
        loop: settings, images, device and ranks.
        evaluate: returns the figures of a model by name; called on every rank, may call collectives.
        split: the images of ``evaluate`` ("holdout" or "test"), prefix of its figures.
        checkpoints: those of this training, or None for none.
        classes: number of classes.
        teacher: the dense network to distil from, or None.
        masks: parameter name -> 0/1 tensor of its shape; masked weights and their momentum stay exact zeros.
        losses: (wrapped network, batch) -> (n,) losses, in place of the recipe's loss; or None.
        watch: called after each update with its number since the beginning, from 0.
        penalty: called before each update, to add to the averaged gradients; or None.
        carried: state of an earlier training with which this one starts (learning rates start over), or None. If
            weights were averaged, ``model`` needs the trained weights, not their averages.
        keep_state: whether ``final_state`` is wanted.
        final_state: after ``run``, optimizer state and averages at the selected epoch, for the next training.
        history: figures of the epochs so far.
        best: weights of the best epoch so far, or None.
        best_figure: its primary figure, or None.
        task: decides the loss, and the primary figure that selects an epoch.
    """

    model: nn.Module
    loop: Loop
    evaluate: Evaluate
    split: str = "test"
    checkpoints: CheckpointManager | None = None
    classes: int = 0
    teacher: nn.Module | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Callable[[nn.Module, Batch], Tensor] | None = None
    watch: Callable[[int], None] = lambda step: None
    penalty: Callable[[], None] | None = None
    carried: CarriedOptimizerState | None = None
    keep_state: bool = False
    final_state: CarriedOptimizerState | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_figure: float | None = None
    task: Task = CLASSIFICATION
    _held: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def run(self) -> list[dict[str, float]]:
        """Train from the beginning, or from the last checkpoint, to the end; a collective, called by every rank.

        Afterwards ``model`` is bare and has the selected epoch's weights (averaged ones if there are averages).

        Returns:
            The figures of each epoch: ``epoch`` from 1, those of ``Loop.run_epoch``, those of ``evaluate`` with the
            prefix ``<split>_``, and ``best`` if the epoch is the best so far. Empty for 0 epochs.

        Raises:
            PreemptedError: on every rank, after one of them was asked to stop; the state is saved.
            PruneError: the batch is too small for the ranks, or the loss is not finite.
        """
        loop = self.loop
        settings = self.loop.settings
        environment = self.loop.environment
        if settings.epochs == 0:
            return []
        sampling.check_batch_size(settings.batch, loop.images_per_epoch, environment.comm.world, loop.name)
        self.model.to(environment.device)
        if self.teacher is not None:
            self.teacher.to(environment.device).eval().requires_grad_(False)
        accelerated = AcceleratedModel(self.model, settings, environment)
        self.ema = ModelEmaV3(self.model, decay=settings.ema, use_warmup=True) if settings.ema else None
        optimizer = optim.create_optimizer(optim.parameter_groups(self.model, settings), settings)
        schedule = optim.LearningRate(optimizer, settings, loop.steps_per_epoch)
        checkpoint = self._load_checkpoint()
        if checkpoint is not None:
            self._load_weights(*checkpoint)
        elif self.carried is not None and self.ema is not None:
            self.ema.module.load_state_dict(self.carried.tables["ema"])
            self.updates = self.carried.plain["updates"]
        self.engine = self._make_engine(optimizer, accelerated)
        if self.penalty is not None:
            self.engine.penalty = self.penalty
        epoch, begin = self._resume(checkpoint)
        self._apply_masks()
        losses = self._make_losses()
        loop.save = self._save
        loop.after = self._after
        loop.last_good = self._last_good
        try:
            while not self._finished(epoch):
                self.engine.forward.train()
                if settings.freeze_bn:
                    freeze_batch_norms(self.model)
                figures = loop.run_epoch(epoch, losses, self.engine, schedule, self.watch, begin)
                begin, epoch = None, epoch + 1
                self._end_of_epoch(epoch - 1, figures)
        except PreemptedError:  # on every rank; the process ends soon, and the writing thread with it
            self._wait()
            raise
        return self._end(accelerated)

    def _make_losses(self) -> Losses:
        """The function of a batch's losses: the trainer's own one, or the recipe's loss, which counts hits."""
        forward, custom = self.engine.forward, self.losses
        if custom is not None:
            return lambda batch, epoch, step: custom(forward, batch)
        training_loss = TrainingLoss(
            self.loop.settings, self.classes, self.loop.seed, self.teacher, self._amp, self.task
        )
        if type(self.task).hits is not Task.hits:
            self.loop.hits, self.loop.hit_name = training_loss.hits, self.task.primary
        return lambda batch, epoch, step: training_loss(forward, batch, epoch, step)

    def _make_engine(self, optimizer: torch.optim.Optimizer, accelerated: AcceleratedModel) -> TrainEngine:
        """Model and optimizer on all ranks: through DeepSpeed, accelerate's DDP, or neither."""
        environment, settings = self.loop.environment, self.loop.settings
        if environment.zero_stage:
            return deepspeed_engine.DeepSpeedEngine(environment, optimizer, self.model, settings)
        sync = (
            gradient_averager(list(self.model.parameters()), environment.comm)
            if environment.accelerator is None
            else None
        )
        forward = accelerated.compile(environment.wrap(self.model))
        return TrainEngine(environment, optimizer, self.model, forward, sync, scaled=settings.precision == "fp16")

    def _amp(self) -> torch.autocast:
        dtype = DTYPES[self.loop.settings.precision]
        return torch.autocast(self.loop.environment.device.type, dtype=dtype, enabled=dtype is not torch.float32)

    def _after(self) -> None:
        self._apply_masks()
        if self.ema is not None:
            self.updates += 1
            with self.engine.full_weights():
                self.ema.update(self.model, step=self.updates)

    updates: int = 0
    resumed: dict[str, int] | None = None  # epoch and step of the checkpoint that was loaded

    def _apply_masks(self) -> None:
        if self.masks:
            if not self._held:  # copied to the device once, not after every update
                self._held = {
                    name: mask.to(self.loop.environment.device, torch.float32) for name, mask in self.masks.items()
                }
            self.engine.apply_masks(self._held)

    @property
    def _selected(self) -> nn.Module:
        """The network that is evaluated and kept: the averaged weights if there are some."""
        return self.ema.module if self.ema is not None else self.model

    def _end_of_epoch(self, number: int, figures: dict[str, float]) -> None:
        loop, settings = self.loop, self.loop.settings
        broadcast_buffers(self.model, loop.environment.comm)
        broadcast_buffers(self._selected, loop.environment.comm)
        line: dict[str, float] = {"epoch": number + 1, **figures}
        if (number + 1) % settings.evaluate_every == 0 or number + 1 == settings.epochs:
            try:
                results = self.evaluate(self._selected)
            except PreemptedError:
                self._save(number, loop.progress)  # all steps are done: the next process starts with the evaluation
                raise
            line |= {f"{self.split}_{key}": value for key, value in results.items()}
            figure = results.get(self.task.primary)
            if settings.selection != "last" and figure is not None and self.task.better(figure, self.best_figure):
                self.best_figure, line["best"] = figure, 1.0
                self.best = self._weights(self._selected)
                self.final_state = self._state() if self.keep_state else None
        self.history.append(line)
        self._report_epoch(line)
        self._save(number + 1, Progress())

    def _finished(self, epoch: int) -> bool:
        """Whether all epochs are done, or the recipe's patience has passed without a better evaluation."""
        patience = self.loop.settings.patience
        key, best = f"{self.split}_{self.task.primary}", max if self.task.higher_is_better else min
        tops = [line[key] for line in self.history if key in line]
        impatient = patience is not None and bool(tops) and len(tops) - 1 - tops.index(best(tops)) >= patience
        return epoch >= self.loop.settings.epochs or impatient

    def _end(self, accelerated: AcceleratedModel) -> list[dict[str, float]]:
        """Load the selected weights into the bare model."""
        self._wait()
        selected = self.best if self.best is not None else self._weights(self._selected)
        if self.keep_state and self.best is None:
            self.final_state = self._state()
        self.engine.close()
        accelerated.restore()
        self.model.load_state_dict(selected)
        return self.history

    def _wait(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        if self.checkpoints is not None:
            self.loop.environment.comm.run_on_main(self.checkpoints.wait)

    def _state(self) -> CarriedOptimizerState:
        averaged = self.ema.module if self.ema is not None else None
        return CarriedOptimizerState.capture(
            self.model, self.engine.optimizer, self.engine.state(), averaged, self.updates
        )

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """A copy of a network's full weights, on the CPU; called on every rank."""
        with self.engine.full_weights():
            return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}

    def _save(self, epoch: int, progress: Progress) -> None:
        if self.checkpoints is None:
            return
        checkpoints, comm = self.checkpoints, self.loop.environment.comm
        optimizer_state, plain = self.engine.state()
        sections = {"model": self._weights(self.model), "optimizer": optimizer_state}
        if self.ema is not None:
            sections["ema"] = self.ema.module.state_dict()
        if self.best is not None:
            sections["best"] = self.best
        carried, carried_plain = self.final_state.to_file() if self.final_state is not None else ({}, None)
        sections["left"] = carried
        meta = {
            "optimizer": plain, "history": self.history, "best_figure": self.best_figure, "epoch": epoch,
            "progress": asdict(progress), "updates": self.updates, "world": comm.world,
            **({"left": carried_plain} if carried_plain else {}),
        }  # fmt: skip
        tensors = {f"{section}/{name}": tensor for section, named in sections.items() for name, tensor in named.items()}
        learned = {f"model/{name}" for name, _ in self.model.named_parameters()}

        def write() -> None:
            not_finite = [name for name in sorted(learned & tensors.keys()) if not tensors[name].isfinite().all()]
            if not_finite:  # the next loss ends the training; the checkpoint before stays the last good one
                name = not_finite[0].removeprefix("model/")
                self.loop.tracker.info(
                    f"  {self.loop.name}: no checkpoint of step {progress.step}: {name} is not finite"
                )
            else:
                checkpoints.save(epoch * self.loop.steps_per_epoch + progress.step, tensors, meta)

        comm.run_on_main(write)

    def _last_good(self) -> str | None:
        """The path of the newest checkpoint after it is written; called on every rank."""
        checkpoints = self.checkpoints
        if checkpoints is None:
            return None

        def path() -> str | None:
            checkpoints.wait()
            name = checkpoints.newest()
            return str(checkpoints.folder / name) if name is not None else None

        comm = self.loop.environment.comm
        return comm.broadcast_object(comm.run_on_main(path))

    def _load_checkpoint(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The tensors of the newest checkpoint by section, and its meta."""
        if self.checkpoints is None:
            return None
        comm = self.loop.environment.comm
        loaded = self.checkpoints.load(comm)
        others = [path.name for path in self.checkpoints.other_trainings()] if comm.is_main else []
        if others:
            self.loop.tracker.info(
                f"  {self.loop.name}: {len(others)} checkpoint(s) in {self.checkpoints.folder} are of this training by "
                f"other keys ({others[-1]}): left alone until this stage is finished"
            )
        if loaded is None:
            return None
        tensors, meta = loaded
        sections: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            section, _, key = name.partition("/")
            sections.setdefault(section, {})[key] = tensor
        return sections, meta

    def _load_weights(self, sections: Mapping[str, dict[str, Tensor]], meta: Mapping[str, Any]) -> None:
        """Load weights and history of a checkpoint, before the model is wrapped."""
        self.model.load_state_dict(sections["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(sections["ema"])
        self.best = sections.get("best")
        if "best_figure" in meta:
            self.best_figure = meta["best_figure"]
        elif self.best is not None:  # a checkpoint of an earlier version
            self.best_figure = meta["best_top1"]
        self.history = meta["history"]
        self.updates = meta["updates"]
        if "left" in meta:
            self.final_state = CarriedOptimizerState.from_tensors(sections.get("left", {}), meta["left"])
        self.loop.skipped = int(sum(line.get("skipped_updates", 0) for line in self.history))

    def _resume(
        self, checkpoint: tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None
    ) -> tuple[int, Progress | None]:
        """Load the optimizer's state of a checkpoint; return (epoch, progress within it)."""
        if checkpoint is None:
            if self.carried is not None:
                self.engine.load_state(*self.carried.for_optimizer(self.model, self.engine.optimizer))
            return 0, None
        sections, meta = checkpoint
        self.engine.load_state(sections.get("optimizer", {}), meta["optimizer"])
        progress = Progress(**meta["progress"])
        self.resumed = {"epoch": meta["epoch"], "step": progress.step}
        self._report_resumed(meta, progress)
        return meta["epoch"], progress

    def _report_resumed(self, meta: Mapping[str, Any], progress: Progress) -> None:
        loop = self.loop
        where = f"epoch {meta['epoch']}" + (f", step {progress.step}" if progress.step else "")
        loop.tracker.info(f"  {loop.name}: resumes after {where} of {loop.settings.epochs} epochs")
        if meta["world"] != loop.environment.comm.world:
            loop.tracker.info(
                f"  {loop.name}: from {meta['world']} to {loop.environment.comm.world} process(es): the global batch "
                f"of {loop.settings.batch} and the order of the images stay; sums are added in another order"
            )

    def _report_epoch(self, line: Mapping[str, float]) -> None:
        loop, key = self.loop, f"{self.split}_{self.task.primary}"
        figure = f", {self.split} {self.task.text(line[key])}" if key in line else ""
        loop.tracker.info(
            f"  {loop.name} {line['epoch']:.0f}/{loop.settings.epochs}: loss {line['loss']:.4f}{figure}, "
            f"lr {line['lr']:.4g}, {line['images_per_s']:.0f} images/s"
        )
        loop.tracker.scalars({f"{loop.name}/{k}": v for k, v in line.items() if k != "epoch"}, int(line["epoch"]))
        loop.tracker.log_jsonl({"stage": loop.name, **line})


def broadcast_buffers(model: nn.Module, comm: Communicator) -> None:
    """Broadcast the batch-norm statistics of rank 0, which are evaluated and kept; a collective.

    Args:
        model: its buffers are changed in place on the other ranks.
        comm: all processes.
    """
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(comm.broadcast(buffer))
