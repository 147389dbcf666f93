"""ONNX and torch.export files of a network, each checked against the network on images. The only module with ONNX.

Files take normalised float32 images (n, C, H, W), with any n, as ``images`` and give ``logits`` (n, classes), or the
network's outputs by their names (see ``tasks.outputs.named_tensors``). Where the task wants it and the network can do
it, H and W are free as well.
"""

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_prune.errors import PruneError, import_problem
from dist_prune.export.fuse_bn import relative_difference
from dist_prune.tasks.outputs import main_output, named_tensors

SUFFIX = {"onnx": ".onnx", "onnx-fp16": ".fp16.onnx", "onnx-int8": ".int8.onnx", "pt2": ".pt2"}
# Largest difference of a logit, relative to the largest logit. An int8 file is checked by its predicted classes.
TOLERANCE = {"onnx": 1e-4, "onnx-fp16": 2e-2, "pt2": 1e-5}
AGREEMENT = 0.9  # share of images on which int8 and the network have to predict the same class
BATCH = 16
MAIN_OUTPUT = "logits"  # name of a network's only output


def write(
    kind: str,
    model: nn.Module,
    images: Tensor,
    file: Path,
    facts: Mapping[str, str],
    calibration: Tensor | None = None,
    any_size: bool = False,
    opset: int | None = None,
) -> dict[str, Any]:
    """Write one file, run it from the disk on images, and compare it with the network.

    Args:
        kind: A key of ``SUFFIX``.
        model: The network in evaluation mode, float32, on the CPU.
        images: (n, C, H, W) normalised float32 images to check the file on.
        file: Path of the file; its folder exists. An existing file is replaced.
        facts: Name -> text for the file's own metadata.
        calibration: (n, C, H, W) images that the ranges of int8 are taken from. None: ``images``.
        any_size: Whether the file should take images of other sizes too. It is also checked on images of twice the
            height, and written for the one size if the network or the format allows no other.
        opset: ONNX operator set of the file; None: torch's default.

    Returns:
        ``difference`` (the largest of any output, relative to its largest value), ``same_class`` (share of images, of
        dense outputs share of pixels), ``images`` (their number), ``outputs`` (their names), ``bytes`` (of the file),
        ``any_size`` (whether it takes images of other sizes); of ONNX files ``opset``.

    Raises:
        PruneError: The network cannot be written in this format, or the file's outputs differ from the network's. No
            file is kept then.
    """
    flat = _Flat(model)
    with torch.no_grad():
        flat(images[:1])  # its outputs get their names
    calibration = images if calibration is None else calibration
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        temporary = Path(folder) / file.name
        free = any_size and _write_free(kind, flat, images, calibration, temporary, facts, opset)
        try:
            if not free:
                with _silence():
                    _WRITERS[kind](flat, _Example(images[:2], opset=opset), calibration, temporary, facts)
        except PruneError:
            raise
        except ImportError as error:
            raise import_problem(error, f"{kind} needs onnx, onnxruntime and onnxscript", "onnx") from error
        except Exception as error:  # any error of a tracer that cannot follow the network
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            raise PruneError(f"{kind}: this network cannot be written so: {type(error).__name__}: {reason}") from error
        result = compare(flat, runner(kind, temporary), images)
        if _deviates(kind, result):
            raise PruneError(
                f"{kind}: the file answers otherwise than the network: logits differ by {result['difference']:.2g} of "
                f"the largest, {result['same_class']:.1%} of the classes on {len(images)} images are the same. It was "
                "not kept."
            )
        result["outputs"], result["any_size"] = flat.names, free
        if kind != "pt2":
            result["opset"] = _opset_of(temporary)
        result["bytes"] = temporary.stat().st_size
        os.replace(temporary, file)
    return result


@dataclass(frozen=True)
class _Example:
    """What a file is traced with.

    Attributes:
        images: (2, C, H, W).
        free: Whether height and width may change.
        opset: ONNX operator set; None: torch's default.
    """

    images: Tensor
    free: bool = False
    opset: int | None = None


def _write_free(
    kind: str,
    flat: "_Flat",
    images: Tensor,
    calibration: Tensor,
    file: Path,
    facts: Mapping[str, str],
    opset: int | None,
) -> bool:
    """Write a file for images of any size; whether it answers like the network at two sizes."""
    wide, high = (functional.interpolate(images[:2], scale_factor=scale) for scale in ((1, 2), (2, 1)))
    try:
        with torch.no_grad():
            flat(wide)  # a width of its own: traced with squares, a file might take squares alone
        with _silence():
            _WRITERS[kind](flat, _Example(wide, True, opset), calibration, file, facts)
        return not _deviates(kind, compare(flat, runner(kind, file), high))
    except Exception:  # the network, the tracer or the format wants one size
        return False


def _deviates(kind: str, result: Mapping[str, Any]) -> bool:
    """Whether a file answers otherwise than its network."""
    return result["difference"] > TOLERANCE[kind] if kind in TOLERANCE else result["same_class"] < AGREEMENT


