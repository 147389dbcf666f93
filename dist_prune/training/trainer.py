"""Train a network on all ranks: objective, averaged weights, masks, checkpoints, which epoch is kept."""

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
from dist_prune.training import deepspeed_engine, optim
from dist_prune.training.acceleration import AcceleratedModel
from dist_prune.training.checkpoints import CheckpointManager
from dist_prune.training.engine import TrainEngine
from dist_prune.training.loop import Loop, Losses, Progress, gradient_averager
from dist_prune.training.loss import TrainingLoss
from dist_prune.training.optimizer_state import CarriedOptimizerState

Judge = Callable[[nn.Module], Mapping[str, float]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Trainer:
    """One training of one bare model.

    Attributes:
        model: trained in place; wrapped for all ranks while ``run`` is at work.
        loop: settings, images, machine.
        judge: figures (``top1`` ...) of a model, called on every rank.
        judged: what the judge looks at ("holdout" or "test"): a prefix of its figures.
        states: checkpoints, or None for none.
        classes: number of classes.
        teacher: the dense network to distil from, or None.
        masks: parameter name -> 0/1 tensor; kept at exact zeros, momentum included.
        losses: (n,) losses of a batch by the wrapped network, in place of the recipe's objective.
        watch: called after each update with its number since the beginning.
        penalty: adds to the gradients that the ranks have averaged, before each update; or None.
        carried: the state of a training before this one, which goes on in it (its rates start over), or None. Where
            weights were averaged, ``model`` has to come with the weights that were trained, not with their averages.
        leaves: whether ``left`` is wanted: the state at the epoch that was kept.
    """

    model: nn.Module
    loop: Loop
    judge: Judge
    judged: str = "test"
    states: CheckpointManager | None = None
    classes: int = 0
    teacher: nn.Module | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Callable[[nn.Module, Batch], Tensor] | None = None
    watch: Callable[[int], None] = lambda step: None
    penalty: Callable[[], None] | None = None
    carried: CarriedOptimizerState | None = None
    leaves: bool = False
    left: CarriedOptimizerState | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_top1: float = -1.0
    _held: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def run(self) -> list[dict[str, float]]:
        """Train to the end, or from the last checkpoint to the end; a line of figures per epoch."""
        loop, settings, environment = self.loop, self.loop.settings, self.loop.environment
        if settings.epochs == 0:
            return []
        sampling.check_batch_size(settings.batch, loop.images_per_epoch, environment.comm.world, loop.name)
        self.model.to(environment.device)
        if self.teacher is not None:
            self.teacher.to(environment.device).eval().requires_grad_(False)
        body = AcceleratedModel(self.model, settings, environment)
        self.ema = ModelEmaV3(self.model, decay=settings.ema, use_warmup=True) if settings.ema else None
        optimizer = optim.create_optimizer(optim.parameter_groups(self.model, settings), settings)
        schedule = optim.LearningRate(optimizer, settings, loop.steps_per_epoch)
        found = self._newest()
        if found is not None:
            self._take(*found)
        elif self.carried is not None and self.ema is not None:
            self.ema.module.load_state_dict(self.carried.tables["ema"])
            self.updates = self.carried.plain["updates"]
        self.engine = self._driven(optimizer, body)
        if self.penalty is not None:
            self.engine.penalty = self.penalty
        epoch, begin = self._resume(found)
        self._mask()
        losses = self._objective()
        loop.save, loop.after, loop.newest = self._save, self._after, self._last_good
        try:
            while not self._finished(epoch):
                self.engine.forward.train()
                figures = loop.run_epoch(epoch, losses, self.engine, schedule, self.watch, begin)
                begin, epoch = None, epoch + 1
                self._end_of_epoch(epoch - 1, figures)
        except PreemptedError:  # on every rank at once; the process ends soon, and the writing thread with it
            self._wait()
            raise
        return self._end(body)

    def _objective(self) -> Losses:
        """Losses of a batch by the wrapped network: its own, or the recipe's objective, which counts hits."""
        forward, own = self.engine.forward, self.losses
        if own is not None:
            return lambda part, epoch, step: own(forward, part)
        objective = TrainingLoss(self.loop.settings, self.classes, self.loop.seed, self.teacher, self._amp)
        self.loop.hits = objective.hits
        return lambda part, epoch, step: objective(forward, part, epoch, step)

    def _driven(self, optimizer: torch.optim.Optimizer, body: AcceleratedModel) -> TrainEngine:
        """Model and optimizer on all ranks: through DeepSpeed, accelerate's DDP, or neither."""
        environment, settings = self.loop.environment, self.loop.settings
        if environment.zero_stage:
            return deepspeed_engine.DeepSpeedEngine(environment, optimizer, self.model, settings)
        sync = (
            gradient_averager(list(self.model.parameters()), environment.comm)
            if environment.accelerator is None
            else None
        )
        forward = body.compiled(environment.wrap(self.model))
        return TrainEngine(environment, optimizer, self.model, forward, sync, scaled=settings.precision == "fp16")

    def _amp(self) -> torch.autocast:
        dtype = DTYPES[self.loop.settings.precision]
        return torch.autocast(self.loop.environment.device.type, dtype=dtype, enabled=dtype is not torch.float32)

    def _after(self) -> None:
        self._mask()
        if self.ema is not None:
            self.updates += 1
            with self.engine.full_weights():
                self.ema.update(self.model, step=self.updates)

    updates: int = 0
    resumed: dict[str, int] | None = None  # where a stopped process had come to

    def _mask(self) -> None:
        if self.masks:
            if not self._held:  # copied to the device once, not after every update
                self._held = {
                    name: mask.to(self.loop.environment.device, torch.float32) for name, mask in self.masks.items()
                }
            self.engine.apply_masks(self._held)

    @property
    def _shown(self) -> nn.Module:
        """The network that is judged and kept: the averaged weights where there are some."""
        return self.ema.module if self.ema is not None else self.model

    def _end_of_epoch(self, number: int, figures: dict[str, float]) -> None:
        loop, settings = self.loop, self.loop.settings
        broadcast_buffers(self.model, loop.environment.comm)
        broadcast_buffers(self._shown, loop.environment.comm)
        line: dict[str, float] = {"epoch": number + 1, **figures}
        if (number + 1) % settings.evaluate_every == 0 or number + 1 == settings.epochs:
            try:
                found = self.judge(self._shown)
            except PreemptedError:
                self._save(number, loop.reached)  # all steps done: the next process begins with the evaluation
                raise
            line |= {f"{self.judged}_{key}": value for key, value in found.items()}
            if settings.selection != "last" and found.get("top1", 0.0) > self.best_top1:
                self.best_top1, line["best"] = found["top1"], 1.0
                self.best = self._weights(self._shown)
                self.left = self._state() if self.leaves else None
        self.history.append(line)
        self._tell(line)
        self._save(number + 1, Progress())

    def _finished(self, epoch: int) -> bool:
        """All epochs done, or no better evaluation for longer than the recipe's patience."""
        patience = self.loop.settings.patience
        judged = [line for line in self.history if f"{self.judged}_top1" in line]
        tops = [line[f"{self.judged}_top1"] for line in judged]
        tired = patience is not None and bool(tops) and len(tops) - 1 - tops.index(max(tops)) >= patience
        return epoch >= self.loop.settings.epochs or tired

    def _end(self, body: AcceleratedModel) -> list[dict[str, float]]:
        """The kept weights into the bare model."""
        self._wait()
        kept = self.best if self.best is not None else self._weights(self._shown)
        if self.leaves and self.best is None:
            self.left = self._state()
        self.engine.close()
        body.restore()
        self.model.load_state_dict(kept)
        return self.history

    def _wait(self) -> None:
        """Until the last checkpoint is on the disk."""
        if self.states is not None:
            self.loop.environment.comm.run_on_main(self.states.wait)

    def _state(self) -> CarriedOptimizerState:
        averaged = self.ema.module if self.ema is not None else None
        return CarriedOptimizerState.capture(
            self.model, self.engine.optimizer, self.engine.state(), averaged, self.updates
        )

    def _weights(self, model: nn.Module) -> dict[str, Tensor]:
        """A copy of a network's whole weights, on the CPU; called on every rank."""
        with self.engine.full_weights():
            return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}

    def _save(self, epoch: int, progress: Progress) -> None:
        if self.states is None:
            return
        checkpoints, comm = self.states, self.loop.environment.comm
        kept, plain = self.engine.state()
        parts = {"model": self._weights(self.model), "optimizer": kept}
        if self.ema is not None:
            parts["ema"] = self.ema.module.state_dict()
        if self.best is not None:
            parts["best"] = self.best
        left, left_plain = self.left.to_file() if self.left is not None else ({}, None)
        parts["left"] = left
        meta = {
            "optimizer": plain, "history": self.history, "best_top1": self.best_top1, "epoch": epoch,
            "progress": asdict(progress), "updates": self.updates, "world": comm.world,
            **({"left": left_plain} if left_plain else {}),
        }  # fmt: skip
        tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        learned = {f"model/{name}" for name, _ in self.model.named_parameters()}

        def write() -> None:
            strange = [name for name in sorted(learned & tensors.keys()) if not tensors[name].isfinite().all()]
            if strange:  # the next loss ends the training; what was saved before stays the last good checkpoint
                name = strange[0].removeprefix("model/")
                self.loop.tracker.info(
                    f"  {self.loop.name}: no checkpoint of step {progress.step}: {name} is not finite"
                )
            else:
                checkpoints.save(epoch * self.loop.steps_per_epoch + progress.step, tensors, meta)

        comm.run_on_main(write)

    def _last_good(self) -> str | None:
        """The place of the newest checkpoint, once it is written; called on every rank."""
        checkpoints = self.states
        if checkpoints is None:
            return None

        def place() -> str | None:
            checkpoints.wait()
            name = checkpoints.newest()
            return str(checkpoints.folder / name) if name is not None else None

        comm = self.loop.environment.comm
        return comm.broadcast_object(comm.run_on_main(place))

    def _newest(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """The newest checkpoint's tensors by part, and its meta."""
        if self.states is None:
            return None
        comm = self.loop.environment.comm
        loaded = self.states.load(comm)
        others = [path.name for path in self.states.other_trainings()] if comm.is_main else []
        if others:
            self.loop.tracker.info(
                f"  {self.loop.name}: {len(others)} checkpoint(s) in {self.states.folder} are of this training by "
                f"other keys ({others[-1]}): left alone until this stage is finished"
            )
        if loaded is None:
            return None
        tensors, meta = loaded
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts.setdefault(part, {})[key] = tensor
        return parts, meta

    def _take(self, parts: Mapping[str, dict[str, Tensor]], meta: Mapping[str, Any]) -> None:
        """Weights and history of a checkpoint, before anything is wrapped around the model."""
        self.model.load_state_dict(parts["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(parts["ema"])
        self.best, self.best_top1, self.history = parts.get("best"), meta["best_top1"], meta["history"]
        self.updates = meta["updates"]
        if "left" in meta:
            self.left = CarriedOptimizerState.from_tensors(parts.get("left", {}), meta["left"])
        self.loop.skipped = int(sum(line.get("skipped_updates", 0) for line in self.history))

    def _resume(self, found: tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None) -> tuple[int, Progress | None]:
        """The optimizer's state of a checkpoint; (epoch, progress inside it)."""
        if found is None:
            if self.carried is not None:
                self.engine.load_state(*self.carried.for_optimizer(self.model, self.engine.optimizer))
            return 0, None
        parts, meta = found
        self.engine.load_state(parts.get("optimizer", {}), meta["optimizer"])
        progress = Progress(**meta["progress"])
        self.resumed = {"epoch": meta["epoch"], "step": progress.step}
        self._say_resumed(meta, progress)
        return meta["epoch"], progress

    def _say_resumed(self, meta: Mapping[str, Any], progress: Progress) -> None:
        loop = self.loop
        where = f"epoch {meta['epoch']}" + (f", step {progress.step}" if progress.step else "")
        loop.tracker.info(f"  {loop.name}: goes on after {where} of {loop.settings.epochs} epochs")
        if meta["world"] != loop.environment.comm.world:
            loop.tracker.info(
                f"  {loop.name}: from {meta['world']} to {loop.environment.comm.world} process(es): the global batch "
                f"of {loop.settings.batch} and the order of the images stay; sums are added in another order"
            )

    def _tell(self, line: Mapping[str, float]) -> None:
        loop, key = self.loop, f"{self.judged}_top1"
        top1 = f", {self.judged} top-1 {line[key]:.2f} %" if key in line else ""
        loop.tracker.info(
            f"  {loop.name} {line['epoch']:.0f}/{loop.settings.epochs}: loss {line['loss']:.4f}{top1}, "
            f"lr {line['lr']:.4g}, {line['images_per_s']:.0f} images/s"
        )
        loop.tracker.scalars({f"{loop.name}/{k}": v for k, v in line.items() if k != "epoch"}, int(line["epoch"]))
        loop.tracker.log_jsonl({"stage": loop.name, **line})


def broadcast_buffers(model: nn.Module, comm: Communicator) -> None:
    """The first rank's batch-norm statistics everywhere: they are what is judged and kept."""
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.copy_(comm.broadcast(buffer))
