"""The Hugging Face Trainer, with the few things it lacks: AdamW groups that honour parts, a rate that ends at 2 %,
exact means.

A step's loss is the mean over the scored cells of the whole step, however many batches and processes it was cut into:
each batch's mean is weighted by its share of the cells. The model's own forward never sees that count, so nothing is
divided twice.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from formwright.training.method import Method, Pass, packed, through, unpack
from formwright.training.settings import Settings

STATES = "methods.safetensors"


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: matrices, which decay, and all else: vectors and numbers (norms, biases), embedding
    tables, and what a module names in its `no_weight_decay`."""
    named = {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "no_weight_decay", ())}
    tables = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)}
    decayed, spared = [], []
    for parameter in model.parameters():  # shared ones once
        if parameter.requires_grad:
            free = parameter.ndim < 2 or id(parameter) in tables or id(parameter) in named
            (spared if free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class SimilarLengths(Sampler[int]):
    """Rows in random order, but those of one batch of similar length: little padding. The order hangs on seed and
    epoch alone."""

    def __init__(self, lengths: Tensor, batch_size: int, seed: int, pool: int = 50) -> None:
        self.row_lengths, self.batch_size, self.seed, self.pool, self.epoch = lengths, batch_size, seed, pool, 0

    def __len__(self) -> int:
        return len(self.row_lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        batches = []
        for rows in order.split(self.batch_size * self.pool):
            batches += rows[torch.argsort(self.row_lengths[rows], stable=True)].split(self.batch_size)
        full = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]  # at the end, where it may be dropped
        mixed = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return iter(torch.cat(mixed + rest).tolist())


class FormwrightTrainer(Trainer):
    """One run under `Settings`; `losses` holds a number for every step, `extras` those that the model reports as
    `extra_losses`."""

    loss_is_scaled_for_ga = True

    def __init__(self, *, settings: Settings, shifts: bool, methods: Sequence[Method], **rest: Any) -> None:
        super().__init__(**rest)
        self.settings, self.methods = settings, methods
        self.model_accepts_loss_kwargs = settings.accumulate > 1 or self.args.world_size > 1  # else nothing to count
        self._loss_shifts_labels = shifts
        self.by_length: SimilarLengths | None = None
        self.earlier: list[float] = []  # the losses before the checkpoint this run resumed from
        self.curve: list[dict[str, float]] = []
        self.sums: list[Tensor] = []
        self.extras: dict[str, list[Tensor]] = {}
        self.fresh = True  # the next batch opens a step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = decay_groups(self.model if model is None else model, self.settings.weight_decay)
            plain = {parameter.dtype for group in groups for parameter in group["params"]} <= {torch.float32}
            self.optimizer = torch.optim.AdamW(
                groups, lr=self.settings.learning_rate, betas=self.settings.betas, fused=plain or None
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            assert num_training_steps == self.settings.steps
            # a plain function, which a checkpoint leaves out; anything else it would pickle
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: self.settings.rate(step))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None)
        if lengths is None:
            return super()._get_train_sampler(dataset)
        self.by_length = SimilarLengths(lengths, self.settings.batch_size, self.args.data_seed)
        return self.by_length

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.state.log_history = [{"losses": self.losses(), "curve": self.curve}]
        states = packed(self.methods)
        if states and self.args.should_save:  # before the Trainer's own files, the last of which says: whole
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_file(states, folder / STATES)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        states = Path(resume_from_checkpoint) / STATES
        unpack(self.methods, load_file(states) if states.exists() else {})

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        self.fresh = True
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        share: Tensor | float = 1.0
        if num_items_in_batch is not None:
            share = self.cells(inputs["labels"]) / num_items_in_batch
        scale = share * self.args.world_size  # the processes' gradients are averaged, not summed
        given = Pass(
            model=self.accelerator.unwrap_model(model) if self.methods else model,
            batch=inputs,
            step=self.state.global_step + 1,
            run=lambda batch: model(**batch),
            backward=lambda part: self.accelerator.backward(part * scale),
        )
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            outputs = through(self.methods, given)
        loss = outputs["loss"]
        self.record(loss.detach() * share, outputs)
        if num_items_in_batch is not None:
            loss = loss * scale
        return (loss, outputs) if return_outputs else loss

    def cells(self, labels: Tensor) -> Tensor:
        return (labels[..., 1:] if self._loss_shifts_labels else labels).ne(-100).sum()

    def record(self, loss: Tensor, outputs: Any) -> None:
        if self.fresh:
            self.sums.append(loss)
        else:
            self.sums[-1] = self.sums[-1] + loss
        for name, value in (outputs.get("extra_losses") or {}).items():
            column = self.extras.setdefault(name, [])
            if self.fresh:
                column.append(value.detach().clone())  # a parameter would change
        self.fresh = False

    def losses(self) -> list[float]:
        """The loss of every step so far, over all processes."""
        if not self.sums:
            return self.earlier
        sums = torch.stack([value.float() for value in self.sums])
        return (
            self.earlier
            + (self.accelerator.reduce(sums, reduction="sum") if self.args.world_size > 1 else sums).tolist()
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:  # noqa: ARG002 - the Trainer's signature
        return 0  # its estimate costs time at every step, and `bench.measure` counts better


class Watch(TrainerCallback):
    """Tells the trainer which epoch it is in and what a checkpoint remembers, and calls back after every step."""

    def __init__(self) -> None:
        self.trainer: FormwrightTrainer | None = None
        self.after_step: Callable[[int], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        for remembered in state.log_history:
            self.trainer.earlier, self.trainer.curve = remembered["losses"], remembered["curve"]

    @property
    def bare(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.trainer.by_length is not None:
            self.trainer.by_length.epoch = int(state.epoch or 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        for method in self.trainer.methods:
            method.gradients(self.bare, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        for method in self.trainer.methods:
            method.stepped(self.bare, state.global_step)
        self.after_step(state.global_step)
