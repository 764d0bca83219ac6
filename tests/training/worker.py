"""A small run that tests compare: in this process, in one that is killed, and in two at once.

python worker.py FOLDER killed        trains until step 25 of 40, then ends as kill -9 ends it
python worker.py FOLDER counted       the same, with a training method that counts steps
torchrun ... worker.py FOLDER both    trains in as many processes as there are; the first writes losses.json
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from formwright.models.transformer import TransformerConfig, TransformerForTokenClassification
from formwright.tasks.base import IGNORED, Columns, Defaults, Task, cells_and_wholes, score_cells
from formwright.training import History, Method, Settings, fit, seeded

# 100 rows make 12 batches of 8 an epoch: 40 steps end in the fourth. The rows' scored cells differ in number.
SETTINGS = Settings(steps=40, batch_size=8, learning_rate=1e-2, save_every=10, seed=3)


def ragged(rows: int = 100, width: int = 12) -> Task:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, (rows, width), generator=random)
    labels = tokens.flip(1).masked_fill(
        torch.rand(rows, width, generator=random) < torch.rand(rows, 1, generator=random), IGNORED
    )
    labels[:, -1] = tokens[:, 0]
    data = Columns(input_ids=tokens, labels=labels)
    return Task(
        name="ragged",
        head="token-classification",
        model_config={},
        train=data,
        test=data.select(torch.arange(min(57, rows))),
        metrics=(),
        score=score_cells,
        summary=cells_and_wholes,
        baselines=dict,
        defaults=Defaults(settings=SETTINGS, model={}),
    )


def small(dropout: float = 0.1) -> TransformerForTokenClassification:
    seeded(1)
    return TransformerForTokenClassification(
        TransformerConfig(
            architecture="encoder",
            vocab_size=10,
            num_labels=10,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            qkv_bias=False,  # no loss depends on a key's bias: its gradient is rounding, which Adam makes large
            dropout=dropout,
        )
    )


def killed(step: int, _steps: int, _loss: float) -> None:
    if step == 25:
        os.kill(os.getpid(), signal.SIGKILL)


class Counting(Method):
    """How many steps there were, and the sum of their numbers."""

    def __init__(self) -> None:
        self.seen = torch.zeros(2, dtype=torch.int64)

    def stepped(self, model: torch.nn.Module, step: int) -> None:  # noqa: ARG002
        self.seen += torch.tensor([1, step])

    def state(self) -> dict[str, torch.Tensor]:
        return {"seen": self.seen}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.seen = state["seen"]


def main(folder: Path, what: str) -> None:
    if what in ("killed", "counted"):
        methods = [Counting()] if what == "counted" else []
        fit(small(), ragged(), SETTINGS, folder=folder, progress=killed, methods=methods)
        return
    # without dropout, whose noise each process draws for itself
    model = small(dropout=0.0)
    history: History = fit(model, ragged(), SETTINGS, folder=folder)
    if int(os.environ["RANK"]) == 0:
        (folder / "losses.json").write_text(json.dumps(history.losses))
        torch.save(model.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