@torch.no_grad()
def compare(model: nn.Module, answer: Callable[[Tensor], Any], images: Tensor) -> dict[str, Any]:
    """Compare a network with a file on the same images, in batches and a last single image.

    Args:
        model: The network in evaluation mode; it gives a tensor or a tuple of tensors.
        answer: The file as a function of the same form (see ``runner``).
        images: (n, C, H, W) normalised float32 images, n >= 1.

    Returns:
        ``images``, ``difference`` and ``same_class``, see ``write``.
    """
    batches = [*images[:-1].split(BATCH), images[-1:]] if len(images) > 1 else [images]
    expected, answers = (
        [torch.cat(parts) for parts in zip(*(_tuple(function(batch)) for batch in batches), strict=True)]
        for function in (model, answer)
    )
    return {
        "images": len(images),
        "difference": relative_difference(expected, answers),
        "same_class": float((expected[0].argmax(1) == answers[0].argmax(1)).float().mean()),
    }


class _Flat(nn.Module):
    """A network whose outputs are one tensor, or a tuple of tensors, the main output first.

    Attributes:
        names: of the tensors, once it has run.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.names: list[str] = []
        self.eval()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.model(images)
        if isinstance(outputs, Tensor):
            self.names = [MAIN_OUTPUT]
            return outputs
        main = main_output(outputs)
        pairs = sorted(named_tensors(outputs, MAIN_OUTPUT), key=lambda pair: pair[1] is not main)
        self.names = [name for name, _ in pairs]
        return tuple(tensor for _, tensor in pairs)


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def runner(kind: str, file: Path) -> Callable[[Tensor], Any]:
    """A file as a function from images to logits, or to a tuple of outputs, in the runtime that it is made for.

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

    def answer(images: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]
        return found[0] if len(found) == 1 else tuple(found)

    return answer


def _export_program(model: nn.Module, example: _Example) -> torch.export.ExportedProgram:
    images = example.images
    images = images if len(images) > 1 else images.repeat(2, 1, 1, 1)  # one image would fix the batch to 1
    dims: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if example.free:
        dims |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        return torch.export.export(model, (images.contiguous(),), dynamic_shapes=(dims,))


def _write_pt2(model: nn.Module, example: _Example, _: Tensor, file: Path, facts: Mapping[str, str]) -> None:
    torch.export.save(_export_program(model, example), file, extra_files={"facts.json": json.dumps(dict(facts))})


def _write_onnx(model: nn.Module, example: _Example, _: Tensor, file: Path, facts: Mapping[str, str]) -> None:
    import onnx

    exported = _export_program(model, example)
    names = model.names if isinstance(model, _Flat) else [MAIN_OUTPUT]  # known once it has run
    program = torch.onnx.export(
        exported, dynamo=True, input_names=["images"], output_names=names, verbose=False, opset_version=example.opset
    )
    assert program is not None
    program.save(str(file), external_data=False)
    body = onnx.load(str(file))
    if example.opset is not None and _opset(body) != example.opset:
        raise PruneError(
            f"--opset: this network's operations cannot be written in operator set {example.opset}; torch left it at "
            f"{_opset(body)}. Name a later one, or leave --opset out"
        )
    _name_dimensions(body.graph)
    _set_metadata(body, file, facts)


def _name_dimensions(graph: Any) -> None:
    """Give the free dimensions of the images, and those that are equal to one of them, their names."""
    own = ("batch", "channels", "height", "width")
    dimensions = graph.input[0].type.tensor_type.shape.dim
    names = {found.dim_param: name for found, name in zip(dimensions, own, strict=True) if found.dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]


def _write_fp16(model: nn.Module, example: _Example, calibration: Tensor, file: Path, facts: Mapping[str, str]) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    _write_onnx(model, example, calibration, file, facts)
    _set_metadata(convert_float_to_float16(onnx.load(str(file)), keep_io_types=True), file, facts)


def _write_int8(model: nn.Module, example: _Example, calibration: Tensor, file: Path, facts: Mapping[str, str]) -> None:
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
    onnx.helper.set_model_props(body, {**facts, "opset": str(_opset(body))})
    onnx.save(body, str(file))


def _opset(body: Any) -> int:
    """The version of ONNX's own operators that a model uses."""
    return next(entry.version for entry in body.opset_import if entry.domain in ("", "ai.onnx"))


def _opset_of(file: Path) -> int:
    import onnx

    return _opset(onnx.load(str(file)))


def newest_opset() -> int:
    """The newest operator set that the installed packages can write.

    Raises:
        PruneError: onnx is missing.
    """
    try:
        import onnx
        from torch.onnx._constants import ONNX_MAX_OPSET
    except ImportError as error:
        raise import_problem(error, "--opset needs onnx", "onnx") from error
    return min(ONNX_MAX_OPSET, onnx.defs.onnx_opset_version())


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


_WRITERS: dict[str, Callable[[nn.Module, _Example, Tensor, Path, Mapping[str, str]], None]] = {
    "onnx": _write_onnx, "onnx-fp16": _write_fp16, "onnx-int8": _write_int8, "pt2": _write_pt2,
}  # fmt: skip
