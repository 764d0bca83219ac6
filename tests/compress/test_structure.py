"""A changed model comes back from its folder: in this process, in a fresh one, by load and by the Auto classes."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import formwright
import formwright.compress
from formwright.compress.depth.deebert import EarlyExit
from formwright.compress.runtime.bytetransformer import PaddingFree
from formwright.compress.structure import Executor, adopt, attach, describe, load
from formwright.compress.tokens.ltp import TokenPruning
from formwright.errors import FormwrightError

IDS = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 2, 1, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = BertConfig(vocab_size=20, intermediate_size=24, num_labels=3, max_position_embeddings=16, **sizes)
    return BertForSequenceClassification(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def narrow(model: BertForSequenceClassification, layer: int, width: int) -> None:
    """Cut a feed-forward by hand, as any user might."""
    block = model.bert.encoder.layer[layer]
    up, down = block.intermediate.dense, block.output.dense
    up.weight, up.bias = nn.Parameter(up.weight[:width].clone()), nn.Parameter(up.bias[:width].clone())
    down.weight = nn.Parameter(down.weight[:, :width].clone())
    up.out_features = down.in_features = width


def changed() -> BertForSequenceClassification:
    model = bert()
    adopt(model)
    narrow(model, 0, 10)
    narrow(model, 2, 7)
    del model.bert.encoder.layer[1]
    model.config.num_hidden_layers = 2
    return model


def test_adopting_changes_no_output_and_keeps_the_class() -> None:
    model = bert()
    before = logits(model)
    assert adopt(model) is model
    assert isinstance(model, BertForSequenceClassification)
    assert torch.equal(logits(model), before)
    assert adopt(model) is model


def test_a_changed_model_comes_back(tmp_path) -> None:
    model = changed()
    model.save_pretrained(tmp_path)
    for back in (
        load(tmp_path),
        formwright.load(tmp_path),
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits(back), logits(model))
        assert back.config.num_hidden_layers == 2
        assert back.bert.encoder.layer[1].intermediate.dense.out_features == 7
    bare = AutoModel.from_pretrained(tmp_path)
    assert len(bare.encoder.layer) == 2


def test_it_comes_back_in_a_fresh_process(tmp_path) -> None:
    model = changed()
    model.save_pretrained(tmp_path)
    code = (
        "import json, sys, torch, formwright.compress\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"ids, mask = torch.tensor({IDS.tolist()}), torch.tensor({MASK.tolist()})\n"
        f"for read in (formwright.load, Auto.from_pretrained):\n"
        f"    model = read({str(tmp_path)!r}).eval()\n"
        "    print(json.dumps(model(input_ids=ids, attention_mask=mask).logits.tolist()))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line in ran.stdout.splitlines():
        assert torch.equal(torch.tensor(json.loads(line)), logits(model))


def test_a_pipeline_of_transformers_classifies_with_it_in_a_fresh_process(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = changed()
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w1").save_pretrained(tmp_path)
    code = (
        "import json, formwright.compress\n"
        "from transformers import pipeline\n"
        f"classify = pipeline('text-classification', model={str(tmp_path)!r}, top_k=None)\n"
        "print(type(classify.model).__name__)\n"
        "print(json.dumps(classify(['w5 w6 w7 w8 w9', 'w4 w3 w2'], batch_size=2)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, answers = ran.stdout.splitlines()
    assert name == "FormwrightBertForSequenceClassification"
    shares = logits(model).softmax(-1)
    shares[1] = model(input_ids=IDS[1:, :3]).logits.softmax(-1)[0].detach()
    for told, row in zip(json.loads(answers), shares, strict=True):
        assert {one["label"]: one["score"] for one in told} == pytest.approx(
            {f"LABEL_{i}": value.item() for i, value in enumerate(row)}, abs=1e-6
        )


def executors() -> dict[str, Executor]:
    return {
        "padding-free": PaddingFree(),
        "early-exit": EarlyExit(width=16, classes=3, ramps=2, threshold=0.5, dropout=0.0),
        "token-pruning": TokenPruning(layers=3, final_threshold=0.1, temperature=1e-3, variant="paper"),
    }


@pytest.mark.parametrize("kind", executors())
def test_the_auto_classes_bring_an_executor_back(tmp_path, kind: str) -> None:
    model = bert()
    attach(model, executors()[kind])
    model.eval().save_pretrained(tmp_path)
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert back.executor.kind == kind
    assert torch.equal(logits(back), logits(model))
    if kind == "padding-free":  # knows nothing of the class
        bare = AutoModel.from_pretrained(tmp_path)
        with torch.no_grad():
            hidden = bare(input_ids=IDS, attention_mask=MASK).last_hidden_state
            wanted = bert().bert(input_ids=IDS, attention_mask=MASK).last_hidden_state
        assert not hidden[1, 3:].any()  # padding was not computed
        torch.testing.assert_close(hidden[MASK.bool()], wanted[MASK.bool()], atol=1e-5, rtol=1e-5)
        bare.save_pretrained(tmp_path / "bare")
        head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
        assert head.executor.kind == kind
    else:
        with pytest.raises(FormwrightError, match=r"BertModel cannot take over: .*formwright\.load"):
            AutoModel.from_pretrained(tmp_path)


def test_it_can_be_changed_and_saved_again(tmp_path) -> None:
    model = changed()
    model.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    narrow(again, 0, 4)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(load(tmp_path / "twice")), logits(again))


def test_an_unchanged_model_says_so() -> None:
    found = describe(adopt(bert()))
    assert not any(found[what] for what in ("layers", "modules", "shapes", "attributes", "configs"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(tmp_path, dtype: torch.dtype) -> None:
    model = changed().to(dtype)
    model.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert back.dtype == dtype
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize(
    ("cls", "config", "path"),
    [
        (GPT2LMHeadModel, GPT2Config(vocab_size=20, n_embd=16, n_layer=3, n_head=4, n_positions=32), "transformer.h"),
        (
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4
            ),
            "model.layers",
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_a_decoder_without_a_layer_generates_the_same(tmp_path, cls, config, path) -> None:
    torch.manual_seed(0)
    model = cls(config).eval()
    adopt(model)
    layers = model.get_submodule(path)
    del layers[1]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(back.generate(IDS, **greedy), model.generate(IDS, **greedy))
    assert (back.lm_head.weight is back.get_input_embeddings().weight) == cls.__name__.startswith("GPT2")


def test_a_foreign_module_is_refused_at_saving(tmp_path) -> None:
    model = adopt(bert())
    model.bert.encoder.layer[0].output.dense = nn.Sequential(nn.Linear(24, 16))
    with pytest.raises(FormwrightError, match="cannot be saved"):
        model.save_pretrained(tmp_path)


def test_what_is_no_model_is_one_sentence(tmp_path) -> None:
    with pytest.raises(FormwrightError, match="is no folder"):
        load(tmp_path / "absent")
    with pytest.raises(FormwrightError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormwrightError, match="is no JSON"):
        load(tmp_path)
    with pytest.raises(FormwrightError, match="no transformers model"):
        adopt(nn.Linear(2, 2))


def test_a_checkpoint_cut_in_half_is_one_sentence(tmp_path) -> None:
    changed().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(FormwrightError, match="cut off or damaged"):
        load(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path) -> None:
    changed().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["compression"]["shapes"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormwrightError):
        load(tmp_path)


def test_an_adopted_encoder_still_gives_its_hidden_states() -> None:
    model = adopt(bert().bert)
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 4


def test_our_own_models_load_and_change_as_others_do(tmp_path) -> None:
    from formwright.models.transformer import TransformerConfig, TransformerForCausalLM

    torch.manual_seed(0)
    model = TransformerForCausalLM(
        TransformerConfig(architecture="decoder", vocab_size=20, hidden_size=16, num_hidden_layers=3)
    ).eval()
    model.save_pretrained(tmp_path / "plain")
    back = load(tmp_path / "plain")
    assert type(back) is TransformerForCausalLM
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    adopt(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "changed")
    assert torch.equal(load(tmp_path / "changed")(IDS).logits, model(IDS).logits)
