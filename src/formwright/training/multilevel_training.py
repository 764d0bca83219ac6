"""Multi-level training: a large model is trained through a smaller one, made of it and put back into it.

Paper    Zou, Zhang, Deng: A Multi-Level Framework for Accelerating Training Transformer Models (ICLR 2024),
         arXiv:2404.07999.
Idea     A multigrid V-cycle. The large model is trained for its warm-up, coalesced to half its width and depth, trained
         there at an eighth of the cost, de-coalesced, and mixed with what it was: the mixture breaks the symmetry of
         neurons that would have equal gradients for ever.

             coalesce      W_s = F W T       F = 1/2 [I I] over outputs (mean),  T = [I I]^T over inputs (sum)
                           b_s = F b         biases, norms, embeddings (columns): mean
             de-coalesce   W = T W_s F       outputs twice, inputs halved;  F T = I: the former undoes it
             depth         a small layer is the mean of two; back, both are copies of it
             interpolate   W <- (1 - alpha) W_before + alpha W_decoalesced

         Pairs are i and i + n/2: whole heads of attention, whose size stays, channels of the stream, hidden neurons.
         Twice as wide, a model computes exactly the same; twice as deep, it does not.
Differs  With embeddings that are also the output, logits would double. `exact` halves the norm that the head reads (and
         doubles it on the way down), which keeps the function; the release halves the embeddings instead
         (`official`), and with them the input, which pre-norm models do not survive. The release's script interpolates
         with a finished baseline by mistake; here it is with the weights before coalescing, as in the paper.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.build import parse_spec
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerPreTrainedModel
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.feedforward.glu import GLU
from formwright.parts.feedforward.mlp import MLP
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.position.learned import Learned
from formwright.training.evaluation import Trainable
from formwright.training.loop import History, fit
from formwright.training.method import Method
from formwright.training.settings import Settings, named

Pairs = Literal["neighbours", "halves"]
Scale = Literal["exact", "official"]


# Which models


@dataclass(frozen=True, kw_only=True)
class Family:
    """Fields of a transformers config and paths in its models.

    Args:
        width: fields that are halved, where they are set.
        heads: of those, the numbers of heads.
        depth: the field with the number of layers.
        layers: what their ModuleList's path ends with.
        last_norm: what the path of the norm ends with that the language-model head reads.
    """

    width: tuple[str, ...] = ("hidden_size", "num_attention_heads", "intermediate_size")
    heads: tuple[str, ...] = ("num_attention_heads",)
    depth: str = "num_hidden_layers"
    layers: str
    last_norm: str = ""


FAMILIES = {
    "bert": Family(layers="encoder.layer", last_norm="cls.predictions.transform.LayerNorm"),
    "gpt2": Family(
        width=("n_embd", "n_head", "n_inner"), heads=("n_head",), depth="n_layer", layers="h", last_norm="ln_f"
    ),
    "vit": Family(
        width=("hidden_size", "num_attention_heads", "intermediate_size", "pooler_output_size"), layers="layers"
    ),
}
OURS = TransformerConfig.model_type
POSITIONS = ("none", "learned", "rope", "t5")
BLOCKS = ("pre", "post", "sub-ln")


def check(model: nn.Module, *, width: bool = True, depth: bool = True, times: int = 1) -> None:
    """Raise unless the model can be halved so often.

    Raises:
        FormwrightError: a family or part without the operators, or a size that does not halve.
    """
    if not width and not depth:
        raise FormwrightError("Neither width nor depth is to be halved: set one of them.")
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family == OURS:
        _check_ours(model, depth)
    elif family not in FAMILIES:
        raise FormwrightError(
            f"Multi-level training does not know {family}: it halves {', '.join(FAMILIES)} and our own Transformer."
        )
    elif getattr(model.config, "add_cross_attention", False) or getattr(model.config, "is_decoder", False):
        raise FormwrightError(f"This {family} is the decoder of a pair, which multi-level training does not halve.")
    for name, value in _sizes(model.config, width, depth).items():
        if value % 2**times:
            raise FormwrightError(f"{name} is {value}, but it must be divisible by {2**times} to be halved.")


def _check_ours(model: nn.Module, depth: bool) -> None:
    config = model.config
    wants = {
        "embedding": (config.embedding, ("none",)),
        "sharing": (config.sharing, ("none",)),
        "position": (config.position, POSITIONS),
        "cross_position": (config.cross_position, POSITIONS),
        "block": (config.block, BLOCKS),
        "norm": (config.norm, ("layernorm", "rmsnorm")),
    }
    for slot, (given, known) in wants.items():
        for spec in given if isinstance(given, list) else [given]:
            if parse_spec(spec)["name"] not in known:
                raise FormwrightError(f"Multi-level training takes {slot}={' or '.join(known)}, and not {spec!r}.")
    if depth and any(
        isinstance(given, list) and any(one != given[0] for one in given)
        for given in (config.mixer, config.feedforward, config.block, config.position)
    ):
        raise FormwrightError("Layers of different parts have no mean: set depth=False, or give all layers the same.")
    if getattr(model._scheme, "tied_factor", 1.0) != 1:
        raise FormwrightError(f"init={config.init!r} scales tied logits by the width: choose another scheme.")
    for path, module in model.named_modules():
        if hasattr(module, "cache_kind") and not (
            type(module) is MultiHeadAttention and type(module.attention) is SoftmaxAttention
        ):
            raise FormwrightError(f"{path} is a {type(module).__name__}; multi-level training takes softmax attention.")
        if path.endswith(".feedforward") and not isinstance(module, MLP | GLU):
            raise FormwrightError(
                f"{path} is a {type(module).__name__}; multi-level training halves plain and gated feed-forward layers."
            )


def _sizes(config: Any, width: bool, depth: bool) -> dict[str, int]:
    """The fields of a config that are halved, as they are."""
    if config.model_type == OURS:
        wide: Sequence[str] = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        deep: Sequence[str] = ("num_hidden_layers", "num_decoder_layers")
    else:
        wide, deep = FAMILIES[config.model_type].width, (FAMILIES[config.model_type].depth,)
    fields = [*(wide if width else ()), *(deep if depth else ())]
    found = {name: getattr(config, name, None) for name in fields}
    multi_query = {"num_key_value_heads"} if found.get("num_key_value_heads") == 1 else set()  # one head for all stays
    return {name: value for name, value in found.items() if value is not None and name not in multi_query}


# What becomes of a weight


class Axis(NamedTuple):
    """A dimension that is halved: outputs by their mean, inputs by their sum. Its sections lie one behind the other,
    and some may stay.
    """

    dim: int
    output: bool
    big: tuple[int, ...]
    small: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter of the small model and those of the large one that it stands for."""

    name: str
    sources: tuple[str, ...]
    axes: tuple[Axis, ...]


