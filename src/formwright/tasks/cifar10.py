"""cifar10: 32 x 32 colour photographs from Parquet files of encoded images, 20,000 to train on and 5,000 to test."""

from pathlib import Path

from formwright.tasks.base import Columns, Defaults, Task
from formwright.tasks.support.files import folder
from formwright.tasks.support.images import Jittered, image_task, jpegs, normalised
from formwright.training import Settings

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def task(*, patch_size: int = 4, augment: bool = True, validation: float = 0.0, data: Path | None) -> Task:
    """Ten classes, from the folder `cifar10` of the data folder. Where the processor has bfloat16 matrix units,
    precision="bfloat16" is faster.

    Args:
        patch_size: pixels a side of a token: 4 gives 64 tokens.
        augment: training images come mirrored or not, and shifted by up to 4 pixels.
        validation: share of the training images set aside.
        data: the data folder.
    """
    here = folder(data, "cifar10", "cifar10")
    pixels, labels = jpegs(here / "train.parquet")
    test_pixels, test_labels = jpegs(here / "test.parquet")
    train, test = normalised(pixels, test_pixels)
    columns = {"pixel_values": train, "labels": labels}
    return image_task(
        name="cifar10",
        train=Jittered(shift=4, **columns) if augment else Columns(**columns),
        test=Columns(pixel_values=test, labels=test_labels),
        classes=CLASSES,
        patch_size=patch_size,
        validation=validation,
        with_logistic=False,
        defaults=Defaults(
            settings=Settings(steps=1400, batch_size=64, learning_rate=2e-3, weight_decay=0.05),
            model={
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "init": "fan-in",
                "position": "learned(std=1.0)",
            },
        ),
    )
