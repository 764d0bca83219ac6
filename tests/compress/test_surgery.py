"""A cut takes exactly what it should: parameters, FLOPs and outputs, in every family."""

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

import formwright
from formwright.bench import measure
from formwright.compress import structure
from formwright.compress.anatomy import describe
from formwright.compress.surgery import (
    remove_heads,
    remove_layers,
    remove_neurons,
    skip_attention,
)
from formwright.errors import FormwrightError

from . import zoo

BEFORE = tuple(family for family in zoo.MODELS if describe(zoo.build(family)).layers[0].norm_first)


def inputs(model, path: str) -> torch.Tensor:
    """What the module there reads in one forward pass."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:-1]))
    zoo.outputs(model, describe(model).family)
    handle.remove()
    return seen[0]


def cost(model) -> tuple[int, int]:
    return measure.parameters(model)[0], measure.flops(model, zoo.batch_for(describe(model).family))


def zero(model, path: str, units: list[int] | None = None) -> None:
    """Let these inputs of a projection count for nothing; without any, all of them and the bias."""
    module = model.get_submodule(path)
    with torch.no_grad():
        if units is None:
            for one in module.parameters():
                one.zero_()
        elif isinstance(module, Conv1D):
            module.weight[units] = 0
        else:
            module.weight[:, units] = 0


@pytest.mark.parametrize("family", zoo.MODELS)
def test_a_head_takes_its_parameters_and_flops(family):
    model = zoo.build(family)
    layer = describe(model).layers[-1 if family != "t5" else 2]  # of T5 an encoder's, as of the others
    part, gone = layer.attention, [2, 3] if family in zoo.GROUPED_FAMILIES else [2]
    rows, length = inputs(model, part.output)
    biases = sum(
        1 if path != part.fused else 3
        for path in (part.query, part.key, part.value, part.fused)
        if path and getattr(model.get_submodule(path), "bias", None) is not None
    )
    before = cost(model)
    remove_heads(model, {layer.index: gone})
    after = cost(model)
    columns = 4 * (2 * len(gone) + 2 * len(gone) * part.kv_heads // part.heads)  # of query and output, key and value
    assert before[0] - after[0] == 16 * columns + 4 * len(gone) * biases
    products = 2 * 2 * rows * len(gone) * length * length * 4
    assert before[1] - after[1] == layer.repeats * (2 * rows * length * 16 * columns + products)


@pytest.mark.parametrize("family", zoo.MODELS)
def test_neurons_take_their_parameters_and_flops(family):
    model = zoo.build(family)
    layer = describe(model).layers[0]
    part = layer.feedforward
    tokens = inputs(model, part.down).numel()
    gated, bias = part.gate is not None, getattr(model.get_submodule(part.up), "bias", None) is not None
    before = cost(model)
    remove_neurons(model, {0: [0, 5, 7]})
    after = cost(model)
    assert before[0] - after[0] == 3 * (16 * (2 + gated) + bias * (1 + gated))
    assert before[1] - after[1] == layer.repeats * 2 * tokens * 3 * 16 * (2 + gated)


@pytest.mark.parametrize("family", zoo.MODELS)
def test_a_layer_takes_its_parameters_and_flops(family):
    model = zoo.build(family)
    layer = describe(model).layers[0 if family == "albert" else 1]
    part, whole = layer.attention, zoo.parameters(model, layer.path)
    rows, length = inputs(model, part.output)
    up = [part.query, part.key, part.value, part.fused, part.output, layer.feedforward.up, layer.feedforward.down]
    up += [layer.feedforward.gate]
    weights = sum(model.get_submodule(path).weight.numel() for path in dict.fromkeys(up) if path is not None)
    before = cost(model)
    remove_layers(model, [1])
    after = cost(model)
    assert before[0] - after[0] == (0 if family == "albert" else whole)
    assert before[1] - after[1] == 2 * rows * length * weights + 2 * 2 * rows * 4 * length * length * 4
    assert sum(one.repeats for one in describe(model).layers) == {"whisper": 4, "t5": 4}.get(family, 2)
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("family", zoo.MODELS)
def test_zeroed_heads_and_neurons_are_not_missed(family):
    model = zoo.build(family)
    layers = describe(model).layers
    for layer in layers:  # other heads and neurons in every layer, where there is more than one
        heads = [2, 3] if layer.index % 2 else [0, 1]
        zero(model, layer.attention.output, [4 * head + i for head in heads for i in range(4)])
        zero(model, layer.feedforward.down, [layer.index, 9])
    before = zoo.outputs(model, family)
    remove_heads(model, {layer.index: [2, 3] if layer.index % 2 else [0, 1] for layer in layers})
    remove_neurons(model, {layer.index: [layer.index, 9] for layer in layers})
    torch.testing.assert_close(zoo.outputs(model, family), before, atol=1e-5, rtol=1e-5)
    remove_neurons(model, {0: [3]})  # and once more
    if family not in zoo.GROUPED_FAMILIES:
        remove_heads(model, {0: [1]})
    assert torch.isfinite(zoo.outputs(model, family)).all()


@pytest.mark.parametrize("family", BEFORE)
@pytest.mark.parametrize("gone", [[0], [1, -1]])
def test_a_zeroed_layer_is_not_missed(family, gone):
    model = zoo.build(family)
    layers = describe(model).layers
    if family == "t5" and gone == [0]:
        pytest.skip("T5's first layer makes the position bias of the others")
    for layer in (layers[index] for index in gone):
        parts = [layer.attention.output, layer.feedforward.down]
        for path in parts if layer.cross is None else [*parts, layer.cross.output]:
            zero(model, path)
    before = zoo.outputs(model, family)
    remove_layers(model, [layers[index].index for index in gone])
    torch.testing.assert_close(zoo.outputs(model, family), before, atol=1e-5, rtol=1e-5)


def attention_paths(layer) -> list[str]:
    """The attention with its norm and its scale."""
    part = layer.attention
    scales = [f"{layer.path}.layer_scale1"] if layer.path.startswith("dinov2") else []
    return [part.path, part.norm, *scales]


@pytest.mark.parametrize("family", BEFORE)
def test_a_zeroed_attention_is_not_missed(family):
    model = zoo.build(family)
    gone = [1, 2] if family in ("t5", "whisper") else [0, 1]
    whole = describe(model).layers
    for index in gone:
        zero(model, whole[index].attention.output)
    before, size = zoo.outputs(model, family), measure.parameters(model)[0]
    skip_attention(model, gone)
    torch.testing.assert_close(zoo.outputs(model, family), before, atol=1e-5, rtol=1e-5)
    assert [layer.attention is None for layer in describe(model).layers] == [i in gone for i in range(len(whole))]
    fewer = sum(16 * 16 for _ in range(2)) + sum(
        16 * 8 * 2 if family in zoo.GROUPED_FAMILIES else 16 * 16 * 2 for _ in gone
    )
    assert size - measure.parameters(model)[0] >= fewer


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "mpnet", "distilbert", "wav2vec2"])
def test_a_skipped_attention_and_its_norm_after_it_give_x(family):
    model, skipped = zoo.build(family), zoo.build(family)
    skip_attention(skipped, [1])
    part = describe(model).layers[1].attention
    module = part.norm.removesuffix(".output.LayerNorm").removesuffix(".LayerNorm")
    if module == part.norm:  # a norm beside the attention: its sum is x, and so is what it gives
        model.get_submodule(part.path).register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), *out[1:]))
        model.get_submodule(part.norm).register_forward_hook(lambda _, given, __: given[0])
    else:
        model.get_submodule(module).register_forward_hook(lambda _, given, out: (given[0], *out[1:]))
    torch.testing.assert_close(zoo.outputs(skipped, family), zoo.outputs(model, family), atol=1e-5, rtol=1e-5)


MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 3}
CUTS = {
    "heads": lambda model: remove_heads(model, {0: [0, 1], 2: [2, 3]}),
    "neurons": lambda model: remove_neurons(model, {1: [0, 3]}),
    "first layer": lambda model: remove_layers(model, [0]),
    "middle layer": lambda model: remove_layers(model, [1]),
    "first attention": lambda model: skip_attention(model, [0]),
    "middle attention": lambda model: skip_attention(model, [1]),
    "two attentions": lambda model: skip_attention(model, [0, 1]),
}
DECODERS = {family: zoo.MODELS[family] for family in zoo.CAUSAL}
DECODERS["mixed"] = lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**zoo.GROUPED, use_sliding_window=True, **MIXED))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache_equals_generation_without(family, cut):
    model = zoo.build(DECODERS[family])
    CUTS[cut](model)
    ids = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(2))
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        cached, plain = (model.generate(ids, use_cache=use, **given) for use in (True, False))
        cache = model(ids, use_cache=True).past_key_values
    assert torch.equal(cached, plain)
    attentions = sum(layer.attention is not None for layer in describe(model).layers)
    assert sum(entry.get_seq_length() > 0 for entry in cache.layers) == attentions
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("cut", ["heads", "middle layer", "middle attention"])
@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_an_encoder_decoder_generates_too(family, cut):
    model = zoo.build(family)
    CUTS[cut](model)
    if cut == "heads":
        remove_heads(model, {3: [1], 4: [0]})
    if cut == "middle attention":
        skip_attention(model, [4])
    batch = zoo.batch_for(family)
    ids = batch.pop("decoder_input_ids")
    with torch.no_grad():
        whole = model(**batch, decoder_input_ids=ids, use_cache=False).logits
        first = model(**batch, decoder_input_ids=ids[:, :3], use_cache=True)
        rest = model(
            encoder_outputs=(first.encoder_last_hidden_state,),
            decoder_input_ids=ids[:, 3:],
            past_key_values=first.past_key_values,
            use_cache=True,
        )
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", zoo.MODELS)
def test_a_cut_model_comes_back_from_its_folder(family, tmp_path):
    model = zoo.build(family)
    count = len(describe(model).layers)
    remove_heads(model, {count - 1: [0, 1], 0: [2, 3]})
    remove_neurons(model, {0: [1]})
    remove_layers(model, [1])
    if family != "albert":
        skip_attention(model, [1])
    model.save_pretrained(tmp_path)
    again = formwright.load(tmp_path).eval()
    torch.testing.assert_close(zoo.outputs(again, family), zoo.outputs(model, family), atol=0, rtol=0)
    assert describe(again) == describe(model)


def test_the_configs_of_t5s_stacks_count_their_layers_when_it_comes_back(tmp_path):
    model = zoo.build("t5")
    remove_layers(model, [1, 4])
    model.save_pretrained(tmp_path)
    for one in (model, formwright.load(tmp_path), hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)):
        assert (one.encoder.config.num_layers, one.decoder.config.num_layers) == (2, 1)
        assert (one.config.num_layers, one.config.num_decoder_layers) == (2, 1)
        assert one.decoder.config.is_decoder
        assert not one.encoder.config.is_decoder
    again = formwright.load(tmp_path).eval()
    remove_layers(again, [1])
    again.save_pretrained(tmp_path / "twice")
    assert formwright.load(tmp_path / "twice").encoder.config.num_layers == 1
    ids = zoo.batch_for("t5")["input_ids"]
    cache = again.generate(ids, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    assert len(cache.self_attention_cache.layers) == 1


def test_bias_and_device_and_grad_stay_as_they_were():
    model = zoo.build("bert").to(torch.bfloat16)
    part = describe(model).layers[0].attention
    model.get_submodule(part.query).weight.requires_grad_(False)
    kept = model.get_submodule(part.query).weight[4:].clone()
    remove_heads(model, {0: [0]})
    query = model.get_submodule(part.query)
    assert torch.equal(query.weight, kept)
    assert not query.weight.requires_grad
    assert query.bias.requires_grad
    assert (query.in_features, query.out_features, query.weight.dtype) == (16, 12, torch.bfloat16)
    module = model.get_submodule(part.path)
    assert (module.num_attention_heads, module.all_head_size) == (3, 12)


def test_nothing_to_remove_changes_nothing():
    model = zoo.build("bert")
    before = zoo.outputs(model, "bert")
    remove_heads(model, {0: []})
    remove_neurons(model, {0: []})
    remove_layers(model, [])
    skip_attention(model, [])
    assert torch.equal(zoo.outputs(model, "bert"), before)


ERRORS = [
    ("bert", lambda m: remove_heads(m, {3: [0]}), "no layer 3: its layers are 0 to 2"),
    ("bert", lambda m: remove_heads(m, {0: [4]}), "There are 4 heads of layer 0, 0 to 3: leave 4 out"),
    ("bert", lambda m: remove_heads(m, {0: [0, 1, 2, 3]}), "All 4 heads of layer 0 would be gone"),
    ("bert", lambda m: remove_neurons(m, {0: range(24)}), "All 24 neurons of layer 0 would be gone"),
    ("bert", lambda m: remove_neurons(m, {0: [-1]}), "leave -1 out"),
    ("bert", lambda m: remove_layers(m, [0, 1, 2]), "leave at least one"),
    ("bert", lambda m: skip_attention(m, [0, 1, 2]), "keep at least one"),
    ("t5", lambda m: remove_layers(m, [3, 4]), "All layers of decoder.block would be gone"),
    ("t5", lambda m: remove_layers(m, [0]), "makes the position bias for its whole stack and cannot be removed"),
    ("t5", lambda m: skip_attention(m, [3]), "makes the position bias for its whole stack and cannot be skipped"),
    ("llama", lambda m: remove_heads(m, {0: [1]}), "remove whole groups, such as heads 0, 1 together"),
    ("albert", lambda m: remove_heads(m, {1: [0]}), "a cut is one in all its repeats"),
    ("albert", lambda m: remove_layers(m, [0, 1, 2]), "All repeats of the shared layer"),
    ("albert", lambda m: skip_attention(m, [0]), "keep at least one"),
]


@pytest.mark.parametrize(("family", "cut", "says"), ERRORS)
def test_what_cannot_be_done_is_said_and_nothing_changes(family, cut, says):
    model = zoo.build(family)
    before = zoo.outputs(model, family)
    with pytest.raises(FormwrightError, match=says):
        cut(model)
    assert torch.equal(zoo.outputs(model, family), before)
    assert not isinstance(model, structure.Adopted)


def test_what_cannot_be_done_to_variants():
    model = zoo.build("bert")
    skip_attention(model, [1])
    with pytest.raises(FormwrightError, match="layer 1 was skipped or replaced"):
        remove_heads(model, {1: [0]})
    with pytest.raises(FormwrightError, match="layer 1 was skipped or replaced"):
        skip_attention(model, [1])
    groups = hf.AlbertConfig(**zoo.TEXT, **{**zoo.SIZE, "num_hidden_layers": 4}, embedding_size=8, num_hidden_groups=2)
    with pytest.raises(FormwrightError, match="2 shared layers that take turns"):
        remove_layers(hf.AlbertModel(groups), [0])
    weighed = hf.Wav2Vec2Config(**zoo.SIZE, **zoo.SOUND, use_weighted_layer_sum=True)
    with pytest.raises(FormwrightError, match="weighs the outputs of all layers"):
        remove_layers(hf.Wav2Vec2ForSequenceClassification(weighed), [0])
    with pytest.raises(FormwrightError, match="A backbone gives"):
        remove_layers(hf.Dinov2Backbone(hf.Dinov2Config(**zoo.SIZE, **zoo.IMAGE)), [0])
    sliding = zoo.build(DECODERS["mixed"])
    with pytest.raises(FormwrightError, match="a layer of full_attention: keep at least one"):
        skip_attention(sliding, [0, 2])
    other = zoo.build("bert")
    path = describe(other).layers[0].feedforward.up
    other.set_submodule(path, type("Other", (nn.Linear,), {})(16, 24))
    with pytest.raises(FormwrightError, match="which cannot be cut: cut first"):
        remove_neurons(other, {0: [0]})
