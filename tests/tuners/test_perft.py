"""PERFT: exact properties on tiny OLMoE, Mixtral and Qwen3, then transformers' own mixture and balancing loss."""

import copy

import pytest
import torch

pytest.importorskip("peft")
from peft import PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock, load_balancing_loss_func

from formwright.build import build
from formwright.errors import FormwrightError
from formwright.tuners import PERFTConfig, PERFTLayer
from formwright.tuners.perft import Adapters, Embedded, Routed, Routing, imbalance

SIZES = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 12, "num_experts_per_tok": 2, "pad_token_id": 0}
FAMILIES = {
    "olmoe": lambda **more: OlmoeForCausalLM(OlmoeConfig(**SIZES | more, num_experts=5)),
    "mixtral": lambda **more: MixtralForCausalLM(MixtralConfig(**SIZES | more, num_local_experts=5)),
    "qwen3": lambda **more: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES | more, num_experts=5, moe_intermediate_size=12, head_dim=8)
    ),
}
VARIANTS = ("routed", "embedded", "dense", "single")
D, N, LAYERS = 16, 5, 2


def base(family="olmoe", **more):
    torch.manual_seed(0)
    return FAMILIES[family](**more).eval()


def tuned(config, family="olmoe", moved=True, **more):
    """A model with adapters that are no longer at their beginning."""
    model = get_peft_model(base(family, **more), config).eval()
    if moved:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = 0.3 * torch.randn_like(parameter)
            assert parameter.requires_grad == ("formwright_perft" in name)
    return model


def ids(rows=2, length=7):
    return torch.randint(1, 41, (rows, length), generator=torch.Generator().manual_seed(2))


def layers(model):
    return [module for module in model.modules() if isinstance(module, PERFTLayer)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_at_first_and_something_does_once_the_adapters_have_moved(family, variant):
    plain = base(family)(ids()).logits
    config = PERFTConfig(variant=variant, r=3)
    assert torch.equal(tuned(config, family, moved=False)(ids()).logits, plain)
    changed = tuned(config, family)(ids()).logits
    assert (changed - plain).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({"variant": "routed", "adapters": 6, "top_k": 2}, 6 * 2 * D * 3 + 6 * D),
        ({"variant": "embedded"}, N * 2 * D * 3),
        ({"variant": "dense", "adapters": 3}, 3 * 2 * D * 3),
        ({"variant": "single"}, 2 * D * 3),
    ],
)
def test_trained_are_the_adapters_and_the_router_alone(options, each):
    model = tuned(PERFTConfig(r=3, **options), moved=False)
    assert model.get_nb_trainable_parameters()[0] == LAYERS * each


def test_one_dense_adapter_is_a_single_one():
    dense = tuned(PERFTConfig(variant="dense", adapters=1, r=3))(ids()).logits
    assert torch.equal(dense, tuned(PERFTConfig(variant="single", r=3))(ids()).logits)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_dense_is_the_sum_of_its_adapters(activation):
    torch.manual_seed(0)
    many = Adapters(3, 8, r=2, alpha=None if activation else 4.0, activation=activation, dropout=0.0)
    many.up.data.normal_()
    x = torch.randn(5, 8)
    act = torch.nn.functional.gelu if activation else (lambda inner: 2.0 * inner)
    separate = sum(act(x @ many.down[j].T) @ many.up[j] for j in range(3))
    torch.testing.assert_close(many(x), separate)


def test_routed_with_all_weights_one_is_dense(monkeypatch):
    routed = Routed(3, 8, top_k=3, normalise=False, balance=0.0, r=2, alpha=4.0, activation=None, dropout=0.0)
    dense = Adapters(3, 8, r=2, alpha=4.0, activation=None, dropout=0.0)
    routed.up.data.normal_()
    dense.load_state_dict({name: value for name, value in routed.state_dict().items() if name != "router"})
    ones = torch.ones(10, 3)
    monkeypatch.setattr(routed, "route", lambda _: Routing(ones, ones, ones.bool()))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(routed(x), dense(x))


