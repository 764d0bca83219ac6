"""Local learning: a vision Transformer in modules that no gradient crosses, each trained by a loss of its own.

Paper    Pathak, Zhang, Samaras: Local Learning on Transformers via Feature Reconstruction (2022), arXiv:2212.14215, a
         change of InfoPro: Wang, Ni, Song, Yang, Huang: Revisiting Locally Supervised Learning (ICLR 2021).
Idea     A module that only learnt to classify would throw away what later ones need. So it must also be possible to
         make its input again of its output: InfoPro asks for the image, this paper for the features it read, which are
         nearer in size and kind. A module's activations are freed before the next one runs.

             h_k = f_k(sg(h_{k-1}))                                                   sg: no gradient
             L_k = a_k mean |Dec_k(h_k) - norm(sg(h_{k-1}))|^2 + b_k CE(Head_k(h_k), label)     for k < K
             L_K = the model's own loss

         h_0 are the patches of the image. a_k and b_k go linearly from the first module's to the last local one's.
Differs  Decoders, losses, weights, heads and cut points could not be read and are our choice. Only tokens that lie on
         the grid are made again, a class token is not. The image of decoder="image" has values from 0 to 1, as
         InfoPro's: between the smallest and the largest of every channel in 512 training images.

The model's own forward runs; a hook behind the last layer of a module takes its loss and its gradient and hands the
detached tokens on. Heads and decoders hang on the model while it trains and are taken away at the end.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SwinConfig, SwinForImageClassification, ViTForImageClassification
from transformers.models.swin.modeling_swin import SwinLayer

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerForImageClassification
from formwright.training.evaluation import Trainable, fetch
from formwright.training.method import Method, Outputs, Pass
from formwright.training.settings import Settings

Decoder = Literal["linear", "conv", "transformer", "image"]
Supervision = Literal["classifier", "contrast"]
Cut = Literal["even", "balanced"]
Grid = tuple[int, int]

CONTRAST, TEMPERATURE = 128, 0.07  # features and temperature of InfoPro's contrastive loss
PROBED, RANGED = 2, 512  # training images that sizes, and the range of pixels, are read from


class Features(NamedTuple):
    """What leaves a layer: tokens of `width` on a grid, behind `prefix` others."""

    width: int
    grid: Grid
    prefix: int = 0

    def of(self, h: Float[Tensor, "b n w"]) -> Float[Tensor, "b w h2 w2"]:
        """The tokens on the grid, as an image."""
        return h[:, self.prefix :].transpose(1, 2).unflatten(-1, self.grid)


# What trains a module


class LinearDecoder(nn.Module):
    """Every token becomes the s x s tokens that were merged into it, each by its own rows of one matrix."""

    def __init__(self, now: Features, before: Features) -> None:
        super().__init__()
        self.side, self.grid = _side(now.grid, before.grid), before.grid
        self.linear = nn.Conv2d(now.width, before.width * self.side**2, kernel_size=1)

    def forward(self, x: Float[Tensor, "b w h2 w2"]) -> Float[Tensor, "b v h1 w1"]:
        return F.pixel_shuffle(self.linear(x), self.side)[..., : self.grid[0], : self.grid[1]]


class ConvDecoder(nn.Module):
    """InfoPro's shape at the features' size: a convolution, the grid made larger, another convolution."""

    def __init__(self, now: Features, before: Features) -> None:
        super().__init__()
        self.grid = before.grid
        self.first = nn.Conv2d(now.width, before.width, 3, padding=1)
        self.norm = nn.BatchNorm2d(before.width)
        self.second = nn.Conv2d(before.width, before.width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b w h2 w2"]) -> Float[Tensor, "b v h1 w1"]:
        x = F.gelu(self.norm(self.first(x)))
        return self.second(F.interpolate(x, size=self.grid, mode="bilinear", align_corners=False))


class TransformerDecoder(nn.Module):
    """A Swin block, then the linear decoder."""

    def __init__(self, now: Features, before: Features) -> None:
        super().__init__()
        window = min(7, *now.grid)
        heads = next(h for h in range(max(1, now.width // 32), 0, -1) if now.width % h == 0)
        config = SwinConfig(window_size=window, attn_implementation="sdpa")
        self.grid = now.grid
        self.block = SwinLayer(config, dim=now.width, input_resolution=now.grid, num_heads=heads)
        self.linear = LinearDecoder(now, before)

    def forward(self, x: Float[Tensor, "b w h2 w2"]) -> Float[Tensor, "b v h1 w1"]:
        tokens = self.block(x.flatten(2).transpose(1, 2), self.grid)[0]
        return self.linear(tokens.transpose(1, 2).unflatten(-1, self.grid))


class ImageDecoder(nn.Module):
    """InfoPro's: the grid made as large as the image, two convolutions with 12 channels between, a logit a pixel."""

    def __init__(self, now: Features, size: Grid, channels: int) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.Sequential(
            nn.Conv2d(now.width, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, channels, 3, padding=1)
        )

    def forward(self, x: Float[Tensor, "b w h2 w2"]) -> Float[Tensor, "b c height width"]:
        return self.layers(F.interpolate(x, size=self.size, mode="bilinear", align_corners=True))