def _merged(value: Tensor, axis: Axis) -> Tensor:
    parts = []
    for section, big, small in zip(value.split(axis.big, axis.dim), axis.big, axis.small, strict=True):
        if big != small:
            first, second = section.chunk(2, axis.dim)
            section = (first + second) / 2 if axis.output else first + second
        parts.append(section)
    return torch.cat(parts, axis.dim)


def _doubled(value: Tensor, axis: Axis) -> Tensor:
    parts = []
    for section, big, small in zip(value.split(axis.small, axis.dim), axis.big, axis.small, strict=True):
        if big != small:
            section = torch.cat([section, section], axis.dim)
            section = section if axis.output else section / 2
        parts.append(section)
    return torch.cat(parts, axis.dim)


def _plan(big: PreTrainedModel, small: PreTrainedModel, pairs: Pairs) -> Iterator[Weight]:
    """What every parameter of the small model stands for; a tied one once."""
    groups: dict[str, tuple[str, ...]] = {}
    for path, layers in small.named_modules():
        if isinstance(layers, nn.ModuleList):
            few, many = len(layers), len(big.get_submodule(path))
            for j in range(few):
                members = (j,) if few == many else (2 * j, 2 * j + 1) if pairs == "neighbours" else (j, j + few)
                groups[f"{path}.{j}."] = tuple(f"{path}.{i}." for i in members)
    for name, value in small.named_parameters():
        inside = next((path for path in groups if name.startswith(path)), "")
        sources = tuple(one + name.removeprefix(inside) for one in groups.get(inside, ("",)))
        path, _, kind = name.rpartition(".")
        there = sources[0].rpartition(".")[0]
        yield Weight(name, sources, tuple(_axes(big, there, kind, small.get_submodule(path), value)))


def _axes(big: PreTrainedModel, path: str, kind: str, small: nn.Module, value: Tensor) -> Iterator[Axis]:
    module = big.get_submodule(path)
    whole = module.get_parameter(kind).shape
    out, into = value.ndim - 1, None  # vectors, tables and the columns of raw parameters
    if kind == "weight" and isinstance(module, nn.Linear | nn.Conv2d):
        out, into = 0, 1
    elif kind == "weight" and isinstance(module, Conv1D):
        out, into = 1, 0
    for dim in range(value.ndim):
        if whole[dim] == value.shape[dim]:
            continue
        if dim == out:
            sections, halves = _sections(big, path, module), _sections(big, path, small)
            yield Axis(dim, True, sections or (whole[dim],), halves or (value.shape[dim],))
        elif dim == into:
            yield Axis(dim, False, (whole[dim],), (value.shape[dim],))
        else:
            raise FormwrightError(f"{path}.{kind} is {tuple(whole)} and {tuple(value.shape)}: no half of it is known.")


