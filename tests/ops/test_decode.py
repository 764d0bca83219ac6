"""A decoding step in one call equals the step in tensor operations."""

import pytest
import torch
from torch import nn

from formwright.models import decoding
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.ops.decode import BlockWeights, block_step, block_step_reference, kernel

pytestmark = pytest.mark.skipif(kernel() is None, reason="the native kernels are not built here")


def made(batch, dim, heads, groups, width, hidden, room, biases=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)

    rows = (heads + 2 * groups) * width
    shapes = [(dim,), (dim,), (rows, dim), (rows,), (dim, heads * width), (dim,)]
    shapes += [(dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,)]
    tensors = [random(*shape) if biases or i not in (3, 5, 9, 11) else None for i, shape in enumerate(shapes)]
    buffers = [torch.randn(batch, groups, room, width, generator=generator) for _ in range(2)]
    return torch.randn(batch, 1, dim, generator=generator), BlockWeights(*tensors), *buffers


SIZES = [
    (1, 16, 4, 4, 4, 64, 9),
    (2, 24, 4, 2, 6, 33, 300),
    (3, 40, 8, 1, 5, 7, 700),
    (1, 64, 1, 1, 64, 256, 64),
    (1, 96, 1, 1, 96, 40, 65),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu-tanh"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_call_equals_many(sizes, activation, padded, threads):
    x, weights, keys, values = made(*sizes, biases=activation != "relu")
    past = sizes[-1] - 1
    seen = None
    if padded:
        seen = torch.rand(sizes[0], past + 1, generator=torch.Generator().manual_seed(2)) > 0.4
        seen[:, -1] = True
    asked = {"past": past, "heads": sizes[2], "eps": (1e-5, 1e-3), "activation": activation, "seen": seen}
    theirs = [tensor.clone() for tensor in (keys, values)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = block_step(x, weights, keys, values, **asked)
    finally:
        torch.set_num_threads(before)
    wanted = block_step_reference(x, weights, *theirs, **asked)
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    for ours, other in zip((keys, values), theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)


def test_a_token_that_may_see_nothing_attends_to_nothing():
    x, weights, keys, values = made(1, 16, 4, 4, 4, 8, 5)
    hidden = torch.zeros(1, 5, dtype=torch.bool)
    asked = {"past": 4, "heads": 4, "eps": (1e-5, 1e-5), "activation": "gelu", "seen": hidden}
    torch.testing.assert_close(
        block_step(x, weights, keys.clone(), values.clone(), **asked),
        block_step_reference(x, weights, keys, values, **asked),
        atol=1e-5,
        rtol=1e-5,
    )


def test_very_large_scores_do_not_overflow():
    x, weights, keys, values = made(1, 16, 4, 4, 4, 8, 600)
    asked = {"past": 599, "heads": 4, "eps": (1e-5, 1e-5), "activation": "gelu"}
    weights = weights._replace(query_key_value=weights.query_key_value * 300)
    got = block_step(x, weights, keys.clone(), values.clone(), **asked)
    torch.testing.assert_close(got, block_step_reference(x, weights, keys, values, **asked), atol=1e-2, rtol=1e-4)


def model(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "architecture": "decoder", "init": "normal(std=0.3)"}
    return TransformerForCausalLM(TransformerConfig(**sizes | fields)).eval()


def steps(model, ids, mask=None):
    """Logits of the last tokens, one by one after a prefill of the first three."""
    cache, logits = model.model.new_cache(), []
    for start, end in [(0, 3), *((t, t + 1) for t in range(3, ids.shape[1]))]:
        seen = None if mask is None else mask[:, :end]
        out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.fixture
def calls(monkeypatch):
    """How often the native step ran."""
    counted = []
    monkeypatch.setattr(decoding, "block_step", lambda *a, **k: counted.append(1) or block_step(*a, **k))
    return counted


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_takes_the_native_step_and_gives_the_same(calls, padded):
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0 if padded else 1
    made = model()
    with torch.no_grad():
        stepped, whole = steps(made, ids, mask), made(ids, attention_mask=mask).logits
    torch.testing.assert_close(stepped[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)
    assert len(calls) == 2 * 6


@pytest.mark.parametrize(
    "fields",
    [{"block": "post"}, {"position": "rope"}, {"norm": "rmsnorm"}, {"feedforward": "swiglu"}, {"mixer": "aft"}],
)
def test_other_models_take_the_ordinary_step(calls, fields):
    with torch.no_grad():
        steps(model(**fields), torch.arange(6)[None])
    assert not calls


def test_what_must_see_every_operation_still_does(calls):
    made, ids, seen = model(), torch.arange(6)[None], []
    made.model.decoder.layers[0].block.mixer.out.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        steps(made, ids)
    assert len(seen) == 4  # once for the prefill and once for each of three tokens
    assert len(calls) == 3  # the other layer has no hook
    calls.clear()
    loss = steps(made.requires_grad_(True), ids).sum()
    loss.backward()
    assert made.model.decoder.layers[1].block.feedforward.up.weight.grad.any()
    assert not calls


def test_weights_that_were_replaced_are_the_ones_used():
    made, ids = model(), torch.arange(6)[None]
    with torch.no_grad():
        steps(made, ids)
        made.model.decoder.layers[0].block.feedforward.down = nn.Linear(64, 16)
        torch.testing.assert_close(steps(made, ids), made(ids).logits, atol=1e-4, rtol=1e-4)


def prefilled(made, ids, *, autocast=False, grad=False):
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return made(ids, use_cache=True).past_key_values


def test_buffers_of_another_batch_or_dtype_are_not_handed_to_the_kernel(calls):
    made, ids = model(), torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for cache, new in (
            (prefilled(made, ids[:1]), ids[:, :1]),
            (prefilled(made, ids), ids[:1, :1]),
            (prefilled(made, ids, autocast=True), ids[:, :1]),
        ):
            with pytest.raises((ValueError, RuntimeError)):
                made(new, past_key_values=cache)
    assert not calls


def test_buffers_that_are_views_are_not_handed_to_the_kernel(calls):
    made, ids = model(), torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = prefilled(made, ids, grad=True)  # kept out of place, as the projection left them
    cache.crop(-3)
    with torch.no_grad():
        stepped = made(ids[:, 6:7], past_key_values=cache).logits
        torch.testing.assert_close(stepped, made(ids[:, :7]).logits[:, 6:], atol=1e-4, rtol=1e-4)
    assert not calls


def test_a_mask_for_another_batch_is_not_handed_to_the_kernel(calls):
    made, ids = model(), torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    cache, mask = prefilled(made, ids), torch.ones(1, 10, dtype=torch.long)
    mask[0, 0] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask"):
        made(ids[:, :1], past_key_values=cache, attention_mask=mask)
    assert not calls


def test_a_hook_on_what_the_last_matrix_reads_is_called(calls):
    made, ids, seen = model(), torch.arange(6)[None], []
    made.model.decoder.layers[0].block.feedforward.inner.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        steps(made, ids)
    assert len(seen) == 4
    assert len(calls) == 3