DECODERS: dict[str, type[nn.Module]] = {
    "linear": LinearDecoder,
    "conv": ConvDecoder,
    "transformer": TransformerDecoder,
}


def _side(now: Grid, before: Grid) -> int:
    """How many tokens a side were merged into one."""
    return max(math.ceil(larger / smaller) for smaller, larger in zip(now, before, strict=True))


class LocalHead(nn.Module):
    """Norm, the mean of the tokens, and two layers: (b, n, w) -> (b, out)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, out)

    def forward(self, h: Float[Tensor, "b n w"]) -> Float[Tensor, "b out"]:
        return self.outer(F.gelu(self.inner(self.norm(h).mean(1))))


def supervised_contrast(x: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """Every image against the others of the batch, of which those of its class should be the nearest: the mean over
    the images that have one (Khosla et al. 2020, arXiv:2004.11362).
    """
    unit = F.normalize(x.float(), dim=-1)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    logits = (unit @ unit.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    alike = (labels[:, None] == labels) & ~itself
    logs = logits.log_softmax(-1).masked_fill(~alike, 0)
    return -(logs.sum(-1) / alike.sum(-1).clamp(min=1)).sum() / alike.any(-1).sum().clamp(min=1)


class Auxiliary(nn.Module):
    """What trains one module: a decoder and a head, either of which the weight 0 leaves out."""

    def __init__(
        self,
        now: Features,
        *,
        decoder: nn.Module | None,
        head: nn.Module | None,
        against: Callable[[Tensor, Tensor], Tensor],
        weights: tuple[float, float],
    ) -> None:
        super().__init__()
        self.now, self.decoder, self.head, self.against, self.weights = now, decoder, head, against, weights

    def terms(
        self, h: Float[Tensor, "b n w"], target: Float[Tensor, "b v h1 w1"], labels: Int[Tensor, " b"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses, weighted. An image is told from features by its decoder."""
        found: dict[str, Tensor] = {}
        if self.decoder is not None:
            made = self.decoder(self.now.of(h)).float()
            bits = isinstance(self.decoder, ImageDecoder)
            loss = F.binary_cross_entropy_with_logits(made, target) if bits else F.mse_loss(made, target)
            found["reconstruction"] = self.weights[0] * loss
        if self.head is not None:
            found["supervision"] = self.weights[1] * self.against(self.head(h).float(), labels)
        return found


# The method


