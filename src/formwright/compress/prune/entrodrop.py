"""EntroDrop: the layers, or the attentions, across which the entropy of the residual stream grows least are removed.

Paper    Entropy-Based Block Pruning for Efficient Large Language Models (ICLR 2026), arXiv:2504.03794.
Idea     In a pre-norm model the entropy of the stream falls in the first layers and rises from then on. What comes
         before the turn is kept; of what comes after, the blocks that add least go, without training. For the M token
         vectors of a text, the mean over texts of

             dH_l = H(Z_l) - H(Z_l-1)         Z_l-1 -> Z_l: a layer, or x -> x + attention(norm(x))
             start = argmin_l H(Z_l)          blocks before it stay; the `count` lowest dH after it go

             bucket   H = - sum_d sum_k p_dk ln p_dk, p_dk the share in bin k of dimension d, between its min and max
             knn      H = D mean_i ln r_i + D/2 ln pi - ln Gamma(D/2 + 1) + ln M - ln k, r_i to the k-th neighbour
             renyi    H = ln(mean_ij K_ij^(a-1)) / (1 - a), K Gaussian on standardised vectors, of the median distance,
                      a = 4
             cosine   1 - mean cos(Z_l-1, Z_l) in place of dH: the baseline (ShortGPT, arXiv:2403.03853), which has no
                      stages, and for whole layers serves post-norm models too

Differs  With knn the turn is looked for from the first layer's output on: equal tokens are equal vectors before it, at
         distance 0. variant="release" keeps the first two layers and the last, whatever their entropy, as the release
         does. All scores are of the whole model; nothing is scored again after a removal.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from formwright.compress.anatomy import Layer, describe
from formwright.compress.modifier import Data, Modifier
from formwright.compress.surgery import remove_layers, skip_attention
from formwright.errors import FormwrightError

Score = Literal["bucket", "knn", "renyi", "cosine"]
Granularity = Literal["layer", "attention"]
Variant = Literal["paper", "release"]

SMALLEST = 1e-10  # of a share or a distance inside a logarithm
ORDER = 4  # Renyi's alpha
ROWS = 1024  # of a distance matrix at a time


# Estimators: the entropy of M points in D dimensions, in nats


def bucket_entropy(points: Float[Tensor, "m d"], bins: int = 20) -> float:
    """The sum over dimensions of the entropy of a histogram between the dimension's smallest and largest value."""
    points = points.float()
    low, high = points.amin(0), points.amax(0)
    wide = torch.where(high > low, high - low, 1.0)
    places = ((points - low) / wide * bins).long().clamp(max=bins - 1)
    counts = torch.zeros(bins, points.shape[1], device=points.device)
    counts.scatter_add_(0, places, torch.ones_like(points))
    shares = (counts / len(points)).clamp(min=SMALLEST)
    return float(-(shares * shares.log()).sum())


