"""mnist: the 10,000 MNIST test images from gzipped idx files, split into 8,000 and 2,000."""

from pathlib import Path

from formwright.errors import FormwrightError
from formwright.tasks.base import Columns, Defaults, Task
from formwright.tasks.support.files import folder, read_idx
from formwright.tasks.support.images import image_task, normalised
from formwright.training import Settings

TRAIN = 8000


def task(*, patch_size: int = 4, validation: float = 0.0, data: Path | None) -> Task:
    """Ten classes of 28 x 28 pixels, from the folder `mnist` of the data folder.

    Args:
        patch_size: pixels a side of a token: 4 gives 49 tokens.
        validation: share of the training images set aside.
        data: the data folder.
    """
    here = folder(data, "mnist", "mnist")
    pixels = read_idx(here / "t10k-images-idx3-ubyte.gz")[:, None]
    labels = read_idx(here / "t10k-labels-idx1-ubyte.gz").long()
    if len(pixels) != len(labels) or len(labels) <= TRAIN:
        raise FormwrightError(
            f"{here} holds {len(pixels)} images and {len(labels)} labels; mnist needs 10,000 of each."
        )
    train, test = normalised(pixels[:TRAIN], pixels[TRAIN:])
    return image_task(
        name="mnist",
        train=Columns(pixel_values=train, labels=labels[:TRAIN]),
        test=Columns(pixel_values=test, labels=labels[TRAIN:]),
        classes=[str(digit) for digit in range(10)],
        patch_size=patch_size,
        validation=validation,
        with_logistic=True,
        defaults=Defaults(
            settings=Settings(steps=600, batch_size=64, learning_rate=2e-3, weight_decay=0.05),
            model={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "init": "fan-in",
                "position": "learned(std=1.0)",
            },
        ),
    )
