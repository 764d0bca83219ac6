"""DSFormer: a weight as sparse coefficients times a small dense basis, fitted to the task while it is trained.

Paper    Chand, Prabhu, Kumar: DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization
         (2023), arXiv:2312.13211.
Idea     A low rank puts all rows of a matrix into one small subspace. Here the matrix is cut into groups of columns as
         wide as a head, and every row of a group is the sum of s of r atoms, its own choice of them.

             W_b (p x q) ~ S_b D_b        D_b (r x q) dense, S_b (p x r) with s non-zeros in every row, b = 1 .. groups
             bits of a group:             32 (r q + p s) + p s ceil(log2 r)
             multiplications a token:     r q + p s  instead of  p q

         Which atoms a row takes cannot be differentiated. The straight-through factoriser trains a dense shadow W~:

             W^ = code(W~; D) D           forward: W~ coded anew every few steps, s falling from q to its end
             dL/dW~ := dL/dW^             backward: as if W^ were W~
             dL/dD   = S^T dL/dW^         and now and then D by least squares on W~, after which W~ := W^

         and at last values and basis alone, the choice fixed.
Differs  The format, the groups as wide as a head and the K-SVD start are the author's. Of the straight-through
         factoriser only the description was at hand: its inner loop, the falling s and the last phase are a
         reconstruction, as is the axis that is cut: outputs for queries, keys and values, inputs elsewhere.
         The start is rows of the matrix and least squares, which comes nearer than K-SVD from random atoms.

Coding and the steps on the atoms are in dictionary.py.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from formwright.compress.distill import Pair
from formwright.compress.factorize.dictionary import Code, Recipe, factorise, least_squares_step, product, pursue
from formwright.compress.factorize.sites import Site, sites
from formwright.compress.finetune import Budget, takes_labels, trainable
from formwright.compress.modifier import Data, Modifier
from formwright.compress.structure import Rebuilt
from formwright.compress.structure import replace as put_at
from formwright.errors import FormwrightError
from formwright.training import fit

Side = Literal["heads", "inputs", "outputs"]
Train = Literal["never", "values", "coefficients", "weights"]

FALLING = 1 / 3  # the share of the steps in which s falls
LAST = 0.2  # the share of the steps, at the end, in which the choice is fixed
TURNS = 2  # of a fit that only compares numbers of atoms


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a matrix is stored, cut into groups of columns: `rows` x (`groups` `width`).

    Args:
        by_outputs: the columns are the layer's outputs; else they are its inputs.
    """

    rows: int
    groups: int
    width: int
    atoms: int
    nonzeros: int
    by_outputs: bool

    def bits(self, number: int = 32) -> int:
        """Of all groups, the index among them; `number` bits a value."""
        entries = self.rows * self.nonzeros
        return self.groups * (number * (self.atoms * self.width + entries) + entries * index_bits(self.atoms))

    def ratio(self, number: int = 32) -> float:
        return self.rows * self.groups * self.width * number / self.bits(number)

    @property
    def multiplications(self) -> int:
        """For one token."""
        return self.groups * (self.atoms * self.width + self.rows * self.nonzeros)

    def cut(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "g p q"]:
        rows = weight.T if self.by_outputs else weight
        return rows.unflatten(1, (self.groups, self.width)).transpose(0, 1)

    def join(self, blocks: Float[Tensor, "g p q"]) -> Float[Tensor, "o i"]:
        rows = blocks.transpose(0, 1).flatten(1)
        return rows.T if self.by_outputs else rows


def index_bits(atoms: int) -> int:
    return math.ceil(math.log2(atoms)) if atoms > 1 else 0


