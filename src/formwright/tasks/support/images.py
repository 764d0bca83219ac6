"""What the image tasks share: normalised pixels, baselines on them, flips and crops."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from formwright.errors import FormwrightError
from formwright.tasks.base import ACCURACY, LOSS, Batch, Columns, Defaults, Task, hold_out, share_of_classes


def normalised(
    train: Float[Tensor, "m c h w"] | UInt8[Tensor, "m c h w"],
    test: Float[Tensor, "n c h w"] | UInt8[Tensor, "n c h w"],
) -> tuple[Tensor, Tensor]:
    """Both with the training pixels' mean 0 and standard deviation 1, channel by channel."""
    train, test = train.float(), test.float()
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return (train - mean) / std, (test - mean) / std


class Jittered(Columns):
    """Images that come mirrored or not and shifted by up to `shift` pixels, anew each time. Draws from torch's
    global random state,
    as dropout does, so that a run that resumes goes on as it would have."""

    def __init__(self, *, shift: int, **columns: Tensor) -> None:
        super().__init__(**columns)
        self.shift = shift

    def __getitem__(self, index: int) -> Batch:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = super().__getitems__(indices)
        pixels = batch["pixel_values"]
        rows, _, height, width = pixels.shape
        mirrored = torch.rand(rows) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        padded = F.pad(pixels, [self.shift] * 4)
        down, right = torch.randint(0, 2 * self.shift + 1, (2, rows, 1))
        y, x = down + torch.arange(height), right + torch.arange(width)
        row = torch.arange(rows)[:, None, None]
        batch["pixel_values"] = padded[row, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
        return batch

    def select(self, rows: Tensor) -> "Jittered":
        return Jittered(shift=self.shift, **{name: column[rows] for name, column in self.columns.items()})


def nearest_centroid(train: Columns, test: Columns, classes: int) -> float:
    """The accuracy of the class whose mean training image is nearest."""
    x, y = train.columns["pixel_values"].flatten(1), train.columns["labels"]
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    found = torch.cdist(test.columns["pixel_values"].flatten(1), means).argmin(1)
    return float((found == test.columns["labels"]).double().mean())


def logistic(
    x: Float[Tensor, "m d"], y: Int[Tensor, " m"], x_test: Float[Tensor, "n d"], y_test: Int[Tensor, " n"], classes: int
) -> dict[str, float]:
    """Multinomial logistic regression on plain inputs, weight penalty 1 (scikit-learn's C = 1), by L-BFGS from zero."""
    weights = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weights, bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weights + bias, y) + weights.square().sum() / (2 * len(y))
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    logits = (x_test @ weights + bias).detach()
    return {
        "accuracy": float((logits.argmax(1) == y_test).double().mean()),
        "loss": float(F.cross_entropy(logits, y_test)),
    }


def image_task(
    *,
    name: str,
    train: Columns,
    test: Columns,
    classes: Sequence[str],
    patch_size: int,
    validation: float,
    defaults: Defaults,
    with_logistic: bool,
) -> Task:
    """An image classification task of what was read."""
    channels, height, width = test.columns["pixel_values"].shape[1:]
    if height % patch_size or width % patch_size:
        raise FormwrightError(f"patch_size is {patch_size}, but it must divide the images' {height} x {width} pixels.")
    if not 0 <= validation < 1:
        raise FormwrightError(f"validation is {validation}, but it is the share of training rows set aside: below 1.")
    learnt, aside = hold_out(train, validation)
    still = None if aside is None else Columns(**aside.columns)  # no jitter in evaluation

    def baselines() -> dict[str, dict[str, float]]:
        labels, truth = learnt.columns["labels"], test.columns["labels"]
        found = share_of_classes(labels, truth, len(classes))
        found["nearest centroid"] = {"accuracy": nearest_centroid(learnt, test, len(classes))}
        if with_logistic:
            x, x_test = (rows.columns["pixel_values"].flatten(1) for rows in (learnt, test))
            found["logistic regression"] = logistic(x, labels, x_test, truth, len(classes))
        return found

    return Task(
        name=name,
        head="image-classification",
        model_config=image_config(height, patch_size, channels, classes),
        train=learnt,
        validation=still,
        test=test,
        metrics=(ACCURACY, LOSS),
        baselines=baselines,
        defaults=defaults,
    )


def image_config(size: int, patch_size: int, channels: int, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "architecture": "encoder",
        "vocab_size": 0,  # no table of ids
        "image_size": size,
        "patch_size": patch_size,
        "num_channels": channels,
        "max_position_embeddings": (size // patch_size) ** 2,
        "pooling": "mean",
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {label: i for i, label in enumerate(classes)},
    }


def jpegs(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, h, w) as bytes, and labels, of a Parquet file with the columns `image` (an encoded image) and
    `label`."""
    import io

    import numpy

    from formwright.errors import require
    from formwright.tasks.support.files import column, read_table

    image = require("PIL.Image", extra="data")
    table = read_table(path)
    pixels = []
    for row, encoded in enumerate(column(table, "image", path, "image")):
        encoded = encoded["bytes"] if isinstance(encoded, dict) else encoded  # as datasets stores an image
        try:
            pixels.append(numpy.asarray(image.open(io.BytesIO(encoded)).convert("RGB")))
        except (OSError, TypeError) as wrong:
            raise FormwrightError(f"{path}, row {row}: no image can be read from it.") from wrong
    labels = torch.tensor(column(table, "label", path, "label").tolist())
    return torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2).contiguous(), labels
