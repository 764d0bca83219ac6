"""Patch embedding: an image becomes one token for every square patch.

Paper    Dosovitskiy et al.: An Image is Worth 16x16 Words (ICLR 2021), arXiv:2010.11929, equation 1.
Idea     A patch's pixels, side by side, pass through one matrix.

             token_(i, j) = E vec(pixels of patch (i, j)) + b        row by row

Differs  In nothing; the matrix product is written as a convolution whose stride is its size.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formwright.errors import FormwrightError


class PatchEmbedding(nn.Module):
    """(b, c, h, w) -> (b, h/p * w/p, d); `grid` is that of images of the size given.

    Args:
        dim: width d of a token.
        image_size: height and width of the images; others whose sides are multiples of p have another grid.
        patch_size: p, a divisor of the image size.
        channels: c.
    """

    def __init__(self, *, dim: int, image_size: int, patch_size: int, channels: int) -> None:
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise FormwrightError(f"Patches of {patch_size} do not tile images of {image_size}; use a divisor of it.")
        self.patch_size, self.channels = patch_size, channels
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.projection = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        channels, height, width = pixels.shape[1:]
        if channels != self.channels or height % self.patch_size or width % self.patch_size or not height * width:
            raise FormwrightError(
                f"The model reads images of {self.channels} channels whose sides are multiples of {self.patch_size}, "
                f"got {' x '.join(map(str, pixels.shape[1:]))}."
            )
        return self.projection(pixels).flatten(2).transpose(1, 2)

    def grid_of(self, pixels: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """The grid that the patches of these images lie on."""
        return (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)


class ClassToken(nn.Module):
    """One learned token in front of all others: (b, n, d) -> (b, 1 + n, d)."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.token, std=0.02)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        return torch.cat([self.token.to(x.dtype).expand(len(x), 1, -1), x], 1)
