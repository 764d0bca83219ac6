"""int8 files: they score what the model scores, pruned zeros stay zero, and a file that loses more is not left."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from formwright.bench import compress as compressing
from formwright.compress import export_int8 as exporting
from formwright.compress.export import OnnxRunner, OpenVinoRunner
from formwright.compress.export_int8 import export_int8, feeds
from formwright.compress.modifier import Data
from formwright.compress.prune.llm_weight_pruning import matrices
from formwright.errors import FormwrightError
from formwright.tasks.base import Columns, Defaults, Task, score_rows
from formwright.training import Settings

PACKAGES = {"onnx": "onnxruntime", "openvino": "nncf"}


def model(name="distilbert") -> nn.Module:
    torch.manual_seed(0)
    text = {"vocab_size": 40, "pad_token_id": 0, "max_position_embeddings": 32}
    if name == "distilbert":
        config = DistilBertConfig(**text, dim=24, hidden_dim=40, n_heads=3, n_layers=2, initializer_range=0.3)
        made = DistilBertForSequenceClassification(config).eval()
    else:
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_hidden_layers": 2}
        made = BertForSequenceClassification(BertConfig(**text, **sizes, initializer_range=0.3)).eval()
    for one in matrices(made).values():
        rows, columns = one.values.shape
        one.weight.data.mul_((torch.rand(rows // 4, columns) > 0.5).repeat_interleave(4, 0))
    return made


def labelled(by: nn.Module, *, validation=True) -> Data:
    """Rows whose labels are the model's own answers."""
    mask = (torch.arange(12) < torch.randint(4, 13, (64, 1), generator=torch.Generator().manual_seed(1))).long()
    ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    with torch.no_grad():
        labels = by(input_ids=ids, attention_mask=mask).logits.argmax(-1)
    rows = Columns(input_ids=ids, attention_mask=mask, labels=labels)
    task = Task(
        name="rows", head="sequence-classification", model_config={}, train=rows, test=rows, metrics=(),
        validation=rows if validation else None, score=score_rows, baselines=dict,
        defaults=Defaults(settings=Settings(), model={}),
    )  # fmt: skip
    return Data(task=task, kind="text-classification")


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def exported(request, tmp_path_factory):
    """A model, its rows and its file; writing one takes seconds."""
    pytest.importorskip(PACKAGES[request.param])
    made = model()
    data = labelled(made)
    folder = tmp_path_factory.mktemp(request.param)
    return made, data, export_int8(made, folder, data, request.param, samples=48, max_drop=0.1)


@pytest.mark.reference
def test_the_file_scores_what_the_model_scores(exported) -> None:
    made, data, found = exported
    assert found.score[1] == 1.0
    assert found.score[0] >= 0.9
    batch = data.task.collate([data.task.test[i] for i in range(5)])
    batch.pop("labels")
    with torch.no_grad():
        wanted = made(**batch).logits
    runner = OnnxRunner if found.path.suffix == ".onnx" else OpenVinoRunner
    got = runner(found.path.parent)(**batch).logits
    assert 0 < (got - wanted).abs().max() < 0.2 * wanted.abs().max()  # in whole numbers, but the same model
    assert made.training is False


@pytest.mark.reference
def test_weights_in_the_onnx_file_are_bytes_and_zeros_stay(exported) -> None:
    onnx = pytest.importorskip("onnx")
    made, _, found = exported
    if found.path.suffix != ".onnx":
        pytest.skip("OpenVINO's file is read by OpenVINO")
    held = [onnx.numpy_helper.to_array(one) for one in onnx.load(str(found.path)).graph.initializer]
    whole = [one for one in held if one.dtype == "int8" and one.ndim == 2]
    assert len(whole) >= 12
    for path, one in matrices(made).items():
        zero = (one.values == 0).numpy()
        turns = [turn for w in whole for turn in (w, w.T) if turn.shape == zero.shape]
        assert any((turn[zero] == 0).all() and (turn[~zero] != 0).mean() > 0.9 for turn in turns), path


def test_a_file_that_loses_more_is_removed(tmp_path, monkeypatch) -> None:
    made = model()
    data = labelled(made, validation=False)

    def write(_: object, folder: object, format: str) -> Path:
        (Path(folder) / "model.onnx").write_text(format)
        return Path(folder) / "model.onnx"

    def spoilt(_: Path, path: Path, batches) -> None:
        assert sum(len(one["input_ids"]) for one in batches) == 20
        path.write_text("")

    wrong = SimpleNamespace(logits=torch.tensor([[0.0, 1.0]]))
    monkeypatch.setattr(exporting, "ready", lambda _: None)
    monkeypatch.setattr(exporting, "require", lambda *_, **__: None)
    monkeypatch.setattr(exporting, "export", write)
    monkeypatch.setattr(exporting, "write_onnx", spoilt)
    monkeypatch.setattr(exporting, "OnnxRunner", lambda _: lambda **b: expanded(wrong, len(b["input_ids"])))
    with pytest.raises(FormwrightError, match="removed"):
        export_int8(made, tmp_path, data, samples=20)
    assert not list(tmp_path.iterdir())
    found = export_int8(made, tmp_path, data, samples=20, max_drop=1.0)
    assert found.bytes == (0, 4)


def expanded(answer: SimpleNamespace, rows: int) -> SimpleNamespace:
    return SimpleNamespace(logits=answer.logits.expand(rows, -1))


def test_token_types_are_fed_where_the_file_takes_them() -> None:
    data = labelled(model())
    assert {tuple(one) for one in feeds(model(), data, 8)} == {("input_ids", "attention_mask")}
    [given] = feeds(model("bert"), data, 8)
    assert not given["token_type_ids"].any()
    assert given["token_type_ids"].shape == given["input_ids"].shape


def test_bad_input_is_said(tmp_path) -> None:
    made = model()
    data = labelled(made)
    with pytest.raises(FormwrightError, match="samples"):
        export_int8(made, tmp_path, data, samples=0)
    with pytest.raises(FormwrightError, match="max_drop"):
        export_int8(made, tmp_path, data, max_drop=-1.0)
    data.kind = "causal-lm"
    with pytest.raises(FormwrightError, match="accuracy"):
        export_int8(made, tmp_path, data)


def test_the_command_writes_int8_files_and_says_what_they_score(tmp_path, monkeypatch) -> None:
    made = model()
    result = object.__new__(compressing.Compressed)  # of which only these two are read
    vars(result).update(model=made, sentences=())

    def written(given, folder, data, format, *, max_drop):
        assert (given, data.kind, max_drop) == (made, "text-classification", 0.02)
        if format == "openvino":
            raise FormwrightError("It lost too much.")
        return exporting.Exported(path=Path(folder) / "model.onnx", score=(0.9, 0.91), bytes=(1, 4))

    monkeypatch.setattr(compressing, "export_int8", written)
    found = compressing.exported(result, list(exporting.INT8), tmp_path, labelled(made), 0.02)
    assert found["exports"] == {"onnx-int8": tmp_path / "onnx-int8" / "model.onnx", "openvino-int8": None}
    assert "scores 0.9000 on validation rows and the model 0.9100" in found["sentences"][0]
    assert found["sentences"][1] == "For OpenVINO in int8 nothing was written. It lost too much."