def test_equal_embedded_adapters_with_normalised_weights_are_a_single_one():
    embedded = tuned(PERFTConfig(variant="embedded", r=3), "mixtral")
    single = tuned(PERFTConfig(variant="single", r=3), "mixtral")
    for ours, theirs in zip(layers(embedded), layers(single), strict=True):
        for name in ("down", "up"):
            own = getattr(theirs.formwright_perft_adapters["default"], name).data
            getattr(ours.formwright_perft_adapters["default"], name).data = own.expand(N, -1, -1).clone()
    torch.testing.assert_close(embedded(ids()).logits, single(ids()).logits)


def test_only_the_chosen_adapters_touch_a_token():
    torch.manual_seed(0)
    routed = Routed(5, 8, top_k=2, normalise=False, balance=0.0, r=2, alpha=4.0, activation="silu", dropout=0.0)
    routed.up.data.normal_()
    x = torch.randn(9, 8)
    chosen = routed.route(x).chosen
    assert (chosen.sum(1) == 2).all()
    before = routed(x)
    for j in range(5):
        other = copy.deepcopy(routed)
        other.up.data[j] += 1
        assert torch.equal((other(x) != before).any(1), chosen[:, j])


def test_embedded_follows_the_models_router():
    torch.manual_seed(0)
    embedded = Embedded(5, 8, r=2, alpha=4.0, activation=None, dropout=0.0)
    embedded.up.data.normal_()
    x, index = torch.randn(6, 8), torch.stack([torch.randperm(5)[:2] for _ in range(6)])
    weights = torch.rand(6, 2)
    separate = [
        sum(w * (2.0 * x[t] @ embedded.down[i].T) @ embedded.up[i] for i, w in zip(index[t], weights[t], strict=True))
        for t in range(6)
    ]
    torch.testing.assert_close(embedded(x, index, weights), torch.stack(separate))


@pytest.mark.parametrize(("family", "top_k"), [("olmoe", 1), ("olmoe", 2), ("mixtral", 2)])
def test_the_router_learns_from_the_task_once_the_adapters_have_moved(family, top_k):
    model = tuned(PERFTConfig(r=3, adapters=4, top_k=top_k, balance=0.0), family, moved=False).train()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
    routers = [layer.formwright_perft_adapters["default"].router for layer in layers(model)]
    model(ids(), labels=ids()).loss.backward()
    assert all(torch.equal(router.grad, torch.zeros_like(router)) for router in routers)
    optimizer.step()
    model(ids(), labels=ids()).loss.backward()
    assert all(router.grad.abs().max() > 0 for router in routers)
    assert all((one.grad is not None) == one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_saved_as_safetensors_and_comes_back(variant, tmp_path):
    config = PERFTConfig(variant=variant, r=3, activation="silu")
    model = tuned(config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 40_000
    assert not list(tmp_path.glob("*.bin"))
    again = PeftModel.from_pretrained(base(), tmp_path, adapter_name="other").eval()
    assert again.peft_config["other"].activation == "silu"
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    light = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=True).eval()  # adapters made on meta
    assert torch.equal(light(ids()).logits, model(ids()).logits)


def test_two_adapters_take_turns_and_come_off():
    plain, model = base()(ids()).logits, tuned(PERFTConfig(r=3))
    first = model(ids()).logits
    model.add_adapter("second", PERFTConfig(variant="single", r=2))
    model.set_adapter("second")
    assert torch.equal(model(ids()).logits, plain)
    model.set_adapter("default")
    assert torch.equal(model(ids()).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(ids()).logits, plain)
    with pytest.raises(FormwrightError, match="unload"):
        model.merge_and_unload()
    bare = model.unload()
    assert torch.equal(bare(ids()).logits, plain)
    assert not bare._forward_hooks
    assert not layers(bare)


def test_transformers_takes_it_as_an_adapter_of_its_own():
    model = base()
    plain = model(ids()).logits
    model.add_adapter(PERFTConfig(r=3))
    assert len(layers(model)) == LAYERS
    assert torch.equal(model(ids()).logits, plain)
    model.train()
    assert "perft-balance" in model(ids(), labels=ids()).extra_losses


def test_the_balancing_loss_joins_the_loss_in_training_alone_and_sees_no_pads():
    model = tuned(PERFTConfig(r=3, dropout=0.0, balance=0.5))
    text, mask = ids(), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    labels = text.masked_fill(mask == 0, -100)
    plain = model(text, attention_mask=mask, labels=labels)
    assert "extra_losses" not in plain
    model.train()
    seen = []
    handles = [
        layer.formwright_perft_adapters["default"].register_forward_hook(
            lambda adapters, given, _: seen.append(imbalance(adapters.route(given[0]), mask.flatten().bool()))
        )
        for layer in layers(model)
    ]
    trained = model(text, attention_mask=mask, labels=labels)
    expected = 0.5 * sum(seen) / LAYERS
    torch.testing.assert_close(trained.loss - plain.loss, expected)
    torch.testing.assert_close(trained.extra_losses["perft-balance"], expected)
    for handle in handles:
        handle.remove()
    as_tuple = model(text, attention_mask=mask, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], trained.loss)
    assert model(text).loss is None


