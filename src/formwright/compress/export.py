"""A model as a file for another runtime, ONNX Runtime or OpenVINO, checked against the model it came from.

    export(model, "out", format="onnx")
    run = OnnxRunner("out")
    run(input_ids=..., attention_mask=...).logits

Batch and length stay free. Token types are an input where the model tells several apart; a runner that gets none takes
the first, as the model does. Encoders with or without a head and causal language models (without a cache) go through
torch.export; what the file computes is compared with the model on random padded batches before the path is returned.
"""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formwright.compress.structure import EXECUTOR, first_line
from formwright.errors import FormwrightError, require

Format = Literal["onnx", "openvino"]
Precision = Literal["float32", "float16"]

FILES = {"onnx": "model.onnx", "openvino": "model.xml"}
TITLES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
PACKAGES = {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("openvino",)}
TYPES = "token_type_ids"
SHAPES = ((2, 9), (1, 1), (3, 17))  # batch and length of the comparison
ALLOWED = {"float32": 1e-4, "float16": 2e-2}  # largest difference, as a share of the largest output


class Text(nn.Module):
    """The model as a function of ids and mask, and of token types where it tells them apart. The mask is an input: left
    out, padding would be lost for good.
    """

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types, **self.extra)[self.output]


class Image(nn.Module):
    """The model as a function of pixels alone."""

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values)[self.output]


class OnnxRunner:
    """An exported ONNX file, called as the model was."""

    def __init__(self, folder: str | Path) -> None:
        runtime = require("onnxruntime", extra="onnx")
        self.session = runtime.InferenceSession(_file(folder, "onnx"), providers=["CPUExecutionProvider"])
        self.output = self.session.get_outputs()[0].name

    def __call__(self, **batch: Tensor) -> SimpleNamespace:
        given = _inputs([one.name for one in self.session.get_inputs()], batch)
        return SimpleNamespace(**{self.output: torch.from_numpy(self.session.run(None, given)[0])})


class OpenVinoRunner:
    """An exported OpenVINO file, called as the model was."""

    def __init__(self, folder: str | Path) -> None:
        openvino = require("openvino", extra="openvino")
        # Left alone, OpenVINO computes in bfloat16 on processors that can.
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = openvino.Core().compile_model(_file(folder, "openvino"), "CPU", hint)
        self.output = self.compiled.output(0).any_name

    def __call__(self, **batch: Tensor) -> SimpleNamespace:
        given = _inputs([one.any_name for one in self.compiled.inputs], batch)
        return SimpleNamespace(**{self.output: torch.from_numpy(self.compiled(given)[0].copy())})


def _file(folder: str | Path, format: Format) -> str:
    path = Path(folder) / FILES[format]
    if not path.exists():
        raise FormwrightError(f"{folder} holds no {FILES[format]}: write it with export(model, folder, '{format}').")
    return str(path)


def _inputs(names: list[str], batch: dict[str, Tensor]) -> dict:
    if TYPES in names and TYPES not in batch and "input_ids" in batch:
        batch = {**batch, TYPES: torch.zeros_like(batch["input_ids"])}
    if set(names) != set(batch):
        raise FormwrightError(f"The exported model takes {', '.join(names)}, got {', '.join(batch)}.")
    return {name: batch[name].cpu().numpy() for name in names}


