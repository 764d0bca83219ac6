"""Distillation: the changed model learns from the original's answers, and from its hidden states on the way to them.

Paper    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015), arXiv:1503.02531.
Idea     The shares a trained model gives to the wrong classes say what is like what. Read at a temperature above 1 they
         are targets that teach far more than a label does.

             L = a T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)) + (1 - a) CE(z_student, label)
                 + b mean over the student's layers l of  |P_l h_l - h'_g(l)|^2 / |h'_g(l)|^2

             g(l) = round(l L' / L): the first states meet the first, the last the last

         T^2 keeps the soft targets' gradients, which shrink as 1 / T^2, at the size of the hard ones'. P_l is the
         identity where the widths agree; else a learned matrix that is thrown away after training.
         For sentence embeddings, which have neither logits nor labels, the first line is 1 - cos(P e, e') of the
         mean-pooled embeddings.
Differs  The hidden states are no part of the paper, but of those that compress Transformers (as TinyBERT); we divide
         by the size of the teacher's states, so that one weight b serves families whose states differ a thousandfold.
         Padding and labels of -100 count nowhere.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from formwright.compress.fidelity import mean_pooled
from formwright.compress.finetune import Budget, takes_labels, trainable, zeros_kept
from formwright.compress.modifier import Data, Kind, Modifier
from formwright.errors import FormwrightError
from formwright.training import fit

IGNORED = -100


class Distill(Modifier):
    """Train on the original model's answers.

    Args:
        temperature: T.
        alpha: the share of the soft targets in the first line; 1 reads no labels. Embeddings have no labels, and it
            changes nothing for them.
        hidden: b; 0 compares the answers alone.
        steps: optimizer steps.
        epochs: instead of steps, passes over the training rows.
        learning_rate: the highest of the schedule.
        batch_size: rows a step.
    """

    trains: ClassVar[bool] = True
    uses_teacher: ClassVar[bool] = True

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        alpha: float = 0.5,
        hidden: float = 1.0,
        steps: int | None = None,
        epochs: float | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not temperature > 0:
            raise FormwrightError(f"temperature is {temperature}, but it must be above 0.")
        if not 0 <= alpha <= 1:
            raise FormwrightError(f"alpha is {alpha}, but it is a share: from 0 to 1.")
        if hidden < 0:
            raise FormwrightError(f"hidden is {hidden}, but it is a weight: 0 or more.")
        if alpha == 0 and hidden == 0:
            raise FormwrightError("alpha=0 and hidden=0 leave nothing to learn from the original model: use finetune.")
        self.temperature, self.alpha, self.hidden = temperature, alpha, hidden
        self.budget = Budget(steps=steps, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)

    def check(self, model: PreTrainedModel) -> None:
        trainable(model, "distill")
        problem = getattr(model.config, "problem_type", None)
        if problem not in (None, "single_label_classification"):
            raise FormwrightError(f"distill compares shares of classes, and this model's problem is {problem}.")

    def finetune(self, model: PreTrainedModel, data: Data) -> None:
        """Train in place.

        Raises:
            FormwrightError: there is no teacher, or its answers or tokens are not those of this model.
        """
        if data.teacher is None:
            raise FormwrightError("distill learns from the original model, and the data holds none as its teacher.")
        [example] = data.batches(1, batch_size=2)
        pair = Pair(
            model,
            data.teacher,
            kind=data.kind,
            example={name: value.to(model.device) for name, value in example.items()},
            temperature=self.temperature,
            alpha=self.alpha,
            hidden=self.hidden,
        )
        with zeros_kept(model):
            fit(pair, data.task, self.budget.settings(data))


class Pair(nn.Module):
    """Student and teacher as one module whose output's loss is the distillation loss.

    Args:
        student: the model that is trained.
        teacher: stays as it is, without dropout; moved to the student's device.
        kind: what both are for.
        example: a batch without labels, from which widths and depths are learnt.
        temperature, alpha, hidden: T, a and b.

    Raises:
        FormwrightError: the two cannot be compared.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        kind: Kind,
        example: Mapping[str, Tensor],
        temperature: float,
        alpha: float,
        hidden: float,
    ) -> None:
        super().__init__()
        self.student = student
        self.kind, self.temperature, self.alpha, self.hidden = kind, temperature, alpha, hidden
        device = next(student.parameters()).device
        self.others = (teacher.to(device).eval(),)  # in a tuple it is no part of this module: never trained, no dropout
        ours = self.read(student.train(), example)  # as in training: an executor leaves that to the model itself
        with torch.no_grad():
            theirs = self.read(teacher, example)
        self.projections = nn.ModuleList()
        if kind != "sentence-embedding" and alpha < 1 and not takes_labels(student):
            raise FormwrightError(f"{type(student).__name__} computes no loss from labels: use distill(alpha=1).")
        if kind != "sentence-embedding" and ours.logits.shape != theirs.logits.shape:
            raise FormwrightError(
                f"The model's answers are of shape {tuple(ours.logits.shape)} and the original's of "
                f"{tuple(theirs.logits.shape)}: distill needs the same classes or vocabulary."
            )
        if not self.sees_states:
            return
        if min(len(one.hidden_states or ()) for one in (ours, theirs)) < 2:
            raise FormwrightError("The models give no hidden states of their layers: use distill(hidden=0).")
        for mine, its in matched(ours.hidden_states, theirs.hidden_states):
            if mine.shape[:-1] != its.shape[:-1]:
                raise FormwrightError(
                    f"Hidden states of shape {tuple(mine.shape)} and {tuple(its.shape)} are of different tokens: put "
                    "distill before the step that drops them, or use distill(hidden=0)."
                )
            narrow, wide = mine.shape[-1], its.shape[-1]
            same = narrow == wide
            self.projections.append(nn.Identity() if same else nn.Linear(narrow, wide, bias=False, device=device))

    @property
    def sees_states(self) -> bool:
        return self.hidden > 0 or self.kind == "sentence-embedding"

    def read(self, model: nn.Module, batch: Mapping[str, Any]) -> Any:
        return model(**batch, output_hidden_states=self.sees_states)

    def forward(self, labels: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        hard = {"labels": labels} if labels is not None and self.alpha < 1 else {}
        ours = self.read(self.student, {**batch, **hard})
        with torch.no_grad():
            theirs = self.read(self.others[0], batch)
        mask = batch.get("attention_mask")
        if self.kind == "sentence-embedding":
            loss = self.apart(ours.last_hidden_state, theirs.last_hidden_state, batch["attention_mask"])
        else:
            loss = soft_loss(*scored(ours.logits, theirs.logits, labels, mask, self.kind), self.temperature)
            if hard:
                loss = self.alpha * loss + (1 - self.alpha) * ours.loss
        if self.hidden > 0:
            pairs = zip(self.projections, matched(ours.hidden_states, theirs.hidden_states), strict=True)
            distances = [state_loss(project(mine), its, mask) for project, (mine, its) in pairs]
            loss = loss + self.hidden * torch.stack(distances).mean()
        return {"loss": loss} if self.kind == "sentence-embedding" else {"loss": loss, "logits": ours.logits}

    def apart(self, ours: Float[Tensor, "b n d"], theirs: Float[Tensor, "b n e"], mask: Tensor) -> Float[Tensor, ""]:
        ours = self.projections[-1](mean_pooled(ours, mask))
        return 1 - F.cosine_similarity(ours, mean_pooled(theirs, mask)).mean()


def matched(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Each of the student's states with the teacher's at the same share of the depth."""
    last, depth = len(ours) - 1, len(theirs) - 1
    return [(state, theirs[round(layer * depth / last)]) for layer, state in enumerate(ours)]


def scored(
    ours: Tensor, theirs: Tensor, labels: Tensor | None, mask: Tensor | None, kind: Kind
) -> tuple[Float[Tensor, "m c"], Float[Tensor, "m c"]]:
    """The answers that count: all rows of a classifier, the tokens of a language model that tell a real one."""
    if kind != "causal-lm":
        return ours, theirs
    if labels is not None:
        counts = labels[:, 1:] != IGNORED
    elif mask is not None:
        counts = mask[:, 1:].bool()
    else:
        counts = torch.ones(ours.shape[0], ours.shape[1] - 1, dtype=torch.bool, device=ours.device)
    return ours[:, :-1][counts], theirs[:, :-1][counts]


def soft_loss(ours: Float[Tensor, "m c"], theirs: Float[Tensor, "m c"], temperature: float) -> Float[Tensor, ""]:
    """T^2 KL(teacher || student) at temperature T, the mean over answers."""
    student = F.log_softmax(ours.float() / temperature, dim=-1)
    teacher = F.log_softmax(theirs.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def state_loss(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Float[Tensor, ""]:
    """The squared distance of two layers' states over the size of the teacher's, over real tokens."""
    if mask is not None and mask.shape == ours.shape[: mask.ndim]:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    theirs = theirs.float()
    return (ours.float() - theirs).square().sum() / theirs.square().sum()
