"""int8: exact integers on both paths, nearness of the answers, every family and its saved form."""

import copy
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

import formwright
from formwright.build import build
from formwright.compress import pipeline
from formwright.compress.modifier import Data
from formwright.compress.quantize import int8
from formwright.compress.quantize.bfloat16 import BFloat16
from formwright.compress.quantize.int8 import Int8, Int8Linear, Seen, exact_product, has_instructions, layers
from formwright.compress.runtime.bytetransformer import padding_free
from formwright.errors import FormwrightError

from .. import zoo

SCALES = ["static", "dynamic"]
CPU = torch.device("cpu")
needs_instructions = pytest.mark.skipif(not has_instructions(CPU), reason="no 8-bit instructions that oneDNN uses")


class Rows(torch.utils.data.Dataset):
    """Batches of the zoo's shape, other numbers."""

    def __init__(self, family: str, count: int = 12) -> None:
        generator = torch.Generator().manual_seed(5)
        one = {name: value[:1] for name, value in zoo.batch_for(family).items()}
        self.rows = [
            {
                name: torch.randn(value.shape[1:], generator=generator)
                if value.is_floating_point()
                else torch.randint(3, 40, value.shape[1:], generator=generator)
                for name, value in one.items()
            }
            for _ in range(count)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return self.rows[place]


def data(family: str = "bert", mask: int | None = None) -> Data:
    """`mask`: how many tokens of a row count."""

    def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([one[name] for one in items]) for name in items[0]}
        if mask is not None:
            batch["attention_mask"] = (torch.arange(7) < mask).long().expand(len(items), 7)
        return batch

    rows = Rows(family)
    task: Any = SimpleNamespace(name="rows", head="", train=rows, validation=None, test=rows, score=None, summary=None)
    task.collate = collate
    return Data(task=task, kind="text-classification")


def linear(inputs: int = 24, outputs: int = 10, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def inputs(count: int = 33, width: int = 24) -> torch.Tensor:
    """Channels of unlike reach, off centre."""
    torch.manual_seed(1)
    return torch.randn(count, width) * torch.exp2(torch.arange(width) % 4) + 0.5


def seen(x: torch.Tensor) -> Seen:
    return Seen(x.amin(0), x.amax(0), [x])


def made(old: nn.Module, x: torch.Tensor, scale: Any = "static", smooth: float = 0.5) -> Int8Linear:
    return Int8Linear.of(old, scale=scale, smooth=smooth, seen=seen(x))


def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "has_instructions", lambda _: False)


@needs_instructions
@pytest.mark.reference
@pytest.mark.parametrize("size", [(1, 3, 5), (33, 24, 10), (7, 2500, 9), (64, 64, 64)])
@pytest.mark.parametrize("zero", [0, 128, 201, 255])
def test_onednn_and_pytorch_give_the_integers_of_int64(size, zero) -> None:
    torch.manual_seed(0)
    t, i, o = size
    x = torch.randint(0, 256, (t, i), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (o, i), dtype=torch.int8)
    expected = (x.long() - zero) @ weight.long().T
    ours = exact_product(x, weight, zero)
    assert ours.dtype == torch.int32
    assert torch.equal(ours.long(), expected)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    one, none = torch.ones(o), torch.zeros(o, dtype=torch.int32)
    theirs = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero, packed, one, none, None, 1.0, 0, torch.float32, "none", [], ""
    )
    assert torch.equal(theirs.long(), expected.float().long())


@pytest.mark.reference
def test_no_sum_rounds_at_the_ends_of_the_range() -> None:
    x = torch.full((2, 5000), 0, dtype=torch.uint8)
    x[1] = 255
    weight = torch.full((1, 5000), -127, dtype=torch.int8)
    assert exact_product(x, weight, 0).flatten().tolist() == [0, -255 * 127 * 5000]
    assert exact_product(x, weight, 255).flatten().tolist() == [255 * 127 * 5000, 0]