class LocalLearning(Method):
    """Trains ViT, Swin and our own vision encoder in modules. In `History.extras` the two losses of every local module.

    Args:
        modules: K; 1 is the usual training.
        decoder: how features are made again of the next ones: "linear", "conv" or "transformer" (a Swin block and the
            linear one); "image" makes the image instead, as InfoPro does.
        supervision: the second loss of a local module: a "classifier"'s or InfoPro's supervised "contrast".
        cut: "even" gives every module the same number of Swin's stages or of layers, as near as can be; "balanced" cuts
            between layers so that the largest module keeps as little for its backward pass as possible.
        weights: a and b of the first module; 0 leaves a term out (a = 0: greedy supervised learning).
        last_weights: those of the last local module; none = the same.
    """

    def __init__(
        self,
        *,
        modules: int = 2,
        decoder: Decoder = "linear",
        supervision: Supervision = "classifier",
        cut: Cut = "even",
        weights: tuple[float, float] = (1.0, 1.0),
        last_weights: tuple[float, float] | None = None,
    ) -> None:
        for name, value, kind in (
            ("decoder", decoder, Decoder),
            ("supervision", supervision, Supervision),
            ("cut", cut, Cut),
        ):
            if value not in get_args(kind):
                raise FormwrightError(f"{name} is one of {', '.join(get_args(kind))}, got {value!r}.")
        if modules < 1:
            raise FormwrightError(f"A network is cut into at least one module, got modules={modules}.")
        for pair in (weights, last_weights or weights):
            if min(pair) < 0 or max(pair) == 0:
                raise FormwrightError(f"The weights of a local loss are 0 or more, and not both 0; got {pair}.")
        self.modules, self.decoder, self.supervision, self.cut = modules, decoder, supervision, cut
        self.weights, self.last_weights = weights, weights if last_weights is None else last_weights
        self.ends: list[nn.Module] = []  # the layers that modules end with, but for the last

    def check(self, model: nn.Module, task: Trainable, settings: Settings) -> None:  # noqa: ARG002
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise FormwrightError(
                "Local learning takes gradients while the model still runs, which averaging over processes does not "
                "allow: start one process."
            )
        if not isinstance(
            model, ViTForImageClassification | SwinForImageClassification | TransformerForImageClassification
        ):
            raise FormwrightError(
                f"Local learning trains image classifiers of ViT, Swin and our own encoder, not {type(model).__name__}."
            )
        if model.config.num_labels < 2 or model.config.problem_type not in (None, "single_label_classification"):
            raise FormwrightError("Local modules learn classes: every image needs one label of two or more.")
        if getattr(model, "is_activation_checkpointing", False):
            raise FormwrightError(
                "Local learning frees activations itself, and checkpointing would run layers again: call "
                "gradient_checkpointing_disable()."
            )
        layers = len(self._layers(model))
        if layers < self.modules:
            raise FormwrightError(
                f"{type(model).__name__} has {layers} places to end a module at, fewer than modules={self.modules}: "
                "ask for fewer" + (', or set cut="balanced".' if self.cut == "even" else ".")
            )

    def prepare(self, model: nn.Module, task: Trainable, settings: Settings) -> None:  # noqa: ARG002
        layers = self._layers(model)
        with torch.random.fork_rng():  # the rows may be drawn with jitter, and dropout may run
            batch = _rows(task, PROBED, model)
            sizes = [1.0] * len(layers) if self.cut == "even" else _kept(model, batch, layers)
            groups = even(len(layers), self.modules) if self.cut == "even" else balanced(sizes, self.modules)
            self.ends = [layers[end - 1] for end in accumulate(groups)][:-1]
            features = _features(model, batch, self.ends)
            pixels = _rows(task, min(RANGED, len(task.train)), model)["pixel_values"] if self.ends else None
        like = next(model.parameters())
        model.local_learning = nn.ModuleList(
            self._auxiliary(k, features, batch["pixel_values"], model.config.num_labels) for k in range(len(self.ends))
        ).to(like.device, like.dtype)
        if self.decoder == "image" and pixels is not None:
            model.local_learning.register_buffer("low", pixels.float().amin((0, 2, 3))[:, None, None])
            model.local_learning.register_buffer("high", pixels.float().amax((0, 2, 3))[:, None, None])

    def _auxiliary(self, k: int, features: list[Features], pixels: Tensor, classes: int) -> Auxiliary:
        before, now = features[k : k + 2]
        along = k / max(1, self.modules - 2)
        a, b = (first + along * (last - first) for first, last in zip(self.weights, self.last_weights, strict=True))
        decoder: nn.Module | None = None
        if a and self.decoder == "image":
            decoder = ImageDecoder(now, tuple(pixels.shape[2:]), pixels.shape[1])
        elif a:
            decoder = DECODERS[self.decoder](now, before)
        contrasts = self.supervision == "contrast"
        head = LocalHead(now.width, CONTRAST if contrasts else classes) if b else None
        against = supervised_contrast if contrasts else F.cross_entropy
        return Auxiliary(now, decoder=decoder, head=head, against=against, weights=(a, b))

    def forward(self, given: Pass) -> Outputs:
        told: dict[str, Tensor] = {}
        pixels, labels = given.batch["pixel_values"], given.batch["labels"]
        trainers = given.model.local_learning
        image = None
        if self.decoder == "image" and self.ends:
            image = ((pixels.float() - trainers.low) / (trainers.high - trainers.low)).clamp(0, 1)
        before = [normal(_patches(given.model, pixels))]  # of the module that runs: what it read

        def end(k: int) -> Callable[..., Any]:
            def hook(_layer: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
                h = out[0] if isinstance(out, tuple) else out
                _refuse_carried(args)
                target = before[0] if image is None else image
                terms = trainers[k].terms(h, target, labels)
                given.backward(sum(terms.values()))
                told.update({f"{name} {k + 1}": term.detach() for name, term in terms.items()})
                free = h.detach()
                before[0] = normal(trainers[k].now.of(free))
                return (free, *(_detached(one) for one in out[1:])) if isinstance(out, tuple) else free

            return hook

        with ExitStack() as hooks:
            for k, layer in enumerate(self.ends):
                hooks.callback(layer.register_forward_hook(end(k)).remove)
            outputs = given.run(given.batch)
        if self.ends and outputs.get("extra_losses"):
            raise FormwrightError(
                f"Some layers have losses of their own ({', '.join(outputs['extra_losses'])}), whose gradient local "
                "modules would lose: choose other parts."
            )
        return {**outputs, "extra_losses": told}

    def finish(self, model: nn.Module) -> None:
        self.ends = []
        if hasattr(model, "local_learning"):
            del model.local_learning

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        """Where a module may end, in order. Swin merges patches behind the last block of a stage."""
        if isinstance(model, ViTForImageClassification):
            return list(model.vit.layers)
        if isinstance(model, TransformerForImageClassification):
            return list((model.model.encoder or model.model.decoder).layers)
        stages = list(model.swin.encoder.layers)
        return stages if self.cut == "even" else [one for stage in stages for one in (*stage.blocks[:-1], stage)]


# Where to cut


def even(layers: int, modules: int) -> list[int]:
    """Numbers of layers, as equal as can be."""
    return [(k + 1) * layers // modules - k * layers // modules for k in range(modules)]


def balanced(sizes: Sequence[float], modules: int) -> list[int]:
    """Numbers of layers with which the largest module is as small as can be."""
    ends = [0, *accumulate(sizes)]
    # best[n]: the largest module when the first n layers make so many modules, and where the last of these begins
    best: list[tuple[float, list[int]]] = [(end, [n]) for n, end in enumerate(ends)]
    for made in range(2, modules + 1):
        best = [
            min((max(best[cut][0], ends[n] - ends[cut]), [*best[cut][1], n - cut]) for cut in range(made - 1, n))
            if n >= made
            else (math.inf, [])
            for n in range(len(ends))
        ]
    return best[-1][1]


@torch.enable_grad()
def _kept(model: nn.Module, batch: dict[str, Tensor], layers: Sequence[nn.Module]) -> list[float]:
    """Bytes that every layer keeps for its backward pass; what comes before and behind them counts with the first and
    the last.
    """
    own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, Tensor] = {}
    total, marks = 0, []

    def pack(value: Tensor) -> Tensor:
        nonlocal total
        storage = value.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = value  # alive, so that no other takes its place
            total += storage.nbytes()
        return value

    training = model.training
    with ExitStack() as hooks:
        hooks.callback(model.train, training)
        for layer in layers:
            hooks.callback(layer.register_forward_hook(lambda *_: marks.append(total)).remove)
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value))
        model.train()(**batch)
    return [float(end - start) for start, end in zip([0, *marks[:-1]], [*marks[:-1], total], strict=True)]


