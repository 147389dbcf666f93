"""ONNX and torch.export files of a network, each checked against the network on images. The only module with ONNX.

Files take normalised float32 images (n, C, H, W), with any n, as ``images`` and give ``logits`` (n, classes).
"""

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_prune.errors import PruneError
from dist_prune.export.fuse_bn import relative_difference

SUFFIX = {"onnx": ".onnx", "onnx-fp16": ".fp16.onnx", "onnx-int8": ".int8.onnx", "pt2": ".pt2"}
# Largest difference of a logit, relative to the largest logit. An int8 file is checked by its predicted classes.
TOLERANCE = {"onnx": 1e-4, "onnx-fp16": 2e-2, "pt2": 1e-5}
AGREEMENT = 0.9  # share of images on which int8 and the network have to predict the same class
BATCH = 16


def write(
    kind: str, model: nn.Module, images: Tensor, file: Path, facts: Mapping[str, str], calibration: Tensor | None = None
) -> dict[str, Any]:
    """Write one file, run it from the disk on images, and compare it with the network.

    Args:
        kind: A key of ``SUFFIX``.
        model: The network in evaluation mode, float32, on the CPU.
        images: (n, C, H, W) normalised float32 images to check the file on.
        file: Path of the file; its folder exists. An existing file is replaced.
        facts: Name -> text for the file's own metadata.
        calibration: (n, C, H, W) images that the ranges of int8 are taken from. None: ``images``.

    Returns:
        ``difference`` (the largest, relative to the largest logit), ``same_class`` (share of images), ``images`` (their
        number), ``bytes`` (of the file).

    Raises:
        PruneError: The network cannot be written in this format, or the file's outputs differ from the network's. No
            file is kept then.
    """
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        temporary = Path(folder) / file.name
        try:
            with _silence():
                _WRITERS[kind](model, images[:2], calibration if calibration is not None else images, temporary, facts)
        except ImportError as error:
            raise PruneError(f"{kind}: {error.name} is missing; pip install 'dist-prune[onnx]' brings it") from error
        except Exception as error:  # any error of a tracer that cannot follow the network
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise PruneError(f"{kind}: this network cannot be written so: {type(error).__name__}: {reason}") from error
        result = compare(model, runner(kind, temporary), images)
        deviates = result["difference"] > TOLERANCE[kind] if kind in TOLERANCE else result["same_class"] < AGREEMENT
        if deviates:
            raise PruneError(
                f"{kind}: the file answers otherwise than the network: logits differ by {result['difference']:.2g} of "
                f"the largest, {result['same_class']:.1%} of {len(images)} images get the same class. It was not kept."
            )
        result["bytes"] = temporary.stat().st_size
        os.replace(temporary, file)
    return result


@torch.no_grad()
def compare(model: nn.Module, answer: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Any]:
    """Compare a network with a file on the same images, in batches and a last single image.

    Args:
        model: The network in evaluation mode.
        answer: The file as a function (see ``runner``).
        images: (n, C, H, W) normalised float32 images, n >= 1.

    Returns:
        ``images``, ``difference`` and ``same_class``, see ``write``.
    """
    batches = [*images[:-1].split(BATCH), images[-1:]] if len(images) > 1 else [images]
    expected, answers = (torch.cat([function(batch) for batch in batches]) for function in (model, answer))
    return {
        "images": len(images),
        "difference": relative_difference(expected, answers),
        "same_class": float((expected.argmax(1) == answers.argmax(1)).float().mean()),
    }


def runner(kind: str, file: Path) -> Callable[[Tensor], Tensor]:
    """A file as a function from images to logits, in the runtime that it is made for.

    Args:
        kind: A key of ``SUFFIX``.
        file: A file of that kind.
    """
    if kind == "pt2":
        with _silence():
            return torch.export.load(file).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _export_program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    example = example if len(example) > 1 else example.repeat(2, 1, 1, 1)  # one image would fix the batch to 1
    dims = ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        return torch.export.export(model, (example.contiguous(),), dynamic_shapes=dims)


def _write_pt2(model: nn.Module, example: Tensor, _: Tensor, file: Path, facts: Mapping[str, str]) -> None:
    torch.export.save(_export_program(model, example), file, extra_files={"facts.json": json.dumps(dict(facts))})


def _write_onnx(model: nn.Module, example: Tensor, _: Tensor, file: Path, facts: Mapping[str, str]) -> None:
    import onnx

    program = torch.onnx.export(
        _export_program(model, example), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
    )
    assert program is not None
    program.save(str(file), external_data=False)
    _set_metadata(onnx.load(str(file)), file, facts)


def _write_fp16(model: nn.Module, example: Tensor, calibration: Tensor, file: Path, facts: Mapping[str, str]) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    _write_onnx(model, example, calibration, file, facts)
    _set_metadata(convert_float_to_float16(onnx.load(str(file)), keep_io_types=True), file, facts)


def _write_int8(model: nn.Module, example: Tensor, calibration: Tensor, file: Path, facts: Mapping[str, str]) -> None:
    """Static quantisation of weights (per channel) and activations, as onnxruntime does it."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.parts: Iterator[Tensor] = iter(calibration.split(BATCH))

        def get_next(self) -> Any:
            batch = next(self.parts, None)
            return None if batch is None else {"images": batch.numpy()}

    plain, ready = file.with_suffix(".plain"), file.with_suffix(".ready")
    _write_onnx(model, example, calibration, plain, facts)
    quant_pre_process(str(plain), str(ready))
    quantize_static(
        str(ready), str(file), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
    )  # fmt: skip
    _set_metadata(onnx.load(str(file)), file, facts)


def _set_metadata(body: Any, file: Path, facts: Mapping[str, str]) -> None:
    import onnx

    del body.metadata_props[:]
    onnx.helper.set_model_props(body, dict(facts))
    onnx.save(body, str(file))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the exporters' warnings about their own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


_WRITERS: dict[str, Callable[[nn.Module, Tensor, Tensor, Path, Mapping[str, str]], None]] = {
    "onnx": _write_onnx, "onnx-fp16": _write_fp16, "onnx-int8": _write_int8, "pt2": _write_pt2,
}  # fmt: skip
