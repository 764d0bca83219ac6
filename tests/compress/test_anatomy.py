"""What `describe` finds in every family, with and without a head, in its variants, whole and cut."""

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

from formwright.compress import families as described
from formwright.compress.anatomy import describe
from formwright.compress.families import (
    AttentionDescription,
    Family,
    FeedForwardDescription,
    StackDescription,
    families,
    register_family,
)
from formwright.compress.surgery import remove_heads, remove_neurons
from formwright.errors import FormwrightError

from . import zoo

NEOX = Family(
    stacks=(
        StackDescription(
            layers="layers",
            attention=AttentionDescription(
                module="attention",
                fused="attention.query_key_value",
                layout="heads",
                output="attention.dense",
                head_dim="head_size",
                norm="input_layernorm",
            ),
            feedforward=FeedForwardDescription(
                up="mlp.dense_h_to_4h",
                down="mlp.dense_4h_to_h",
                activation="hidden_act",
                norm="post_attention_layernorm",
            ),
            norm_first=True,
            causal=True,
            final_norm="final_layer_norm",
        ),
    ),
    token="embed_in",
)


@pytest.mark.parametrize("family", zoo.MODELS)
def test_every_weight_of_a_layer_has_its_place(family):
    model = zoo.build(family)
    anatomy = describe(model)
    assert anatomy.family == family
    assert len(anatomy.layers) == {"albert": 1, "whisper": 5, "t5": 5}.get(family, 3)
    for index, layer in enumerate(anatomy.layers):
        assert layer.index == index
        found = []
        for part in (layer.attention, layer.cross):
            if part is not None:
                found += [part.query, part.key, part.value, part.fused, part.output, part.norm]
        found += [layer.feedforward.up, layer.feedforward.gate, layer.feedforward.down, layer.feedforward.norm]
        aside = [  # outside the table: norms inside a head, scales, a bias of the whole stack
            f"{layer.path}.{name}"
            for name in ("self_attn.q_norm", "self_attn.k_norm", "layer_scale1", "layer_scale2")
            if zoo.has(model, f"{layer.path}.{name}")
        ]
        if layer.attention.bias is not None and layer.attention.bias.startswith(layer.path):
            aside.append(layer.attention.bias)
        assert zoo.parameters(model, *dict.fromkeys(found), *aside) == zoo.parameters(model, layer.path)
        projections = [path for path in found if path is not None and path not in layer.norms]
        assert all(type(model.get_submodule(path)) in (nn.Linear, Conv1D) for path in projections)


@pytest.mark.parametrize("family", zoo.MODELS)
def test_sizes_are_those_of_the_config_in_a_whole_model(family):
    for layer in describe(zoo.build(family)).layers:
        heads = layer.attention
        assert (heads.heads, heads.head_dim) == (4, 4)
        assert heads.kv_heads == (2 if family in zoo.GROUPED_FAMILIES else 4)
        assert layer.feedforward.width == (32 if family == "dinov2" else 24)


@pytest.mark.parametrize("family", zoo.MODELS)
def test_sizes_are_those_of_the_weights_in_a_cut_model(family):
    model = zoo.build(family)
    remove_heads(model, {0: [2, 3]})
    remove_neurons(model, {0: [0, 1, 2]})
    layer, before = describe(model).layers[0], describe(zoo.build(family)).layers[0]
    assert layer.attention.heads == 2
    assert layer.attention.head_dim == 4
    assert layer.attention.kv_heads == before.attention.kv_heads // 2
    assert layer.feedforward.width == before.feedforward.width - 3
    assert layer.attention.output == before.attention.output


@pytest.mark.parametrize("family", zoo.MODELS)
def test_order_of_norm_and_direction(family):
    anatomy = describe(zoo.build(family))
    after = ("bert", "roberta", "distilbert", "electra", "mpnet", "albert", "wav2vec2")
    assert anatomy.layers[0].norm_first is (family not in after)
    assert (anatomy.final_norm is None) is (family in after)
    assert anatomy.causal is (family in (*zoo.CAUSAL, "t5", "whisper"))
    assert anatomy.shared is (family == "albert")
    assert anatomy.layers[0].repeats == (3 if family == "albert" else 1)
    assert anatomy.embeddings.token is not None