def export(
    model: PreTrainedModel, folder: str | Path, format: Format = "onnx", precision: Precision = "float32"
) -> Path:
    """Write the model for another runtime; the model is left in its mode.

    Args:
        model: with `logits` or `last_hidden_state`, on the CPU in float32.
        folder: where model.onnx, or model.xml and model.bin, go.
        precision: of the weights in the file; float16 is OpenVINO's, which computes in float32 all the same.

    Raises:
        FormwrightError: the model cannot be exported, a package is missing, or the outputs differ.
    """
    ready(format)
    if precision not in get_args(Precision):
        raise FormwrightError(f"{precision!r} is no precision of an export: use float32 or float16.")
    if format == "onnx" and precision != "float32":
        raise FormwrightError("ONNX files are written in float32: leave precision out, or use format='openvino'.")
    executor = getattr(model, EXECUTOR, None)
    if executor is not None:
        raise FormwrightError(f"The model is run by {executor.kind}, which no file can hold: export it without.")
    if {one.dtype for one in model.parameters()} != {torch.float32} or model.device.type != "cpu":
        raise FormwrightError("Only a float32 model on the CPU is exported: call model.float().cpu() first.")
    if model.config.is_encoder_decoder:
        raise FormwrightError("Encoder-decoder models are not exported: export their encoder.")
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise FormwrightError(
            f"{type(model).__name__} reads {model.main_input_name}: only texts and images are exported."
        )
    path = Path(folder) / FILES[format]
    path.parent.mkdir(parents=True, exist_ok=True)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _write(model, path, format, precision)
            _compare(model, {"onnx": OnnxRunner, "openvino": OpenVinoRunner}[format](folder), ALLOWED[precision])
    except BaseException as wrong:  # what was not found equal is not left to be used
        for part in (path, path.with_suffix(".bin")):
            part.unlink(missing_ok=True)
        if isinstance(wrong, FormwrightError) or not isinstance(wrong, Exception):
            raise
        raise FormwrightError(
            f"{type(model).__name__} cannot be written for {TITLES[format]} ({type(wrong).__name__}: "
            f"{first_line(wrong)}): take another format, or leave the export out."
        ) from wrong
    finally:
        model.train(training)
    return path


def ready(format: str) -> None:
    """Raise what stands in the way of any export to this format: it is unknown, or a package is missing."""
    if format not in get_args(Format):
        raise FormwrightError(f"{format!r} is no format of an export: use {' or '.join(get_args(Format))}.")
    for package in PACKAGES[format]:
        require(package, extra=format)


def _write(model: PreTrainedModel, path: Path, format: Format, precision: Precision) -> None:
    sample = _batch(model, 2, 9)  # of a batch of 1 the number would be baked in
    with torch.no_grad():
        found = model(**sample)
    output = "logits" if "logits" in found else "last_hidden_state"
    wrapper = (Image if model.main_input_name == "pixel_values" else Text)(model, output).eval()
    axes: dict = {0: torch.export.Dim("batch")}
    if "input_ids" in sample:
        axes[1] = torch.export.Dim("length", max=_longest(model))
    shapes = dict.fromkeys(sample, axes)
    program = torch.export.export(wrapper, tuple(sample.values()), dynamic_shapes=shapes)
    if format == "onnx":
        torch.onnx.export(
            program, f=str(path), dynamo=True, input_names=list(sample), output_names=[output],
            external_data=False, verbose=False,
        )  # fmt: skip
        return
    openvino = require("openvino", extra="openvino")
    made = openvino.convert_model(program)
    for port, name in zip([*made.inputs, *made.outputs], [*sample, output], strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(made, str(path), compress_to_fp16=precision == "float16")


def _longest(model: PreTrainedModel) -> int:
    longest = getattr(model.config, "max_position_embeddings", 4096)
    for name, module in model.named_modules():  # RoBERTa's positions begin after its padding
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest -= module.padding_idx + 1
    return longest


def _batch(model: PreTrainedModel, rows: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * length)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.randn(rows, model.config.num_channels, *size, generator=generator)}
    ids = torch.randint(2, model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, length - length // 3 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if TYPES in inspect.signature(model.forward).parameters and getattr(model.config, "type_vocab_size", 1) > 1:
        batch[TYPES] = torch.randint(0, model.config.type_vocab_size, (rows, length), generator=generator)
    return batch


def _compare(model: PreTrainedModel, run: OnnxRunner | OpenVinoRunner, allowed: float) -> None:
    for rows, length in SHAPES:
        batch = _batch(model, rows, length)
        wanted, got = model(**batch)[run.output], getattr(run(**batch), run.output)
        if got.shape != wanted.shape:
            raise FormwrightError(f"The exported model gives {tuple(got.shape)}, the model {tuple(wanted.shape)}.")
        if "attention_mask" in batch and wanted.ndim == 3:  # what stands at padding means nothing
            wanted, got = (one[batch["attention_mask"].bool()] for one in (wanted, got))
        error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()
        if not error <= allowed:
            raise FormwrightError(
                f"The exported model's outputs differ by {error:.1e} of the largest, above {allowed:.0e}, at batch "
                f"{rows} and length {length}: the file was removed; take the other format."
            )
