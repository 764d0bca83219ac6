"""DSFormer: coding and atoms, the format, the straight-through factoriser, whole models; scikit-learn's pursuit and a
K-SVD written row by row are the references."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import formwright
from formwright.build import build
from formwright.compress.factorize import dictionary
from formwright.compress.factorize.dictionary import (
    Code,
    better,
    factorise,
    k_svd_step,
    least_squares_step,
    product,
    pursue,
)
from formwright.compress.factorize.dsformer import (
    DenseCoefficients,
    DenseSparseLinear,
    DSFormer,
    Fit,
    Format,
    Shadow,
    falling,
    index_bits,
    pack,
    straight_through,
    unpack,
)
from formwright.compress.factorize.sites import sites
from formwright.compress.pipeline import apply
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM

from .. import zoo
from ..classifiers import Rows, data, rows, tiny


def drawn(groups=3, height=30, width=8, atoms=12, seed=0):
    torch.manual_seed(seed)
    blocks = torch.randn(groups, height, width, dtype=torch.float64)
    return blocks, torch.randn(groups, atoms, width, dtype=torch.float64)


def error(blocks, basis, code) -> float:
    return float((blocks - product(basis, code)).norm())


def form(by_outputs=False, **changed) -> Format:
    return Format(
        **{"rows": 10, "groups": 3, "width": 4, "atoms": 6, "nonzeros": 2, "by_outputs": by_outputs} | changed
    )


def fitted(by_outputs=False, dtype=torch.float64, **changed):
    """A weight and the module that stands for it."""
    torch.manual_seed(0)
    one = form(by_outputs, **changed)
    shape = (12, 10) if by_outputs else (10, 12)
    weight, bias = torch.randn(*shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)
    basis, code = factorise(one.cut(weight), one.atoms, one.nonzeros, rounds=3)
    return weight, bias, one, basis, code, DenseSparseLinear.of(one, basis, code, bias)


# Coding and atoms


@pytest.mark.reference
@pytest.mark.parametrize("at_once", [2**19, 1])
def test_pursuit_is_scikit_learns(monkeypatch, at_once):
    from sklearn.linear_model import orthogonal_mp

    monkeypatch.setattr(dictionary, "AT_ONCE", at_once)
    blocks, basis = drawn()
    code = pursue(blocks, basis, 4).dense(12).numpy()
    for block, atoms, found in zip(blocks.numpy(), basis.numpy(), code, strict=True):
        norms = np.linalg.norm(atoms, axis=1)
        expected = orthogonal_mp((atoms / norms[:, None]).T, block.T, n_nonzero_coefs=4).T / norms
        np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.reference
def test_the_k_svd_recipe_is_that_of_a_loop_over_rows_and_atoms():
    from sklearn.linear_model import orthogonal_mp

    blocks, _ = drawn(groups=2)
    torch.manual_seed(3)
    basis, code = factorise(blocks, 12, 3, rounds=1, recipe="k-svd")
    torch.manual_seed(3)
    start = torch.rand(2, 12, 8).double()
    start = (start / start.norm(dim=-1, keepdim=True)).numpy()
    for block, atoms, its_basis, its_code in zip(blocks.numpy(), start, basis, code.dense(12), strict=True):
        sparse = np.stack([orthogonal_mp(atoms.T, row, n_nonzero_coefs=3) for row in block])
        for j in range(12):
            users = [i for i in range(len(block)) if sparse[i, j] != 0]
            if not users:
                continue
            others = [k for k in range(12) if k != j]
            rest = np.stack([block[i] - sparse[i, others] @ atoms[others] for i in users])
            new = rest.T @ sparse[users, j]
            atoms[j] = new / np.linalg.norm(new)
            sparse[users, j] = rest @ atoms[j]
        np.testing.assert_allclose(its_basis.numpy(), atoms, atol=1e-9)
        np.testing.assert_allclose(its_code.numpy(), sparse, atol=1e-9)


@pytest.mark.reference
def test_the_least_squares_step_is_scipys():
    from scipy.linalg import lstsq

    blocks, basis = drawn()
    code = pursue(blocks, basis, 4)
    made, coded = least_squares_step(blocks, basis, code)
    for block, sparse, atoms, values in zip(blocks, code.dense(12), made, coded.dense(12), strict=True):
        expected = lstsq(sparse.numpy(), block.numpy())[0]
        np.testing.assert_allclose((values @ atoms).numpy(), sparse.numpy() @ expected, atol=1e-4)


def test_every_row_takes_as_many_different_atoms():
    blocks, basis = drawn()
    blocks[0, 3], basis[1, 5], basis[2, 7] = 0, 0, basis[2, 6]  # a row and an atom of zeros, an atom twice
    index, values = pursue(blocks, basis, 9)  # more atoms than a row has numbers
    assert index.shape == values.shape == (3, 30, 9)
    assert index.min() >= 0
    assert index.max() < 12
    assert all(len(set(row)) == 9 for block in index.tolist() for row in block)
    assert values.isfinite().all()
    assert error(blocks[[0, 2]], basis[[0, 2]], Code(index[[0, 2]], values[[0, 2]])) < 1e-3 * blocks.norm()


@pytest.mark.parametrize("step", [k_svd_step, least_squares_step])
def test_no_step_adds_to_the_error_or_moves_the_support(step):
    blocks, basis = drawn()
    basis[0, 2] = 0  # an atom nobody will use
    code = pursue(blocks, basis, 3)
    for _ in range(4):
        before = error(blocks, basis, code)
        basis, stepped = step(blocks, basis, code)
        assert torch.equal(stepped.chosen, code.chosen)
        assert error(blocks, basis, stepped) <= before * (1 + 1e-6)
        before = error(blocks, basis, stepped)
        code = better(blocks, basis, stepped, pursue(blocks, basis, 3))
        assert error(blocks, basis, code) <= before * (1 + 1e-12)


@pytest.mark.parametrize("recipe", ["least-squares", "k-svd"])
def test_more_rounds_come_nearer(recipe):
    blocks, _ = drawn()
    found = []
    for rounds in (1, 3, 10):
        torch.manual_seed(0)
        found.append(error(blocks, *factorise(blocks, 12, 3, rounds=rounds, recipe=recipe)))
    assert found[0] > found[1] > found[2]


def test_all_atoms_in_every_row_is_the_best_low_rank_and_then_the_matrix_itself():
    blocks, _ = drawn()
    basis, code = factorise(blocks, 5, 5, rounds=1)
    left, singular, right = torch.linalg.svd(blocks, full_matrices=False)
    torch.testing.assert_close(product(basis, code), left[..., :5] * singular[:, None, :5] @ right[:, :5])
    torch.testing.assert_close(product(*factorise(blocks, 8, 8, rounds=1)), blocks)


# The format and the layer


@pytest.mark.parametrize("atoms", [1, 2, 6, 64, 300])
def test_the_index_takes_the_bits_it_needs(atoms):
    index = torch.randint(atoms, (7, 3, 5))
    packed = pack(index, index_bits(atoms))
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-index.numel() * index_bits(atoms) // 8)
    assert torch.equal(unpack(packed, index_bits(atoms), (7, 3, 5)), index)


def test_storage_and_work_are_those_of_the_formula():
    one = Format(rows=768, groups=12, width=64, atoms=32, nonzeros=8, by_outputs=False)
    assert one.bits() == 12 * (32 * (32 * 64 + 768 * 8) + 768 * 8 * 5)
    assert round(one.ratio(), 1) == 5.4
    assert one.multiplications == 12 * (32 * 64 + 768 * 8)
    _, _, one, *_, module = fitted(dtype=torch.float32)
    tensors = [value for name, value in module.state_dict().items() if name != "bias"]
    assert {value.dtype for value in tensors} == {torch.float32, torch.uint8}
    assert sum(value.numel() * value.element_size() for value in tensors) == -(-one.bits() // 8)


@pytest.mark.parametrize("by_outputs", [False, True])
def test_sparse_sums_and_the_matrix_give_the_same(by_outputs):
    weight, bias, one, basis, code, module = fitted(by_outputs)
    dense = one.join(product(basis, code))
    assert dense.shape == weight.shape
    torch.testing.assert_close(module.weight, dense)
    torch.testing.assert_close(one.join(one.cut(weight)), weight)
    x = torch.randn(2, 5, weight.shape[1], dtype=torch.float64)
    expected = F.linear(x, dense, bias)
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(module(x[0, 0]), expected[0, 0])
        assert module(x[:0]).shape == expected[:0].shape


@pytest.mark.parametrize("by_outputs", [False, True])
def test_gradients_reach_basis_values_and_input(by_outputs):
    weight, _, one, basis, code, module = fitted(by_outputs)
    x = torch.randn(3, weight.shape[1], dtype=torch.float64, requires_grad=True)

    def read(x, basis, values):
        return F.linear(x, one.join(product(basis, Code(code.chosen, values))))

    given = (x, basis.clone().requires_grad_(), code.values.clone().requires_grad_())
    expected = torch.autograd.grad(read(*given).square().sum(), given)
    module.bias.data.zero_()
    found = torch.autograd.grad(module(x).square().sum(), (x, module.basis, module.values))
    for mine, its in zip(found, (expected[0], expected[1], expected[2].transpose(0, 1)), strict=True):
        torch.testing.assert_close(mine, its)


def test_a_loaded_index_and_another_dtype_are_noticed():
    *_, module = fitted(dtype=torch.float32)
    *_, other = fitted(dtype=torch.float32)
    x = torch.randn(4, 12)
    with torch.no_grad():
        module(x)
        state = copy.deepcopy(other.state_dict())
        state["packed"] = pack((module.index() + 1) % 6, 3)
        module.load_state_dict(state)
        torch.testing.assert_close(module(x), F.linear(x, module.weight, module.bias))
        assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        assert torch.equal(copy.deepcopy(module).places.atoms, module.places.atoms)


# The straight-through factoriser


def shadowed(kind):
    """A layer, GPT-2's on its side, whose weight is a shadow."""
    model = zoo.build("gpt2")
    site = next(one for one in sites(model) if one.path.endswith("c_attn"))
    one = Format(rows=16, groups=12, width=4, atoms=6, nonzeros=2, by_outputs=True)
    basis, code = factorise(one.cut(site.matrix.values), 6, 2, rounds=2)
    shadow = kind(Fit(site, one, basis, code))
    module = site.matrix.module
    parametrize.register_parametrization(module, "weight", shadow)
    return module, shadow, one


