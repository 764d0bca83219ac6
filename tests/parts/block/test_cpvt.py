"""CPVT: where its position generator stands, and images of other sizes."""

import pytest
import torch

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerForImageClassification
from formwright.parts.block.cpvt import CPVT
from formwright.parts.block.postnorm import PostNorm
from formwright.parts.block.prenorm import PreNorm


def built(seed=0, **options):
    torch.manual_seed(seed)
    given = {"vocab_size": 0, "image_size": 16, "patch_size": 4, "num_channels": 2, "hidden_size": 24, "use_grid": True}
    config = TransformerConfig(**given | {"num_hidden_layers": 3, "position": "none", "block": "cpvt"} | options)
    return TransformerForImageClassification(config).eval()


def images(height, width, batch=2):
    return torch.randn(batch, 2, height, width, generator=torch.Generator().manual_seed(1))


def shuffled(pixels):
    """The same patches in another order."""
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)
    order = torch.randperm(patches.shape[2], generator=torch.Generator().manual_seed(2))
    rows = pixels.shape[2] // 4
    return patches[:, :, order].unflatten(2, (rows, -1)).permute(0, 1, 2, 4, 3, 5).reshape(pixels.shape)


@pytest.mark.parametrize(("after", "layers"), [(1, [0]), (2, [0, 1]), (5, [0, 1, 2])])
def test_a_generator_follows_the_first_blocks(after, layers):
    blocks = [layer.block for layer in built(block=f"cpvt(after={after})").model.encoder.layers]
    assert [i for i, block in enumerate(blocks) if block.peg is not None] == layers


def test_the_output_is_the_generator_of_the_inner_block():
    block = built().model.encoder.layers[0].block
    x = torch.randn(2, 15, 24)
    context = Context.of(x, grid=(3, 5))
    assert torch.equal(block(x, context), block.peg.embed(block.inner(x, context), context))


def test_it_wraps_any_wiring_and_ends_with_its_norm():
    assert isinstance(built(block="cpvt(inner=post)").model.encoder.layers[0].block.inner, PostNorm)
    assert built(block="cpvt(inner=post)").model.encoder.norm is None
    assert isinstance(built().model.encoder.layers[0].block.inner, PreNorm)
    assert built().model.encoder.norm is not None


@torch.no_grad()
def test_with_it_the_order_of_patches_counts_and_without_it_does_not():
    x = images(16, 16)
    plain, placed = built(block="pre"), built()
    assert torch.allclose(plain(x).logits, plain(shuffled(x)).logits, atol=1e-5)
    assert (placed(x).logits - placed(shuffled(x)).logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"class_token": True, "pooling": "first"}, {"block": "pre", "position": "peg"}]
)
def test_images_of_any_size_are_read_and_each_as_a_model_built_for_it_reads_it(options):
    model = built(**options)
    for height, width in ((16, 16), (24, 24), (8, 20), (4, 4)):
        assert torch.isfinite(model(images(height, width)).logits).all()
    larger = built(seed=1, image_size=24, **options)
    larger.load_state_dict(model.state_dict())
    assert torch.equal(larger(images(24, 24)).logits, model(images(24, 24)).logits)


@pytest.mark.parametrize("options", [{"position": "learned", "block": "pre"}, {"use_grid": False, "block": "pre"}])
def test_a_model_whose_parts_know_one_size_refuses_others(options):
    model = built(**options)
    assert model(images(16, 16)).logits.shape == (2, 2)
    with pytest.raises(UnsupportedContext, match="16 x 16, got 24 x 16"):
        model(images(24, 16))


@torch.no_grad()
def test_the_class_token_is_what_is_read():
    model = built(class_token=True, pooling="first")
    states = model.model(pixel_values=images(16, 16)).last_hidden_state
    assert states.shape == (2, 17, 24)
    assert torch.equal(model.classifier(states[:, 0]), model(images(16, 16)).logits)
    learned = built(class_token=True, pooling="first", position="learned", block="pre", max_position_embeddings=16)
    assert learned(images(16, 16)).logits.shape == (2, 2)  # one place more
    for wrong in ({"pooling": "mean"}, {"pooling": "first", "image_size": 0, "vocab_size": 9}):
        with pytest.raises(FormwrightError, match="class token"):
            TransformerConfig(**{"image_size": 16, "class_token": True} | wrong)


def test_a_save_brings_it_back(tmp_path):
    model = built(class_token=True, pooling="first")
    model.save_pretrained(tmp_path)
    loaded = TransformerForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images(8, 20)).logits, model(images(8, 20)).logits)


def test_a_decoder_trains_and_a_step_with_a_cache_is_refused():
    torch.manual_seed(0)
    config = TransformerConfig(architecture="decoder", vocab_size=9, hidden_size=16, block="cpvt", position="none")
    model = TransformerForCausalLM(config).eval()
    ids = torch.randint(9, (1, 7))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.decoder.layers[0].block.peg.weight.grad.any()
    start = model(ids, use_cache=True)
    with pytest.raises(UnsupportedContext, match="use_cache=False"):
        model(ids[:, :1], past_key_values=start.past_key_values)


def test_bad_options_are_refused():
    block = built().model.encoder.layers[0].block
    with pytest.raises(FormwrightError, match="at least one block"):
        CPVT(dim=24, mixer=block.mixer, feedforward=None, norm=lambda width: torch.nn.LayerNorm(width), after=0)
