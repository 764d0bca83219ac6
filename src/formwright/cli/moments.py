"""`formwright moments`: variances of a Transformer's layers and gradients, predicted and measured."""

import ast
import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from formwright.errors import FormwrightError


def moments(
    fields: Annotated[
        list[str] | None,
        typer.Argument(help="FIELD=VALUE of the configuration: block=post init=xavier num_hidden_layers=24 ..."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Folder of a saved model whose configuration to start from; its weights are not read."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts, or images.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a text.")] = 64,
    seed: Annotated[int, typer.Option(help="Of weights, texts and dropout.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how large signals and gradients are at every layer of a fresh model, by formula and in one training step.

    Example: formwright moments block=post init=xavier num_hidden_layers=24 feedforward=relu

    The numbers are mean squares; r is the correlation of two tokens of a text. Ids are drawn by Zipf's law.
    """
    import torch

    from formwright.models.transformer import TransformerConfig, TransformerModel
    from formwright.theory.deepscalelm import compare, errors, texts
    from formwright.training import seeded

    known = {} if config is None else TransformerConfig.from_pretrained(config).to_dict()
    made = TransformerConfig(**known | _fields(fields or [], TransformerConfig))
    seeded(seed)
    model = TransformerModel(made)
    generator = torch.Generator().manual_seed(seed)
    if made.image_size:
        shape = (batch, made.num_channels, made.image_size, made.image_size)
        inputs = {"pixel_values": torch.randn(shape, generator=generator)}
    else:
        inputs = {"input_ids": texts(made.vocab_size, batch=batch, length=length, seed=seed)}
    if made.is_encoder_decoder:
        inputs["decoder_input_ids"] = texts(made.vocab_size, batch=batch, length=length, seed=seed + 1)
    rows = compare(model, inputs, seed=seed)
    if as_json:
        lines = [{**dataclasses.asdict(row), "error": row.error} for row in rows]
        typer.echo(json.dumps({"rows": lines, "errors": errors(rows)}, indent=2))
        return
    typer.echo("stack\tlayer\twhat\tpredicted\tmeasured\terror\tr predicted\tr measured")
    for row in rows:
        sizes = f"{row.predicted.second:.4g}\t{row.measured.second:.4g}\t{row.error:.1%}"
        shares = f"{row.predicted.correlation:.2f}\t{row.measured.correlation:.2f}"
        typer.echo(f"{row.stack}\t{row.layer}\t{row.what}\t{sizes}\t{shares}")
    typer.echo("error: " + ", ".join(f"{name} {value:.1%}" for name, value in errors(rows).items()))


def _fields(given: list[str], config: type) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    found: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or name not in defaults:
            raise FormwrightError(
                f"{item!r} sets no field of a configuration: write FIELD=VALUE, block=post or num_hidden_layers=24."
            )
        words = {"true": True, "false": False} | ({"none": None} if defaults[name] is None else {})
        try:
            found[name] = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found
