"""A model as an int8 file for ONNX Runtime or OpenVINO: calibrated on training rows, and checked by its score.

    export_int8(model, "out", data, format="onnx").path
    run = OnnxRunner("out")

The float32 file is written and compared with the model first (export.py). Then the runtime's own tools put whole
numbers around its products with weights: weights signed, by output channel and symmetric, so that pruned ones stay
exactly zero; activations unsigned, by tensor, their ranges from training rows. What the file scores is read on the
validation rows, and a file that loses more than allowed is not left behind.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formwright.compress.export import FILES, TITLES, TYPES, Format, OnnxRunner, OpenVinoRunner, export, ready
from formwright.compress.modifier import Data, Kind
from formwright.errors import FormwrightError, require
from formwright.training import evaluate

Feed = dict[str, np.ndarray]
KINDS = ("text-classification", "image-classification")
INT8: dict[str, Format] = {f"{format}-int8": format for format in get_args(Format)}  # what `--export` calls them
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An int8 file.

    Args:
        path: of it.
        score: the file's on validation rows, or on test rows where there are none; that of the model beside it.
        bytes: of the file, and of the same in float32.
    """

    path: Path
    score: tuple[float, float]
    bytes: tuple[int, int]


class Scored(nn.Module):
    """A file as a model that can be evaluated."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # the CPU

    def forward(self, **batch: Tensor) -> Any:
        return self.run(**batch)


def export_int8(
    model: PreTrainedModel,
    folder: str | Path,
    data: Data,
    format: Format = "onnx",
    *,
    samples: int = 128,
    max_drop: float = 0.01,
) -> Exported:
    """Write a classifier in int8 for another runtime; the model is left as it is.

    Args:
        model: in float32 on the CPU, pruned or not.
        folder: where model.onnx, or model.xml and model.bin, go.
        data: rows to calibrate on and to score.
        samples: calibration rows.
        max_drop: how much of its accuracy the file may lose; 0.01 is one point.

    Raises:
        FormwrightError: the model cannot be exported, a package is missing, or the file loses more than allowed.
    """
    ready_int8(format, data.kind)
    if samples < 1 or max_drop < 0:
        raise FormwrightError(f"samples must be at least 1 and max_drop at least 0, got {samples} and {max_drop:g}.")
    folder = Path(folder)
    path = folder / FILES[format]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        whole = export(model, place, format)
        before = _size(whole)
        write = {"onnx": write_onnx, "openvino": write_openvino}[format]
        try:
            with _quiet():
                write(whole, path, feeds(model, data, samples))
            run = {"onnx": OnnxRunner, "openvino": OpenVinoRunner}[format](folder)
            split = "test" if data.task.validation is None else "validation"
            scores = [next(iter(evaluate(one, data.task, split).metrics.values())) for one in (Scored(run), model)]
            if scores[1] - scores[0] > max_drop:
                raise FormwrightError(
                    f"In int8 for {TITLES[format]} the score is {scores[0]:.4f} and not the model's {scores[1]:.4f}, a "
                    f"loss above {max_drop:g}: the file was removed; take more samples, or export it in float32."
                )
        except BaseException:
            for part in (path, path.with_suffix(".bin")):
                part.unlink(missing_ok=True)
            raise
    return Exported(path=path, score=(scores[0], scores[1]), bytes=(_size(path), before))


def ready_int8(format: Format, kind: Kind) -> None:
    """Raise what stands in the way of any int8 file of this format and kind."""
    if kind not in KINDS:
        raise FormwrightError(f"An int8 file is checked by its accuracy, and {kind} has none: export it in float32.")
    ready(format)
    if format == "openvino":
        require("nncf", extra="openvino")


def feeds(model: PreTrainedModel, data: Data, samples: int) -> Iterator[Feed]:
    """Calibration batches as the file takes them."""
    left = samples
    for batch in data.batches(-(-samples // BATCH), batch_size=min(BATCH, samples)):
        given = {name: value[:left] for name, value in batch.items()}
        left -= BATCH
        if TYPES not in given and getattr(model.config, "type_vocab_size", 1) > 1 and "input_ids" in given:
            given[TYPES] = torch.zeros_like(given["input_ids"])
        yield {name: value.cpu().numpy() for name, value in given.items()}


def write_onnx(whole: Path, path: Path, batches: Iterator[Feed]) -> None:
    """By ONNX Runtime's static quantisation, with a pair of operators around every product (QDQ)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> Feed | None:
            return next(batches, None)

    quantize_static(
        str(whole),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True, "ActivationSymmetric": False},
    )


def write_openvino(whole: Path, path: Path, batches: Iterator[Feed]) -> None:
    """By NNCF's quantisation after training, with its settings for Transformers."""
    nncf, openvino = require("nncf", extra="openvino"), require("openvino", extra="openvino")
    given = list(batches)
    made = nncf.quantize(
        openvino.Core().read_model(str(whole)),
        nncf.Dataset(given),
        subset_size=len(given),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    openvino.save_model(made, str(path), compress_to_fp16=False)


def _size(path: Path) -> int:
    return sum(part.stat().st_size for part in {path, path.with_suffix(".bin")} if part.exists())


@contextmanager
def _quiet() -> Iterator[None]:
    """The tools' notes are for people who watch them alone."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