def _sections(big: PreTrainedModel, path: str, module: nn.Module) -> tuple[int, ...] | None:
    """The outputs of a projection that holds several."""
    if hasattr(module, "splits"):  # ours: queries, keys, values
        return tuple(module.splits)
    parent = big.get_submodule(path.rpartition(".")[0]) if path else None
    parts = 3 if isinstance(module, Conv1D) and path.endswith(".c_attn") else 1
    if isinstance(parent, GLU) and path.endswith(".up"):
        parts = 2
    outputs = module.nf if isinstance(module, Conv1D) else getattr(module, "out_features", 0)
    return (outputs // parts,) * parts if parts > 1 else None


# The three operators


def coalesce(
    model: PreTrainedModel,
    *,
    width: bool = True,
    depth: bool = True,
    pairs: Pairs = "neighbours",
    embed_scale: Scale = "exact",
) -> PreTrainedModel:
    """A model of half the width, the depth or both, made of this one, which stays as it is.

    Args:
        width, depth: what is halved.
        pairs: of layers, 2i and 2i + 1 ("neighbours"), or i and i + L/2 ("halves").
        embed_scale: how logits keep their size where embeddings are tied, see the module.

    Raises:
        FormwrightError: see `check`.
    """
    _check_choices(pairs, embed_scale)
    check(model, width=width, depth=depth)
    config = copy.deepcopy(model.config)
    for name, value in _sizes(config, width, depth).items():
        setattr(config, name, value // 2)
    with torch.random.fork_rng():  # the weights it is built with are not used
        small = type(model)(config)
    small = small.to(device=model.device, dtype=model.dtype).train(model.training)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for weight in _plan(model, small, pairs):
            value = torch.stack([theirs[one] for one in weight.sources]).mean(0)
            for axis in weight.axes:
                value = _merged(value, axis)
            small.get_parameter(weight.name).copy_(value)
        if width:
            _scale_output(small, 2.0, embed_scale)
    return small


def decoalesce(
    small: PreTrainedModel, like: PreTrainedModel, *, pairs: Pairs = "neighbours", embed_scale: Scale = "exact"
) -> PreTrainedModel:
    """A model of the sizes of `like` that repeats the small one.

    Args:
        like: the model that was coalesced; its weights are not read.
        pairs, embed_scale: as they were then.

    Raises:
        FormwrightError: the small model is no half of the other.
    """
    _check_choices(pairs, embed_scale)
    width, _ = _halved(small, like)
    big = copy.deepcopy(like)
    unscaled = copy.deepcopy(small)
    with torch.no_grad():
        if width:
            _scale_output(unscaled, 0.5, embed_scale)
        for weight in _plan(big, small, pairs):
            value = unscaled.get_parameter(weight.name)
            for axis in weight.axes:
                value = _doubled(value, axis)
            for source in weight.sources:
                big.get_parameter(source).copy_(value)
    return big


def _halved(small: PreTrainedModel, like: PreTrainedModel) -> tuple[bool, bool]:
    """Whether the width and the depth of one are half of the other's."""
    if type(small) is not type(like):
        raise FormwrightError(f"A {type(small).__name__} is no half of a {type(like).__name__}.")
    found = []
    for which in ((True, False), (False, True)):
        wholes = _sizes(like.config, *which)
        ours = {name: getattr(small.config, name) for name in wholes}
        if ours != wholes and ours != {name: value // 2 for name, value in wholes.items()}:
            raise FormwrightError(f"{ours} is no half of {wholes}: give the model that was coalesced.")
        found.append(ours != wholes)
    check(like, width=found[0], depth=found[1])
    return found[0], found[1]


@torch.no_grad()
def interpolate(model: nn.Module, other: nn.Module, alpha: float) -> None:
    """(1 - alpha) of the model's weights and alpha of the other's, in place."""
    if not 0 <= alpha <= 1:
        raise FormwrightError(f"alpha is {alpha}, but it is the share of the other model: from 0 to 1.")
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_((1 - alpha) * parameter + alpha * theirs[name])


def _check_choices(pairs: str, embed_scale: str) -> None:
    for name, value, kind in (("pairs", pairs, Pairs), ("embed_scale", embed_scale, Scale)):
        if value not in get_args(kind):
            raise FormwrightError(f"{name} is {value!r}, but it must be {' or '.join(get_args(kind))}.")


def _scale_output(model: PreTrainedModel, factor: float, embed_scale: Scale) -> None:
    """Where the embeddings are the output too: the norm before it, or the embeddings themselves."""
    head = model.get_output_embeddings()
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return
    if embed_scale == "exact":
        scaled = list(_last_norm(model).parameters())
    else:
        columns = head.weight.shape[-1]
        scaled = [
            parameter
            for module in model.modules()
            if isinstance(module, nn.Embedding | Learned)
            for parameter in module.parameters(recurse=False)
            if parameter.shape[-1] == columns
        ]
    for parameter in scaled:
        parameter.mul_(factor)


def _last_norm(model: PreTrainedModel) -> nn.Module:
    """The norm whose output the language-model head alone reads."""
    if isinstance(model, TransformerPreTrainedModel):
        transform = getattr(model, "transform", None)
        if isinstance(transform, nn.Sequential):
            return transform[-1]
        stack = model.model.decoder or model.model.encoder
        block = stack.layers[-1].block
        return stack.norm or block.feedforward_norm or block.mixer_norm
    ending = FAMILIES[model.config.model_type].last_norm
    return next(module for path, module in model.named_modules() if ending and path.endswith(ending))


# The V-cycle


class Phase(NamedTuple):
    """One part of the cycle before the last, which `fit` itself returns."""

    level: int  # 0 is the large model, 1 its half
    history: History


class MultiLevel(Method):
    """The V-cycle down and up; what `fit` then trains is the large model's last part, and `settings.steps` its length.

    Every part begins with a fresh optimizer and its own schedule. The first is the large model's warm-up alone, the
    others have none in the paper: set warmup=0. Interrupted and resumed, a run goes through the cycle again.

    Args:
        first: steps of a level before it is coalesced, as a share of the last part's; 0 leaves them out.
        small: steps of the smaller level, as a share of the last part's.
        rate: the smaller levels' learning rate over the large model's; 4 in the paper's GPT-2.
        alpha: the share of the de-coalesced weights.
        levels: 2 is a model and its half.
        width, depth: what is halved.
        pairs, embed_scale: as in `coalesce`.
    """

    def __init__(
        self,
        *,
        first: float = 0.1,
        small: float = 1.0,
        rate: float = 4.0,
        alpha: float = 0.5,
        levels: int = 2,
        width: bool = True,
        depth: bool = True,
        pairs: Pairs = "neighbours",
        embed_scale: Scale = "exact",
    ) -> None:
        if not 0 <= alpha <= 1:
            raise FormwrightError(f"alpha is {alpha}, but it is the share of the small model's weights: from 0 to 1.")
        if first < 0 or not small > 0 or not rate > 0 or levels < 2:
            raise FormwrightError(
                f"multilevel needs first >= 0, small > 0, rate > 0 and 2 levels or more, got {first}, {small}, {rate} "
                f"and {levels}."
            )
        _check_choices(pairs, embed_scale)
        self.first, self.small, self.rate, self.alpha, self.levels = first, small, rate, alpha, levels
        self.halved = {"width": width, "depth": depth}
        self.how: dict[str, Any] = {"pairs": pairs, "embed_scale": embed_scale}
        self.phases: list[Phase] = []

    def check(self, model: nn.Module, task: Trainable, settings: Settings) -> None:  # noqa: ARG002
        check(model, **self.halved, times=self.levels - 1)
        if len(named(settings.methods)) > 1:
            raise FormwrightError(
                f"multilevel trains smaller models of its own and stands alone, got methods={settings.methods!r}."
            )

    def prepare(self, model: PreTrainedModel, task: Trainable, settings: Settings) -> None:
        alone = replace(settings, methods="none", save_every=0)
        first = round(self.first * settings.steps)
        self.phases = []
        if first:
            rising = {"steps": first, "schedule": "constant", "warmup": (first - 1) / first}
            self.phases.append(Phase(0, fit(model, task, replace(alone, **rising, seed=settings.seed + 1))))
        little = coalesce(model, **self.halved, **self.how)
        deeper = [self._next()] if self.levels > 2 else []
        history = fit(
            little,
            task,
            replace(
                alone,
                steps=max(1, round(self.small * settings.steps)),
                learning_rate=self.rate * settings.learning_rate,
                warmup=0.0,
                seed=settings.seed + 2,
            ),
            methods=deeper,
        )
        below = itertools.chain.from_iterable(method.phases for method in deeper)
        self.phases += [Phase(phase.level + 1, phase.history) for phase in below]
        self.phases.append(Phase(1, history))
        interpolate(model, decoalesce(little, model, **self.how), self.alpha)

    def _next(self) -> "MultiLevel":
        """The cycle of the level below, at that level's rate."""
        below = copy.copy(self)
        below.levels, below.rate = self.levels - 1, 1.0
        return below
