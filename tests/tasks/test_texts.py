"""Labelled texts and images from files: every format gives the same rows, and every fault a sentence."""

import gzip
import json
import struct

import numpy as np
import pandas as pd
import pytest
import torch

from formwright import tasks
from formwright.errors import FormwrightError
from formwright.tasks.support.files import read_idx
from formwright.tasks.support.images import Jittered

GOOD, BAD = "what a lovely day number", "such a dreadful night number"
TABLE = pd.DataFrame(
    {
        "body": [f"{GOOD if i % 3 else BAD} {'x ' * (i % 7)}{i}." for i in range(60)],
        "kind": ["fine" if i % 3 else "awful" for i in range(60)],
    }
)


def write(table, path):
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        table.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_pandas(table).save_to_disk(str(path))
    return path


@pytest.fixture
def csv(tmp_path):
    return write(TABLE, tmp_path / "mails.csv")


def load(path, more=""):
    return tasks.load(f"text-classification(file={path},text=body,label=kind{more})")


@pytest.mark.parametrize("name", ["mails.tsv", "mails.parquet", "mails.jsonl", "mails"])
def test_every_format_gives_the_same_task(csv, tmp_path, name):
    plain, other = load(csv), load(write(TABLE, tmp_path / name))
    assert plain.model_config == other.model_config
    for one, two in zip(plain.test.tokens, other.test.tokens, strict=True):
        assert torch.equal(one, two)
    assert plain.model_config["id2label"] == {0: "awful", 1: "fine"}
    assert (len(plain.train), len(plain.test)) == (48, 12)


def test_labels_follow_their_texts(csv):
    task = load(csv)
    vocabulary = task.tokenizer.get_vocab()
    for rows in (task.train, task.test):
        for text, label in zip(rows.tokens, rows.labels.tolist(), strict=True):
            assert (vocabulary["lovely"] in text.tolist()) == (label == 1)


def test_a_batch_is_padded_to_its_longest_and_masked(csv):
    task = load(csv)
    batch = task.test.__getitems__([0, 5, 3])
    lengths = [len(task.test.tokens[i]) for i in (0, 5, 3)]
    assert batch["input_ids"].shape == (3, max(lengths))
    assert min(lengths) < max(lengths)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"][batch["attention_mask"] == 0] == task.model_config["pad_token_id"]).all()
    assert torch.equal(task.collate([task.test[i] for i in (0, 5, 3)])["input_ids"], batch["input_ids"])


def test_the_vocabulary_is_that_of_the_training_texts(tmp_path):
    write(TABLE, tmp_path / "train.csv")
    write(
        pd.DataFrame({"body": ["a marvellous day", "a dreadful one"], "kind": ["fine", "awful"]}), tmp_path / "test.csv"
    )
    task = load(tmp_path / "train.csv", f",test={tmp_path / 'test.csv'}")
    assert "marvellous" not in task.tokenizer.get_vocab()
    assert task.test.tokens[0].tolist()[1] == task.tokenizer.token_to_id("[UNK]")


def test_duplicates_stand_on_one_side_only(tmp_path):
    twice = pd.concat([TABLE, TABLE], ignore_index=True)
    task = load(write(twice, tmp_path / "mails.csv"))
    assert len(task.train) + len(task.test) == 60


def test_a_text_of_the_second_file_is_not_trained_on(csv, tmp_path):
    shared = TABLE.iloc[[0, 1, 2, 2]]
    other = pd.DataFrame({"body": ["a lovely new one"], "kind": ["fine"]})
    write(pd.concat([shared, other], ignore_index=True), tmp_path / "test.csv")
    task = load(csv, f",test={tmp_path / 'test.csv'}")
    assert (len(task.train), len(task.test)) == (57, 5)
    write(shared, tmp_path / "train.csv")
    with pytest.raises(FormwrightError, match="nothing is left to train on"):
        load(tmp_path / "train.csv", f",test={tmp_path / 'test.csv'}")


def test_naive_bayes_tells_these_apart_and_the_majority_does_not(csv):
    found = load(csv).baselines()
    assert found["naive Bayes"]["accuracy"] == 1
    assert found["majority"]["accuracy"] < 0.9


def test_byte_pairs_need_no_unknown_token(csv):
    task = load(csv, ",tokenizer=bpe,vocab=400")
    assert task.model_config["vocab_size"] <= 400
    assert task.tokenizer.token_to_id("[PAD]") == task.model_config["pad_token_id"] == 0


