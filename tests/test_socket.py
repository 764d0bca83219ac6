"""Attention functions in Hugging Face models: equal to eager, masks kept, and nothing dropped in silence."""

import inspect

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoModelForCausalLM

from formwright import socket
from formwright.contracts import Mask, UnsupportedContext
from formwright.errors import FormwrightError

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
HEADS = {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SMALL, max_position_embeddings=64),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=64, **SPECIAL),
    "llama": lambda: transformers.LlamaConfig(**SMALL, **HEADS, num_key_value_heads=2),
    "mistral": lambda: transformers.MistralConfig(**SMALL, **HEADS, num_key_value_heads=2, sliding_window=4),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SMALL, **HEADS, cls_token_id=1, sep_token_id=2, local_attention=4, global_attn_every_n_layers=2
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    ),
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODERS = ("gpt2", "llama", "mistral")


def model(family, cls=AutoModel):
    torch.manual_seed(0)
    built = cls.from_config(CONFIGS[family](), attn_implementation="eager").eval()
    for parameter in built.parameters():  # scores far enough apart that attention is no plain mean
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return built


def ids(family, padded=None):
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.long)
    if padded == "left":
        mask[0, :4] = 0
    if padded == "right":
        mask[0, -4:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    return batch | ({"decoder_input_ids": tokens.flip(1)} if family == "t5" else {})


def run(built, batch, implementation):
    built.set_attn_implementation(implementation)
    with torch.no_grad():
        return built(**batch).last_hidden_state


@pytest.mark.reference
@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_softmax_equals_eager(family, padded):
    built, batch = model(family), ids(family, padded)
    real = batch["attention_mask"].bool() if family != "t5" else torch.ones(2, 9, dtype=torch.bool)
    eager, ours = (run(built, batch, name)[real] for name in ("eager", "formwright-softmax"))
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("name", ["softmax", "clipped-softmax(length=9, alpha=2.0)"])
def test_what_pads_hold_moves_no_real_token(family, name):
    built, batch = model(family), ids(family, "left")
    implementation = socket.register(name)
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    real = batch["attention_mask"].bool() if family != "t5" else torch.ones(2, 9, dtype=torch.bool)
    first, second = (run(built, inputs, implementation)[real] for inputs in (batch, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", [*CONFIGS, "vit"])
def test_clipped_softmax_is_another_function_and_reaches_every_layer(family):
    if family == "vit":
        built, batch = vit(), {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    else:
        built, batch = model(family), ids(family)
    eager = run(built, batch, "eager")
    assert (run(built, batch, socket.register("clipped-softmax(length=9, alpha=2.0)")) - eager).abs().max() > 1e-3
    assert socket.check_attention(built, batch) == (6 if family == "t5" else 2)  # t5: encoder, decoder, cross


def queries(q, k, v, mask, *, scaling, dropout, position_bias=None):
    """An attention function that gives its queries back, and no weights."""
    del k, v, mask, scaling, dropout, position_bias
    return q


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        initializer_range=0.3,
    )
    return AutoModel.from_config(config, attn_implementation="eager").eval()


def test_softmax_equals_eager_on_images_and_sound():
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    eager, ours = (run(vit(), pixels, name) for name in ("eager", "formwright-softmax"))
    assert torch.equal(ours, eager)
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=32,
        max_source_positions=8,
        num_mel_bins=4,
        **SPECIAL,
        decoder_start_token_id=1,
    )
    encoder = transformers.WhisperModel._from_config(config, attn_implementation="eager").eval().encoder
    sound = {"input_features": torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))}
    eager, ours = (run(encoder, sound, name) for name in ("eager", "formwright-softmax"))
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_equals_eager(family, cache):
    built, batch = model(family, AutoModelForCausalLM), ids(family, "left")
    texts = []
    for name in ("eager", "formwright-softmax"):
        built.set_attn_implementation(name)
        texts.append(
            built.generate(**batch, max_new_tokens=6, do_sample=False, cache_implementation=cache, disable_compile=True)
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_clipped_softmax_in_generate_and_alone_equals_our_part(family):
    part = socket.build("attention", "clipped-softmax(length=9, alpha=2.0)")
    built, batch = model(family), ids(family, "left")
    seen = []

    def spy(q, k, v, mask, *, scaling, dropout):
        seen.append((mask is None, dropout))
        real = batch["attention_mask"].bool()
        return part(q, k, v, mask=Mask(queries=9, keys=9, causal=family == "llama", padding=real), scaling=scaling)

    name = socket.register_attention(f"spy-{family}", spy)
    torch.testing.assert_close(
        run(built, batch, name), run(built, batch, socket.register("clipped-softmax(length=9, alpha=2.0)"))
    )
    assert seen == [(False, 0.0)] * 2


def test_output_attentions_gives_the_weights_of_eager():
    built, batch = model("llama"), ids("llama")
    weights = []
    for name in ("eager", "formwright-softmax"):
        built.set_attn_implementation(name)
        weights.append(built(**batch, output_attentions=True).attentions)
    assert len(weights[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_output_attentions_of_a_function_without_weights_raises(family):
    name = socket.register_attention("no-weights", queries)
    built, batch = model(family), ids(family)
    run(built, batch, name)
    with pytest.raises(UnsupportedContext, match="output_attentions"):
        built(**batch, output_attentions=True)


def test_sinks_and_soft_caps_are_refused_by_name():
    class Attention(torch.nn.Module):
        is_causal = False

    door, q = AttentionInterface()["formwright-softmax"], torch.randn(1, 2, 3, 4)
    for keyword in ("softcap", "s_aux", "never_heard_of"):
        with pytest.raises(UnsupportedContext, match=f"{keyword}.*Attention.*eager"):
            door(Attention(), q, q, q, None, **{keyword: 1.0})
        door(Attention(), q, q, q, None, **{keyword: None})


@pytest.mark.parametrize("said", ["module", "keyword"])
def test_causal_without_a_mask_is_refused(said):
    class Attention(torch.nn.Module):
        is_causal = said == "module"

    door, q = AttentionInterface()["formwright-softmax"], torch.randn(1, 2, 3, 4)
    given = {"is_causal": True} if said == "keyword" else {}
    with pytest.raises(UnsupportedContext, match="causal Attention without a mask"):
        door(Attention(), q, q, q, None, **given)
    door(Attention(), q[:, :, :1], q, q, None, **given)  # one query sees all that is cached
    door(Attention(), q, q, q, torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(), **given)


def test_a_window_without_a_mask_is_refused_where_it_would_cut():
    class Attention(torch.nn.Module):
        is_causal = False

    door, q = AttentionInterface()["formwright-softmax"], torch.randn(1, 2, 5, 4)
    with pytest.raises(UnsupportedContext, match="sliding window of 4"):
        door(Attention(), q, q, q, None, sliding_window=4)
    door(Attention(), q, q, q, None, sliding_window=5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_a_dense_mask_gets_its_structure_back(causal, padded):
    real = ids("bert", padded)["attention_mask"].bool()
    mask = Mask(queries=9, keys=9, causal=causal, padding=real)
    found, bias = socket._structure(mask.dense(), 9, 9, torch.device("cpu"))
    assert bias is None
    assert found.causal == causal
    assert (
        torch.equal(found.dense().expand(2, 1, 9, 9), mask.dense()) if not found.hides_nothing else mask.dense().all()
    )


def test_a_window_stays_dense_and_a_float_mask_is_added():
    i = torch.arange(9)
    window = ((i[:, None] - i).abs() < 3)[None, None]
    found, bias = socket._structure(window, 9, 9, torch.device("cpu"))
    assert found.hides_nothing
    assert torch.equal(bias == 0, window)
    lowest = torch.finfo(torch.float32).min
    found, bias = socket._structure(torch.tensor([[[[0.5, lowest]]]]), 1, 2, torch.device("cpu"))
    assert bias.tolist() == [[[[0.5, -torch.inf]]]]


def test_the_mask_function_is_registered_beside_the_function():
    socket.register_attention("with-mask", queries)
    assert AttentionMaskInterface()["formwright-with-mask"] is socket.dense_mask


def test_dropout_of_the_models_config_is_applied_in_training():
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    built = AutoModel.from_config(config, attn_implementation="formwright-softmax").train()
    first, second = (built(**ids("bert")).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_gradients_equal_eagers():
    built, batch = model("llama"), ids("llama", "left")
    real, grads = batch["attention_mask"].bool(), []
    for name in ("eager", "formwright-softmax"):
        built.set_attn_implementation(name)
        built.zero_grad()
        built(**batch).last_hidden_state[real].sum().backward()
        grads.append([p.grad.clone() for p in built.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_family_outside_the_socket_is_told():
    mpnet = AutoModel.from_config(transformers.MPNetConfig(**SMALL, pad_token_id=0), attn_implementation="eager")
    with pytest.raises(FormwrightError, match="MPNetModel has an attention of its own"):
        socket.check_attention(mpnet)


def test_a_model_without_our_attention_or_without_inputs_is_told():
    with pytest.raises(FormwrightError, match="set a Formwright attention first"):
        socket.check_attention(model("bert"))
    built = vit()
    built.set_attn_implementation("formwright-softmax")
    with pytest.raises(FormwrightError, match="reads pixel_values"):
        socket.check_attention(built)


def test_a_stored_name_that_is_never_called_is_told():
    built = model("bert")
    built.set_attn_implementation("formwright-softmax")
    assert socket.check_attention(built) == 2
    built.encoder.layer = torch.nn.ModuleList()
    with pytest.raises(FormwrightError, match="never calls it"):
        socket.check_attention(built)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: socket.register("clipped-softmax(length=8, dropout=0.1)", slug="dropped"), "dropout"),
        (lambda: socket.register("clipped-softmax(lenth=8)"), "length"),
        (lambda: socket.register("clipped-softmax"), "length"),
        (lambda: socket.register("no-such-attention"), "No attention is called"),
        (lambda: socket.register_attention("bad", lambda q: q), "scaling and dropout"),
    ],
)
def test_what_cannot_be_registered_says_why(call, says):
    with pytest.raises(FormwrightError, match=says):
        call()


def test_one_name_stands_for_one_setting():
    assert socket.register("clipped-softmax(length=9, alpha=2.0)") == "formwright-clipped-softmax"
    assert socket.register("clipped-softmax(length=9, alpha=2.0)") == "formwright-clipped-softmax"
    with pytest.raises(FormwrightError, match="slug="):
        socket.register("clipped-softmax(length=9, alpha=3.0)")
    assert socket.register("clipped-softmax(length=9, alpha=3.0)", slug="clipped-3") == "formwright-clipped-3"


def test_the_private_names_it_leans_on_are_still_there():
    from transformers.masking_utils import sdpa_mask
    from transformers.utils.output_capturing import _active_collector

    assert "allow_is_causal_skip" in inspect.signature(sdpa_mask).parameters
    assert _active_collector.get() is None
    assert transformers.PreTrainedModel._can_set_attn_implementation() in (True, False)
