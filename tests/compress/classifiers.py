"""Tiny classifiers of random weights with rows to train them on, for methods in which texts or tokens leave early."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from formwright.compress import Data
from formwright.tasks.base import Columns, accuracy_and_loss, score_rows
from formwright.training import Settings, seeded

LAYERS, WIDTH, CLASSES = 4, 16, 3


def tiny(family="Bert", layers=LAYERS, classes=CLASSES, **more):
    """A classifier whose layers and head are far enough from their small initial weights to differ."""
    seeded(0)
    sizes = {"vocab_size": 50, "num_labels": classes, "max_position_embeddings": 40, "pad_token_id": 0}
    if family == "DistilBert":
        sizes |= {"dim": WIDTH, "n_layers": layers, "n_heads": 2, "hidden_dim": 32}
    else:
        sizes |= {"hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    if family == "Electra":
        sizes["embedding_size"] = 8
    config = getattr(transformers, f"{family}Config")(**sizes, **more)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def rows(count=12, length=14, seed=1, shortest=4):
    """A padded batch of texts of every length from the shortest on."""
    ids = torch.randint(1, 50, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for i in range(count):
        mask[i, shortest + i % (length - shortest + 1) :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@dataclass
class Rows:
    """A task of random rows."""

    name: str = "rows"
    head: str = "sequence-classification"
    train: Any = field(default_factory=lambda: Columns(**rows(32), labels=torch.arange(32) % CLASSES))
    validation: Any = None
    test: Any = None
    collate: Any = dict
    score: Any = field(default=score_rows)
    summary: Any = field(default=accuracy_and_loss)


def data(**settings):
    usual = {"steps": 3, "batch_size": 8, "learning_rate": 1e-2}
    return Data(task=Rows(), kind="text-classification", settings=Settings(**(usual | settings)))
