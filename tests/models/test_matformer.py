"""MatFormer: granularities of a model, extraction, Mix'n'Match, and drafting for itself."""

from itertools import pairwise

import pytest
import torch

from formwright.errors import FormwrightError
from formwright.models.matformer import choose, drafter, extract, fitting, mixes, size
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerForSequenceClassification,
    TransformerModel,
)

WIDTHS = (8, 16, 32, 64)


def built(cls=TransformerForCausalLM, architecture="decoder", **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 3, "max_position_embeddings": 64}
    return cls(
        TransformerConfig(architecture=architecture, init="fan-in", **sizes, **{"feedforward": "matformer"} | options)
    ).eval()


def ids(n=9, rows=2):
    return torch.randint(1, 23, (rows, n), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(model):
    given = {"decoder_input_ids": ids()} if model.config.is_encoder_decoder else {}
    found = model(ids(), **given)
    return found.logits if "logits" in found else found.last_hidden_state


@pytest.mark.parametrize("granularities", [1, 2, 4, (1, 2, 2), (4, 1, 3)])
@pytest.mark.parametrize(
    ("cls", "architecture", "options"),
    [
        (TransformerForCausalLM, "decoder", {}),
        (TransformerModel, "encoder", {"feedforward": "matformer(form=swiglu, bias=false)"}),
        (TransformerForSequenceClassification, "encoder", {"feedforward": ["matformer", "matformer(form=relu)"]}),
        (
            TransformerForConditionalGeneration,
            "encoder-decoder",
            {"num_decoder_layers": 2, "decoder_start_token_id": 1},
        ),
    ],
)
def test_an_extracted_model_is_an_ordinary_one_that_computes_the_same(
    cls, architecture, options, granularities, tmp_path
):
    model = built(cls, architecture, **options)
    small = extract(model, granularities)
    choose(model, granularities)
    torch.testing.assert_close(outputs(small), outputs(model), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) == size(model, granularities)
    assert "matformer" not in str(small.config.feedforward)
    small.save_pretrained(tmp_path)
    loaded, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(outputs(loaded.eval()), outputs(small))


def test_extraction_copies_and_leaves_the_model_and_the_random_state_alone():
    model = built().to(torch.bfloat16)
    state, before = torch.get_rng_state(), outputs(model)
    small = extract(model.train(), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert small.dtype is torch.bfloat16
    assert small.training
    assert small.lm_head.weight is small.model.embeddings.tokens.weight
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7)
    assert torch.equal(outputs(model.eval()), before)


def test_parameters_are_those_of_the_rest_and_of_the_chosen_widths():
    model = built()
    rest = size(model, 4) - 3 * (2 * 16 * 64 + 64 + 16)
    for granularities in (1, (1, 2, 4)):
        each = [granularities] * 3 if granularities == 1 else granularities
        assert size(model, granularities) == rest + sum(2 * 16 * WIDTHS[g - 1] + WIDTHS[g - 1] + 16 for g in each)


def test_a_constant_mix_is_the_uniform_sub_model():
    model = built()
    choose(model, 2)
    uniform = outputs(model)
    choose(model, (2, 2, 2))
    assert torch.equal(outputs(model), uniform)
    assert extract(model, (2, 2, 2)).config.feedforward == extract(model, 2).config.feedforward


def test_caches_of_all_granularities_have_one_shape_and_fit_each_other():
    model = built()
    shapes = []
    for granularity in (1, 4):
        choose(model, granularity)
        past = model(ids(), use_cache=True).past_key_values
        shapes.append([layer.stored()[0].shape for layer in past.layers])
    assert shapes[0] == shapes[1]
    choose(model, 1)
    with torch.no_grad():  # a prompt read by the smallest, a token by the largest
        past = model(ids(), use_cache=True).past_key_values
        choose(model, 4)
        assert model(ids(1), past_key_values=past).logits.isfinite().all()


def test_mixes_never_decrease_with_depth_use_neighbours_and_grow_by_one_layer():
    found = list(mixes(3, 4))
    assert len(found) == len(set(found)) == 3 * 3 + 1
    assert (found[0], found[-1]) == ((1, 1, 1), (4, 4, 4))
    for mix in found:
        assert list(mix) == sorted(mix)
        assert mix[-1] - mix[0] <= 1
    assert all(sum(b) - sum(a) == 1 for a, b in pairwise(found))


def test_a_budget_is_met_within_one_step():
    model = built()
    sizes = [size(model, mix) for mix in mixes(3, 4)]
    assert sizes == sorted(sizes)
    for budget in range(sizes[0], sizes[-1] + 500, 97):
        place = sizes.index(size(model, fitting(model, parameters=budget)))
        assert sizes[place] <= budget
        assert place == len(sizes) - 1 or sizes[place + 1] > budget
    with pytest.raises(FormwrightError, match="smallest model"):
        fitting(model, parameters=sizes[0] - 1)


def test_a_drafter_shares_every_weight_and_keeps_its_own_granularity():
    model = built()
    before = outputs(model)
    draft = drafter(model, 1)
    mine, its = dict(model.named_parameters()), dict(draft.named_parameters())
    assert all(its[name] is value for name, value in mine.items())
    assert torch.equal(outputs(model), before)
    torch.testing.assert_close(outputs(draft), outputs(extract(model, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularities", [1, (1, 1, 4)])
def test_drafting_for_itself_gives_the_models_own_greedy_text(granularities):
    model = built(position="rope").double()
    draft = drafter(model, granularities)
    asked = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    for seed in range(2):
        prompt = torch.randint(1, 23, (1, 5), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(model.generate(prompt, assistant_model=draft, **asked), model.generate(prompt, **asked))


def test_what_cannot_be_chosen_says_why():
    model = built()
    for wrong in (0, 5, (1, 2), (1, 2, 5)):
        with pytest.raises(FormwrightError, match="3 layers with granularities 1 to 4"):
            choose(model, wrong)
    for other in (built(feedforward="gelu"), built(feedforward=["matformer", "gelu"])):
        with pytest.raises(FormwrightError, match="matformer"):
            extract(other, 1)
    with pytest.raises(FormwrightError, match="Linear"):
        choose(torch.nn.Linear(2, 2), 1)