def knn_entropy(points: Float[Tensor, "m d"], neighbours: int = 25) -> float:
    """Kozachenko and Leonenko's estimate from the distances to the k-th neighbour.

    Raises:
        FormwrightError: there are no k neighbours.
    """
    count, width = points.shape
    if count <= neighbours:
        raise FormwrightError(
            f"A text of {count} tokens has no {neighbours} neighbours to each: choose fewer neighbours, or "
            "score=bucket."
        )
    points = points.float()
    kth = [
        torch.cdist(some, points, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(neighbours + 1, dim=1).values
        for some in points.split(ROWS)  # a point is its own nearest
    ]
    mean = float((torch.cat(kth) + SMALLEST).log().mean())
    constant = width / 2 * math.log(math.pi) - math.lgamma(width / 2 + 1) + math.log(count) - math.log(neighbours)
    return width * mean + constant


def renyi_entropy(points: Float[Tensor, "m d"]) -> float:
    """Renyi's entropy of order 4 from Gaussian kernels on standardised points; their width is the median distance."""
    points = points.float()
    spread = points.std(0, correction=0)
    points = (points - points.mean(0)) / torch.where(spread > 0, spread, 1.0)
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    apart = distances[~torch.eye(len(points), dtype=torch.bool, device=points.device)]
    width = apart.median() if len(apart) else distances.new_tensor(0.0)
    exponent = -(ORDER - 1) * distances.square() / (2 * torch.where(width > 0, width, 1.0).square())
    return float((torch.logsumexp(exponent.flatten(), 0) - math.log(exponent.numel())) / (1 - ORDER))


def cosine_score(before: Float[Tensor, "m d"], after: Float[Tensor, "m d"]) -> float:
    """How far a block turns what passes through it."""
    return 1 - float(F.cosine_similarity(before.float(), after.float(), dim=-1).mean())


# The stream


@contextmanager
def streams(
    model: PreTrainedModel, layers: tuple[Layer, ...], granularity: Granularity
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Filled by every forward pass: what goes into each block and what comes out, by layer."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    entered: dict[int, Tensor] = {}

    def entering(index: int) -> Callable[..., None]:
        def see(module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
            del module
            entered[index] = given[0] if given else named["hidden_states"]

        return see

    def leaving(index: int) -> Callable[..., None]:
        def see(module: nn.Module, given: tuple, out: Any) -> None:
            del module, given
            found[index] = (entered[index], out[0] if isinstance(out, tuple) else out)

        return see

    def between(index: int) -> Callable[..., None]:
        def see(module: nn.Module, given: tuple) -> None:
            del module
            found[index] = (entered[index], given[0])

        return see

    handles = []
    for layer in layers:
        module = model.get_submodule(layer.path)
        handles.append(module.register_forward_pre_hook(entering(layer.index), with_kwargs=True))
        if granularity == "layer":
            handles.append(module.register_forward_hook(leaving(layer.index)))
        else:  # the stream after the attention is what the feed-forward's norm reads
            norm = model.get_submodule(layer.feedforward.norm)  # type: ignore[union-attr, arg-type]
            handles.append(norm.register_forward_pre_hook(between(layer.index)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class EntroDrop(Modifier):
    """Remove the layers, or the attentions, that add least entropy; nothing is trained.

    Args:
        score: "bucket", "knn", "renyi", or the baseline "cosine".
        granularity: what goes: a whole "layer", or its "attention" with the norm before it and its place in the cache.
        count: how many go.
        variant: "paper" keeps what comes before the entropy's lowest point; "release" keeps the first two layers and
            the last.
        samples: texts the entropy is measured on, each alone; 128 of 256 tokens in the paper.
        bins: of bucket, 20 by default.
        neighbours: of knn, 25 by default; fewer than a text has tokens.
    """

    def __init__(
        self,
        *,
        score: Score = "bucket",
        granularity: Granularity = "layer",
        count: int = 1,
        variant: Variant = "paper",
        samples: int = 128,
        bins: int | None = None,
        neighbours: int | None = None,
    ) -> None:
        for name, value, kind in (
            ("score", score, Score),
            ("granularity", granularity, Granularity),
            ("variant", variant, Variant),
        ):
            if value not in get_args(kind):
                raise FormwrightError(f"{name} is {value!r}, but it must be {', '.join(get_args(kind))}.")
        if count < 0 or samples < 1:
            raise FormwrightError(f"count is {count} and samples {samples}: neither can be negative, nor samples 0.")
        for name, number, of, least in (("bins", bins, "bucket", 2), ("neighbours", neighbours, "knn", 1)):
            if number is not None and (score != of or number < least):
                raise FormwrightError(f"{name} is {number}: it belongs to score={of} and is at least {least}.")
        self.score, self.granularity, self.count, self.variant = score, granularity, count, variant
        self.samples, self.bins, self.neighbours = samples, bins or 20, neighbours or 25
        self.entropies: list[float] = []  # of the stream before the first layer and after each
        self.scores: dict[int, float] = {}
        self.start = 0
        self.dropped: list[int] = []

    def check(self, model: PreTrainedModel) -> None:
        anatomy = describe(model)
        if len(anatomy.stacks) > 1 or anatomy.shared:
            raise FormwrightError(
                f"{type(model).__name__} has several stacks, or layers that are one and the same, and EntroDrop reads "
                "one stream: cut heads or neurons instead."
            )
        turned = self.score == "cosine" and self.granularity == "layer"  # this baseline needs no growing stream
        if not turned and not all(layer.norm_first for layer in anatomy.layers):
            raise FormwrightError(
                f"{type(model).__name__} normalises after its layers, which resets the entropy: use "
                "entrodrop(score=cosine)."
            )
        if self.granularity == "attention" and any(
            layer.feedforward is None or layer.feedforward.norm is None for layer in anatomy.layers
        ):
            raise FormwrightError(
                "A feed-forward was replaced, so the stream before it is unknown: drop attentions first."
            )

    def calibrate(self, model: PreTrainedModel, data: Data) -> None:
        self.measure(model, data)
        self.dropped = self.choose(model)

    def apply(self, model: PreTrainedModel) -> None:
        (remove_layers if self.granularity == "layer" else skip_attention)(model, self.dropped)

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, data: Data) -> None:
        """Scores of all blocks, and the entropy before the first layer and after each, means over texts."""
        layers = describe(model).layers
        curves, gains = [], []
        with streams(model, layers, "layer") as whole, streams(model, layers, self.granularity) as found:
            for batch in data.batches(self.samples, batch_size=1):
                model(**{name: value.to(model.device) for name, value in batch.items()})
                live = batch.get("attention_mask")
                curve, gain = self.of_text(whole, found, None if live is None else live[0].bool().to(model.device))
                curves.append(curve)
                gains.append(gain)
        self.entropies = torch.tensor(curves).double().mean(0).tolist()
        means = torch.tensor(gains).double().mean(0).tolist()
        self.scores = {layer.index: mean for layer, mean in zip(layers, means, strict=True)}

    def of_text(
        self,
        whole: dict[int, tuple[Tensor, Tensor]],
        found: dict[int, tuple[Tensor, Tensor]],
        live: Tensor | None,
    ) -> tuple[list[float], list[float]]:
        def points(stream: Tensor) -> Float[Tensor, "m d"]:
            one = stream.flatten(0, -2)  # of one text; OPT lines all tokens up before its feed-forward
            return one if live is None or len(live) != len(one) else one[live]

        if self.score == "cosine":
            return [], [cosine_score(points(before), points(after)) for _, (before, after) in sorted(found.items())]
        depths = [whole[index] for index in sorted(whole)]
        curve = [self.entropy(points(before)) for before, _ in depths] + [self.entropy(points(depths[-1][1]))]
        if self.granularity == "layer":
            return curve, [after - before for before, after in pairwise(curve)]
        return curve, [
            self.entropy(points(after)) - before
            for (_, after), before in zip([found[index] for index in sorted(found)], curve, strict=False)
        ]

    def entropy(self, points: Float[Tensor, "m d"]) -> float:
        if self.score == "bucket":
            return bucket_entropy(points, self.bins)
        return knn_entropy(points, self.neighbours) if self.score == "knn" else renyi_entropy(points)

    def choose(self, model: PreTrainedModel) -> list[int]:
        """The blocks that go.

        Raises:
            FormwrightError: fewer may go than are asked for.
        """
        layers = describe(model).layers
        first = 1 if self.score == "knn" else 0
        two_stages = self.variant == "paper" and self.score != "cosine"
        self.start = (
            min(range(first, len(self.entropies)), key=lambda depth: self.entropies[depth]) if two_stages else 0
        )
        kept = {0, 1, len(layers) - 1} if self.variant == "release" else set(range(self.start))
        free = [
            layer.index
            for layer in layers
            if layer.index not in kept
            and (layer.attention is not None or self.granularity == "layer")
            and (layer.attention is None or not (layer.attention.bias or "").startswith(f"{layer.path}."))
        ]
        if self.count > len(free):
            raise FormwrightError(
                f"{self.count} of {len(layers)} blocks should go, but only {len(free)} may: the others come before the "
                f"entropy's lowest point ({self.start}) or are protected; choose a smaller count."
            )
        return sorted(sorted(free, key=lambda index: self.scores[index])[: self.count])
