"""The machine a run finds itself on: device, ranks, threads; and what accelerate wraps around a model."""

import os
import platform
import socket
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import nn

from dist_prune.distributed import launcher_settings
from dist_prune.distributed.communicator import Communicator, join_all
from dist_prune.distributed.cpu_count import cores
from dist_prune.distributed.rendezvous import check_interfaces, port_in_use_error
from dist_prune.errors import PruneError

PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "accelerate", "tensorboard", "safetensors", "numpy")

BUILD_PATIENCE_S = 900


@dataclass
class DistributedEnvironment:
    """Device and ranks of this process.

    Attributes:
        accelerator: None where no launcher is involved (library use).
        overridden: a line for each setting of the launcher that the recipe overrules.
        claimed: the run directory that these ranks have locked and claimed: nothing is written into another one.
    """

    device: torch.device
    comm: Communicator
    accelerator: Accelerator | None = None
    overridden: tuple[str, ...] = ()
    claimed: Path | None = None

    @classmethod
    def start(
        cls, timeout_s: int = 1800, tf32: bool = False, deterministic: bool = False, join_timeout_s: int = 600
    ) -> "DistributedEnvironment":
        """Join the processes that accelerate, torchrun or a scheduler started.

        What the launcher asks of the training's arithmetic is overridden, and said (see launcher.py).

        Raises:
            PruneError: a process did not come within ``join_timeout_s``, WORLD_SIZE and the processes that found one
                another differ, or the launcher asks for what no recipe can.
        """
        check_launch(os.environ)
        overridden = launcher_settings.override_environment(os.environ)
        rendezvous = join_all(os.environ, join_timeout_s)
        cpu = not torch.cuda.is_available()
        if cpu and "OMP_NUM_THREADS" not in os.environ:
            share = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            os.environ["OMP_NUM_THREADS"] = str(share)
            torch.set_num_threads(share)
        waits = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))
        zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        if zero:
            prepare_deepspeed(cpu)
        if deterministic:  # cuBLAS reads it when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # accelerate knows DeepSpeed on a CPU only when it is not told that there is one
        try:
            accelerator = Accelerator(
                cpu=cpu and not zero, kwargs_handlers=[waits], mixed_precision="no", dynamo_backend="no",
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            )  # fmt: skip
        except RuntimeError as error:
            port_in_use_error(error, os.environ.get("MASTER_PORT"))
            raise
        if zero:
            plugin: Any = accelerator.state.deepspeed_plugin
            overridden += launcher_settings.override_deepspeed_config(plugin.deepspeed_config)
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        if wanted != accelerator.num_processes:
            raise PruneError(_mismatch(f"accelerate sees {accelerator.num_processes} process(es)", wanted))
        device = accelerator.device
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.deterministic = deterministic
        comm = Communicator.of(device=device, rendezvous=rendezvous)
        comm.timeout_s = timeout_s
        comm.connect(timeout_s)
        found = cls(device, comm, accelerator, tuple(overridden))
        if found.comm.is_main:
            for line in found.overridden:
                print(line, file=sys.stderr, flush=True)
        return found

    @classmethod
    def single_process(cls) -> "DistributedEnvironment":
        """One process, no launcher."""
        return cls(torch.device("cuda" if torch.cuda.is_available() else "cpu"), Communicator())

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 where DeepSpeed does not take part."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None) if self.accelerator is not None else None
        return plugin.zero_stage if plugin is not None else 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model ready for training on all ranks (gradients averaged over them)."""
        model = model.to(self.device)
        if self.accelerator is None:
            return model
        if self.comm.world > 1 and not self.zero_stage:  # DDP begins with the first rank's weights and buffers
            self.comm.traffic("weights", sum(map(nbytes, (*model.parameters(), *model.buffers()))))
        # the first backward pass of one-channel convolutions; it says itself that it is no error
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return self.accelerator.prepare(model)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of ``loss``, averaged over ranks for a wrapped model."""
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def check_launch(environment: Mapping[str, str]) -> None:
    """PruneError where a launcher's variables contradict one another before anything waits for a peer."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        given = environment.get(name) or "0"
        if not given.lstrip("-" if name.endswith("RANK") else "").isdigit():  # -1: no rank
            raise PruneError(f"{name} is {given!r}, which is no number; a launcher sets it, or unset it")
    if int(environment.get("MASTER_PORT") or 1) not in range(65536):
        raise PruneError(f"MASTER_PORT is {environment['MASTER_PORT']}, which is no port: 1 to 65535")
    if environment.get("MASTER_ADDR"):  # ranks will meet
        names = [name for _, name in socket.if_nameindex()]
        check_interfaces(environment, names, torch.cuda.is_available())
    wanted = int(environment.get("WORLD_SIZE") or "1")
    if wanted > 1 and not {"RANK", "LOCAL_RANK"} <= environment.keys():
        raise PruneError(_mismatch("this process was given no RANK and LOCAL_RANK, so accelerate would see 1", wanted))


def prepare_deepspeed(cpu: bool) -> None:
    """Let DeepSpeed start: its packages, its device, and no lock that a killed build left behind.

    Raises:
        PruneError: a package is missing.
    """
    missing = [name for name in ("deepspeed", "transformers") if find_spec(name) is None]
    if missing:
        raise PruneError(
            f"this launch config asks for DeepSpeed, but {' and '.join(missing)} is not installed; "
            "pip install -c constraints.txt -e '.[deepspeed]', or launch with another config"
        )
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    unlock(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions"))


def unlock(folder: Path) -> list[Path]:
    """Remove locks of extension builds that were killed: whoever builds next would wait for them for ever.

    Returns the locks that were removed: those older than a build can be.
    """
    stale = [path for path in folder.glob("**/lock") if time.time() - path.stat().st_mtime > BUILD_PATIENCE_S]
    for path in stale:
        print(f"removed {path}: a build of an extension was killed there", file=sys.stderr)
        path.unlink(missing_ok=True)
    return stale


def build_engine() -> str:
    """Compile what DeepSpeed compiles at its first use on a CPU; returns the operation's name."""
    prepare_deepspeed(cpu=True)
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)
    return ShareMemCommBuilder.NAME


def _mismatch(seen: str, wanted: int) -> str:
    return (
        f"WORLD_SIZE is {wanted} but {seen}: each process would do the whole job alone. Start all processes with "
        "'accelerate launch --config_file launch/cpu_2.yaml dist_prune/run.py ...' or 'torchrun --nproc_per_node N "
        "dist_prune/run.py ...', or unset WORLD_SIZE to run one process."
    )


def describe_environment(environment: DistributedEnvironment) -> dict[str, Any]:
    """What a result depends on beside the recipe: for environment.json."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "device": str(environment.device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": environment.comm.world,
        "threads": torch.get_num_threads(),
        "overridden": list(environment.overridden),
        "packages": found,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
