"""Transformer-XL: what segments and memory promise, generate and the Trainer with it, then the model written out."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from formwright import tasks
from formwright.errors import FormwrightError
from formwright.models.text.transformer_xl import (
    Inputs,
    Recent,
    TransformerXLConfig,
    TransformerXLForCausalLM,
    TransformerXLModel,
)
from formwright.tasks.support.streams import Streams, streamed
from formwright.training import Settings, evaluate, fit, seeded

SIZES = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "dropout": 0.0}


def model(kind=TransformerXLForCausalLM, **options):
    """Double precision, and weights large enough for every term to show."""
    torch.manual_seed(0)
    made = kind(TransformerXLConfig(**SIZES | options)).double().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            scale = 0.02 if "tokens" in name else 0.3
            parameter.add_(torch.randn_like(parameter) * scale)
    return made


def ids(n, rows=2, seed=1):
    return torch.randint(0, 37, (rows, n), generator=torch.Generator().manual_seed(seed))


def in_segments(made, text, sizes, **more):
    memory, seen = made.new_cache(), []
    for part in text.split(sizes, dim=1):
        seen.append(made(part, past_key_values=memory, **more).logits)
    return torch.cat(seen, 1)


@pytest.mark.parametrize("block", ["post", "pre", "sub-ln"])
@pytest.mark.parametrize("learning", [True, False])
def test_with_unlimited_memory_every_split_equals_one_pass(block, learning):
    made = model(block=block, mem_len=100).train(learning)
    text = ids(16)
    whole = made(text, use_cache=False).logits
    for sizes in ([5, 1, 7, 3], [8, 8], [1] * 16):
        torch.testing.assert_close(in_segments(made, text, sizes), whole)


def test_a_limited_memory_forgets_but_reaches_back_once_more_with_every_layer():
    made, text = model(mem_len=4), ids(24)
    changed = text.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 37
    moved = (in_segments(made, text, [1] * 24) - in_segments(made, changed, [1] * 24)).abs().amax((0, 2)) > 0
    assert moved.nonzero().max() == 3 * 4  # layers x mem_len
    assert moved[:13].all()


@pytest.mark.parametrize("kind", ["learning", "evaluating"])
def test_memory_holds_the_last_inputs_of_every_layer(kind):
    made, text = model(mem_len=5).train(kind == "learning"), ids(9)
    out = made(text[:, :7], past_key_values=made.new_cache(), output_hidden_states=True)
    later = made(text[:, 7:], past_key_values=out.past_key_values, output_hidden_states=True)
    read = [torch.cat([a, b], 1)[:, -5:] for a, b in zip(out.hidden_states, later.hidden_states, strict=True)]
    layers = later.past_key_values.layers
    assert len(layers) == 3
    for layer, block, wanted in zip(layers, made.model.decoder.layers, read, strict=False):
        assert layer.get_seq_length() == 9
        if kind == "learning":
            assert isinstance(layer, Inputs)
            assert layer.state[0].shape == (2, 5, 16)
            torch.testing.assert_close(layer.state[0], wanted)
        else:
            assert isinstance(layer, Recent)
            keys = block.block.mixer.query_key_value(wanted)[..., 16:32].unflatten(-1, (4, 4)).transpose(1, 2)
            torch.testing.assert_close(layer.state[0], keys)
        assert not any(part.requires_grad for part in layer.state)


def test_the_past_gets_no_gradient_and_the_matrices_learn_from_it():
    made = model(mem_len=8).train()
    first = made.get_input_embeddings()(ids(6)).detach().requires_grad_()
    second = made.get_input_embeddings()(ids(6, seed=2)).detach().requires_grad_()
    memory = made(inputs_embeds=first, past_key_values=made.new_cache()).past_key_values
    kept = memory.layers[0].state[0].clone()
    grad = {}
    for name, cache in (("with", memory), ("without", None)):
        out = made(inputs_embeds=second, past_key_values=cache).logits.square().sum()
        weight = made.model.decoder.layers[0].block.mixer.query_key_value.weight
        grad[name] = torch.autograd.grad(out, (first, second, weight), allow_unused=True)
    assert torch.equal(kept, first)
    assert grad["with"][0] is None
    assert grad["with"][1].abs().max() > 0
    assert (grad["with"][2] - grad["without"][2])[16:].abs().max() > 1e-6


def test_one_pair_of_global_biases_serves_all_layers():
    made = model(kind=TransformerXLModel)
    layer = 5 * 16 * 16 + (2 * 16 * 64 + 64 + 16) + 4 * 16
    assert sum(p.numel() for p in made.parameters()) == 37 * 16 + 3 * layer + 2 * 16
    assert [name for name, _ in made.named_parameters() if "biases" in name] == ["biases.content", "biases.distance"]


def test_tokens_are_embedded_times_the_root_of_the_width_and_weights_start_as_in_the_paper():
    torch.manual_seed(0)
    made = TransformerXLForCausalLM(TransformerXLConfig(**SIZES | {"hidden_size": 128, "vocab_size": 500}))
    body = made.model
    torch.testing.assert_close(body.tokens(ids(3)), body.tokens.weight[ids(3)] * math.sqrt(128))
    block = body.decoder.layers[0].block
    for weight in (
        body.tokens.weight,
        block.mixer.out.weight,
        block.mixer.relative.weight,
        block.feedforward.down.weight,
    ):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    assert float(block.mixer_norm.weight.detach().mean()) == pytest.approx(1, abs=0.01)
    assert 0.01 < float(block.mixer_norm.weight.detach().std()) < 0.03
    assert made.lm_head.weight is body.tokens.weight
    resized = made.resize_token_embeddings(510)
    torch.testing.assert_close(resized(ids(3)), resized.weight[ids(3)] * math.sqrt(128))


def test_remember_changes_how_far_back_is_read_and_is_saved(tmp_path):
    made, text = model(mem_len=3), ids(24)
    short = in_segments(made, text, [8, 8, 8])
    made.remember(16)
    longer = in_segments(made, text, [8, 8, 8])
    assert torch.equal(short[:, :8], longer[:, :8])
    assert (short - longer)[:, 16:].abs().max() > 1e-6
    made.remember(16, clamp_len=5)
    clamped = in_segments(made, text, [8, 8, 8])
    torch.testing.assert_close(clamped[:, :6], longer[:, :6])
    assert (clamped - longer)[:, 8:].abs().max() > 1e-6
    made.remember(6, same_length=True)
    window = in_segments(made, text, [8, 8, 8])
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (again.config.mem_len, again.config.same_length) == (6, True)
    torch.testing.assert_close(in_segments(again.eval(), text, [8, 8, 8]), window)


def test_same_length_shows_every_token_as_many_others():
    made = model(mem_len=6)
    made.remember(6, same_length=True)
    memory = made.new_cache()
    for part in ids(24).split(8, 1):
        shown = made(part, past_key_values=memory, output_attentions=True).attentions[0]
    assert torch.equal((shown > 0).sum(-1), torch.full((2, 4, 8), 6))


def test_with_the_same_length_for_all_every_split_equals_one_pass():
    made, text = model(mem_len=6, same_length=True), ids(24)
    whole = made(text, use_cache=False).logits
    for sizes in ([8, 8, 8], [3, 16, 5], [1] * 24):
        torch.testing.assert_close(in_segments(made, text, sizes), whole)


@pytest.mark.parametrize("options", [{}, {"cutoffs": [10, 20], "div_val": 2}, {"tie_word_embeddings": False}])
def test_saved_and_loaded_it_is_the_same_model(options, tmp_path):
    made, text = model(**options), ids(9)
    made.save_pretrained(tmp_path)
    again, info = TransformerXLForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not any(info.values())
    theirs = again.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in made.state_dict().items())
    torch.testing.assert_close(again.eval()(text).logits, made(text).logits)  # a file's alignment moves the last digit
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in made.parameters())
    read, wrote = AutoConfig.from_pretrained(tmp_path).to_dict(), made.config.to_dict()
    assert read | {"_name_or_path": ""} == wrote


def loop(made, text, new):
    """Greedy decoding without any memory between the calls."""
    for _ in range(new):
        text = torch.cat([text, made(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return text


def test_generate_equals_a_loop_without_cache():
    made, text = model(mem_len=64), ids(9, rows=3)
    wanted = loop(made, text, 8)
    plain = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(made.generate(text, **plain), wanted)
    assert torch.equal(made.generate(text, **plain, prefill_chunk_size=4), wanted)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(made.generate(text, **plain, **beams), made.generate(text, **plain, **beams, use_cache=False))
    half = made.generate(text, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    going_on = made.generate(half.sequences, max_new_tokens=4, do_sample=False, past_key_values=half.past_key_values)
    assert torch.equal(going_on, wanted)


@pytest.mark.parametrize("options", [{"mem_len": 64}, {"mem_len": 3}, {"mem_len": 64, "clamp_len": 4}])
def test_a_row_padded_on_the_left_generates_what_it_does_alone(options):
    made, text = model(**options), ids(9)
    mask = torch.ones_like(text)
    mask[1, :4] = 0
    plain = {"max_new_tokens": 6, "do_sample": False}
    both = made.generate(text, attention_mask=mask, **plain)
    assert torch.equal(both[0, 9:], made.generate(text[:1], **plain)[0, 9:])
    assert torch.equal(both[1, 9:], made.generate(text[1:, 4:], **plain)[0, 5:])


def test_rows_of_a_memory_are_reordered_repeated_and_selected():
    made, text = model(mem_len=5), ids(9, rows=3)
    memory = made(text).past_key_values
    alone = made(text[1:2]).past_key_values
    memory.reorder_cache(torch.tensor([1, 1, 0]))
    memory.batch_select_indices(torch.tensor([1]))
    for a, b in zip(memory.layers, alone.layers, strict=True):
        torch.testing.assert_close(a.state, b.state)
    memory.batch_repeat_interleave(2)
    torch.testing.assert_close(
        made(ids(2), past_key_values=memory).logits[:1], made(ids(2)[:1], past_key_values=alone).logits
    )


def test_labels_are_shifted_and_one_more_tells_the_last_token():
    made, text = model(), ids(8)
    logits = made(text[:, :7]).logits
    plain, more = made(text[:, :7], labels=text[:, :7]).loss, made(text[:, :7], labels=text).loss
    torch.testing.assert_close(plain.double(), F.cross_entropy(logits[:, :-1].mT, text[:, 1:7]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(more.double(), F.cross_entropy(logits.mT, text[:, 1:]), atol=1e-6, rtol=1e-6)
    ignored = text.clone()
    ignored[:, 4:] = -100
    part = made(text[:, :7], labels=ignored).loss
    torch.testing.assert_close(part.double(), F.cross_entropy(logits[:, :3].mT, text[:, 1:4]), atol=1e-6, rtol=1e-6)
    with pytest.raises(FormwrightError, match="7 or 8"):
        made(text[:, :7], labels=text[:, :5])


def test_logits_to_keep_keeps_the_last():
    made, text = model(), ids(8)
    assert made(text, logits_to_keep=2).logits.shape == (2, 2, 37)
    torch.testing.assert_close(made(text, logits_to_keep=2).logits, made(text).logits[:, -2:])
    kept = made(text, logits_to_keep=torch.tensor([0, 3])).logits
    torch.testing.assert_close(kept, made(text).logits[:, [0, 3]])


@pytest.mark.parametrize("div_val", [1, 2])
def test_clusters_give_the_loss_of_their_own_probabilities(div_val):
    made, text = model(cutoffs=[10, 20], div_val=div_val), ids(12)
    out = made(text, labels=text)
    torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(2, 12, dtype=out.logits.dtype))
    torch.testing.assert_close(out.loss, F.nll_loss(out.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))
    made.train()(text, labels=text).loss.backward()
    assert all(p.grad is not None for p in made.parameters())
    with pytest.raises(FormwrightError, match="resized"):
        made.resize_token_embeddings(50)


def stream_task(streams=4, length=16):
    return streamed(tasks.load("char-lm(length=16, test=0.01, validation=0.01)"), streams=streams, length=length)


def small(task, **options):
    seeded(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.0, "mem_len": 16}
    return TransformerXLForCausalLM(TransformerXLConfig(**task.model_config, **sizes | options))


def test_training_through_the_trainer_carries_the_memory_from_step_to_step():
    task = stream_task()
    made = small(task)
    settings = Settings(steps=3, batch_size=4, learning_rate=1e-3, schedule="constant", warmup=0.0, clip=0.0)
    by_hand, memory, losses = copy.deepcopy(made).train(), None, []
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        rows = task.train.__getitems__(range(4 * step, 4 * step + 4))
        out = by_hand(rows["input_ids"], past_key_values=memory or by_hand.new_cache(), labels=rows["labels"])
        memory = out.past_key_values
        losses.append(float(out.loss.detach()))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    history = fit(made, task, Settings(**{**vars(settings), "weight_decay": 0.0, "evaluate_every": 2}))
    assert history.losses == pytest.approx(losses, abs=1e-5)
    assert history.curve[0]["step"] == 2


def test_a_run_that_broke_off_goes_on_at_its_place_in_the_text(tmp_path):
    task, settings = stream_task(), Settings(steps=6, batch_size=4, save_every=2)
    whole = fit(small(task), task, settings, folder=tmp_path / "whole")

    def stop(step, *_):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(small(task), task, settings, folder=tmp_path / "broken", progress=stop)
    again = small(task)
    history = fit(again, task, settings, folder=tmp_path / "broken")
    assert again.model.streams[True][2] == 6 * 16
    assert history.losses[:4] == pytest.approx(whole.losses[:4], abs=1e-5)
    assert history.losses[4] != whole.losses[4]  # its memory was empty
    assert history.losses[4] == pytest.approx(whole.losses[4], abs=0.05)


def test_transformers_own_trainer_takes_the_streams_as_they_are(tmp_path):
    task = stream_task()
    made = small(task)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    Trainer(model=made, args=arguments, train_dataset=task.train).train()
    assert made.model.streams[True][2] == 4 * 16


def test_evaluation_in_streams_equals_one_pass_with_enough_memory():
    task = stream_task(streams=2, length=16)
    text = Streams(task.test.symbols[:90], streams=2, length=16)
    made = small(task).eval()
    made.remember(1000)
    seen = [made(**{k: v for k, v in text.__getitems__([i, i + 1]).items() if k != "labels"}).logits for i in (0, 2, 4)]
    rows = [text.symbols[first : first + 45].long() for first in (0, 45)]
    whole = [made(row[None], use_cache=False).logits for row in rows]
    torch.testing.assert_close(torch.cat(seen, 1)[0, :45], whole[0][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(seen, 1)[1, :44], whole[1][0][:44], atol=1e-5, rtol=1e-4)


def test_every_symbol_but_the_first_is_told_once_and_a_longer_memory_changes_the_loss():
    task = stream_task(streams=3)
    made = small(task)
    first = evaluate(made, task, "test")
    assert int(first.items.cells.sum()) == len(task.test.symbols) - 1
    again = evaluate(made, task, "test", batch_size=7)
    assert first.metrics == again.metrics
    made.remember(0)
    assert evaluate(made, task, "test").metrics["loss"] != first.metrics["loss"]


def test_segments_out_of_order_are_refused():
    task = stream_task()
    made = small(task)
    rows = {n: task.train.__getitems__(range(4 * n, 4 * n + 4)) for n in range(3)}
    made(**rows[0])
    made(**rows[1])
    with pytest.raises(FormwrightError, match="one after the other"):
        made(**rows[1])
    with pytest.raises(FormwrightError, match="one after the other"):
        made(**task.train.__getitems__([8, 9, 12, 13]))
    made(**rows[2])
    made.eval()(**rows[0])  # evaluation remembers apart from training
    made.train()(**task.train.__getitems__(range(12, 16)))
    with pytest.raises(FormwrightError, match="accumulate"):
        fit(small(task), task, Settings(steps=3, batch_size=4, accumulate=2))


def test_a_batch_that_begins_inside_a_stream_starts_without_memory():
    task = stream_task()
    made = small(task).eval()
    rows = task.train.__getitems__(range(8, 12))
    torch.testing.assert_close(made(**rows).logits, made(rows["input_ids"]).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "encoder"}, "decoder"),
        ({"position": "rope"}, "own positions"),
        ({"mixer": "softmax"}, "mixer"),
        ({"mixer": "transformer-xl(clamp_len=3)"}, "clamp_len"),
        ({"mem_len": -1}, "mem_len"),
        ({"mem_len": 0, "same_length": True}, "same_length"),
        ({"clamp_len": 0}, "clamp_len"),
        ({"cutoffs": [20, 10]}, "cutoffs"),
        ({"cutoffs": [10, 37]}, "cutoffs"),
        ({"cutoffs": [10, 20], "div_val": 3}, "div_val"),
    ],
)
def test_bad_configs_are_refused(options, words):
    with pytest.raises(FormwrightError, match=words):
        TransformerXLConfig(**SIZES | options)


def test_memories_that_do_not_fit_are_refused():
    made, text = model(), ids(5)
    with pytest.raises(FormwrightError, match="not made for"):
        made(text, past_key_values=DynamicCache())
    memory = made(text).past_key_values
    with pytest.raises(FormwrightError, match="2 sequences"):
        made(ids(5, rows=3), past_key_values=memory)
    with pytest.raises(FormwrightError, match="evaluation"):
        made.train()(text, past_key_values=memory)
    with pytest.raises(FormwrightError, match="both bring"):
        made(text, past_key_values=made.new_cache(), segments=torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(FormwrightError, match="one of the two"):
        made()
    made.gradient_checkpointing_enable()
    with pytest.raises(FormwrightError, match="twice"):
        made(text, past_key_values=made.new_cache())
    made(text, labels=text).loss.backward()  # without memory


def test_another_text_cannot_be_streamed():
    with pytest.raises(FormwrightError, match="language modelling"):
        streamed(tasks.load("copy(examples=200)"), streams=2, length=4)
    with pytest.raises(FormwrightError, match="streams"):
        Streams(torch.arange(4), streams=4, length=2)


def written_out(made, text, memories, mem_len):
    """One segment, sequence first, pair by pair, from the weights alone; what the layers read comes back too."""
    state = {name.removeprefix("model."): value for name, value in made.state_dict(keep_vars=True).items()}
    heads, d, width = 4, 4, 16
    rates = 1 / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    h = (state["tokens.weight"][text] * width**0.5).transpose(0, 1)
    u, w = state["biases.content"][:, 0], state["biases.distance"][:, 0]
    kept = []
    for i in range(3):
        at = f"decoder.layers.{i}.block."
        past = h[:0] if memories is None else memories[i]
        both = torch.cat([past, h])
        kept.append(both[-mem_len:].detach())
        wq, wk, wv = state[at + "mixer.query_key_value.weight"].chunk(3)
        q, k, v = ((y @ m.T).reshape(len(y), -1, heads, d) for y, m in ((h, wq), (both, wk), (both, wv)))
        t = torch.arange(len(h))[:, None] + len(past) - torch.arange(len(both))
        waves = torch.cat([(t[..., None] * rates).sin(), (t[..., None] * rates).cos()], -1)  # q x k x D
        r = (waves @ state[at + "mixer.relative.weight"].T).unflatten(-1, (heads, d))
        scores = torch.einsum("ibnd,jbnd->bnij", q + u, k) + torch.einsum("ibnd,ijnd->bnij", q + w, r)
        weights = (scores / d**0.5).masked_fill(t < 0, -1e30).softmax(-1)
        mixed = torch.einsum("bnij,jbnd->ibnd", weights, v).flatten(2) @ state[at + "mixer.out.weight"].T

        def norm(y, name, at=at):
            return F.layer_norm(y, (width,), state[at + name + ".weight"], state[at + name + ".bias"])

        a = norm(h + mixed, "mixer_norm")
        up = (a @ state[at + "feedforward.up.weight"].T + state[at + "feedforward.up.bias"]).relu()
        down = up @ state[at + "feedforward.down.weight"].T + state[at + "feedforward.down.bias"]
        h = norm(a + down, "feedforward_norm")
    return (h @ state["tokens.weight"].T + state["lm_head.bias"]).transpose(0, 1), kept


@pytest.mark.reference
@pytest.mark.parametrize("learning", [True, False])
def test_equal_to_the_model_written_out_over_segments_with_gradients(learning):
    made, text = model(mem_len=6).train(learning), ids(20)
    memory, theirs = made.new_cache(), None
    weights = [p for p in made.parameters() if p.requires_grad]
    for part in text.split([5, 8, 7], dim=1):
        ours = made(part, past_key_values=memory).logits
        wanted, theirs = written_out(made, part, theirs, 6)
        torch.testing.assert_close(ours, wanted)
        if learning:
            a, b = (torch.autograd.grad(y.square().sum(), weights) for y in (ours, wanted))
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y)
