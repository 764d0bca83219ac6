"""`formwright compress`: a trained model in, the fastest or smallest one within the allowed loss out."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from formwright.build import split_list


class Task(StrEnum):
    text_classification = "text-classification"
    image_classification = "image-classification"
    causal_lm = "causal-lm"
    sentence_embedding = "sentence-embedding"


def compress(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face model with its tokenizer or image processor.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command goes on where a stopped one was.")],
    task: Annotated[Task, typer.Option(help="What the model is for.")] = Task.text_classification,
    data: Annotated[
        str | None,
        typer.Option(
            help="Your rows: a CSV, JSON, Parquet or text file, a folder of images, or the name of a task; without it "
            "the data that comes with the kind of task."
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts, where its name does not tell.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels, where its name does not tell.")] = None,
    max_drop: Annotated[
        float, typer.Option(help="Loss allowed: 0.01 is one point of accuracy, or one per cent of perplexity.")
    ] = 0.01,
    target: Annotated[
        str, typer.Option(help="latency=0.5, size=0.25 or params=0.5: the share of the original's wished for.")
    ] = "latency=0.5",
    budget: Annotated[str, typer.Option(help="30m, 90s, 2h, or a number of trials.")] = "30m",
    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe to run in place of a search.")] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            help="onnx,openvino; of classifiers onnx-int8,openvino-int8 too: write the chosen model for these runtimes "
            "as well. May be repeated."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of splits, training and search.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of sentences.")] = False,
) -> None:
    """Make a Hugging Face model smaller or faster within the accuracy you allow.

    Example: formwright compress my-model --data reviews.csv --max-drop 0.01 --target latency=0.5 --out runs/small

    Exit status: 0 done, 1 the choice lost more than allowed on test rows, 2 bad input, 130 interrupted.
    """
    import json

    from formwright.bench.compress import compress as run

    command = shlex.join(["formwright", *sys.argv[1:]])
    try:
        result = run(
            model,
            recipe,
            data,
            task=task.value,
            out=out,
            max_drop=max_drop,
            target=target,
            budget=budget,
            text=text,
            label=label,
            export=[format for one in export or () for format in split_list(one)],
            seed=seed,
            command=command,
            told=lambda sentence: typer.echo(sentence, err=True),
        )
    except KeyboardInterrupt as stopped:
        typer.echo(f"Stopped. What was finished is in {out}; the same command goes on from there:", err=True)
        typer.echo(f"  {command}", err=True)
        raise typer.Exit(130) from stopped
    if as_json:
        values = {
            "folder": str(result.folder),
            "recipe": None if result.recipe is None else result.recipe.model_dump(),
            "met": result.met,
            "confirmed": result.confirmed,
            "test": result.test,
            "exports": {format: None if path is None else str(path) for format, path in result.exports.items()},
            "sentences": result.sentences,
            "report": str(result.report),
        }
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        for sentence in result.sentences:
            typer.echo(sentence)
        typer.echo(f"Model: {result.folder}")
        typer.echo(f"Report: {result.report}")
    if not result.confirmed:
        raise typer.Exit(1)
