"""Export: the file computes what the model computes, at any batch and length, and what it cannot hold is refused."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from formwright.compress import export as exporting
from formwright.compress.export import OnnxRunner, OpenVinoRunner, export
from formwright.compress.structure import Executor, attach
from formwright.errors import FormwrightError

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=64, **SMALL)).eval()


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=64, **SMALL)).eval()


def vit():
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SMALL)).eval()


@pytest.mark.reference
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("make", [bert, llama, vit])
def test_the_file_gives_the_models_outputs_at_another_shape(tmp_path, make, format):
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[format])
    model = make()
    export(model, tmp_path, format)
    batch = exporting._batch(model, 5, 31)
    with torch.no_grad():
        wanted = model(**batch).logits
    got = {"onnx": OnnxRunner, "openvino": OpenVinoRunner}[format](tmp_path)(**batch).logits
    keep = batch["attention_mask"].bool() if wanted.ndim == 3 else slice(None)
    torch.testing.assert_close(got[keep], wanted[keep], atol=1e-5, rtol=1e-4)


@pytest.mark.reference
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_token_types_are_an_input_and_zero_where_none_are_given(tmp_path, format):
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[format])
    model = bert()
    with torch.no_grad():
        for weight in model.parameters():  # large enough for the types to matter
            weight.mul_(10 if weight.ndim == 2 else 1)
    export(model, tmp_path, format)
    run = {"onnx": OnnxRunner, "openvino": OpenVinoRunner}[format](tmp_path)
    batch = exporting._batch(model, 2, 7)
    assert batch["token_type_ids"].any()
    untyped = {name: value for name, value in batch.items() if name != "token_type_ids"}
    with torch.no_grad():
        typed, zeros = model(**batch).logits, model(**untyped).logits
    assert not torch.allclose(typed, zeros, atol=1e-3)
    torch.testing.assert_close(run(**batch).logits, typed, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(**untyped).logits, zeros, atol=1e-5, rtol=1e-4)


class Sorted(torch.nn.Module):
    """Branches on the values, which no exported graph can."""

    def forward(self, hidden):
        return hidden.sort(1).values if hidden.sum() > 0 else hidden


def test_what_the_exporter_raises_is_one_sentence(tmp_path):
    pytest.importorskip("openvino")
    model = bert()
    model.bert.pooler = torch.nn.Sequential(model.bert.pooler, Sorted())
    with pytest.raises(FormwrightError, match="BertForSequenceClassification cannot be written for OpenVINO") as told:
        export(model, tmp_path, "openvino")
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_different_outputs_are_an_error(tmp_path):
    pytest.importorskip("openvino")
    model = bert()
    export(model, tmp_path, "openvino")
    with torch.no_grad():
        model.classifier.bias += 1
        with pytest.raises(FormwrightError, match="differ by"):
            exporting._compare(model, OpenVinoRunner(tmp_path), 1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(FormwrightError, match="float32"):
        export(bert(), tmp_path, "onnx", "float16")
    with pytest.raises(FormwrightError, match="float32 model"):
        export(bert().bfloat16(), tmp_path)
    with pytest.raises(FormwrightError, match="no format"):
        exporting.ready("tflite")
    sound = Wav2Vec2Config(vocab_size=12, conv_dim=(8,), conv_kernel=(4,), conv_stride=(4,), **SMALL)
    with pytest.raises(FormwrightError, match="reads input_values"):
        export(Wav2Vec2ForCTC(sound), tmp_path)
    with pytest.raises(FormwrightError, match="holds no"):
        OpenVinoRunner(tmp_path) if pytest.importorskip("openvino") else None


def test_float16_halves_the_weights_and_stays_near(tmp_path):
    pytest.importorskip("openvino")
    model = BertModel(BertConfig(vocab_size=500, max_position_embeddings=64, **SMALL)).eval()
    size = {}
    for precision in ("float32", "float16"):
        export(model, tmp_path / precision, "openvino", precision)
        size[precision] = (tmp_path / precision / "model.bin").stat().st_size
    assert size["float16"] < 0.6 * size["float32"]


def test_an_executor_is_refused(tmp_path):
    class Other(Executor):
        kind = "other"

    model = bert()
    attach(model, Other())
    with pytest.raises(FormwrightError, match="run by other"):
        export(model, tmp_path)