def test_jitter_of_the_models_router_is_what_the_adapters_read_too():
    """Mixtral multiplies what its block is given in place, in training."""
    model = tuned(PERFTConfig(variant="single", r=3, dropout=0.0), "mixtral", router_jitter_noise=0.5).train()
    read = []
    for layer in layers(model):
        layer.base_layer.experts.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        adapters = layer.formwright_perft_adapters["default"]
        adapters.register_forward_pre_hook(lambda _, given: read.append(given[0].flatten(0, 1)))
    model(ids(), labels=ids()).loss.backward()
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[2], read[3])


def test_balance_follows_the_model_where_it_is_not_set():
    for family in ("olmoe", "mixtral"):
        model = tuned(PERFTConfig(r=3), family, router_aux_loss_coef=0.125)
        assert layers(model)[0].formwright_perft_adapters["default"].balance == 0.125


def test_activation_checkpoints_give_the_same_gradients_or_are_refused():
    grads = []
    for checkpointed in (False, True):
        model = tuned(PERFTConfig(r=3, dropout=0.0, balance=0.5)).train()
        if checkpointed:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(), labels=ids()).loss.backward()
        grads.append([one.grad for one in model.parameters() if one.requires_grad])
        copy.deepcopy(model)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(FormwrightError, match="use_reentrant"):
        model(ids(), labels=ids())


def test_the_models_own_router_is_recorded_as_before():
    model = tuned(PERFTConfig(r=3))
    assert len(model(ids(), output_router_logits=True).router_logits) == LAYERS


def test_a_bfloat16_model_keeps_its_dtype_and_its_adapters_stay_fine():
    for variant in VARIANTS:
        model = get_peft_model(base(intermediate_size=16).bfloat16(), PERFTConfig(variant=variant, r=3))
        assert model(ids()).logits.dtype == torch.bfloat16
        assert all(one.dtype == torch.float32 for one in model.parameters() if one.requires_grad)
    routed = Routed(3, 8, top_k=2, normalise=True, balance=0.0, r=2, alpha=4.0, activation="silu", dropout=0.0)
    routed.up.data.normal_()
    x = torch.randn(5, 8)
    torch.testing.assert_close(copy.deepcopy(routed).double()(x.double()), routed(x).double(), atol=1e-5, rtol=1e-4)


def test_decoding_with_a_cache_is_one_pass():
    model = tuned(PERFTConfig(r=3))
    whole = model(ids()).logits
    start = model(ids()[:, :4], use_cache=True)
    rest = model(ids()[:, 4:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), whole)


def test_a_classifier_is_trained_beside_the_adapters():
    torch.manual_seed(0)
    model = MixtralForSequenceClassification(MixtralConfig(**SIZES, num_local_experts=5))
    model = get_peft_model(model, PERFTConfig(task_type="SEQ_CLS", r=3, modules_to_save=["score"]))
    model(ids(), labels=torch.tensor([0, 1])).loss.backward()
    assert any("score" in name and one.grad is not None for name, one in model.named_parameters())