def pack(index: Int[Tensor, "*n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Whole numbers below 2^bits, one after the other, `bits` bits each."""
    single = (index.flatten()[:, None] >> torch.arange(bits, device=index.device)) & 1
    single = F.pad(single.flatten(), (0, -single.numel() % 8)).view(-1, 8)
    return (single << torch.arange(8, device=index.device)).sum(1).to(torch.uint8)


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, shape: tuple[int, ...]) -> Int64[Tensor, "*n"]:
    """Without shifts, which runtimes for exported models lack for signed numbers."""
    powers = 2 ** torch.arange(8, device=packed.device)
    single = (packed.long()[:, None] // powers) % 2
    single = single.flatten()[: math.prod(shape) * bits].view(math.prod(shape), bits)
    return (single * 2 ** torch.arange(bits, device=packed.device)).sum(1).view(shape)


class Places(NamedTuple):
    """The index made ready for calls: atoms as rows of all groups' atoms, or the inputs that every atom reads."""

    source: Tensor
    atoms: Int64[Tensor, "p g s"]
    bags: Int64[Tensor, "*n"]
    order: Int64[Tensor, " n"] | None
    offsets: Int64[Tensor, " m"] | None


class DenseSparseLinear(Rebuilt):
    """A linear layer that stores a basis, values and their packed index, and a bias.

    Without gradients a token is multiplied by basis and values alone. With them, and under a compiler, the matrix is
    put together in every call: sums over scattered rows have slow gradients, and no other runtime has them.
    """

    kind: ClassVar[str] = "dense-sparse-linear"
    packed: UInt8[Tensor, " bytes"]

    def __init__(self, *, form: Format, bias: bool) -> None:
        super().__init__()
        self.form = form
        wide = form.groups * form.width
        self.in_features, self.out_features = (form.rows, wide) if form.by_outputs else (wide, form.rows)
        self.basis = nn.Parameter(torch.empty(form.groups, form.atoms, form.width))
        self.values = nn.Parameter(torch.empty(form.rows, form.groups, form.nonzeros))
        size = math.ceil(self.values.numel() * index_bits(form.atoms) / 8)
        self.register_buffer("packed", torch.empty(size, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        self._places: Places | None = None

    def structure(self) -> dict[str, Any]:
        return {**asdict(self.form), "bias": self.bias is not None}

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "DenseSparseLinear":  # noqa: ARG003 - it stands alone
        bias = structure.pop("bias")
        return cls(form=Format(**structure), bias=bias)

    @classmethod
    @torch.no_grad()
    def of(
        cls, form: Format, basis: Float[Tensor, "g r q"], code: Code, bias: Float[Tensor, " o"] | None
    ) -> "DenseSparseLinear":
        made = cls(form=form, bias=bias is not None).to(basis)
        made.basis.copy_(basis)
        made.values.copy_(code.values.transpose(0, 1))
        made.packed.copy_(pack(code.chosen.transpose(0, 1), index_bits(form.atoms)))
        if made.bias is not None and bias is not None:
            made.bias.copy_(bias)
        return made

    def index(self) -> Int64[Tensor, "p g s"]:
        form = self.form
        return unpack(self.packed, index_bits(form.atoms), (form.rows, form.groups, form.nonzeros))

    @property
    def places(self) -> Places:
        """Taken out of their bits at the first call, and again when the index is another tensor."""
        if self._places is None or self._places.source is not self.packed:
            form, device = self.form, self.packed.device
            atoms = self.index()
            flat = atoms + form.atoms * torch.arange(form.groups, device=device)[:, None]
            bags, order, offsets = flat.flatten(1), None, None
            if form.by_outputs:
                order = flat.flatten().argsort(stable=True)
                bags = order // (form.groups * form.nonzeros)
                counts = flat.flatten().bincount(minlength=form.groups * form.atoms)
                offsets = F.pad(counts.cumsum(0), (1, 0))
            self._places = Places(self.packed, atoms, bags, order, offsets)
        return self._places

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The matrix, with gradients to basis and values."""
        index = self.index() if torch.compiler.is_compiling() else self.places.atoms  # a graph keeps the packed index
        code = Code(index.transpose(0, 1), self.values.transpose(0, 1))
        return self.form.join(product(self.basis, code))

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        form, places = self.form, self.places
        columns = x.reshape(-1, self.in_features).T.contiguous()  # i x tokens: a row of it is added at once
        if form.by_outputs:
            values = self.values.flatten()[places.order]
            z = F.embedding_bag(  # groups r x tokens
                places.bags, columns, places.offsets, mode="sum", per_sample_weights=values, include_last_offset=True
            )
            y = (self.basis.mT @ z.unflatten(0, (form.groups, form.atoms))).flatten(0, 1)
        else:
            z = (self.basis @ columns.unflatten(0, (form.groups, form.width))).flatten(0, 1)
            y = F.embedding_bag(places.bags, z, mode="sum", per_sample_weights=self.values.flatten(1))
        answer = y.T if self.bias is None else y.T + self.bias
        return answer.reshape(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": None}  # a copy unpacks its own index

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._places = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, atoms={self.form.atoms}, nonzeros={self.form.nonzeros}"


@dataclass
class Fit:
    """A site's factors as they are now."""

    site: Site
    form: Format
    basis: Float[Tensor, "g r q"]
    code: Code


# The straight-through factoriser


class Shadow(nn.Module):
    """A dense weight, read as its factors; its gradient is that of what is read."""

    def __init__(self, fitted: Fit) -> None:
        super().__init__()
        self.matrix, self.form, self.code = fitted.site.matrix, fitted.form, fitted.code
        self.basis = nn.Parameter(fitted.basis)

    def forward(self, weight: Tensor) -> Tensor:
        shadow = self.form.cut(self.matrix.seen(weight))
        read = product(self.basis, self.code) + (shadow - shadow.detach())
        return self.matrix.seen(self.form.join(read))

    def recode(self, weight: Tensor, nonzeros: int) -> None:
        self.code = pursue(self.form.cut(self.matrix.seen(weight)), self.basis, nonzeros)

    def refit(self, weight: Tensor) -> None:
        """The best basis for the shadow; and the shadow becomes what is read, or it would drift away from it."""
        basis, self.code = least_squares_step(self.form.cut(self.matrix.seen(weight)), self.basis, self.code)
        self.basis.copy_(basis)
        weight.copy_(self.matrix.seen(self.form.join(product(basis, self.code))))


class DenseCoefficients(nn.Module):
    """A weight as its basis times dense coefficients, of which the largest of every row are read; the gradient is that
    of all being read. The weight it stands for rests."""

    def __init__(self, fitted: Fit) -> None:
        super().__init__()
        self.matrix, self.form, self.nonzeros = fitted.site.matrix, fitted.form, fitted.form.nonzeros
        self.basis, self.shadow = nn.Parameter(fitted.basis), nn.Parameter(fitted.code.dense(fitted.form.atoms))

    @property
    def code(self) -> Code:
        index = self.shadow.detach().abs().topk(self.nonzeros, dim=-1).indices
        return Code(index, self.shadow.detach().gather(-1, index))

    def forward(self, weight: Tensor) -> Tensor:  # noqa: ARG002 - a parametrization is given it
        read = self.code.dense(self.form.atoms) + (self.shadow - self.shadow.detach())
        return self.matrix.seen(self.form.join(read @ self.basis))

    def recode(self, weight: Tensor, nonzeros: int) -> None:  # noqa: ARG002 - nothing is coded
        self.nonzeros = nonzeros

    def refit(self, weight: Tensor) -> None:
        """Both learn by gradients alone."""


@contextmanager
def straight_through(
    fits: Mapping[str, Fit], kind: type[Shadow] | type[DenseCoefficients], *, steps: int, recode: int, refit: int
) -> Iterator[None]:
    """While training, the sites' weights are shadows of their factors; at the end the fits hold what was learnt."""
    shadows = {path: kind(one) for path, one in fits.items()}
    for path, shadow in shadows.items():
        parametrize.register_parametrization(fits[path].site.matrix.module, "weight", shadow)
    weights = {path: one.site.matrix.module.parametrizations.weight.original for path, one in fits.items()}
    bases = {id(shadow.basis) for shadow in shadows.values()}
    step = 0

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal step
        if not any(id(weight) in bases for group in optimizer.param_groups for weight in group["params"]):
            return
        step += 1
        for path, shadow in shadows.items():
            form = fits[path].form
            if step % recode == 0 or step == steps:
                shadow.recode(weights[path], falling(step / steps, min(form.atoms, form.width), form.nonzeros))
            if step % refit == 0:
                shadow.refit(weights[path])

    handle = register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        handle.remove()
        for path, shadow in shadows.items():
            one = fits[path]
            parametrize.remove_parametrizations(one.site.matrix.module, "weight", leave_parametrized=False)
            one.basis, one.code = shadow.basis.detach(), shadow.code


def falling(done: float, first: int, last: int) -> int:
    """Non-zeros of a row when a share of the training is done: from the first number to the last, by equal factors."""
    left = max(0.0, 1 - done / FALLING)
    return round(last * (first / last) ** left)


# The modifier


class DSFormer(Modifier):
    """Replace the projections of attention and feed-forward layers by sparse coefficients times dense bases.

    Args:
        ratio: bytes of a matrix before, over those after, index counted; 2 by default, above 1.
        atoms: of a group's basis; none = of half, one, two and four times the width of a group, what comes nearest to
            the first matrix of each shape.
        nonzeros: atoms of a row; none = as many as the ratio leaves room for.
        width: columns of a group; none = of a head, or the widest divisor of both.
        side: what groups are cut from: "inputs", "outputs", or "heads": outputs of what makes queries, keys and values,
            inputs elsewhere.
        recipe: of the start: "least-squares" from rows, or the author's "k-svd" from random atoms.
        rounds: of the start.
        train: "weights", the straight-through factoriser; "coefficients", the same with dense coefficients as its
            shadow; "values", with the choice as it was at the start; "never".
        distill: learn from the original model's answers too, half and half with the labels.
        recode: steps between two codings.
        refit: steps between two fits of the basis by least squares.
        steps: of all training together; none = as the data's settings say, as for the next two.
        learning_rate: the highest of the schedule.
        batch_size: rows a step.
    """

    def __init__(
        self,
        *,
        ratio: float | None = None,
        atoms: int | None = None,
        nonzeros: int | None = None,
        width: int | None = None,
        side: Side = "heads",
        recipe: Recipe = "least-squares",
        rounds: int = 8,
        train: Train = "weights",
        distill: bool = False,
        recode: int | None = None,
        refit: int | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        for name, value, kind in (("side", side, Side), ("recipe", recipe, Recipe), ("train", train, Train)):
            if value not in get_args(kind):
                raise FormwrightError(f"{name} is {value!r}, but it must be {', '.join(get_args(kind))}.")
        for name, number in (
            *(("atoms", atoms), ("nonzeros", nonzeros), ("width", width)),
            *(("rounds", rounds), ("recode", recode), ("refit", refit)),
        ):
            if number is not None and number < 1:
                raise FormwrightError(f"{name} is {number}, but it must be at least 1.")
        if ratio is not None and not ratio > 1:
            raise FormwrightError(f"ratio is {ratio:g}, but it is how many times smaller a matrix gets: above 1.")
        for wrong, reason in (
            (nonzeros and ratio, "nonzeros and ratio both say how much is left: leave one out"),
            (nonzeros and not atoms, "nonzeros are chosen among atoms: say how many atoms there are"),
            (nonzeros and atoms and nonzeros > atoms, "a row cannot take more atoms than there are: lower nonzeros"),
            (train == "never" and (steps or learning_rate or batch_size or distill), "nothing is trained: leave "
             "distill and the budget out, or choose another train"),
            (train != "weights" and refit, "only train=weights fits the basis again: leave refit out"),
            (train not in ("weights", "coefficients") and recode, "the choice stays: leave recode out"),
        ):  # fmt: skip
            if wrong:
                raise FormwrightError(f"dsformer: {reason}.")
        self.ratio, self.atoms, self.nonzeros, self.width = 2.0 if ratio is None else ratio, atoms, nonzeros, width
        self.side, self.recipe, self.rounds, self.train, self.distill = side, recipe, rounds, train, distill
        self.recode, self.refit = recode or 10, refit or 100
        self.trains = train != "never"  # type: ignore[misc]
        self.uses_teacher = distill  # type: ignore[misc]
        self.budget = Budget(steps=steps, learning_rate=learning_rate, batch_size=batch_size)
        self.fits: dict[str, Fit] = {}

    # The acts

    def check(self, model: PreTrainedModel) -> None:
        for site in sites(model):
            self.formats(site)
        if self.trains:
            trainable(model, "dsformer")
            if not self.distill and not takes_labels(model):
                raise FormwrightError(
                    f"{type(model).__name__} computes no loss to train the factors on: use dsformer(distill=true), "
                    "which learns from the original, or train=never."
                )

    def apply(self, model: PreTrainedModel) -> None:
        self.start(model)
        if self.train in ("never", "values"):
            self.put(model)

    def finetune(self, model: PreTrainedModel, data: Data) -> None:
        """Train, if asked.

        Raises:
            FormwrightError: texts to embed have no labels, or there is no teacher.
        """
        if not self.trains:
            return
        if data.kind == "sentence-embedding" and not self.distill:
            raise FormwrightError("Texts to embed have no labels: use dsformer(distill=true), or train=never.")
        settings = self.budget.settings(data)
        early = 0
        if self.train != "values":
            early = settings.steps - max(1, round(LAST * settings.steps))
            kind = Shadow if self.train == "weights" else DenseCoefficients
            if early:
                with straight_through(self.fits, kind, steps=early, recode=self.recode, refit=self.refit):
                    fit(self.learner(model, data), data.task, replace(settings, steps=early))
            self.put(model)
        fit(self.learner(model, data), data.task, replace(settings, steps=settings.steps - early))

    # How they do it

    def start(self, model: PreTrainedModel) -> None:
        """The factors of every matrix, from the weights alone; the model stays as it is."""
        chosen: dict[tuple[Format, ...], Format] = {}
        for site in sites(model):
            possible = tuple(self.formats(site))
            if possible not in chosen:
                errors = [self.error(site, form) for form in possible] if len(possible) > 1 else [0.0]
                chosen[possible] = possible[errors.index(min(errors))]
            self.fits[site.path] = self.fit(site, chosen[possible], self.rounds)

    def formats(self, site: Site) -> list[Format]:
        """What the matrix there can be stored as.

        Raises:
            FormwrightError: nothing of the size that was asked for.
        """
        outputs, inputs = site.matrix.values.shape
        by_outputs = self.side == "outputs" or (self.side == "heads" and site.makes_heads)
        rows, columns = (inputs, outputs) if by_outputs else (outputs, inputs)
        width = self.width or math.gcd(columns, site.head_dim)
        if columns % width:
            raise FormwrightError(
                f"{site.path} is {outputs} x {inputs}, whose {columns} columns do not divide into groups of {width}: "
                "choose another width."
            )
        bits, found = 8 * site.matrix.weight.element_size(), []
        for atoms in (self.atoms,) if self.atoms else sorted({max(1, width // 2), width, 2 * width, 4 * width}):
            room = rows * width * bits / self.ratio - bits * atoms * width
            fitting = min(int(room // (rows * (bits + index_bits(atoms)))), atoms, width)
            form = Format(
                rows=rows, groups=columns // width, width=width, atoms=atoms, nonzeros=self.nonzeros or fitting,
                by_outputs=by_outputs,
            )  # fmt: skip
            if atoms <= rows and form.nonzeros >= 1 and form.ratio(bits) > 1:
                found.append(form)
        if not found:
            asked = f"{self.nonzeros} of {self.atoms} atoms a row" if self.nonzeros else f"a ratio of {self.ratio:g}"
            raise FormwrightError(
                f"{site.path} is {outputs} x {inputs}, and {asked} in groups of {width} columns does not make it "
                "smaller: choose a smaller ratio, fewer atoms or another width."
            )
        return found

    def error(self, site: Site, form: Format) -> float:
        fitted = self.fit(site, form, TURNS)
        return float((form.cut(site.matrix.values) - product(fitted.basis, fitted.code)).square().sum())

    def fit(self, site: Site, form: Format, rounds: int) -> Fit:
        """From the weight alone."""
        weight = site.matrix.values
        blocks = form.cut(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        basis, code = factorise(blocks, form.atoms, form.nonzeros, rounds=rounds, recipe=self.recipe)
        return Fit(site, form, basis.to(weight.dtype), Code(code.chosen, code.values.to(weight.dtype)))

    def put(self, model: PreTrainedModel) -> None:
        """The factors in place of the weights."""
        for path, one in self.fits.items():
            put_at(model, path, DenseSparseLinear.of(one.form, one.basis, one.code, one.site.bias))
        self.fits = {}

    def learner(self, model: PreTrainedModel, data: Data) -> nn.Module:
        """What is trained: the model, or the model beside the original."""
        if not self.distill:
            return model
        if data.teacher is None:
            raise FormwrightError("dsformer(distill=true) learns from the original model, and the data holds none.")
        [example] = data.batches(1, batch_size=2)
        example = {name: value.to(model.device) for name, value in example.items()}
        alpha = 0.5 if takes_labels(model) else 1.0
        return Pair(
            model, data.teacher, kind=data.kind, example=example, temperature=2.0, alpha=alpha, hidden=0.0
        )  # fmt: skip
