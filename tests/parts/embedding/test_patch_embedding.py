"""Patches: which pixels a token reads, ViT's own, and images that do not fit."""

import pytest
import torch
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

from formwright.errors import FormwrightError
from formwright.parts.embedding.patch import PatchEmbedding


def test_a_token_is_one_matrix_times_the_pixels_of_its_patch():
    embed = PatchEmbedding(dim=5, image_size=6, patch_size=2, channels=3).double()
    pixels = torch.randn(2, 3, 6, 6, dtype=torch.double)
    row, column = 1, 2
    patch = pixels[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
    wanted = patch @ embed.projection.weight.flatten(1).T + embed.projection.bias
    torch.testing.assert_close(embed(pixels)[:, 3 * row + column], wanted)
    assert embed.grid == (3, 3)


@pytest.mark.reference
def test_it_equals_vit():
    theirs = ViTPatchEmbeddings(ViTConfig(hidden_size=8, image_size=12, patch_size=4, num_channels=3))
    ours = PatchEmbedding(dim=8, image_size=12, patch_size=4, channels=3)
    ours.projection.load_state_dict(theirs.projection.state_dict())
    pixels = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(ours(pixels), theirs(pixels))


@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (2, 3, 7, 6), (2, 3, 6, 0)])
def test_other_images_are_refused(shape):
    with pytest.raises(FormwrightError, match="3 channels whose sides are multiples of 2"):
        PatchEmbedding(dim=5, image_size=6, patch_size=2, channels=3)(torch.zeros(shape))


def test_images_of_another_size_have_another_grid():
    patches = PatchEmbedding(dim=5, image_size=6, patch_size=2, channels=3)
    pixels = torch.randn(2, 3, 8, 4)
    assert patches.grid_of(pixels) == (4, 2)
    assert torch.equal(patches(pixels)[:, 2:4], patches(pixels[:, :, 2:4])[:, :2])
    assert patches.grid == (3, 3)


def test_patches_must_tile_the_image():
    with pytest.raises(FormwrightError, match="do not tile"):
        PatchEmbedding(dim=5, image_size=6, patch_size=4, channels=3)
