"""digits: scikit-learn's 8 x 8 handwritten digits, a fixed split into 1,297 training and 500 test images."""

import torch

from formwright.errors import FormwrightError, require
from formwright.tasks.base import Columns, Defaults, Task
from formwright.tasks.support.images import image_task, normalised
from formwright.training import Settings

TEST = 500


def task(*, patch_size: int = 2, examples: int = 1297, validation: float = 0.0) -> Task:
    """Ten classes; at the default settings near its ceiling (98 %), so read the loss too, or train on fewer examples.

    Args:
        patch_size: pixels a side of a token: 1 (64 tokens), 2 (16), 4 or 8.
        examples: training images, the first of a fixed random order.
        validation: share of the training images set aside.
    """
    if not 10 <= examples <= 1297:
        raise FormwrightError(f"examples is {examples}, but digits has from 10 to 1297 training images.")
    digits = require("sklearn.datasets", extra="data").load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(digits.images).float()[:, None][order]
    labels = torch.from_numpy(digits.target).long()[order]
    train, test = normalised(pixels[TEST : TEST + examples], pixels[:TEST])
    return image_task(
        name="digits",
        train=Columns(pixel_values=train, labels=labels[TEST : TEST + examples]),
        test=Columns(pixel_values=test, labels=labels[:TEST]),
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
