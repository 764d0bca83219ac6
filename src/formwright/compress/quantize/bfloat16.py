"""bfloat16: half the bytes a number, products in the processor's bfloat16 instructions.

Idea     bfloat16 has float32's exponent and 8 bits of mantissa: what fits one fits the other, so nothing is calibrated,
         and a number is off by 2^-8 of itself at most. Weights and activations are bfloat16; sums inside products,
         norms and softmax are float32, as PyTorch and transformers have it.
Differs  `model.bfloat16()` would also round what a model computes for itself when it is built, such as the frequencies
         of rotary positions, of which from_pretrained(dtype=torch.bfloat16) makes no bfloat16 either. Here parameters
         and saved buffers change, as there, so that the saved model comes back as it was.

Fast where the processor has instructions for it (AVX512-BF16, AMX, Arm BF16, GPUs). Elsewhere PyTorch converts to
float32 and back around every product: right all the same, in half the memory, but slower than float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from formwright.compress.modifier import Modifier
from formwright.errors import FormwrightError


class BFloat16(Modifier):
    """Turn a model to bfloat16. Slow on a processor that emulates it, see above; right everywhere."""

    def check(self, model: PreTrainedModel) -> None:
        if all(tensor.dtype == torch.bfloat16 for tensor in floats(model)):
            raise FormwrightError(
                f"{type(model).__name__} has no floating-point weight but bfloat16 ones: leave bfloat16 out."
            )

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> None:
        for tensor in floats(model):
            tensor.data = tensor.data.to(torch.bfloat16)


def floats(model: PreTrainedModel) -> Iterator[Tensor]:
    """Parameters and saved buffers in floating point, but for those that the family always keeps in float32."""
    kept = model._keep_in_fp32_modules_strict or ()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(one in name for one in kept):
            yield tensor
