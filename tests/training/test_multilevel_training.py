"""Multi-level training: exact properties of the operators, then the paper's matrices written out, then the cycle."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

from formwright.build import build
from formwright.errors import FormwrightError
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerForImageClassification,
    TransformerForMaskedLM,
)
from formwright.tasks.base import accuracy_and_loss, score_next
from formwright.training import Settings, fit
from formwright.training.multilevel_training import MultiLevel, coalesce, decoalesce, interpolate

D, H, L, V = 16, 4, 4, 40
TEXT = {"vocab_size": V, "hidden_size": D, "num_attention_heads": H, "num_hidden_layers": L, "intermediate_size": 24}
BERT = {**TEXT, "max_position_embeddings": 32, "pad_token_id": 0}
GPT2 = {"vocab_size": V, "n_embd": D, "n_layer": L, "n_head": H, "n_inner": 24, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
PAIR = {"architecture": "encoder-decoder", "decoder_start_token_id": 0, "pad_token_id": 0, "num_decoder_layers": 6}
IMAGE = {"vocab_size": 0, "image_size": 8, "class_token": True, "pooling": "first", "pooler": True}


def ours(kind=TransformerForCausalLM, **options):
    return lambda: kind(TransformerConfig(**{"architecture": "decoder", **TEXT, **options}))


MODELS = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)),
    "bert untied": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT, tie_word_embeddings=False)),
    "bert pretraining": lambda: hf.BertForPreTraining(hf.BertConfig(**BERT)),
    "bert classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2 untied": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, tie_word_embeddings=False)),
    "gpt2 plain width": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**{**GPT2, "n_inner": None})),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=8, patch_size=4, num_labels=3)
    ),
    "vit base": lambda: hf.ViTModel(
        hf.ViTConfig(**{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=8, patch_size=4)
    ),
    "ours": ours(),
    "ours post": ours(block="post", position="rope", feedforward="relu"),
    "ours sub-ln": ours(block="sub-ln", position="t5", lm_head_bias=True),
    "ours llama": ours(norm="rmsnorm", feedforward="swiglu", position="rope", num_key_value_heads=2, qkv_bias=False),
    "ours multi-query": ours(num_key_value_heads=1, tie_word_embeddings=False, intermediate_size=None),
    "ours bert": ours(TransformerForMaskedLM, architecture="encoder", head_transform=True, block="post",
                      type_vocab_size=2, embedding_norm=True),
    "ours masked": ours(TransformerForMaskedLM, architecture="encoder"),
    "ours pair": ours(TransformerForConditionalGeneration, **PAIR, position="t5", cross_position="t5"),
    "ours images": ours(TransformerForImageClassification, architecture="encoder", **IMAGE, num_labels=3),
}  # fmt: skip


def make(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch_for(model):
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(2, V, (2, 7), generator=generator)
    pair = getattr(model.config, "architecture", "") == "encoder-decoder"
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if pair else {})}


@torch.no_grad()
def answer(model):
    output = model(**batch_for(model))
    return (
        output.logits
        if "logits" in output
        else output.prediction_logits
        if "prediction_logits" in output
        else output[1]
    )


def weights(model):
    return dict(model.named_parameters())


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("scale", ["exact", "official"])
@pytest.mark.parametrize(("width", "depth"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", MODELS)
def test_coalescing_undoes_decoalescing_exactly(name, width, depth, scale):
    how = {"pairs": "halves", "embed_scale": scale}
    big = make(name)
    small = coalesce(big, width=width, depth=depth, **how)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    again = coalesce(decoalesce(small, big, **how), width=width, depth=depth, **how)
    for key, value in small.named_parameters():
        assert torch.equal(again.get_parameter(key), value), key


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vit base"])
def test_a_model_made_twice_as_wide_computes_the_same(name):
    big = make(name)
    small = coalesce(big, depth=False)
    wide = decoalesce(small, big)
    torch.testing.assert_close(answer(wide), answer(small), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(answer(small), answer(big), atol=1e-2)


@pytest.mark.parametrize(
    ("name", "kept"), [("bert", True), ("bert untied", True), ("gpt2", False), ("gpt2 untied", True)]
)
def test_the_releases_scale_keeps_what_post_norm_computes_and_not_pre_norm(name, kept):
    big = make(name)
    small = coalesce(big, depth=False, embed_scale="official")
    wide = decoalesce(small, big, embed_scale="official")
    found = (answer(wide) - answer(small)).abs().max().item()
    assert (found < 1e-3) if kept else (found > 1e-2)


@pytest.mark.parametrize("pairs", ["neighbours", "halves"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "ours"])
def test_a_small_layer_is_the_mean_of_two_and_both_become_its_copies(name, pairs):
    big = make(name)
    small = coalesce(big, width=False, pairs=pairs)
    path = next(path for path, module in big.named_modules() if isinstance(module, nn.ModuleList))
    members = [(0, 1), (2, 3)] if pairs == "neighbours" else [(0, 2), (1, 3)]
    back = decoalesce(small, big, pairs=pairs)
    for j, (a, b) in enumerate(members):
        for key, value in small.get_submodule(f"{path}.{j}").named_parameters():
            ends = (big.get_submodule(f"{path}.{i}").get_parameter(key) for i in (a, b))
            torch.testing.assert_close(value, sum(ends) / 2)
            for i in (a, b):
                assert torch.equal(back.get_submodule(f"{path}.{i}").get_parameter(key), value)
    outside = [key for key in weights(big) if not key.startswith(path)]
    assert all(torch.equal(weights(back)[key], weights(big)[key]) for key in outside)


@pytest.mark.parametrize("name", MODELS)
def test_the_small_model_is_an_ordinary_one_of_half_the_sizes(name, tmp_path):
    big = make(name)
    state = torch.get_rng_state()
    small = coalesce(big)
    assert torch.equal(torch.get_rng_state(), state)
    fresh = type(small)(small.config)
    assert {key: value.shape for key, value in weights(fresh).items()} == {
        k: v.shape for k, v in weights(small).items()
    }
    assert size(small) < size(big) / 2
    config = small.config
    assert config.hidden_size == D // 2
    assert config.num_hidden_layers == L // 2
    assert config.num_attention_heads == H // 2
    small.save_pretrained(tmp_path)
    assert torch.equal(answer(type(small).from_pretrained(tmp_path).eval()), answer(small))


def test_alpha_goes_from_one_model_to_the_other():
    old, other = make("gpt2"), make("gpt2", seed=1)
    for alpha, expected in ((0.0, old), (1.0, other)):
        model = make("gpt2")
        interpolate(model, other, alpha)
        assert all(torch.equal(weights(model)[key], value) for key, value in weights(expected).items())
    model = make("gpt2")
    interpolate(model, other, 0.25)
    for key, value in weights(model).items():
        torch.testing.assert_close(value, 0.75 * weights(old)[key] + 0.25 * weights(other)[key])


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_duplicates_have_equal_gradients_until_interpolation_breaks_the_symmetry(alpha):
    model = make("ours")
    interpolate(model, decoalesce(coalesce(model), model), alpha)
    batch = batch_for(model)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    for layer in model.model.decoder.layers:
        first, second = layer.block.feedforward.up.weight.grad.chunk(2)
        assert torch.allclose(first, second, atol=1e-6) == (alpha == 1)


@torch.no_grad()
@pytest.mark.reference
@pytest.mark.parametrize("scale", ["exact", "official"])
def test_bert_is_coalesced_and_back_by_the_papers_matrices(scale):
    """W_s = F W T and W = T W_s F with row-normalised matrices, layers averaged by R and copied by its transpose."""

    def rows(matrix):
        return matrix / matrix.sum(1, keepdim=True)

    def matrix(width):
        return rows(torch.cat([torch.eye(width // 2)] * 2, 1))

    def linear(module, out, into):
        return {"weight": out @ module["weight"] @ rows(into.T), "bias": out @ module["bias"]}

    def mapped(state, stream, hidden):
        found = {}
        for key in state:
            path, _, kind = key.rpartition(".")
            value = state[key]
            if "embeddings.weight" in key:
                found[key] = value @ stream.T
            elif "LayerNorm" in key:
                found[key] = stream @ value
            elif key.startswith("cls.predictions.bias"):
                found[key] = value
            elif kind == "weight":
                pair = (hidden, stream) if "intermediate" in key else (stream, stream)
                pair = (stream, hidden) if path.endswith("output.dense") and "attention" not in path else pair
                made = linear({"weight": value, "bias": state[f"{path}.bias"]}, *pair)
                found |= {f"{path}.{name}": one for name, one in made.items()}
        return found

    big = make("bert")
    stream, hidden = matrix(D), matrix(24)
    r = torch.kron(torch.eye(L // 2), torch.tensor([[0.5, 0.5]]))
    down = mapped(weights(big), stream, hidden)
    expected = {}
    for key, value in down.items():
        parts = key.split(".")
        if parts[:3] == ["bert", "encoder", "layer"]:
            i, rest = int(parts[3]), ".".join(parts[4:])
            for j in range(L // 2):
                name = f"bert.encoder.layer.{j}.{rest}"
                expected[name] = expected.get(name, 0) + r[j, i] * value
        else:
            expected[key] = value
    final = "cls.predictions.transform.LayerNorm."
    for key in expected:
        if key.startswith(final) if scale == "exact" else "embeddings.weight" in key:
            expected[key] = 2 * expected[key]
    small = coalesce(big, embed_scale=scale)
    assert expected.keys() == weights(small).keys()
    for key, value in weights(small).items():
        torch.testing.assert_close(value, expected[key], msg=key)
    up = mapped(weights(small), rows(stream.T), rows(hidden.T))
    for key, value in weights(decoalesce(small, big, embed_scale=scale)).items():
        parts = key.split(".")
        if parts[:3] == ["bert", "encoder", "layer"]:
            key = ".".join([*parts[:3], str(int(parts[3]) // 2), *parts[4:]])
        halved = key.startswith(final) if scale == "exact" else "embeddings.weight" in key
        torch.testing.assert_close(value, up[key] / 2 if halved else up[key], msg=key)


# The cycle


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(2, V, (32, 7), generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def task():
    return SimpleNamespace(
        name="rows",
        head="causal-lm",
        train=Rows(),
        validation=Rows(),
        test=Rows(),
        collate=lambda items: {key: torch.stack([one[key] for one in items]) for key in items[0]},
        score=score_next,
        summary=accuracy_and_loss,
    )


def settings(**more):
    return Settings(**{"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "warmup": 0.0, **more})


def test_the_cycle_is_its_parts_one_after_the_other():
    given = settings(methods="multilevel(first=0.5, small=1.5, rate=4, alpha=0.25)")
    model, by_hand = make("ours"), make("ours")
    history = fit(model, task(), given)
    fit(by_hand, task(), settings(steps=2, schedule="constant", warmup=0.5, seed=1))
    small = coalesce(by_hand)
    fit(small, task(), settings(steps=6, learning_rate=4e-3, seed=2))
    interpolate(by_hand, decoalesce(small, by_hand), 0.25)
    expected = fit(by_hand, task(), settings())
    assert history.losses == expected.losses
    assert all(torch.equal(weights(model)[key], value) for key, value in weights(by_hand).items())


def test_levels_go_down_and_up_and_tell_what_they_learnt():
    model = make("ours")
    cycle = MultiLevel(levels=3, first=0.5)
    fit(model, task(), settings(evaluate_every=2), methods=[cycle])
    found = [(phase.level, len(phase.history.losses)) for phase in cycle.phases]
    assert found == [(0, 2), (1, 2), (2, 4), (1, 4)]
    assert all(phase.history.curve for phase in cycle.phases)
    assert model.config.hidden_size == D


def test_without_a_first_part_the_cycle_starts_small():
    cycle = MultiLevel(first=0.0, small=0.5, width=False)
    fit(make("gpt2"), task(), settings(), methods=[cycle])
    assert [phase.level for phase in cycle.phases] == [1]


def test_bad_input_is_refused():
    for options, said in (
        ("alpha=1.5", "alpha"),
        ("levels=1", "levels"),
        ("small=0", "small"),
        ("pairs=thirds", "pairs"),
        ("embed_scale=loud", "embed_scale"),
    ):
        with pytest.raises(FormwrightError, match=said):
            build("training", f"multilevel({options})")
    for model, said in (
        (hf.AlbertModel(hf.AlbertConfig(**BERT, embedding_size=8)), "does not know albert"),
        (hf.BertModel(hf.BertConfig(**{**BERT, "num_hidden_layers": 3})), "divisible by 2"),
        (hf.BertLMHeadModel(hf.BertConfig(**BERT, is_decoder=True)), "decoder"),
        (ours(sharing="sandwich")(), "sharing"),
        (ours(position="alibi")(), "position"),
        (ours(mixer="mamba", position="none")(), "softmax"),
        (ours(feedforward=["relu", "gelu"])(), "depth=False"),
        (ours(num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=5)(), "num_hidden_layers"),
    ):
        with pytest.raises(FormwrightError, match=said):
            coalesce(model)
    with pytest.raises(FormwrightError, match="Neither"):
        coalesce(make("gpt2"), width=False, depth=False)
    with pytest.raises(FormwrightError, match="no half"):
        decoalesce(coalesce(coalesce(make("gpt2"))), make("gpt2"))
    with pytest.raises(FormwrightError, match="divisible by 8"):
        fit(make("ours"), task(), settings(methods="multilevel(levels=4)"))
    with pytest.raises(FormwrightError, match="alone"):
        fit(make("ours"), task(), settings(methods="multilevel + multilevel"))