def test_the_shadows_gradient_is_that_of_what_is_read():
    module, shadow, one = shadowed(Shadow)
    x = torch.randn(5, 16)
    read = one.join(product(shadow.basis, shadow.code)).T.detach().requires_grad_()
    expected = torch.autograd.grad((x @ read + module.bias).square().sum(), read)[0]
    module(x).square().sum().backward()
    torch.testing.assert_close(module.weight, read)
    torch.testing.assert_close(module.parametrizations.weight.original.grad, expected)
    sparse = shadow.code.dense(6)
    torch.testing.assert_close(shadow.basis.grad, sparse.mT @ one.cut(expected.T))


def test_the_gradient_of_dense_coefficients_is_that_of_the_largest():
    module, shadow, one = shadowed(DenseCoefficients)
    assert (shadow.code.values != 0).all()
    x = torch.randn(5, 16)
    read = one.join(shadow.code.dense(6) @ shadow.basis).T.detach().requires_grad_()
    expected = torch.autograd.grad((x @ read + module.bias).square().sum(), read)[0]
    module(x).square().sum().backward()
    torch.testing.assert_close(shadow.shadow.grad, one.cut(expected.T) @ shadow.basis.detach().mT)
    assert module.parametrizations.weight.original.grad is None


def test_a_refit_lowers_the_error_and_makes_the_shadow_what_is_read():
    module, shadow, one = shadowed(Shadow)
    weight = module.parametrizations.weight.original
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
        goal = one.cut(weight.T).clone()
        shadow.recode(weight, 2)
        before = error(goal, shadow.basis, shadow.code)
        shadow.refit(weight)
        assert error(goal, shadow.basis, shadow.code) < before
        torch.testing.assert_close(weight, module.weight)