@pytest.mark.parametrize(
    ("family", "base", "pooler", "head"),
    [
        ("bert", "bert", "bert.pooler", ("classifier",)),
        ("roberta", "roberta", None, ("lm_head",)),
        ("distilbert", "distilbert", None, ("pre_classifier", "classifier")),
        ("mpnet", "", "pooler", ()),
        ("albert", "albert", "albert.pooler", ("classifier",)),
        ("modernbert", "model", None, ("head", "classifier")),
        ("deit", "deit", None, ("cls_classifier", "distillation_classifier")),
        ("gpt2", "transformer", None, ("lm_head",)),
        ("whisper", "model", None, ("proj_out",)),
        ("t5", "", None, ("lm_head",)),
    ],
)
def test_base_pooler_and_head(family, base, pooler, head):
    anatomy = describe(zoo.build(family))
    assert (anatomy.base, anatomy.pooler, anatomy.head) == (base, pooler, head)


BARE = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**zoo.TEXT, **zoo.SIZE)),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**zoo.SIZE, **zoo.IMAGE)),
    "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(**zoo.GPT2)),
    "opt": lambda: hf.OPTModel(hf.OPTConfig(**zoo.OPT)),
    "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**zoo.GROUPED)),
    "whisper": lambda: hf.WhisperForAudioClassification(hf.WhisperConfig(**zoo.WHISPER)),
    "t5": lambda: hf.T5EncoderModel(hf.T5Config(**zoo.T5)),
    "wav2vec2": lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**zoo.SIZE, **zoo.SOUND, do_stable_layer_norm=True)),
}


@pytest.mark.parametrize("family", BARE)
def test_any_class_of_a_family(family):
    anatomy = describe(BARE[family]())
    assert len(anatomy.layers) == 3
    heads = {"llama": ("score",), "whisper": ("projector", "classifier")}
    assert anatomy.head == heads.get(family, ())
    if family == "wav2vec2":
        assert anatomy.layers[0].norm_first
        assert anatomy.final_norm == "encoder.layer_norm"


def test_gates_of_variants():
    t5 = describe(hf.T5EncoderModel(hf.T5Config(**zoo.T5, feed_forward_proj="gated-gelu"))).layers[0].feedforward
    assert (t5.gate.rpartition(".")[2], t5.up.rpartition(".")[2], t5.activation) == ("wi_0", "wi_1", "gelu_new")
    dino = hf.Dinov2Model(hf.Dinov2Config(**zoo.SIZE, **zoo.IMAGE, use_swiglu_ffn=True))
    part = describe(dino).layers[0].feedforward
    assert (part.gate.rpartition(".")[2], part.activation) == ("gate_proj", "silu")
    assert part.width == dino.get_submodule(part.down).in_features
    modern = describe(zoo.build("modernbert")).layers[0].feedforward
    assert modern.gate == modern.up


def test_cross_attention_where_there_is_one():
    bert = hf.BertLMHeadModel(hf.BertConfig(**zoo.TEXT, **zoo.SIZE, is_decoder=True, add_cross_attention=True))
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(**zoo.GPT2, add_cross_attention=True))
    for model in (bert, gpt2, zoo.build("t5"), zoo.build("whisper")):
        anatomy = describe(model)
        assert anatomy.layers[-1].cross.heads == 4
        assert anatomy.causal
    assert describe(zoo.build("t5")).layers[0].cross is None
    assert describe(gpt2).layers[0].cross.query.endswith("q_attn")


def test_the_families():
    assert set(families()) >= set(zoo.MODELS)
    with pytest.raises(FormwrightError, match=r"'gpt_neo' is not described; known are albert.*register_family"):
        describe(hf.GPTNeoModel(hf.GPTNeoConfig(hidden_size=16, num_layers=1, attention_types=[[["global"], 1]])))
    with pytest.raises(FormwrightError, match="described already"):
        register_family("bert", NEOX)


def test_outsiders_describe_their_own(monkeypatch):
    monkeypatch.setattr(described, "_families", dict(described._families))
    register_family("gpt_neox", NEOX)
    model = zoo.build(lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**zoo.TEXT, **zoo.SIZE)))
    ids = {"input_ids": torch.arange(3, 10)[None]}
    layer = describe(model).layers[1]
    with torch.no_grad():
        model.get_submodule(layer.attention.output).weight[:, 4:8] = 0  # what head 1 gives
        before = model(**ids).logits
        remove_heads(model, {1: [1]})
        torch.testing.assert_close(model(**ids).logits, before, atol=1e-5, rtol=1e-5)
    assert describe(model).layers[1].attention.heads == 3
    assert describe(model).head == ("lm_head",)


def test_a_description_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(described, "_families", {"bert": NEOX})
    with pytest.raises(FormwrightError, match="no layers where the description of bert"):
        describe(zoo.build("bert"))
    monkeypatch.setattr(described, "_families", {"llama": NEOX})
    with pytest.raises(FormwrightError, match="the description of this family does not fit"):
        describe(zoo.build("llama"))
