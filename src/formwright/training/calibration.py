"""Whether a classifier's probabilities can be believed, and whether it notices inputs of another kind.

    calibration error   sum over bins of confidence of share |accuracy - confidence|      Naeini et al. (AAAI 2015)
    Brier score         mean over items of sum_c (p_c - [c = label])^2                    Brier (1950), from 0 to 2
    nll                 mean of -ln p_label
    AUROC               the chance that an input of another kind is given the higher uncertainty

Calibration error and AUROC are torchmetrics'.
"""

from types import ModuleType
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.errors import FormwrightError, require

Score = Literal["max-probability", "entropy"]


def _torchmetrics() -> ModuleType:
    return require("torchmetrics.functional.classification", extra="metrics")


def calibration_error(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], *, bins: int = 15) -> float:
    """Expected calibration error of the likeliest class, in bins of equal width: from 0, well calibrated, to 1."""
    if bins < 1:
        raise FormwrightError(f"Confidence is read in one bin at least, got bins={bins}.")
    probabilities = logits.float().softmax(-1)
    error = _torchmetrics().multiclass_calibration_error(
        probabilities, labels, num_classes=logits.shape[-1], n_bins=bins, norm="l1"
    )
    return float(error)


def brier_score(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """Squared distance of the probabilities from the truth, summed over the classes."""
    truth = F.one_hot(labels, logits.shape[-1])
    return float((logits.double().softmax(-1) - truth).square().sum(-1).mean())


def negative_log_likelihood(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """Nats an item."""
    return float(F.cross_entropy(logits.double(), labels))


def calibration(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], *, bins: int = 15) -> dict[str, float]:
    """Accuracy, and the three of whether the probabilities can be believed."""
    return {
        "accuracy": float((logits.argmax(-1) == labels).double().mean()),
        "ece": calibration_error(logits, labels, bins=bins),
        "nll": negative_log_likelihood(logits, labels),
        "brier": brier_score(logits, labels),
    }


def uncertainty(logits: Float[Tensor, "n c"], score: Score = "max-probability") -> Float[Tensor, " n"]:
    """1 - the largest probability, or the entropy in nats."""
    if score not in get_args(Score):
        raise FormwrightError(f"A score of uncertainty is one of {', '.join(get_args(Score))}, got {score!r}.")
    logs = logits.double().log_softmax(-1)
    return 1 - logs.amax(-1).exp() if score == "max-probability" else -(logs.exp() * logs).sum(-1)


def ood_auroc(
    inside: Float[Tensor, "n c"], outside: Float[Tensor, "m c"], *, score: Score = "max-probability"
) -> float:
    """How well uncertainty tells inputs of another kind from those of the training's: 0.5 = not at all, 1 = always.

    Args:
        inside: logits of inputs as in training.
        outside: logits of the others.
    """
    scores = torch.cat([uncertainty(inside, score), uncertainty(outside, score)])
    kind = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    return float(_torchmetrics().binary_auroc(scores, kind.to(scores.device)))


@torch.no_grad()
def logits_of(model: nn.Module, pixels: Float[Tensor, "n ..."], *, batch_size: int = 256) -> Float[Tensor, "n c"]:
    """What an image classifier gives in evaluation mode; its mode is left as it was."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        return torch.cat(
            [model(pixel_values=batch.to(device)).logits.float() for batch in pixels.split(batch_size)]
        ).cpu()
    finally:
        model.train(training)