# What a model reads and hands on


def _rows(task: Trainable, count: int, model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in fetch(task.train, list(range(count)), task.collate).items()}


def _patch(model: nn.Module) -> Grid:
    patch = model.config.patch_size
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def _patches(model: nn.Module, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p gh gw"]:
    """The pixels of every patch, patches at the edge filled up with 0."""
    patch = _patch(model)
    grid = [math.ceil(side / one) for side, one in zip(pixels.shape[2:], patch, strict=True)]
    right, below = grid[1] * patch[1] - pixels.shape[3], grid[0] * patch[0] - pixels.shape[2]
    return F.unfold(F.pad(pixels.float(), (0, right, 0, below)), patch, stride=patch).unflatten(-1, grid)


@torch.no_grad()
def _features(model: nn.Module, batch: dict[str, Tensor], ends: Sequence[nn.Module]) -> list[Features]:
    """The patches of the image, then what leaves every end."""
    outs: list[Tensor] = []
    patches = _patches(model, batch["pixel_values"])
    first = Features(patches.shape[1], tuple(patches.shape[2:]))
    training = model.training
    with ExitStack() as hooks:
        hooks.callback(model.train, training)
        for layer in ends:
            keep = layer.register_forward_hook(
                lambda _l, _a, out: outs.append(out[0] if isinstance(out, tuple) else out)
            )
            hooks.callback(keep.remove)
        model.eval()(**batch)
    found = [first]
    for out in outs:
        grid = first.grid
        while out.shape[1] < math.prod(grid):  # patches were merged, two a side
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        found.append(Features(out.shape[2], grid, out.shape[1] - math.prod(grid)))
    return found


def normal(x: Float[Tensor, "b w h2 w2"]) -> Float[Tensor, "b w h2 w2"]:
    """Every token with mean 0 and variance 1, so that a target cannot shrink."""
    return F.layer_norm(x.float().movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _refuse_carried(args: tuple[Any, ...]) -> None:
    """Our layers hand tensors on beside the tokens, and a gradient would come back through them.

    Raises:
        FormwrightError: they do.
    """
    for context in args:
        if isinstance(context, Context):
            flat = torch.utils._pytree.tree_leaves(context.carry)
            if any(isinstance(value, Tensor) and value.requires_grad for value in flat):
                raise FormwrightError(
                    f"A layer hands {', '.join(context.carry)} on to the layers of other modules, and with it a "
                    "gradient: choose parts whose layers share nothing but the tokens."
                )
