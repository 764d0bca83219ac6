"""Train a model on a task: the loop is the Hugging Face Trainer's, the settings are ours."""

import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path

import torch
from torch import nn

from formwright.errors import FormwrightError, require
from formwright.training.evaluation import Trainable, evaluate
from formwright.training.method import Method, methods_of, prepared
from formwright.training.precision import attention_in_float32
from formwright.training.settings import Settings

Progress = Callable[[int, int, float], None]  # step, steps, the step's loss

TOLD = 50  # how often a run tells its progress
SAVED = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class History:
    """What training was like.

    Args:
        losses: the training loss of every step, the mean over its scored cells.
        curve: one entry an evaluation: `step` and the task's metrics, on the validation rows where there are any,
            else on the test.
        seconds: wall time of the steps of this call, evaluations not counted.
        extras: losses that the model reported beside its own, by name, a number for every step of this call.
    """

    losses: list[float]
    curve: list[dict[str, float | int]]
    seconds: float
    extras: dict[str, list[float]] = field(default_factory=dict)

    def final_loss(self, steps: int = 50) -> float:
        """The mean over the last steps: one step's loss is noise."""
        last = self.losses[-steps:]
        return sum(last) / len(last)


def seeded(seed: int) -> None:
    """Seed Python, NumPy and torch. Call it before a model is built: `fit` seeds only what comes after."""
    from transformers import set_seed

    set_seed(seed)


def fit(
    model: nn.Module,
    task: Trainable,
    settings: Settings,
    *,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    methods: Sequence[Method] = (),
) -> History:
    """Train a model in place, on the device it is on, and in all processes that torchrun or accelerate started.

    Args:
        model: a Hugging Face model whose output holds a `loss` for a batch with labels.
        task: where the rows come from.
        settings: how long and how fast.
        folder: where checkpoints go while the run lasts (with `settings.save_every`); they are deleted at its end.
        resume: go on from the newest checkpoint in the folder; False starts over.
        progress: called about fifty times with step, steps and the step's loss.
        methods: training methods beside those that `settings.methods` names, and behind them.

    Raises:
        FormwrightError: the training rows are fewer than a batch, the batch does not divide among the processes, a
            checkpoint of other settings lies in the folder, `save_every` comes without a folder, a method does not suit
            the model, or the loss is no number any more.
    """
    require("accelerate", extra="train")
    if settings.save_every and folder is None:
        raise FormwrightError("save_every needs a folder for its checkpoints: fit(..., folder=...).")
    if len(task.train) < settings.batch_size:
        raise FormwrightError(
            f"{task.name} has {len(task.train)} training rows, fewer than one batch of {settings.batch_size}: "
            f"choose batch_size {len(task.train)} or less."
        )
    methods = [*methods_of(settings), *methods]
    with prepared(methods, model, task, settings):
        if folder is None:
            with tempfile.TemporaryDirectory() as nowhere:
                return _run(model, task, settings, methods, Path(nowhere), None, progress)
        saved = Path(folder) / SAVED
        checkpoint = newest(saved, settings, resume=resume)
        history = _run(model, task, settings, methods, saved, checkpoint, progress)
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(saved, ignore_errors=True)  # they hold pickles, and the model is in memory
    return history


def newest(saved: Path, settings: Settings, *, resume: bool) -> Path | None:
    """The last checkpoint that was written to its end.

    Raises:
        FormwrightError: the folder holds a run with other settings.
    """
    main = int(os.environ.get("RANK", 0)) == 0
    note = saved / "settings.json"
    asked = json.loads(json.dumps(asdict(settings)))
    if not resume and main:
        shutil.rmtree(saved, ignore_errors=True)
    whole = []
    if resume and note.exists():
        held = json.loads(note.read_text())
        other = [f"{name} {held.get(name)} and not {value}" for name, value in asked.items() if held.get(name) != value]
        if other:
            raise FormwrightError(
                f"{saved.parent} holds an unfinished run with {', '.join(other)}: give its settings, or "
                "resume=False to start over."
            )
        for state in saved.glob("checkpoint-*/trainer_state.json"):  # the last file the Trainer writes
            try:
                whole.append((json.loads(state.read_text())["global_step"], state.parent))
            except (json.JSONDecodeError, KeyError):  # cut off in the middle
                continue
    if settings.save_every and main:
        saved.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(asked))
    return max(whole)[1] if whole else None