def test_the_choice_follows_the_shadow_and_the_number_of_atoms_falls(monkeypatch):
    assert [falling(done / 9, 32, 4) for done in range(5)] == [32, 16, 8, 4, 4]
    seen = []
    monkeypatch.setattr(
        Shadow, "recode", lambda self, weight, n, own=Shadow.recode: (seen.append(n), own(self, weight, n))
    )
    model = tiny()
    modifier = DSFormer(ratio=1.5, atoms=8, steps=15, recode=2, refit=5, learning_rate=1e-2)
    modifier.apply(model)
    before = {path: one.code.chosen.clone() for path, one in modifier.fits.items()}
    with straight_through(modifier.fits, Shadow, steps=12, recode=2, refit=5):
        assert sum(parametrize.is_parametrized(one) for one in model.modules()) == len(before)
        from formwright.training import Settings, fit

        fit(model, Rows(), Settings(steps=12, batch_size=8, learning_rate=1e-2))
    assert not any(parametrize.is_parametrized(one) for one in model.modules())
    assert seen[0] > seen[-1] == next(iter(modifier.fits.values())).form.nonzeros
    assert any(not torch.equal(one.code.chosen, before[path]) for path, one in modifier.fits.items())


# Whole models


@pytest.mark.parametrize("family", [*zoo.MODELS])
def test_a_model_of_every_family_gets_smaller_and_comes_back_exactly(tmp_path, family):
    model = zoo.build(family)
    size = sum(one.numel() * one.element_size() for one in model.parameters())
    change = apply(model, DSFormer(ratio=1.6, train="never", rounds=2), data())
    assert change.bytes[1] < change.bytes[0]
    assert not change.simulated
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < size + 20_000
    back = formwright.load(tmp_path).eval()
    assert torch.equal(zoo.outputs(back, family), zoo.outputs(model, family))


