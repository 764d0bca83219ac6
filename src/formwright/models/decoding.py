"""When a layer's decoding step may be one native call: see `formwright.ops.decode`."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from formwright.contracts import Context
from formwright.models.cache import KeyValues
from formwright.ops.decode import Activation, BlockWeights, block_step, kernel
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.block.prenorm import PreNorm
from formwright.parts.feedforward.mlp import GELUMLP, ReLUMLP, TanhGELUMLP
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.norm.layernorm import LayerNorm

ACTIVATIONS: dict[type, Activation] = {ReLUMLP: "relu", GELUMLP: "gelu", TanhGELUMLP: "gelu-tanh"}
LARGEST_BATCH = 8  # beyond, matrix products read the weights once for many sequences


def decoded(block: nn.Module, x: Tensor, context: Context) -> Tensor | None:
    """The block's output for one new token a sequence, or none where the block or the call is not the plain one.

    Plain is float32 on the CPU, without gradients, dropout, hooks or recorded weights, after a prefill; through
    pre-norm, softmax attention without a position on its scores and a ReLU or GELU feed-forward layer.
    """
    if x.shape[1] != 1 or x.shape[0] > LARGEST_BATCH or type(context.cache) is not KeyValues:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or block.training):
        return None
    if (
        torch.compiler.is_compiling()
        or kernel() is None
        or block.training
        or context.attentions is not None
        or context.shared_position is not None
        or torch.is_autocast_enabled("cpu")
        or _get_current_dispatch_mode() is not None
        or not context.causal
        or not _plain(x)
    ):
        return None
    parts = block._modules  # looked up directly: this runs for every layer and token
    if type(block) is not PreNorm or block.cross is not None or block.feedforward is None:
        return None
    mixer, feedforward, norms = parts["mixer"], parts["feedforward"], (parts["mixer_norm"], parts["feedforward_norm"])
    if type(mixer) is not MultiHeadAttention or type(feedforward) not in ACTIVATIONS or mixer.position is not None:
        return None
    inside, beyond = mixer._modules, feedforward._modules
    linears = (inside["query_key_value"], inside["out"], beyond["up"], beyond["down"])
    wanted = ((nn.Linear, linears), (LayerNorm, norms), (nn.Identity, (inside["inner"], beyond["inner"])))
    if type(inside["attention"]) is not SoftmaxAttention or any(
        type(module) is not kind for kind, modules in wanted for module in modules
    ):
        return None
    hooked = (block, mixer, feedforward, *inside.values(), *beyond.values(), *norms)
    if any(module._forward_hooks or module._forward_pre_hooks for module in hooked):
        return None
    first, second = norms
    given = (first, linears[0], linears[1], second, linears[2], linears[3])
    weights = [module._parameters[name] for module in given for name in ("weight", "bias")]
    if first.bias is None or second.bias is None or not all(w is None or _plain(w) for w in weights):
        return None
    if torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights):
        return None
    cache, padding = context.cache, context.padding
    if not _serves(cache, (len(x), mixer.kv_heads, mixer.head_dim)):
        return None
    if padding is not None and padding.shape != (len(x), cache.length + 1):
        return None
    past = cache.claim(1)
    return block_step(
        x,
        BlockWeights(*weights),
        cache.keys,
        cache.values,
        past=past,
        heads=mixer.heads,
        eps=(first.eps, second.eps),
        activation=ACTIVATIONS[type(feedforward)],
        seen=padding,
    )


def _serves(cache: KeyValues, shape: tuple[int, int, int]) -> bool:
    """Whether the call may write into the buffers: a prefill under autocast or with gradients leaves other ones."""
    return cache.is_initialized and all(
        _plain(buffer) and (*buffer.shape[:2], buffer.shape[3]) == shape for buffer in (cache.keys, cache.values)
    )


def _plain(tensor: Tensor) -> bool:
    """Numbers at an address of their own; a subclass (a quantised weight) may hold something else."""
    known = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return known and tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
