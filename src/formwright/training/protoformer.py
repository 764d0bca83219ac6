"""Protoformer: prototypes of a classifier's own training texts say which labels to doubt while it is trained.

Paper    Farhangi et al.: Protoformer: Embedding Prototypes for Transformers (PAKDD 2022), arXiv:2206.12710.
Idea     After some training, texts of a class are sorted by how dense the place is where their embedding lies. Dense
         and mutually different ones stand for the class, and every text is given the class whose prototypes it
         resembles most; the classifier then learns from both labels. Sparse ones, the anomalies, are not filtered out.

             S_ij = cos(e_i, e_j)    rho_i = sum_j sign(S_ij - S_b)    sigma_i = mean_j S_ij    j != i, of i's class

             S_b = a quantile of S. Sorted by (rho, sigma), densest first for class prototypes and sparsest
             first for anomalies, the texts are walked in pieces of 2, 4, 8, ..; of each piece the one least similar, on
             average, to those chosen before becomes a prototype, P. Class prototypes begin beside the densest text.

             y^_i = argmax_c mean_{p in P_c} cos(e_i, e_p)
             loss = (1 - alpha) CE(f(x_i), y_i) + alpha CE(f(x_i), y^_i)

Differs  The loss, the rounds and what follows are our choice: the paper's are not in its code. Only class prototypes
         vote. Labels of texts of the difficult classes are adjusted, those the classifier recalls least; by default all
         classes are. A prototype keeps its label unless both the classifier and the vote say another. e is what the
         classifier's last layer reads. S_b is the median; the release's 20 % quantile lies among the similarities of
         rightly to wrongly labelled texts where more than a ninth are wrong, and makes texts between the classes the
         densest. Large classes are represented by texts drawn at random. The release's densities see one triangle of
         S; ours all of it. A piece is taken when another text follows it, as there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from formwright.errors import FormwrightError
from formwright.training.evaluation import Batch, Trainable, fetch
from formwright.training.method import Collate, Method, Outputs, Pass
from formwright.training.settings import Settings

ROW = "row"  # of a batch in training: where its texts stand in the training rows
READ_AT_ONCE = 256

# Prototypes


def similarity(embeddings: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """S: cosines, exactly 1 with itself."""
    unit = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
    found = (unit @ unit.T).clamp(-1, 1)
    return ((found + found.T) / 2).fill_diagonal_(1)


def density(s: Float[Tensor, "n n"], quantile: float) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """rho and sigma: how many others lie nearer than S_b, less those that lie farther; and the mean similarity."""
    n = len(s)
    others = s[~torch.eye(n, dtype=torch.bool, device=s.device)].view(n, n - 1)
    rank = max(1, math.ceil(quantile * others.numel()))
    base = others.flatten().kthvalue(rank).values
    return (others - base).sign().sum(1).long(), others.mean(1)


def sorted_by(rho: Int[Tensor, " n"], sigma: Float[Tensor, " n"], *, dense: bool) -> Int[Tensor, " n"]:
    """Densest (or sparsest) first; of equals, the one more similar to the others."""
    by_sigma = sigma.argsort(descending=True, stable=True)
    return by_sigma[rho[by_sigma].argsort(descending=dense, stable=True)]


def walked(s: Float[Tensor, "n n"], order: Int[Tensor, " n"], beside: Sequence[int] = ()) -> list[int]:
    """Prototypes, one of each piece of 2, 4, 8, .. texts of the order.

    Args:
        beside: what counts as chosen before the first; it is none of the prototypes unless it is chosen.
    """
    chosen = list(beside)
    start, size = 0, 2
    while start + size < len(order):
        piece = order[start : start + size]
        alike = s[piece][:, chosen].mean(1) if chosen else torch.zeros(size)
        chosen.append(int(piece[alike.argmin()]))  # the first of equals
        start, size = start + size, 2 * size
    return chosen[len(beside) :]


def choose(s: Float[Tensor, "n n"], quantile: float) -> tuple[list[int], list[int]]:
    """The class prototypes and the anomalies among the texts of one class, by their similarities."""
    rho, sigma = density(s, quantile)
    dense, sparse = (sorted_by(rho, sigma, dense=first) for first in (True, False))
    return walked(s, dense, beside=[int(dense[0])]), walked(s, sparse)


def count(rows: int) -> int:
    """How many prototypes of each kind a class of so many texts has."""
    return max(0, int(math.log2(rows + 1)) - 1)


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """Texts that stand for their classes.

    Attributes:
        rows: where they are among the training rows.
        labels: the classes they stand for.
        anomalous: which are anomalies.
        embeddings: theirs.
    """

    rows: Int[Tensor, " p"]
    labels: Int[Tensor, " p"]
    anomalous: Bool[Tensor, " p"]
    embeddings: Float[Tensor, "p d"]

    def vote(self, embeddings: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """y^: the class whose class prototypes are most similar on average."""
        kept = ~self.anomalous
        alike = F.normalize(embeddings.float(), dim=1) @ F.normalize(self.embeddings[kept].float(), dim=1).T
        classes = F.one_hot(self.labels[kept]).to(alike.dtype)
        return (alike @ classes / classes.sum(0)).argmax(1)

    def nearest(
        self, embeddings: Float[Tensor, "n d"], most: int = 3
    ) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
        """Which prototypes explain these texts: places in `rows`, most similar first, and the similarities."""
        alike = F.normalize(embeddings.float(), dim=1) @ F.normalize(self.embeddings.float(), dim=1).T
        found = alike.topk(min(most, len(self.rows)), dim=1)
        return found.indices, found.values


def prototypes(
    embeddings: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    classes: int,
    *,
    quantile: float = 0.5,
    most: int = 1000,
    seed: int = 0,
) -> Prototypes:
    """Class prototypes and anomalies of every class.

    Args:
        quantile: of the similarities, S_b.
        most: texts of a class that are looked at, drawn at random from larger ones.
        seed: of that draw.

    Raises:
        FormwrightError: a class of fewer than three texts.
    """
    random = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, int, bool]] = []
    for label in range(classes):
        rows = (labels == label).nonzero()[:, 0].cpu()
        if count(len(rows)) == 0:
            raise FormwrightError(
                f"Class {label} has {len(rows)} training texts, and prototypes need three: join it to another class."
            )
        rows = rows[torch.randperm(len(rows), generator=random)[:most].sort().values]
        for places, anomalous in zip(choose(similarity(embeddings[rows]), quantile), (False, True), strict=True):
            found.append((rows[places], label, anomalous))
    rows = torch.cat([one for one, _, _ in found])
    repeated = torch.tensor([len(one) for one, _, _ in found])
    return Prototypes(
        rows=rows,
        labels=torch.tensor([label for _, label, _ in found]).repeat_interleave(repeated),
        anomalous=torch.tensor([kind for _, _, kind in found]).repeat_interleave(repeated),
        embeddings=embeddings[rows],
    )


def adjusted(
    found: Prototypes,
    embeddings: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    predictions: Int[Tensor, " n"],
    difficult: Int[Tensor, " c"],
) -> Int[Tensor, " n"]:
    """The label that each text is trained with besides its own.

    Args:
        labels: as they were given.
        predictions: the classifier's.
        difficult: classes whose labels may be adjusted.
    """
    vote = found.vote(embeddings)
    new = torch.where(torch.isin(labels, difficult), vote, labels)
    own, said, voted = labels[found.rows], predictions[found.rows], vote[found.rows]
    new[found.rows] = torch.where((said != own) & (voted != own), new[found.rows], own)
    return new


def recalled_least(
    labels: Int[Tensor, " n"], predictions: Int[Tensor, " n"], classes: int, share: float
) -> Int[Tensor, " c"]:
    """The difficult classes: this share of them, at least one, of the lowest recall."""
    right = torch.bincount(labels[labels == predictions], minlength=classes)
    recall = right / torch.bincount(labels, minlength=classes).clamp(min=1)
    return recall.argsort(stable=True)[: max(1, round(share * classes))]


# The classifier


def last_layer(model: nn.Module) -> nn.Linear:
    """The layer that gives the logits.

    Raises:
        FormwrightError: no linear layer has the classes' number of outputs.
    """
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    found = [one for one in model.modules() if isinstance(one, nn.Linear) and one.out_features == classes]
    if not found:
        raise FormwrightError(
            f"{type(model).__name__} has no last linear layer of as many outputs as classes: prototypes need a "
            "classifier."
        )
    return found[-1]


@torch.no_grad()
def read(model: nn.Module, batches: Sequence[Batch]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n c"]]:
    """Embeddings and logits of texts, in evaluation mode; the model's mode is left as it was.

    Raises:
        FormwrightError: the last layer reads every token of a text, not one vector for it.
    """
    device, training = next(model.parameters()).device, model.training
    embeddings: list[Tensor] = []
    logits: list[Tensor] = []
    hook = last_layer(model).register_forward_pre_hook(lambda _, given: embeddings.append(given[0].float().cpu()))
    model.eval()
    try:
        for batch in batches:
            given = {name: value.to(device) for name, value in batch.items() if name not in ("labels", ROW)}
            logits.append(model(**given).logits.float().cpu())
    finally:
        model.train(training)
        hook.remove()
    if embeddings[0].ndim != 2:
        raise FormwrightError(f"The last layer of {type(model).__name__} reads every token: choose an encoder.")
    return torch.cat(embeddings), torch.cat(logits)


class Rows:
    """The training rows of a task, in batches of similar length, and where a text stands in them."""

    def __init__(self, dataset: Dataset, collate: Collate) -> None:
        self.dataset, self.collate = dataset, collate
        lengths = getattr(dataset, "lengths", None)
        total = len(dataset)  # type: ignore[arg-type]
        self.order = torch.arange(total) if lengths is None else torch.argsort(lengths, stable=True)
        self.place: dict[bytes, int] = {}
        labels = torch.empty(total, dtype=torch.long)
        for places in self.order.split(READ_AT_ONCE):
            batch = fetch(dataset, places.tolist(), collate)
            labels[places] = batch["labels"]
            for place, key in zip(places.tolist(), keys(batch), strict=True):
                self.place.setdefault(key, place)
        self.labels = labels

    def read(self, model: nn.Module) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n c"]]:
        """Embeddings and logits of all of them."""
        batches = [fetch(self.dataset, places.tolist(), self.collate) for places in self.order.split(READ_AT_ONCE)]
        back = self.order.argsort()
        embeddings, logits = read(model, batches)
        return embeddings[back], logits[back]

    def find(self, batch: Batch) -> Int[Tensor, " b"]:
        """Where the texts of a batch stand; -1 for one that is not there."""
        return torch.tensor([self.place.get(key, -1) for key in keys(batch)])


def keys(batch: Batch) -> list[bytes]:
    """What tells texts apart: their real tokens."""
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    return [row[kept].numpy().tobytes() for row, kept in zip(ids, real, strict=True)]


class Protoformer(Method):
    """Train a text classifier on its labels and on those its prototypes vote for.

    Args:
        alpha: the weight of the voted labels, from 0 (plain training) to 1.
        warmup: the share of the steps before prototypes are first found.
        rounds: how often they are, at equal distances from then on.
        difficult: the share of the classes, those recalled least, whose labels are adjusted.
        quantile: of the similarities, S_b; 0.2 in the release.
        most: texts of a class that are looked at.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        warmup: float = 0.3,
        rounds: int = 3,
        difficult: float = 1.0,
        quantile: float = 0.5,
        most: int = 1000,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise FormwrightError(f"alpha is {alpha}, but it is the weight of the voted labels: from 0 to 1.")
        if not 0 <= warmup < 1 or rounds < 1:
            raise FormwrightError(
                f"warmup and rounds are {warmup} and {rounds}, but a share below 1 and at least one round are needed."
            )
        if not 0 < difficult <= 1 or not 0 < quantile < 1 or most < 3:
            raise FormwrightError(
                f"difficult, quantile and most are {difficult}, {quantile} and {most}, but they are a share up to 1, a "
                "share between 0 and 1, and three texts or more."
            )
        self.alpha, self.warmup, self.rounds = alpha, warmup, rounds
        self.difficult, self.quantile, self.most = difficult, quantile, most
        self.found: Prototypes | None = None
        self.labels: Tensor | None = None  # voted, of all training rows

    def check(self, model: nn.Module, task: Trainable, settings: Settings) -> None:  # noqa: ARG002
        if task.head != "sequence-classification" or "input_ids" not in fetch(task.train, [0], task.collate):
            raise FormwrightError(f"Protoformer classifies texts, and {task.name} is no such task: choose one.")
        read(model, [fetch(task.train, [0], task.collate)])

    def prepare(self, model: nn.Module, task: Trainable, settings: Settings) -> None:
        self.found, self.labels = None, None
        self.rows = Rows(task.train, task.collate)
        self.classes, self.seed = model.config.num_labels, settings.seed
        first = round(self.warmup * settings.steps)
        every = (settings.steps - first) / self.rounds
        self.due = {1 + first + int(every * i) for i in range(self.rounds)}

    def collate(self, collate: Collate) -> Collate:
        def collated(given: object) -> Batch:
            batch = collate(given)
            return {**batch, ROW: self.rows.find(batch)}

        return collated

    def forward(self, given: Pass) -> Outputs:
        if given.step in self.due:  # once, though several batches may make the step
            self.due.remove(given.step)
            self.renew(given.model)
        batch = dict(given.batch)
        rows = batch.pop(ROW)
        outputs = given.run(batch)
        if self.labels is None:
            return outputs
        own = batch["labels"]
        voted = torch.where(rows >= 0, self.labels.to(own.device)[rows.clamp(min=0)], own)
        logits = outputs["logits"].float()
        outputs["loss"] = outputs["loss"] + self.alpha * (F.cross_entropy(logits, voted) - F.cross_entropy(logits, own))
        told = {**(outputs.get("extra_losses") or {}), "adjusted": (voted != own).float().mean()}
        outputs["extra_losses"] = told
        return outputs

    def renew(self, model: nn.Module) -> None:
        """Find prototypes, and the labels they vote for."""
        embeddings, logits = self.rows.read(model)
        self.found = self.choose(embeddings)
        predictions = logits.argmax(1)
        difficult = recalled_least(self.rows.labels, predictions, self.classes, self.difficult)
        self.labels = adjusted(self.found, embeddings, self.rows.labels, predictions, difficult)

    def choose(self, embeddings: Float[Tensor, "n d"]) -> Prototypes:
        return prototypes(
            embeddings, self.rows.labels, self.classes, quantile=self.quantile, most=self.most, seed=self.seed
        )

    def state(self) -> dict[str, Tensor]:
        if self.found is None or self.labels is None:
            return {}
        return {"voted": self.labels, **vars(self.found)}

    def load(self, state: dict[str, Tensor]) -> None:
        if state:
            state = dict(state)
            self.labels = state.pop("voted")
            self.found = Prototypes(**state)
