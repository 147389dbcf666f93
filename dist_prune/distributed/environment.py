"""The environment of a run: device, ranks, threads, and accelerate's or DeepSpeed's wrapper around a model."""

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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_prune import plugins
from dist_prune.distributed import launcher_settings
from dist_prune.distributed.communicator import Communicator, join_all
from dist_prune.distributed.cpu_count import cores
from dist_prune.distributed.rendezvous import check_interfaces, port_in_use_error
from dist_prune.distributed.run_program import run_program
from dist_prune.errors import PruneError

if TYPE_CHECKING:  # imported when ranks start: commands that start none need not wait for it
    from accelerate import Accelerator

PACKAGES = ("torch", "torchvision", "timm", "torch-pruning", "accelerate", "tensorboard", "safetensors", "numpy")

BUILD_PATIENCE_S = 900  # seconds; no build of an extension takes longer


@dataclass
class DistributedEnvironment:
    """Device and ranks of this process.

    Attributes:
        device: the device of this rank's networks and batches.
        comm: the processes of the run.
        accelerator: None if the library is used without ``start``.
        overridden: a line for each setting of the launcher that the recipe overrides.
        claimed: the run directory that these ranks have locked: nothing is written into another one.
    """

    device: torch.device
    comm: Communicator
    accelerator: "Accelerator | None" = None
    overridden: tuple[str, ...] = ()
    claimed: Path | None = None

    @classmethod
    def start(
        cls, timeout_s: int = 1800, tf32: bool = False, deterministic: bool = False, join_timeout_s: int = 600
    ) -> "DistributedEnvironment":
        """Join the processes that accelerate, torchrun or a scheduler started; every one of them calls it, once.

        Settings of the launcher that would change the training's arithmetic are overridden, and rank 0 prints a line
        for each (see launcher_settings.py).

        Args:
            timeout_s: seconds for which a rank waits in a collective for the others (``cluster.timeout_s``).
            tf32: whether matrix products and convolutions on a GPU may use TF32.
            deterministic: whether torch may use deterministic algorithms only.
            join_timeout_s: seconds for which a rank waits for the others to start (``cluster.join_timeout_s``).

        Raises:
            PruneError: a process did not come within ``join_timeout_s``, WORLD_SIZE and the number of processes that
                met differ, or the launcher asks for something that no recipe can describe.
            PreemptedError: asked to stop while it waited for the others.
        """
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

        check_launch(os.environ)
        overridden = launcher_settings.override_environment(os.environ)
        rendezvous = join_all(os.environ, join_timeout_s)
        cpu = not torch.cuda.is_available()
        if cpu and "OMP_NUM_THREADS" not in os.environ:
            share = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            os.environ["OMP_NUM_THREADS"] = str(share)
            torch.set_num_threads(share)
        timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        if deepspeed:
            prepare_deepspeed(cpu)
        if deterministic:  # cuBLAS reads the variable when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # accelerate runs DeepSpeed on a CPU only if cpu is not set
        try:
            accelerator = Accelerator(
                cpu=cpu and not deepspeed, kwargs_handlers=[timeout], mixed_precision="no", dynamo_backend="no",
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            )  # fmt: skip
        except RuntimeError as error:
            port_in_use_error(error, os.environ.get("MASTER_PORT"))
            raise
        if deepspeed:
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
        environment = cls(device, comm, accelerator, tuple(overridden))
        if environment.comm.is_main:
            for line in environment.overridden:
                print(line, file=sys.stderr, flush=True)
        return environment

    @classmethod
    def single_process(cls) -> "DistributedEnvironment":
        """The environment of a single process without a launcher: the first GPU, else the CPU."""
        return cls(torch.device("cuda" if torch.cuda.is_available() else "cpu"), Communicator())

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 1 to 3; 0 without DeepSpeed."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None) if self.accelerator is not None else None
        return plugin.zero_stage if plugin is not None else 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and wrap it for training on all ranks; every rank calls it.

        Args:
            model: a bare network; its parameters stay the same objects.

        Returns:
            The module for the forward pass: accelerate's DDP averages its gradients over the ranks and starts from the
            weights of rank 0. Without a launcher, the model itself.
        """
        model = model.to(self.device)
        if self.accelerator is None:
            return model
        if self.comm.world > 1 and not self.zero_stage:  # DDP broadcasts the weights and buffers of rank 0
            self.comm.traffic("weights", sum(map(nbytes, (*model.parameters(), *model.buffers()))))
        # warned in the first backward pass of one-channel convolutions; the text itself says that it is no error
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return self.accelerator.prepare(model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to the parameters; for a wrapped model they are averaged over the ranks.

        Args:
            loss: () tensor.
        """
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)


