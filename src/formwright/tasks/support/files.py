"""Read a user's files, or say in one sentence why not."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formwright.errors import FormwrightError, require

TABLES = (".csv", ".tsv", ".parquet", ".jsonl", ".json")


def folder(data: Path | None, name: str, task: str) -> Path:
    """The folder `name` of the data folder.

    Raises:
        FormwrightError: no data folder was given, or it holds no such folder.
    """
    if data is None:
        raise FormwrightError(
            f"The task {task} reads the folder {name} of a data folder: name that folder with --data DIR or in "
            "$FORMWRIGHT_DATA."
        )
    if not (data / name).is_dir():
        raise FormwrightError(f"The data folder {data} holds no folder {name}, which the task {task} reads.")
    return data / name


def existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise FormwrightError(f"There is no file {path}.")
    return path


def read_bytes(path: str | Path) -> bytes:
    path = existing(path)
    if path.is_dir():
        raise FormwrightError(f"{path} is a folder, but one file of text is needed.")
    content = path.read_bytes()
    if not content:
        raise FormwrightError(f"{path} is empty.")
    return content


def read_text(path: str | Path) -> str:
    """A text file, UTF-8."""
    return decode(read_bytes(path), path)


def decode(content: bytes, path: str | Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as wrong:
        raise FormwrightError(
            f"{path} is not UTF-8 (byte {wrong.start} is 0x{content[wrong.start]:02x}): convert it first, e.g. "
            "iconv -f latin1 -t utf-8."
        ) from wrong


def read_idx(path: Path) -> Tensor:
    """A gzipped idx file (the format of MNIST) of unsigned bytes, with its shape."""
    content = read_bytes(path)
    try:
        content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as wrong:
        raise FormwrightError(f"{path} is no whole gzip file: {wrong}.") from wrong
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise FormwrightError(f"{path} is no idx file of unsigned bytes: it begins with {content[:4].hex(' ')}.")
    axes = content[3]
    start = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", content[4:start])
    values = torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8) if len(content) > start else torch.empty(0)
    count = 1
    for size in shape:
        count *= size
    if len(values) != count:
        raise FormwrightError(f"{path} is cut off: its header promises {count} bytes, {len(values)} follow.")
    return values.view(shape)


def read_table(path: str | Path) -> Any:
    """A CSV, TSV, Parquet, JSON or JSON-lines file, or a folder that `datasets` saved, as a pandas table."""
    pandas = require("pandas", extra="data")
    path = existing(path)
    if path.is_dir():
        return read_dataset(path)
    if path.suffix not in TABLES:
        raise FormwrightError(
            f"{path} is no table by its name: it must end with {', '.join(TABLES)}, or be a folder saved by datasets."
        )
    if path.stat().st_size == 0:
        raise FormwrightError(f"{path} is empty.")
    try:
        if path.suffix == ".parquet":
            require("pyarrow", extra="data")
            table = pandas.read_parquet(path)
        elif path.suffix in (".jsonl", ".json"):
            table = pandas.read_json(path, lines=path.suffix == ".jsonl")
        else:
            table = pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    except UnicodeDecodeError:
        decode(path.read_bytes(), path)
        raise
    except (ValueError, OSError) as wrong:  # pyarrow's and pandas' own errors are both
        decode_if_text(path)
        reason = str(wrong).splitlines()[0].rstrip(".")
        raise FormwrightError(f"{path} cannot be read as {path.suffix[1:]}: {reason}.") from wrong
    if len(table) == 0:
        raise FormwrightError(f"{path} holds no rows.")
    return table


def decode_if_text(path: Path) -> None:
    if path.suffix != ".parquet":
        decode(path.read_bytes(), path)


def read_dataset(path: Path) -> Any:
    """The rows of a folder written by `Dataset.save_to_disk`."""
    datasets = require("datasets", extra="data")
    try:
        held = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as wrong:
        raise FormwrightError(f"{path} is a folder, but no dataset that datasets saved with save_to_disk.") from wrong
    if isinstance(held, datasets.DatasetDict):
        raise FormwrightError(
            f"{path} holds the splits {', '.join(held)}: name one of their folders, e.g. "
            f"file={path / next(iter(held))}."
        )
    if len(held) == 0:
        raise FormwrightError(f"{path} holds no rows.")
    return held.to_pandas()


def column(table: Any, name: str, path: str | Path, option: str) -> Any:
    """One column of a table.

    Raises:
        FormwrightError: it is not there; the sentence names those that are.
    """
    if name not in table.columns:
        raise FormwrightError(
            f"{path} has no column {name!r}; it has {', '.join(map(str, table.columns))}: choose one with {option}=."
        )
    return table[name]
