"""How much of an encoder's geometry is left after it was changed: its embeddings against the original model's.

    e(text)      = mean of the last hidden states over the text's real tokens
    fidelity     = Spearman's rank correlation of all pairwise cosine similarities, ours with the original's
    neighbours   = of the ten texts nearest in the original's space, the share that are among the ten nearest in ours

Both are 1 when searching, clustering or ranking by the changed model gives what the original gives. They ask for no
labels, and do not mind if the whole space was turned.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.errors import FormwrightError
from formwright.training.evaluation import Split, Trainable, fetch, rows

NEAREST = 10
MOST = 2000  # texts: their pairs grow with the square


def fidelity(
    model: nn.Module,
    original: nn.Module,
    task: Trainable,
    split: Split = "test",
    *,
    batch_size: int = 64,
    most: int = MOST,
) -> dict[str, float]:
    """Both numbers over a split's texts.

    Args:
        model, original: give `last_hidden_state` for a batch of the task.
        most: texts compared; of more, evenly spread ones are taken.

    Raises:
        FormwrightError: fewer than three texts, or a model without hidden states.
    """
    ours, theirs = (embeddings(one, task, split, batch_size=batch_size, most=most) for one in (model, original))
    return agreement(ours, theirs)


@torch.no_grad()
def embeddings(
    model: nn.Module, task: Trainable, split: Split = "test", *, batch_size: int = 64, most: int = MOST
) -> Float[Tensor, "texts d"]:
    """A vector a text, in the split's order. The model's mode is left as it was.

    Raises:
        FormwrightError: the model's output has no `last_hidden_state`.
    """
    dataset = rows(task, split)
    count = len(dataset)  # type: ignore[arg-type]
    places = torch.arange(count) if count <= most else torch.arange(most) * count // most
    device = next(model.parameters()).device
    found = []
    training = model.training
    model.eval()
    try:
        for some in places.split(batch_size):
            batch = fetch(dataset, some.tolist(), task.collate)
            batch = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            hidden = getattr(model(**batch), "last_hidden_state", None)
            if hidden is None:
                raise FormwrightError(
                    f"{type(model).__name__} gives no hidden states to embed texts by: load the encoder without its "
                    "head, AutoModel.from_pretrained."
                )
            found.append(mean_pooled(hidden, batch["attention_mask"]).float().cpu())
    finally:
        model.train(training)
    return torch.cat(found)


def mean_pooled(hidden: Float[Tensor, "b n d"], mask: Int[Tensor, "b n"]) -> Float[Tensor, "b d"]:
    """The mean over real tokens."""
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def agreement(ours: Float[Tensor, "texts d"], theirs: Float[Tensor, "texts e"]) -> dict[str, float]:
    """`fidelity` and `neighbours` of two sets of embeddings of the same texts; their widths may differ.

    Raises:
        FormwrightError: fewer than three texts.
    """
    count = len(ours)
    if count < 3:
        raise FormwrightError(f"Embeddings of {count} texts have no pairs to rank: at least 3 are needed.")
    similar = [F.normalize(one.double(), dim=-1) for one in (ours, theirs)]
    similar = [one @ one.T for one in similar]
    first, second = torch.triu_indices(count, count, 1)
    nearest = [one.fill_diagonal_(-2).topk(min(NEAREST, count - 1)).indices for one in similar]
    shared = (nearest[0][:, :, None] == nearest[1][:, None, :]).any(-1)
    return {
        "fidelity": spearman(similar[0][first, second], similar[1][first, second]),
        "neighbours": float(shared.double().mean()),
    }


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """The correlation of the ranks, equal values sharing theirs; 0 where one side is all alike."""
    centred = [rank - rank.mean() for rank in (ranks(x), ranks(y))]
    norms = centred[0].norm() * centred[1].norm()
    return float(centred[0] @ centred[1] / norms) if norms > 0 else 0.0


def ranks(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Places in ascending order; equal values get the mean of theirs."""
    _, place, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]