def test_modules_are_chosen_by_name():
    assert len(layers(tuned(PERFTConfig(r=3, target_modules=["layers.1.mlp"])))) == 1
    assert len(layers(tuned(PERFTConfig(r=3, exclude_modules=["layers.1.mlp"])))) == 1
    embedded = PERFTConfig(variant="embedded", r=3, target_modules=["layers.0.mlp.experts"])
    assert len(layers(tuned(embedded))) == 1


def test_the_catalogue_builds_it():
    config = build("tuner", "perft(variant=routed, adapters=8, top_k=2)")
    assert (config.adapters, config.top_k) == (8, 2)
    with pytest.raises(FormwrightError, match="variant is 'sparse'"):
        build("tuner", "perft(variant=sparse)")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "r from 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"activation": "reluu"}, "no activation"),
        ({"activation": "relu", "lora_alpha": 4.0}, "leave out one"),
        ({"variant": "dense", "top_k": 1}, "leave them out"),
        ({"variant": "embedded", "adapters": 4}, "as many adapters"),
        ({"variant": "single", "adapters": 4}, "one adapter"),
        ({"adapters": 2, "top_k": 3}, "no more chosen"),
        ({"adapters": 2, "top_k": 0}, "no more chosen"),
        ({"balance": -1.0}, "from 0 on"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(FormwrightError, match=says):
        PERFTConfig(**options)


def test_what_has_no_place_for_it_is_refused():
    llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SIZES.items() if "experts" not in k}))
    with pytest.raises(FormwrightError, match="no mixture of experts"):
        get_peft_model(llama, PERFTConfig())
    with pytest.raises(FormwrightError, match="not a mixture"):
        get_peft_model(base(), PERFTConfig(target_modules=["q_proj"]))
    with pytest.raises(FormwrightError, match="normalises"):
        get_peft_model(base("mixtral"), PERFTConfig(top_k=1))
    with pytest.raises(FormwrightError, match="two copies"):
        tuned(PERFTConfig(r=3)).add_adapter("inside", PERFTConfig(variant="embedded"))


@pytest.mark.reference
@pytest.mark.parametrize("normalise", [False, True])
def test_routed_parallel_adapters_are_a_mixture_of_transformers(normalise):
    """With a channel that is always 1, an expert's `up` can be 1, and act(gate) * up is an adapter's act(h A^T)."""
    torch.manual_seed(0)
    config = OlmoeConfig(**SIZES, num_experts=4, norm_topk_prob=normalise, hidden_act="silu")
    theirs = OlmoeSparseMoeBlock(config)
    ours = Routed(4, D, top_k=2, normalise=normalise, balance=0.0, r=12, alpha=None, activation="silu", dropout=0.0)
    ours.up.data.normal_()
    one = torch.zeros(4, 12, D)
    one[:, :, 0] = 1
    theirs.gate.weight.data = ours.router.data.clone()
    theirs.experts.gate_up_proj.data = torch.cat([ours.down.data, one], 1)
    theirs.experts.down_proj.data = ours.up.data.mT.contiguous()
    x = torch.randn(2, 7, D)
    x[..., 0] = 1
    x.requires_grad_()
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b)
    ours_by, theirs_by = (torch.autograd.grad(out.sum(), x)[0] for out in (a, b))
    torch.testing.assert_close(ours_by[..., 1:], theirs_by[..., 1:])


@pytest.mark.reference
def test_imbalance_is_transformers_balancing_loss():
    torch.manual_seed(0)
    routed = Routed(4, D, top_k=2, normalise=False, balance=0.0, r=2, alpha=None, activation=None, dropout=0.0)
    x, mask = torch.randn(3, 7, D), torch.rand(3, 7) < 0.7
    logits = (x @ routed.router.T).flatten(0, 1)
    routing = routed.route(x)
    theirs = load_balancing_loss_func((logits,), 4, 2)
    torch.testing.assert_close(imbalance(routing), theirs)
    masked = load_balancing_loss_func((logits,), 4, 2, mask)
    torch.testing.assert_close(imbalance(routing, mask.flatten()), masked)
