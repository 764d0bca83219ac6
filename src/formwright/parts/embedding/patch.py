"""Patch embedding: an image becomes one token for every square patch.

Paper    Dosovitskiy et al.: An Image is Worth 16x16 Words (ICLR 2021), arXiv:2010.11929, equation 1.
Idea     A patch's pixels, side by side, pass through one matrix.

             token_(i, j) = E vec(pixels of patch (i, j)) + b        row by row

Differs  In nothing; the matrix product is written as a convolution whose stride is its size.
"""

from jaxtyping import Float
from torch import Tensor, nn

from formwright.errors import FormwrightError


class PatchEmbedding(nn.Module):
    """(b, c, h, w) -> (b, h/p * w/p, d).

    Args:
        dim: width d of a token.
        image_size: height and width of the images.
        patch_size: p, a divisor of the image size.
        channels: c.
    """

    def __init__(self, *, dim: int, image_size: int, patch_size: int, channels: int) -> None:
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise FormwrightError(f"Patches of {patch_size} do not tile images of {image_size}; use a divisor of it.")
        self.image_size, self.channels = image_size, channels
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.projection = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        if pixels.shape[1:] != (self.channels, self.image_size, self.image_size):
            wanted = f"{self.channels} x {self.image_size} x {self.image_size}"
            raise FormwrightError(f"The model reads images of {wanted}, got {' x '.join(map(str, pixels.shape[1:]))}.")
        return self.projection(pixels).flatten(2).transpose(1, 2)