def _run(
    model: nn.Module,
    task: Trainable,
    settings: Settings,
    methods: Sequence[Method],
    saved: Path,
    checkpoint: Path | None,
    progress: Progress | None,
) -> History:
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from formwright.training.trainer import FormwrightTrainer, Watch

    processes = int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch_size % (processes * settings.accumulate):
        raise FormwrightError(
            f"batch_size {settings.batch_size} does not divide among {processes} processes and "
            f"accumulate={settings.accumulate}: it must be a multiple of {processes * settings.accumulate}."
        )
    on_cpu = next(model.parameters()).device.type == "cpu"
    watch = Watch()
    with _quiet():
        arguments = TrainingArguments(
            output_dir=str(saved),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size // (processes * settings.accumulate),
            gradient_accumulation_steps=settings.accumulate,
            learning_rate=settings.learning_rate,
            max_grad_norm=settings.clip,
            seed=settings.seed,
            data_seed=settings.seed,
            use_cpu=on_cpu,
            ddp_backend="gloo" if on_cpu and processes > 1 else None,
            dataloader_drop_last=True,  # training only: `evaluate` reads every row
            dataloader_pin_memory=not on_cpu,
            remove_unused_columns=False,
            save_strategy="steps" if settings.save_every else "no",
            save_steps=settings.save_every or 500,
            save_total_limit=2,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = FormwrightTrainer(
            settings=settings,
            shifts=task.head == "causal-lm",
            methods=methods,
            model=model,
            args=arguments,
            train_dataset=task.train,
            data_collator=reduce(lambda collate, method: method.collate(collate), methods, task.collate),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        apart = 0.0
        every = max(1, settings.steps // TOLD)

        def after_step(step: int) -> None:
            nonlocal apart
            if step % every == 0 or step == settings.steps:
                loss = float(trainer.sums[-1])
                _check(task, settings, [loss], step)
                if progress is not None:
                    progress(step, settings.steps, loss)
            if settings.evaluate_every and step % settings.evaluate_every == 0:
                start = time.perf_counter()
                split = "test" if task.validation is None else "validation"
                with torch.random.fork_rng():
                    seen = evaluate(model, task, split, precision=settings.precision)
                trainer.curve = [*trainer.curve, {"step": step, **seen.metrics}]
                apart += time.perf_counter() - start

        watch.trainer, watch.after_step = trainer, after_step
        start = time.perf_counter()
        slow = on_cpu and settings.precision == "bfloat16"
        with attention_in_float32(model) if slow else nullcontext():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - start - apart
    losses = trainer.losses()
    model.eval()
    _check(task, settings, losses)
    extras = {name: torch.stack(values).tolist() for name, values in trainer.extras.items()}
    return History(losses=losses, curve=trainer.curve, seconds=seconds, extras=extras)


def _check(task: Trainable, settings: Settings, losses: list[float], first: int = 1) -> None:
    for step, loss in enumerate(losses, first):
        if not math.isfinite(loss):
            raise FormwrightError(
                f"The loss of {task.name} is {loss} in step {step}: try a learning_rate below "
                f"{settings.learning_rate}, or clip=1."
            )


class _quiet:
    """The Trainer's own notes and bars are for people who watch it alone."""

    def __enter__(self) -> None:
        from transformers.utils import logging as theirs

        self.logger, self.bars = logging.getLogger("transformers.trainer"), theirs.is_progress_bar_enabled()
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)
        theirs.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as theirs

        self.logger.setLevel(self.level)
        if self.bars:
            theirs.enable_progress_bar()