def test_whole_numbers_and_names_are_labels(tmp_path):
    numbered = TABLE.assign(kind=[float(i % 2) for i in range(60)])
    assert load(write(numbered, tmp_path / "a.csv")).model_config["id2label"] == {0: "0", 1: "1"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t.rename(columns={"body": "mail"}),
            "has no column 'body'; it has mail, kind: choose one with text=",
        ),
        (
            lambda t: t.rename(columns={"kind": "class"}),
            "has no column 'kind'; it has body, class: choose one with label=",
        ),
        (lambda t: t.iloc[:0], "holds no rows"),
        (lambda t: t.assign(kind="fine"), "every label is 'fine', so there is nothing to tell apart"),
        (lambda t: t.assign(kind=[None, *t["kind"][1:]]), "1 of 60 labels are missing, the first in row 0"),
        (lambda t: t.assign(kind=[i / 7 for i in range(60)]), "labels are names or whole numbers"),
        (lambda t: t.assign(body=range(60)), "the column 'body' holds no text in row 0, but 0"),
        (lambda t: t.iloc[:1], "holds 1 different texts, too few"),
    ],
)
def test_tables_that_cannot_be_are_sentences(tmp_path, change, says):
    with pytest.raises(FormwrightError, match=says):
        load(write(change(TABLE), tmp_path / "mails.csv"))


def test_files_that_cannot_be_read_are_sentences(tmp_path):
    with pytest.raises(FormwrightError, match="There is no file"):
        load(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(FormwrightError, match="is empty"):
        load(tmp_path / "empty.csv")
    (tmp_path / "latin.csv").write_bytes("body,kind\ncafé,fine\n".encode("latin-1"))
    with pytest.raises(FormwrightError, match="is not UTF-8"):
        load(tmp_path / "latin.csv")
    whole = write(TABLE, tmp_path / "mails.parquet").read_bytes()
    (tmp_path / "mails.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormwrightError, match="cannot be read as parquet"):
        load(tmp_path / "mails.parquet")
    (tmp_path / "mails.jsonl").write_text('{"body": "a", "kind"')
    with pytest.raises(FormwrightError, match="cannot be read as jsonl"):
        load(tmp_path / "mails.jsonl")
    (tmp_path / "mails.xls").write_text("x")
    with pytest.raises(FormwrightError, match="is no table by its name"):
        load(tmp_path / "mails.xls")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FormwrightError, match="no dataset that datasets saved"):
        load(tmp_path / "folder")


def test_test_labels_never_trained_on_are_a_sentence(csv, tmp_path):
    write(pd.DataFrame({"body": ["new one"], "kind": ["odd"]}), tmp_path / "test.csv")
    with pytest.raises(FormwrightError, match="test labels odd do not occur in training"):
        load(csv, f",test={tmp_path / 'test.csv'}")
    with pytest.raises(FormwrightError, match="nothing is left to test on"):
        load(csv, f",test={csv}")
    with pytest.raises(FormwrightError, match="must be word, bpe, or the folder of a model"):
        load(csv, ",tokenizer=wordpiece")


def idx(values):
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def test_idx_files_whole_and_broken(tmp_path):
    values = np.arange(24).reshape(2, 3, 4)
    path = tmp_path / "values.gz"
    path.write_bytes(gzip.compress(idx(values)))
    assert read_idx(path).tolist() == values.tolist()
    path.write_bytes(gzip.compress(idx(values))[:-12])
    with pytest.raises(FormwrightError, match="is no whole gzip file"):
        read_idx(path)
    path.write_bytes(gzip.compress(idx(values)[:-5]))
    with pytest.raises(FormwrightError, match="is cut off: its header promises 24 bytes, 19 follow"):
        read_idx(path)
    path.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(FormwrightError, match="is no idx file"):
        read_idx(path)
    path.write_bytes(b"hello")
    with pytest.raises(FormwrightError, match="is no whole gzip file"):
        read_idx(path)


def test_a_jittered_image_is_a_shifted_or_mirrored_one():
    image = torch.arange(1.0, 26).view(1, 1, 5, 5)
    rows = Jittered(shift=1, pixel_values=image.expand(200, -1, -1, -1), labels=torch.arange(200))
    padded = torch.nn.functional.pad(torch.cat([image, image.flip(-1)]), [1] * 4)
    possible = [padded[m, :, y : y + 5, x : x + 5] for m in (0, 1) for y in range(3) for x in range(3)]
    batch = rows.__getitems__(list(range(200)))
    assert batch["labels"].tolist() == list(range(200))
    seen = {next(i for i, one in enumerate(possible) if torch.equal(one, got)) for got in batch["pixel_values"]}
    assert len(seen) == 18


def test_a_json_table_is_read_like_json_lines(csv, tmp_path):
    (tmp_path / "mails.json").write_text(json.dumps(TABLE.to_dict("records")))
    assert load(tmp_path / "mails.json").model_config == load(csv).model_config