def nbytes(tensor: torch.Tensor) -> int:
    """The size of a tensor's values in bytes."""
    return tensor.numel() * tensor.element_size()


def check_launch(environment: Mapping[str, str]) -> None:
    """Check a launcher's variables before anything waits for another process.

    Args:
        environment: the environment's variables.

    Raises:
        PruneError: a variable is no number or no port, WORLD_SIZE is set without RANK and LOCAL_RANK, or a network
            interface does not exist.
    """
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = environment.get(name) or "0"
        if not value.lstrip("-" if name.endswith("RANK") else "").isdigit():  # -1: no rank
            raise PruneError(f"{name} is {value!r}, which is no number; a launcher sets it, or unset it")
    if int(environment.get("MASTER_PORT") or 1) not in range(65536):
        raise PruneError(f"MASTER_PORT is {environment['MASTER_PORT']}, which is no port: 1 to 65535")
    if environment.get("MASTER_ADDR"):  # there will be a rendezvous
        names = [name for _, name in socket.if_nameindex()]
        check_interfaces(environment, names, torch.cuda.is_available())
    wanted = int(environment.get("WORLD_SIZE") or "1")
    if wanted > 1 and not {"RANK", "LOCAL_RANK"} <= environment.keys():
        raise PruneError(_mismatch("this process was given no RANK and LOCAL_RANK, so accelerate would see 1", wanted))


def prepare_deepspeed(cpu: bool) -> None:
    """Prepare the start of DeepSpeed: check its packages, set its device, remove stale locks of extension builds.

    Args:
        cpu: whether the ranks compute on CPUs.

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
    """Remove the locks of extension builds that were killed: the next build would wait for them forever.

    Args:
        folder: torch's folder of extensions.

    Returns:
        The locks that were removed, those older than ``BUILD_PATIENCE_S`` seconds.
    """
    stale = [path for path in folder.glob("**/lock") if time.time() - path.stat().st_mtime > BUILD_PATIENCE_S]
    for path in stale:
        print(f"removed {path}: a build of an extension was killed there", file=sys.stderr)
        path.unlink(missing_ok=True)
    return stale


def build_engine() -> str:
    """Compile the extension that DeepSpeed needs on a CPU, ahead of its first use; return the extension's name."""
    prepare_deepspeed(cpu=True)
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)
    return ShareMemCommBuilder.NAME


def _mismatch(seen: str, wanted: int) -> str:
    program = run_program()
    return (
        f"WORLD_SIZE is {wanted} but {seen}: each process would do the whole job alone. Start all processes with "
        f"'accelerate launch --num_processes N {program} ...' or 'torchrun --nproc_per_node N {program} ...', "
        "or unset WORLD_SIZE to run one process."
    )


def describe_environment(environment: DistributedEnvironment) -> dict[str, Any]:
    """The content of environment.json: versions, processor, device and ranks, on which a result depends too."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": cores(),
        "device": str(environment.device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": environment.comm.world,
        "threads": torch.get_num_threads(),
        "overridden": list(environment.overridden),
        "packages": versions,
        "plugins": plugins.describe(),
    }


def processor_name() -> str:
    """The name of this machine's processor, as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
