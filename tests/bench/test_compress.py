"""`formwright compress` from end to end on a tiny model: a recipe, a search, its resumption, and every bad input."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    FNetConfig,
    FNetForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import formwright
from formwright.bench import compress as bench
from formwright.bench import judging
from formwright.bench.compress import Budget, Target, compress
from formwright.bench.records import Record, Records
from formwright.cli import app
from formwright.compress.export import OnnxRunner
from formwright.errors import FormwrightError

WORDS = ["good", "bad", "film", "the", "a", "was", "plot", "actor", "very", "dull", "fine", "great"]
BERT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"vocab_size": 4 + len(WORDS), "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny encoder with its tokenizer."""
    place = tmp_path_factory.mktemp("model")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(place)
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Texts that are good or bad by one word."""
    draw = random.Random(0)
    lines = ["text,label"]
    for i in range(400):
        kind = i % 2
        rest = draw.choices(WORDS[2:], k=draw.randint(4, 12))
        rest.insert(draw.randint(0, len(rest)), "good" if kind else "bad")
        lines.append(f"{' '.join(rest)},{'yes' if kind else 'no'}")
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_recipe_makes_a_model_that_loads(tmp_path, folder, rows) -> None:
    result = compress(folder, ["prune(structure=neuron, amount=0.5)"], rows, out=tmp_path, max_drop=0.9)
    assert result.recipe is not None
    model = formwright.load(result.folder)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 16
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(model(ids).logits, result.model(ids).logits)
    page = result.report.read_text()
    assert "prune(structure=neuron, amount=0.5)" in page
    assert (result.folder / "recipe.yaml").exists()
    assert (result.folder / "tokenizer.json").exists()


def test_trials_are_judged_on_as_many_rows_as_it_takes(tmp_path, monkeypatch, folder, rows) -> None:
    monkeypatch.setattr(judging, "FLOOR", 10)
    said: list[str] = []
    result = compress(folder, ["prune(structure=neuron)"], rows, out=tmp_path, max_drop=0.9, told=said.append)
    assert "Judging on 20 of 40 validation rows: enough to tell a loss of 0.9" in said
    assert "the same 20 of 40 validation rows" in result.report.read_text()
    (record,) = Records(tmp_path)
    assert record.metrics["accuracy"] in [hits / 20 for hits in range(21)]
    assert 0 <= record.extra["error"] < 0.3
    assert result.test["chosen"] in [hits / 80 for hits in range(81)]  # all test rows


def test_a_search_goes_on_where_it_stopped(tmp_path, monkeypatch, folder, rows) -> None:
    monkeypatch.setattr(bench, "GROUPS", {"width": ("prune(structure=neuron)", "prune(structure=head)")})
    compress(folder, None, rows, out=tmp_path, max_drop=0.9, target="params=0.9", budget="1")
    first = len(Records(tmp_path))
    said: list[str] = []
    result = compress(folder, None, rows, out=tmp_path, max_drop=0.9, target="params=0.9", budget="2", told=said.append)
    assert (first, len(Records(tmp_path))) == (1, 2)
    assert sum(one.startswith("Trial") for one in said) == 1
    assert result.recipe is not None
    assert len(list((tmp_path / "trials").iterdir())) <= 3


def test_a_trial_killed_in_the_middle_runs_again(tmp_path, monkeypatch, folder, rows) -> None:
    monkeypatch.setattr(bench, "GROUPS", {"width": ("prune(structure=neuron)", "prune(structure=head)")})
    given = {"out": tmp_path, "max_drop": 0.9, "target": "params=0.9", "budget": "2"}
    with monkeypatch.context() as stopped:
        stopped.setattr(bench.Bench, "times", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(folder, None, rows, **given)
    assert len(Records(tmp_path)) == 0
    compress(folder, None, rows, **given)
    assert {one.candidate["recipe"] for one in Records(tmp_path)} == set(bench.GROUPS["width"])


def test_a_folder_of_another_run_is_refused_before_it_is_used(tmp_path, folder, rows) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"model": "another"}}))
    with pytest.raises(FormwrightError, match="choose another folder"):
        compress(folder, ["prune(structure=neuron)"], rows, out=tmp_path)
    assert not (tmp_path / "original").exists()


def record(name: str, drop: float, latency: float, status: str = "done") -> Record:
    extra = {"latency": latency, "size": 0.5, "params": 0.5}
    return Record(
        key=name, task="t", candidate={"recipe": name}, config={}, seed=0, status=status,
        metrics={"drop": drop}, extra=extra,
    )  # fmt: skip


def test_the_choice_is_the_cheapest_within_the_loss() -> None:
    held = [
        record("fast-and-bad", 0.05, 0.1),
        record("good", 0.005, 0.4),
        record("better-and-slower", -0.01, 0.6),
        record("slower-than-before", 0.0, 1.2),
        record("broken", 0.0, 0.1, "unsupported"),
    ]
    assert bench.choose(held, Target(), 0.01).key == "good"
    assert bench.choose(held[3:], Target(), 0.01) is None
    assert [one.key for one in bench.ranking(held, Target(), 0.01)] == ["good", "better-and-slower"]


@pytest.mark.parametrize("text", ["latency", "speed=0.5", "latency=fast", "latency=0", "latency=1.5"])
def test_a_target_that_makes_no_sense(text: str) -> None:
    with pytest.raises(FormwrightError, match="--target"):
        Target.read(text)


def test_budgets() -> None:
    assert Budget.read("30m").seconds == 1800
    assert Budget.read("12").trials == 12
    for text in ("", "0", "soon", "3 days"):
        with pytest.raises(FormwrightError, match="--budget"):
            Budget.read(text)


def run(*given: object) -> tuple[int, str]:
    ran = CliRunner().invoke(app, [str(one) for one in given])
    return ran.exit_code, ran.output


def test_the_command_prints_json(tmp_path, folder, rows) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: [{prune: {structure: neuron, amount: 0.25}}]")
    out = tmp_path / "run"
    code, said = run(
        "compress", folder, "--data", rows, "--recipe", recipe, "--max-drop", 0.9, "--target", "size=0.99", "--json",
        "--out", out,
    )  # fmt: skip
    assert code == 0, said
    found = json.loads(said[said.index("{") :])
    assert found["met"] is True
    assert Path(found["folder"]).exists()
    assert run("report", out)[0] == 0


def test_the_chosen_model_is_written_for_other_runtimes(tmp_path, folder, rows) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    given = ["compress", folder, "--data", rows, "--max-drop", 0.9, "--out", tmp_path / "run"]
    (tmp_path / "one.yaml").write_text("steps: [{prune: {structure: neuron, amount: 0.25}}]")
    code, said = run(*given, "--recipe", tmp_path / "one.yaml", "--export", "onnx", "--json")
    assert code == 0, said
    found = json.loads(said[said.index("{") :])
    assert Path(found["exports"]["onnx"]) == tmp_path / "run" / "onnx" / "model.onnx"
    assert any("ONNX Runtime" in one for one in found["sentences"])
    assert "ONNX Runtime" in (tmp_path / "run" / "report.html").read_text()
    model, ids = formwright.load(found["folder"]), torch.tensor([[4, 5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    got = OnnxRunner(tmp_path / "run" / "onnx")(**batch).logits
    torch.testing.assert_close(got, model(**batch).logits.detach(), atol=1e-5, rtol=1e-4)
    (tmp_path / "two.yaml").write_text("steps: [{padding-free: {}}]")
    code, said = run(*given, "--recipe", tmp_path / "two.yaml", "--export", "onnx")
    assert code == 0, said
    assert "For ONNX Runtime nothing was written. The model is run by padding-free" in said
    assert not (tmp_path / "run" / "onnx").exists()
    assert (tmp_path / "run" / "model" / "config.json").exists()


# Bad input: what is wrong, and what the one sentence says


def refused(*given: object) -> str:
    code, said = run("compress", *given)
    last = said.strip().splitlines()[-1]
    assert code == 2, said
    assert last.startswith("Error: ")
    assert "Traceback" not in said
    return last


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "latency=0.001"], "from 0.01"),
        (["--target", "0.1x"], "cannot be read"),
        (["--target", "latency=0.1x"], "is no number"),
        (["--target", "size=nan"], "choose a share"),
        (["--max-drop", "7"], "max_drop is 7"),
        (["--max-drop", "nan"], "max_drop is nan"),
        (["--budget=-3m"], "cannot be read"),
        (["--export", "onnx,tflite"], "'tflite' is no format"),
        (["--text", "nothing"], "nothing"),
        (["--recipe", "none.yaml"], "none.yaml"),
    ],
)
def test_options_that_make_no_sense(tmp_path, folder, rows, options: list[str], says: str) -> None:
    assert says in refused(folder, "--data", rows, *options, "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("steps: [", "is no YAML"),
        ("", "holds no recipe"),
        ("hello", "holds no recipe"),
        ("steps: []", "steps cannot be read"),
        ("steps: [{shrink: {}}]", "No modifier is called 'shrink'"),
        ("steps: [{prune: {amont: 0.5}}]", "Did you mean amount?"),
        ("steps: [{prune: {amount: 1.5}}]", "amount is 1.5"),
        ("steps: [{prune: {amount: lots}}]", "'lots'"),
    ],
)
def test_recipes_that_cannot_be_run(tmp_path, folder, rows, recipe: str, says: str) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert says in refused(folder, "--data", rows, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run")


def table(*labels: str) -> str:
    """Fifty different rows that take turns in their labels."""
    return "\n".join(["text,label", *(f"good film {i},{labels[i % len(labels)]}" for i in range(50))])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("text,label\n", "holds no rows"),
        (table("yes"), "nothing to tell apart"),
        (table("up", "down"), "none of the model's 2 classes"),
        (table("no", "yes", "maybe"), "the labels maybe are none"),
        (table("no", "yes") + "\n,yes\nNaN,no", "2 of 52 texts are missing"),
        (table("no", "yes") + "\ngood film,", "1 of 51 labels are missing"),
        (None, "rows.csv"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, folder, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "rows.csv").write_text(content)
    model = beside_the_tokenizer(folder, tmp_path / "model", classifier())
    assert says in refused(model, "--data", tmp_path / "rows.csv", "--out", tmp_path / "run")


def beside_the_tokenizer(folder: Path, place: Path, model: PreTrainedModel) -> Path:
    shutil.copytree(folder, place)
    model.save_pretrained(place)
    return place


def classifier(bias: float = 0.0) -> BertForSequenceClassification:
    model = BertForSequenceClassification(
        BertConfig(**BERT, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    )
    torch.nn.init.constant_(model.classifier.bias, bias)
    return model


@pytest.mark.parametrize(
    ("file", "kept", "says"),
    [
        ("model.safetensors", 0.5, "cut off or damaged"),
        ("model.safetensors", 0.0002, "cut off or damaged"),
        ("model.safetensors", 0.0, "cut off or damaged"),
        ("config.json", 0.5, "is no JSON"),
        ("tokenizer.json", 0.5, "no tokenizer that can be read"),
    ],
)
def test_a_model_cut_short(tmp_path, folder, rows, file: str, kept: float, says: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    whole = (folder / file).read_bytes()
    (tmp_path / "model" / file).write_bytes(whole[: int(kept * len(whole))])
    assert says in refused(tmp_path / "model", "--data", rows, "--out", tmp_path / "run")


def test_what_is_no_model_of_the_kind(tmp_path, folder, rows) -> None:
    out = ["--out", tmp_path / "run"]
    assert "absent" in refused(tmp_path / "absent", "--data", rows, *out)
    assert "holds no model" in refused(rows.parent, "--data", rows, *out)
    assert "is no folder" in refused(rows, "--data", rows, *out)
    model = beside_the_tokenizer(folder, tmp_path / "classifier", classifier())
    (tmp_path / "long.txt").write_text("good film " * 3000)
    given = [model, "--data", tmp_path / "long.txt", "--task", "causal-lm"]
    assert "tells no next token" in refused(*given, *out)
    assert "gives no hidden states" in refused(model, "--data", rows, "--task", "sentence-embedding", *out)
    # in the folder of the run that was just refused: its model is not taken for this one
    broken = beside_the_tokenizer(folder, tmp_path / "nan", classifier(float("nan")))
    assert "classifier.bias of the model holds values that are no numbers" in refused(broken, "--data", rows, *out)


@pytest.mark.parametrize("method", ["prune", "entrodrop", "padding-free", "i-bert", "deebert", "ltp"])
def test_a_family_the_method_does_not_know(tmp_path, folder, rows, method: str) -> None:
    config = FNetConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    model = beside_the_tokenizer(folder, tmp_path / "model", FNetForSequenceClassification(config))
    (tmp_path / "recipe.yaml").write_text(f"steps: [{{{method}: {{}}}}]")
    said = refused(model, "--data", rows, "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert method in said
    assert "fnet" in said


def test_what_costs_little_is_tried_first_and_stacked() -> None:
    choices = {
        "width": ["", "prune"],
        "recover": ["", "finetune"],
        "products": ["", "int8"],
        "precision": ["", "bfloat16"],
        "execution": ["", "padding-free", "deebert"],
    }
    tried = [" ".join(step for step in first.values() if step) for first in bench._first_trials(choices)]
    assert tried[:3] == ["padding-free", "bfloat16 padding-free", "int8 bfloat16 padding-free"]
    assert tried[3:] == ["deebert", "bfloat16", "int8", "prune"]
