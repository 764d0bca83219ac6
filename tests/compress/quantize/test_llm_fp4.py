"""LLM-FP4: the search, the channel shifts, what is stored; then a slow search by enumeration."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

import formwright
from formwright.build import build
from formwright.compress import pipeline
from formwright.compress.modifier import Data
from formwright.compress.quantize.llm_fp4 import (
    LLMFP4,
    FP4Embedding,
    FP4Linear,
    OutputError,
    Searcher,
    candidates,
    formats,
    quantise_shifted,
    search_table,
    shifts,
)
from formwright.errors import FormwrightError
from formwright.ops.minifloat import Minifloat, quantise

E2M1 = Minifloat(2, 1)
IDS = torch.arange(36).reshape(4, 9) % 20


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=14, n_layer=2, n_head=2, n_positions=16))


def llama() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 23, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, num_attention_heads=2, num_key_value_heads=1, **sizes))


def bert() -> BertForSequenceClassification:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_attention_heads=2, **sizes))


def masked() -> BertForMaskedLM:
    """Ties a bias beside the table."""
    return BertForMaskedLM(bert().config)


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=20, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2))


def vit() -> ViTForImageClassification:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_attention_heads=2, **sizes))


def made(family) -> Any:
    torch.manual_seed(0)
    return family().eval()


def data(kind: str = "causal-lm") -> Data:
    def collate(items: list) -> dict[str, torch.Tensor]:
        ids = torch.stack([one[0] for one in items])
        if kind == "image-classification":
            return {"pixel_values": torch.randn(len(ids), 3, 8, 8, generator=torch.Generator().manual_seed(0))}
        mask = torch.ones_like(ids)
        mask[:, 7:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}

    rows = TensorDataset(torch.randint(20, (20, 9), generator=torch.Generator().manual_seed(0)))
    task: Any = SimpleNamespace(name="rows", head="", train=rows, validation=None, test=rows, score=None, summary=None)
    task.collate = collate
    return Data(task=task, kind=kind)  # type: ignore[arg-type]


def quick(**options: Any) -> LLMFP4:
    return LLMFP4(**({"candidates": 8, "rounds": 1, "samples": 12} | options))


def layer(shifted: bool, search: Any = "maxval", rows: int = 40, dtype: torch.dtype = torch.float64) -> Searcher:
    """Channels four and more times apart."""
    seeded = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 12, generator=seeded, dtype=dtype) * torch.exp2(torch.arange(12) % 4 * 2.0).to(dtype)
    weight = torch.randn(7, 12, generator=seeded, dtype=dtype)
    forms = formats(4, "fpq")
    return Searcher(x, x.abs().amax(0), weight, forms, forms, shifted, 20, search)


def error(found: Searcher) -> float:
    x = found.quantised_inputs(found.inputs.form, found.inputs.bias)
    weight = quantise(found.weight, found.weights.form, found.weights.bias)
    return float((x @ weight.T - found.x @ found.weight.T).square().mean())


def test_every_mantissa_of_four_bits_and_two_to_six_of_eight() -> None:
    assert {str(form) for form in formats(4, "fpq")} == {"E3M0", "E2M1", "E1M2"}
    assert sorted(form.mantissa for form in formats(8, "fpq-baseline")) == [2, 3, 4, 5, 6]
    assert [str(form) for form in formats(4, "minmax-fp") + formats(4, "minmax-int")] == ["E2M1", "E1M2"]


def test_candidates_are_multiples_of_the_bias_or_of_the_largest_value() -> None:
    b = torch.tensor([3.0, -1.0])
    literal, ours = candidates(b, 100, "bias"), candidates(b, 100, "maxval")
    torch.testing.assert_close(literal[1], 0.01 * b)
    torch.testing.assert_close(literal[-1], 1.2 * b)
    torch.testing.assert_close(torch.exp2(b - ours[1]), torch.full((2,), 0.5))
    torch.testing.assert_close(torch.exp2(b - ours[-1]), torch.full((2,), 1.2))
    assert torch.equal(literal[0], b)
    assert len(ours) == 101


def test_shifts_are_whole_and_fit_the_exponent() -> None:
    channels = torch.tensor([1.2, 2.6, 9.9, 0.4, 60.0])
    for form in formats(4, "fpq"):
        found = shifts(channels, torch.tensor(1.4), form)
        assert torch.equal(found, (channels.round() - 1).clamp(0, 2**form.exponent - 1))


def test_a_shifted_channel_is_quantised_with_its_own_bias() -> None:
    x, rho, s = torch.randn(9, 4, dtype=torch.float64), torch.tensor(1.3), torch.tensor([0.0, 1.0, 2.0, 3.0])
    each = [quantise(x[:, j], E2M1, rho.double() + s[j]) for j in range(4)]
    assert torch.equal(quantise_shifted(x, E2M1, rho.double(), s), torch.stack(each, 1))


def test_without_shifts_it_is_the_baseline() -> None:
    x, rho = torch.randn(9, 4), torch.tensor(1.3)
    assert torch.equal(quantise_shifted(x, E2M1, rho, torch.zeros(4)), quantise(x, E2M1, rho))
    one, two = layer(True), layer(False)
    one.x = two.x = one.x / one.reach  # every channel reaches 1
    one.reach = two.reach = torch.ones_like(one.reach)
    for found in (one, two):
        found.__post_init__()
        found.search_biases("weights")
    assert torch.equal(one.weights.bias, two.weights.bias)
    assert not one.shift(one.inputs.form, one.inputs.bias).any()


@pytest.mark.parametrize("form", formats(4, "fpq"), ids=str)
def test_shifts_lower_the_error_of_uneven_channels_on_the_same_biases(form) -> None:
    least = []
    for one in (layer(True), layer(False)):
        tried = candidates(one.start["inputs"][form], 20, "maxval")
        least.append(min(float((one.quantised_inputs(form, rho) - one.x).square().mean()) for rho in tried))
    assert least[0] <= least[1]


@pytest.mark.parametrize(("m", "i"), [(30, 5), (5, 30)])
def test_the_output_error_is_the_squares_less_a_constant(m, i) -> None:
    a, e, d = (torch.randn(*size, dtype=torch.float64) for size in ((m, i), (m, 3), (3, i)))
    direct = (a @ d.T + e).square().sum(0) - e.square().sum(0)
    torch.testing.assert_close(OutputError(a, e)(d), direct)


@pytest.mark.parametrize("search", ["maxval", "bias"])
def test_the_search_lowers_the_output_error_and_shifts_lower_it_further(search) -> None:
    baseline, fpq = layer(False, search), layer(True, search)
    start = error(baseline)
    for found in (baseline, fpq):
        found.run(2)
    assert error(fpq) < error(baseline) < start


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_module_computes_what_was_searched(shifted, dtype) -> None:
    found = layer(shifted, dtype=dtype)
    found.run(1)
    old = nn.Linear(12, 7, dtype=dtype)
    module = FP4Linear.of(old, found, fold=False)
    weight = quantise(found.weight, found.weights.form, found.weights.bias)
    assert torch.equal(module.weight, weight)
    x = found.quantised_inputs(found.inputs.form, found.inputs.bias)
    assert torch.equal(module(found.x), nn.functional.linear(x, weight, old.bias))


def test_folding_after_quantising_is_exact() -> None:
    found = layer(True)
    found.run(1)
    module = FP4Linear.of(nn.Linear(12, 7, dtype=torch.float64), found, fold=False)
    factor = torch.exp2(module.shift.double())
    assert factor.max() > 1
    x = quantise(found.x * factor, found.inputs.form, found.inputs.bias)  # one bias for all channels
    weight = module.weight / factor
    assert torch.equal(nn.functional.linear(x, weight, module.bias), module(found.x))


def test_a_folded_module_multiplies_numbers_of_four_bits_alone() -> None:
    found = layer(True)
    found.run(1)
    module = FP4Linear.of(nn.Linear(12, 7, dtype=torch.float64), found, fold=True)
    factor = torch.exp2(module.shift.double())
    folded = found.folded()
    assert torch.equal(module.weight, quantise(found.weight / factor, folded.weights.form, folded.weights.bias))
    x = quantise(found.x * factor, found.inputs.form, found.inputs.bias)
    assert torch.equal(module(found.x), nn.functional.linear(x, module.weight, module.bias))


@pytest.mark.parametrize(
    ("family", "kind"),
    [(gpt2, "causal-lm"), (llama, "causal-lm"), (bert, "text-classification"), (masked, "causal-lm")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_saves_and_comes_back_exactly(tmp_path, family, kind, dtype) -> None:
    model = made(family).to(dtype)
    change = pipeline.apply(model, quick(fold=family is llama), data(kind))
    assert change.simulated
    model.save_pretrained(tmp_path)
    back = formwright.load(tmp_path).eval()
    assert torch.equal(back(IDS).logits, model(IDS).logits)
    assert back(IDS).logits.dtype == dtype


def test_all_linear_layers_and_the_input_embeddings_but_not_the_output_layer() -> None:
    for family in (gpt2, llama):
        model = made(family)
        pipeline.apply(model, quick(), data())
        left = [path for path, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
        assert left == ["lm_head"]
        assert isinstance(model.get_input_embeddings(), FP4Embedding)


def test_a_tied_output_layer_keeps_full_precision() -> None:
    model = made(gpt2)
    before = model.lm_head.weight.detach().clone()
    assert model.lm_head.weight is model.transformer.wte.weight
    pipeline.apply(model, quick(), data())
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(model.transformer.wte.weight, before)


def test_a_table_that_two_modules_read_stays(tmp_path) -> None:
    model = made(t5)
    pipeline.apply(model, quick(), data())
    assert type(model.get_input_embeddings()) is nn.Embedding
    model.save_pretrained(tmp_path)
    back = formwright.load(tmp_path).eval()
    assert torch.equal(back(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_images_have_no_table() -> None:
    model = made(vit)
    pipeline.apply(model, quick(), data("image-classification"))
    assert isinstance(model.classifier, FP4Linear)


def test_two_codes_take_a_byte() -> None:
    model = made(llama)
    pipeline.apply(model, quick(), data())
    down = model.model.layers[0].mlp.down_proj
    assert down.codes.dtype == torch.uint8
    assert down.codes.shape == (16, 12)  # 23 inputs
    wide = made(llama)
    pipeline.apply(wide, quick(weight_bits=8), data())
    assert wide.model.layers[0].mlp.down_proj.codes.shape == (16, 23)


def test_a_cast_leaves_the_biases_alone() -> None:
    model = made(llama)
    pipeline.apply(model, quick(), data())
    module = model.model.layers[0].mlp.down_proj
    before = module.weight
    assert torch.equal(copy.deepcopy(model).bfloat16().float().model.layers[0].mlp.down_proj.weight, before)


def test_layers_are_searched_on_what_the_quantised_layers_before_them_give() -> None:
    model = made(llama)
    modifier, seen = LLMFP4(method="minmax-fp", samples=12), {}
    linear = modifier.linear
    modifier.linear = lambda module, x: seen.setdefault(id(module), x.clone()) is None or linear(module, x)  # type: ignore[method-assign]
    last = model.model.layers[1].mlp.down_proj
    modifier.calibrate(model, data())
    batches = modifier.batches
    modifier.apply(model)
    modifier.batches = batches
    assert torch.equal(seen[id(last)], modifier.read(model, model.model.layers[1].mlp.down_proj))


def test_padding_is_left_out_and_samples_are_as_many_as_asked() -> None:
    model = made(llama)
    modifier = quick(samples=11)
    modifier.calibrate(model, data())
    assert modifier.read(model, model.model.layers[0].mlp.up_proj).shape == (11 * 7, 16)
    assert modifier.read(model, model.model.embed_tokens).shape == (11 * 7,)
    assert len(quick(tokens=10).spread(torch.randn(77, 16))) == 10


def test_calibration_changes_nothing() -> None:
    model = made(llama)
    before = copy.deepcopy(model.state_dict())
    quick().calibrate(model, data())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_eight_bits_are_nearer_than_four() -> None:
    distance = {}
    for bits in (4, 8):
        model = made(llama)
        before = model(IDS).logits.detach()
        pipeline.apply(model, quick(weight_bits=bits, activation_bits=bits), data())
        distance[bits] = float((model(IDS).logits.detach() - before).norm() / before.norm())
    assert distance[8] < 0.25 * distance[4]


@pytest.mark.parametrize("option", [{"rounds": 2}, {"candidates": 8}, {"search": "bias"}])
def test_what_searches_nothing_takes_no_options_of_the_search(option: dict[str, Any]) -> None:
    with pytest.raises(FormwrightError, match="searches nothing"):
        LLMFP4(method="minmax-int", **option)


def test_the_modifier_is_in_the_catalogue() -> None:
    built = build("modifier", "llm-fp4(method=minmax-int, weight_bits=8)")
    assert isinstance(built, LLMFP4)
    assert (built.method, built.weight_bits) == ("minmax-int", 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weight_bits": 2}, "weight_bits is 2"),
        ({"activation_bits": 9}, "activation_bits is 9"),
        ({"rounds": 0}, "rounds is 0"),
        ({"candidates": 1}, "candidates is 1"),
        ({"samples": 0}, "samples is 0"),
        ({"tokens": 0}, "tokens is 0"),
        ({"method": "fpq-baseline", "fold": True}, "fold"),
    ],
)
def test_bad_options_are_refused(options, says) -> None:
    with pytest.raises(FormwrightError, match=says):
        LLMFP4(**options)


@pytest.mark.parametrize("spec", ["llm-fp4(method=int)", "llm-fp4(search=scale)"])
def test_unknown_choices_are_refused(spec) -> None:
    with pytest.raises(FormwrightError, match="max"):
        build("modifier", spec)


def test_a_model_that_is_quantised_already_is_refused() -> None:
    model = made(llama)
    pipeline.apply(model, quick(), data())
    with pytest.raises(FormwrightError, match="no linear layer"):
        pipeline.apply(model, quick(), data())


@pytest.mark.reference
def test_a_slow_search_finds_the_same_biases() -> None:
    """One candidate, channel and format at a time, by the nearest of all values and the whole output error."""
    found = layer(False, rows=30)

    def round_to(x: torch.Tensor, form: Minifloat, b: float) -> torch.Tensor:
        table = torch.tensor(form.values(), dtype=torch.float64) * 2.0**-b
        return table[(x[..., None] - table).abs().argmin(-1)]

    exact = found.x @ found.weight.T
    x = round_to(found.x, found.inputs.form, float(found.inputs.bias))
    expected = {}
    for form in found.weight_forms:
        rows = []
        for o, row in enumerate(found.weight):
            tried = [float(b) for b in candidates(form.bias(row.abs().max()).float(), 20, "maxval")]
            rows.append(min(tried, key=lambda b: float((x @ round_to(row, form, b) - exact[:, o]).square().sum())))
        expected[form] = rows
    found.search_biases("weights")
    for form, rows in expected.items():
        torch.testing.assert_close(found.weights.biases[form].flatten().tolist(), rows)

    found.search_biases("inputs")
    form = found.inputs.form
    weight = torch.stack(
        [
            round_to(row, found.weights.form, b)
            for row, b in zip(found.weight, expected[found.weights.form], strict=True)
        ]
    )
    tried = [float(b) for b in candidates(form.bias(found.reach.max()).float(), 20, "maxval")]
    best = min(tried, key=lambda b: float((round_to(found.x, form, b) @ weight.T - exact).square().sum()))
    assert float(found.inputs.bias) == pytest.approx(best)


@pytest.mark.reference
def test_a_slow_search_finds_the_same_table() -> None:
    table = torch.randn(9, 5, dtype=torch.float64)
    tried = [
        (float((quantise(table, form, b) - table).square().sum()), form, float(b))
        for form in formats(4, "fpq")
        for b in candidates(form.bias(table.abs().max()).float(), 30, "maxval")
    ]
    form, bias = search_table(table, table, formats(4, "fpq"), 30, "maxval")
    assert (form, float(bias)) == min(tried, key=lambda one: one[0])[1:]
    assert search_table(table, table, [E2M1], 0, "maxval")[1] == E2M1.bias(table.abs().max()).float()