def test_our_own_transformer_too(tmp_path):
    config = TransformerConfig(architecture="decoder", vocab_size=20, hidden_size=32, num_hidden_layers=2)
    model = TransformerForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    apply(model, DSFormer(ratio=1.8, train="never", rounds=2), data())
    assert sum(isinstance(one, DenseSparseLinear) for one in model.modules()) == 8
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(formwright.load(tmp_path).eval()(ids).logits, model(ids).logits)
        whole, state = model(ids).logits, None
        for place in range(6):
            out = model(ids[:, place : place + 1], past_key_values=state, use_cache=True)
            state = out.past_key_values
            torch.testing.assert_close(out.logits[:, 0], whole[:, place], rtol=1e-4, atol=1e-5)


def test_a_fresh_process_gives_equal_logits(tmp_path):
    model = zoo.build("bert")
    apply(model, DSFormer(ratio=1.6, train="never", rounds=2), data())
    model.save_pretrained(tmp_path)
    code = (
        "import sys, json, torch, formwright; m = formwright.load(sys.argv[1]).eval()\n"
        "with torch.no_grad(): print(json.dumps(m(torch.arange(3, 10)[None]).logits.tolist()))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    with torch.no_grad():
        assert json.loads(ran.stdout) == model(torch.arange(3, 10)[None]).logits.tolist()


def test_a_higher_ratio_is_a_smaller_file_that_is_further_away():
    distance, size = [], []
    for ratio in (1.4, 2.2):
        model = zoo.build("vit")
        before = zoo.outputs(model, "vit")
        size.append(apply(model, DSFormer(ratio=ratio, train="never"), data()).bytes[1])
        distance.append(float((zoo.outputs(model, "vit") - before).norm()))
    assert size[0] > size[1]
    assert distance[0] < distance[1]


@pytest.mark.parametrize(
    ("train", "distill"), [("values", False), ("coefficients", False), ("weights", False), ("weights", True)]
)
def test_training_lowers_the_loss_and_leaves_factors(train, distill):
    model, given = tiny(), data(steps=10)
    given.teacher = copy.deepcopy(model).eval()
    bare = copy.deepcopy(model)
    apply(bare, DSFormer(ratio=1.5, train="never"), given)
    apply(model, DSFormer(ratio=1.5, train=train, distill=distill, steps=20, learning_rate=3e-3), given)
    assert sum(isinstance(one, DenseSparseLinear) for one in model.modules()) == 24
    assert not any(type(one) is nn.Linear for name, one in model.named_modules() if ".layer." in name)
    with torch.no_grad():
        seen = {**rows(32), "labels": torch.arange(32) % 3}
        assert model(**seen).loss < bare(**seen).loss


def test_bfloat16_weights_are_factorised_and_counted_as_such():
    model = zoo.build("llama").bfloat16()
    change = apply(model, DSFormer(ratio=1.3, train="never", rounds=2), data())
    assert change.bytes[1] < change.bytes[0]
    assert zoo.outputs(model, "llama").dtype == torch.bfloat16


def test_the_search_of_a_format_keeps_within_the_ratio():
    site = sites(zoo.build("bert"))[0]
    for ratio in (1.3, 1.6, 2.2):
        assert all(one.ratio() >= ratio for one in DSFormer(ratio=ratio).formats(site))
    [one] = DSFormer(atoms=8, nonzeros=1, width=8, side="outputs").formats(site)
    assert (one.width, one.atoms, one.nonzeros, one.by_outputs) == (8, 8, 1, True)


def test_queries_keys_and_values_are_cut_by_outputs_and_all_else_by_inputs():
    modifier = DSFormer(ratio=1.6)
    model = zoo.build("bert")
    cut = {one.path.rpartition("layer.0.")[2]: modifier.formats(one)[0].by_outputs for one in sites(model)[:6]}
    assert cut == {
        **{f"attention.self.{name}": True for name in ("query", "key", "value")},
        **dict.fromkeys(("attention.output.dense", "intermediate.dense", "output.dense"), False),
    }


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_is_exported_to_onnx_as_factors(tmp_path, family):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from formwright.compress.export import OnnxRunner, export

    model = zoo.build(family)
    apply(model, DSFormer(ratio=1.6, train="never", rounds=2), data())
    export(model, tmp_path, "onnx")  # compares the answers itself
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(
        OnnxRunner(tmp_path)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, logits, rtol=1e-4, atol=1e-3
    )


# What is refused


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.0},
        {"ratio": 2.0, "nonzeros": 2, "atoms": 8},
        {"nonzeros": 2},
        {"nonzeros": 9, "atoms": 8},
        {"rounds": 0},
        {"recode": 0},
        {"train": "never", "distill": True},
        {"train": "never", "steps": 5},
        {"train": "values", "recode": 5},
        {"train": "coefficients", "refit": 5},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(FormwrightError):
        DSFormer(**options)


def test_what_cannot_be_factorised_is_refused():
    for options, says in (({"ratio": 40.0}, "smaller ratio"), ({"width": 5}, "divide")):
        with pytest.raises(FormwrightError, match=says):
            apply(zoo.build("bert"), DSFormer(**options, train="never"), data())
    with pytest.raises(FormwrightError, match="no loss"):
        apply(zoo.build("mpnet"), DSFormer(ratio=1.6), data())
    with pytest.raises(FormwrightError, match="holds none"):
        apply(zoo.build("bert"), DSFormer(ratio=1.6, distill=True, steps=2), data())
    model = zoo.build("bert")
    apply(model, build("modifier", "dsformer(ratio=1.6, train=never, recipe=k-svd)"), data())
    with pytest.raises(FormwrightError, match="no plain projections"):
        apply(model, DSFormer(ratio=1.6, train="never"), data())