@pytest.mark.reference
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("smooth", [0.0, 0.5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_a_layer_is_the_written_equation(scale, smooth, bias, fast, monkeypatch) -> None:
    """In float64 and int64, from the weights alone."""
    if fast and not has_instructions(CPU):
        pytest.skip("no 8-bit instructions that oneDNN uses")
    if not fast:
        without_instructions(monkeypatch)
    old, x = linear(bias=bias), inputs()
    w, x64 = old.weight.double(), x.double()
    s = torch.ones(24, dtype=torch.float64)
    if smooth:
        s = x64.abs().amax(0) ** smooth / w.abs().amax(0) ** (1 - smooth)
    d = (w * s).abs().amax(1) / 127
    codes = (w * s / d[:, None]).round().long()
    rows = x64 / s
    if scale == "static":
        step = (rows.max() - rows.min()) / 255
        zero = int((-rows.min() / step).round())
    else:
        step, zero = rows.abs().amax(1, keepdim=True) / 127, 128
    q = (rows / step + zero + 0.5).floor().clamp(0, 255).long()
    expected = ((q - zero) @ codes.T) * step * d + (old.bias.double() if bias else 0.0)
    new = made(old, x, scale, smooth)
    assert torch.equal(new.codes.long(), codes)
    difference = (new(x).double() - expected).abs()
    # A number on the border of two integers may fall to either side in float32: one step of one input.
    assert float((difference > 1e-4).double().mean()) < 0.05
    assert float(difference.max()) < float((step * d * 127 * 1.01).max())


@needs_instructions
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_give_the_same_answers(scale, dtype, monkeypatch) -> None:
    x = inputs().to(dtype)
    fast = made(linear().to(dtype), x.float(), scale)
    slow = copy.deepcopy(fast)
    first = fast(x)
    assert fast.packed.weight is not None
    without_instructions(monkeypatch)
    second = slow(x)
    assert slow.packed.weight is None
    assert first.dtype == second.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(first, second, rtol=2**-7, atol=1e-6)  # the last bit at most


@pytest.mark.parametrize("scale", SCALES)
def test_the_error_is_small_and_smoothing_lowers_it(scale) -> None:
    old = linear(256, 64)
    x = inputs(200, 256)
    x[:, 3] *= 40
    error = {smooth: float((made(old, x, scale, smooth)(x) - old(x)).norm() / old(x).norm()) for smooth in (0.0, 0.5)}
    assert error[0.5] < 0.7 * error[0.0] < 0.06


def test_none_chooses_the_power_of_the_least_error() -> None:
    old = linear(64, 32)
    x = inputs(100, 64)
    x[:, 3] *= 40
    chosen = Int8().nearest(old, seen(x))
    every = [made(old, x, "static", power)(x) for power in int8.POWERS]
    errors = [((y - old(x)).square().sum(1) / old(x).square().sum(1)).mean() for y in every]
    assert torch.equal(chosen(x), every[int(torch.stack(errors).argmin())])


def test_zero_stays_zero_and_silent_channels_do_no_harm() -> None:
    old = linear(bias=False)
    old.weight[3] = 0
    old.weight[:, 5] = 0
    x = inputs() + 20  # all above 0: the range is widened to hold it
    x[:, 7] = 0
    for scale in SCALES:
        for smooth in (0.0, 0.5, 1.0):
            new = made(old, x, scale, smooth)
            assert torch.equal(new(torch.zeros(2, 24)), torch.zeros(2, 10))
            assert new(x).isfinite().all()
            assert not new(x)[:, 3].any()


def test_static_scales_cut_off_what_calibration_did_not_see_dynamic_ones_do_not() -> None:
    old, x = linear(), inputs()
    far = 10 * x
    errors = {scale: float((made(old, x, scale)(far) - old(far)).norm() / old(far).norm()) for scale in SCALES}
    assert errors["dynamic"] < 0.05 < errors["static"]


def test_with_dynamic_scales_a_token_does_not_hang_on_the_others() -> None:
    new, x = made(linear(), inputs(), "dynamic"), inputs()
    together = new(torch.cat([x, 100 * x]))[:33]
    torch.testing.assert_close(together, new(x), rtol=0, atol=0)


def test_a_conv1d_is_a_linear_layer_turned_around() -> None:
    old = linear()
    turned = Conv1D(10, 24).requires_grad_(False)
    turned.weight.copy_(old.weight.T)
    turned.bias.copy_(old.bias)
    assert torch.equal(made(turned, inputs())(inputs()), made(old, inputs())(inputs()))


def test_any_leading_axes_and_strides() -> None:
    new, x = made(linear(), inputs()), inputs(24)
    assert new(x.view(2, 3, 4, 24)).shape == (2, 3, 4, 10)
    assert torch.equal(new(x[::2]), new(x)[::2])
    assert new(x[0]).shape == (10,)
    assert new(x[:0]).shape == (0, 10)


def test_the_weight_is_near_the_old_one_in_the_models_dtype() -> None:
    old = linear().bfloat16()
    new = made(old, inputs())
    assert new.weight.dtype == new.bias.dtype == torch.bfloat16
    assert float((new.weight.float() - old.weight.float()).norm() / old.weight.float().norm()) < 0.02


@pytest.mark.parametrize("scale", SCALES)
def test_the_way_back_is_refused_and_only_that(scale) -> None:
    new, x = made(linear(), inputs(), scale), inputs()
    expected = new(x)
    with torch.inference_mode():
        assert torch.equal(new(x), expected)
    y = new(x.requires_grad_())
    assert torch.equal(y, expected)
    with pytest.raises(FormwrightError, match="has no gradients"):
        y.sum().backward()


def test_training_a_model_is_refused() -> None:
    model = zoo.build("bert")
    pipeline.apply(model, Int8(samples=4), data())
    loss = model(**zoo.batch_for("bert"), labels=torch.tensor([0, 1])).loss
    with pytest.raises(FormwrightError, match="train the model before step int8"):
        loss.backward()


@pytest.mark.parametrize("scale", SCALES)
def test_a_compiler_sees_pytorch_alone_and_the_same_answer(scale, monkeypatch) -> None:
    new, x = made(linear(), inputs(300), scale), inputs(300)
    expected = new(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert new.packed.weight is None
    torch.testing.assert_close(new(x), expected, rtol=1e-6, atol=1e-6)


def test_another_weight_is_packed_anew() -> None:
    new, other, x = made(linear(), inputs()), made(linear(), 2 * inputs()), inputs()
    other.codes = -other.codes
    before = new(x)
    new.load_state_dict(other.state_dict())
    assert torch.equal(new(x), other(x))
    assert not torch.equal(new(x), before)
    twin = copy.deepcopy(new)
    assert torch.equal(twin(x), new(x))
    twin.codes = -twin.codes
    assert not torch.equal(twin(x), new(x))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", zoo.MODELS)
def test_every_family_keeps_its_answers_and_comes_back_exactly(family, scale, tmp_path) -> None:
    model = zoo.build(family)
    before = zoo.outputs(model, family)
    found = layers(model)
    pipeline.apply(model, Int8(scale=scale, samples=12), data(family))
    assert all(isinstance(model.get_submodule(path), Int8Linear) for path in found)
    after = zoo.outputs(model, family)
    assert after.dtype == torch.float32
    assert float((after - before).norm() / before.norm()) < 0.15
    model.save_pretrained(tmp_path)
    back = formwright.load(tmp_path).eval()
    assert torch.equal(zoo.outputs(back, family), after)


@pytest.mark.parametrize("order", [("int8", "bfloat16"), ("bfloat16", "int8")])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_with_bfloat16_in_either_order(family, order, tmp_path) -> None:
    model = zoo.build(family)
    before = zoo.outputs(model, family)
    steps = {"int8": Int8(samples=12), "bfloat16": BFloat16()}
    for name in order:
        pipeline.apply(model, steps[name], data(family))
    after = zoo.outputs(model, family)
    assert after.dtype == torch.bfloat16
    assert float((after.float() - before).norm() / before.norm()) < 0.15
    model.save_pretrained(tmp_path)
    assert torch.equal(zoo.outputs(formwright.load(tmp_path).eval(), family), after)


def test_a_cast_leaves_scales_and_bias_alone() -> None:
    model = zoo.build("bert")
    pipeline.apply(model, Int8(samples=4), data())
    before = zoo.outputs(model, "bert")
    layer = model.bert.encoder.layer[0].output.dense
    x = torch.randn(3, 24)
    expected = layer(x)
    model.bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    model.float()
    assert torch.equal(layer(x), expected)
    assert zoo.outputs(model, "bert").shape == before.shape


def test_a_fresh_process_gives_the_same_answers_through_the_auto_classes(tmp_path) -> None:
    model = zoo.build("gpt2")
    pipeline.apply(model, Int8(samples=4), data("gpt2"))
    model.save_pretrained(tmp_path / "model")
    torch.save(zoo.batch_for("gpt2"), tmp_path / "batch.pt")
    code = (
        "import sys, torch, formwright.compress; from transformers import AutoModelForCausalLM as A\n"
        "model = A.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "with torch.no_grad(): out = model(**torch.load(sys.argv[1] + '/batch.pt')).logits\n"
        "torch.save(out, sys.argv[1] + '/out.pt')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), zoo.outputs(model, "gpt2"))


def test_it_takes_a_byte_a_weight_on_disk(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.BertModel(hf.BertConfig(vocab_size=40, max_position_embeddings=16, **sizes)).eval()
    weights = sum(module.weight.numel() for module in layers(model).values())

    def size(name: str) -> int:
        model.save_pretrained(tmp_path / name)
        return (tmp_path / name / "model.safetensors").stat().st_size

    before = size("before")
    pipeline.apply(model, Int8(samples=4), data())
    after = size("after")
    assert after < 0.4 * before
    assert before - after > 2.7 * weights  # three bytes of four, less scales and names


def test_embeddings_and_head_stay_and_a_second_time_is_refused() -> None:
    model = zoo.build("bert")
    pipeline.apply(model, Int8(samples=4), data())
    left = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    assert left == ["bert.pooler.dense", "classifier"]
    assert type(model.get_input_embeddings()) is nn.Embedding
    with pytest.raises(FormwrightError, match="no linear layer in floating point left"):
        pipeline.apply(model, Int8(samples=4), data())


def test_calibration_changes_nothing_and_leaves_padding_out() -> None:
    model = zoo.build("bert")
    before = copy.deepcopy(model.state_dict())
    modifier = Int8(samples=5)
    modifier.calibrate(model, data(mask=4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    found = modifier.seen["bert.encoder.layer.0.output.dense"]  # type: ignore[index]
    assert sum(map(len, found.rows)) == 5 * 4
    batch = next(data(mask=4).batches(1, batch_size=5))
    caught: list[torch.Tensor] = []
    hook = model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    real = caught[0][:, :4].flatten(0, 1)
    assert torch.equal(found.low, real.amin(0))
    assert torch.equal(found.high, real.amax(0))


def test_a_padding_free_model_runs_in_integers() -> None:
    model = zoo.build("bert")
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    batch = {**zoo.batch_for("bert"), "attention_mask": mask}
    pipeline.apply(model, Int8(samples=12), data())
    with torch.no_grad():
        padded = model(**batch).logits
        packed = padding_free(model)(**batch).logits
    torch.testing.assert_close(packed, padded, rtol=1e-2, atol=1e-2)


def test_text_is_generated_with_a_cache() -> None:
    model = zoo.build("llama")
    pipeline.apply(model, Int8(samples=12), data("llama"))
    ids = torch.randint(3, 40, (2, 5))
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 9)


def test_options_come_from_the_catalogue_and_bad_ones_are_refused() -> None:
    built = build("modifier", "int8(scale=dynamic, smooth=0.7)")
    assert isinstance(built, Int8)
    assert (built.scale, built.smooth, built.samples) == ("dynamic", 0.7, 128)
    for wrong, says in (("scale=token", "static"), ("smooth=1.5", "smooth is"), ("samples=0", "samples is")):
        with pytest.raises(FormwrightError, match=says):
            build("modifier", f"int8({wrong})")


def test_an_infinite_weight_and_a_missing_calibration_are_told() -> None:
    model = zoo.build("bert")
    with pytest.raises(FormwrightError, match="call calibrate"):
        Int8().apply(model)
    model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = torch.inf
    with pytest.raises(FormwrightError, match=r"output\.dense is infinite"):
        pipeline.apply(model, Int8(), data())
