"""The training loop on a GPU: as on a CPU, resumed on the other, synchronised norms, half precision."""

import pytest
import torch

from dist_prune.distributed.communicator import Communicator
from tests.gpu.support import trainer_on, weights_of

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
RICH = {"ema": 0.99, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "clip_grad": 1.0, "accumulate": 2}


class Killed(BaseException):
    """Stands for the end of a process: nothing in the package catches it."""


def killed_after(updates: int, device, folder, **settings) -> None:
    trainer, count = trainer_on(device, folder, dtype=torch.float64, save_every_steps=2, **settings), [0]
    after = trainer._after

    def dying() -> None:
        after()
        count[0] += 1
        if count[0] == updates:
            raise Killed

    trainer._after = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    trainer.checkpoints.wait()  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [{}, RICH], ids=["plain", "rich"])
def test_the_weights_are_the_cpus(settings, gpu):
    found = []
    for device in (CPU, gpu):
        trainer = trainer_on(device, dtype=torch.float64, **settings)
        trainer.run()
        found.append(weights_of(trainer))
    assert torch.allclose(*found, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("first", ["gpu", "cpu"])
def test_a_checkpoint_of_one_device_is_resumed_on_the_other(first, gpu, tmp_path):
    devices = (gpu, CPU) if first == "gpu" else (CPU, gpu)
    killed_after(7, devices[0], tmp_path, **RICH)
    again = trainer_on(devices[1], tmp_path, dtype=torch.float64, save_every_steps=2, **RICH)
    again.run()
    assert again.resumed is not None
    whole = trainer_on(CPU, dtype=torch.float64, **RICH)
    whole.run()
    assert torch.allclose(weights_of(again), weights_of(whole), rtol=1e-7, atol=1e-7)


def test_killed_and_resumed_on_a_gpu_is_never_killed(gpu, tmp_path):
    """To the bit, in float32, with the deterministic kernels that the loop is asked for."""
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    try:
        trainer = trainer_on(gpu, tmp_path, save_every_steps=2, **RICH)
        trainer.run()
        whole = weights_of(trainer)
        folder = tmp_path / "killed"
        killed = trainer_on(gpu, folder, save_every_steps=2, **RICH)
        count, after = [0], killed._after

        def dying() -> None:
            after()
            count[0] += 1
            if count[0] == 7:
                raise Killed

        killed._after = dying  # type: ignore[method-assign]
        with pytest.raises(Killed):
            killed.run()
        killed.checkpoints.wait()  # type: ignore[union-attr]
        again = trainer_on(gpu, folder, save_every_steps=2, **RICH)
        again.run()
        assert again.resumed is not None
        assert torch.equal(weights_of(again), whole)
    finally:
        torch.backends.cudnn.deterministic = before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_single_precision_does(precision, gpu):
    """fp16 with its scaler; the losses of the last epoch are close."""
    losses = {}
    for name in ("fp32", precision):
        trainer = trainer_on(gpu, epochs=6, precision=name, channels_last=True)
        losses[name] = trainer.run()[-1]["loss"]
        assert weights_of(trainer).isfinite().all()
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.25)


def test_the_scaler_survives_a_checkpoint(gpu, tmp_path):
    first = trainer_on(gpu, tmp_path, epochs=2, precision="fp16")
    first.run()
    scale = first.engine.state()[1]["scaler"]["scale"]
    again = trainer_on(gpu, tmp_path, epochs=2, precision="fp16")
    again.run()
    assert again.engine.state()[1]["scaler"]["scale"] == scale > 1


def test_a_compiled_network_learns_the_same(card):
    found = []
    for compile_it in (False, True, "reduce-overhead"):
        trainer = trainer_on(card, dtype=torch.float64, compile=compile_it, epochs=1)
        trainer.run()
        found.append(weights_of(trainer))
    assert torch.allclose(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert torch.allclose(found[0], found[2], rtol=1e-6, atol=1e-6)


def synchronised(ranks: Communicator, device: torch.device, sync_bn: bool) -> torch.Tensor:
    trainer = trainer_on(device, ranks=ranks, dtype=torch.float64, epochs=1, sync_bn=sync_bn)
    trainer.run()
    return weights_of(trainer)


def test_synchronised_norms_of_two_ranks_are_those_of_one(card, pair):
    alone = pair.run(1, synchronised, card, False)[0]
    both = pair.run(2, synchronised, card, True)
    apart = pair.run(2, synchronised, card, False)[0]
    assert torch.equal(*both)
    assert torch.allclose(both[0], alone, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(apart, alone, rtol=1e-4, atol=1e-4), "without it each rank has norms of its own"
