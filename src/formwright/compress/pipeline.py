"""Run a recipe on a model: every step proves that it changed something, and a killed run goes on where it stopped."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from formwright.build import Spec, format_spec
from formwright.compress.modifier import Data, Modifier
from formwright.compress.recipe import Recipe
from formwright.compress.structure import EXECUTOR, Rebuilt, adopt, load
from formwright.errors import FormwrightError
from formwright.training import seeded

Told = Callable[[int, int, str], None]  # step, steps, its name

DONE = "done.json"


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one step did.

    Args:
        step: its name and options.
        parameters: numbers in weights and buffers, before and after.
        zeros: how many of them are zero.
        bytes: what they take.
        simulated: the method's gain is not realised here.
        says: a sentence for the report.
    """

    step: str
    parameters: tuple[int, int]
    zeros: tuple[int, int]
    bytes: tuple[int, int]
    simulated: bool
    says: str


def run(
    model: PreTrainedModel,
    recipe: Recipe | Spec | Sequence[Spec] | str | Path,
    data: Data,
    *,
    folder: str | Path | None = None,
    progress: Told | None = None,
) -> tuple[PreTrainedModel, list[Change]]:
    """Apply a recipe to a model, in place.

    Args:
        folder: where the model is kept after every step; a later call with the same recipe goes on from there.
        progress: called before each step.

    Returns:
        The model (another object when an interrupted run was taken up) and what each step did.

    Raises:
        FormwrightError: the recipe cannot be read, a method cannot be applied to this model, a step changed nothing, or
            the folder holds the run of another recipe.
    """
    recipe = Recipe.read(recipe)
    modifiers = recipe.modifiers()
    if data.teacher is None and any(one.uses_teacher for one in modifiers):
        data.teacher = copy.deepcopy(model).eval().requires_grad_(False)
    finished = 0
    changes: list[Change] = []
    if folder is not None:
        held = _held(Path(folder), recipe)
        if held is not None:
            model, changes = held
            finished = len(changes)
    adopt(model)
    for number, (modifier, step) in enumerate(zip(modifiers, recipe.steps, strict=True)):
        if number < finished:
            continue
        if progress is not None:
            progress(number, len(modifiers), step["name"])
        seeded(recipe.seed)
        changes.append(apply(model, modifier, data, step=format_spec(step)))
        model.config.compression["recipe"] = [*model.config.compression["recipe"], step]
        if folder is not None:
            _keep(Path(folder), recipe, model, changes)
    return model.eval(), changes


def apply(model: PreTrainedModel, modifier: Modifier, data: Data, *, step: str = "") -> Change:
    """One method, from check to finalize, with the proof that it changed something."""
    step = step or type(modifier).__name__
    adopt(model)
    modifier.check(model)
    before, size = _fingerprint(model), _size(model)
    model.eval()
    modifier.calibrate(model, data)
    modifier.apply(model)
    modifier.finetune(model, data)
    modifier.finalize(model)
    model.eval()
    if _fingerprint(model) == before:
        raise FormwrightError(f"{step} changed nothing in this model: leave it out, or give it a larger amount.")
    return _change(step, modifier, size, _size(model))


def _change(step: str, modifier: Modifier, before: tuple[int, int, int], after: tuple[int, int, int]) -> Change:
    parts = []
    if before[0] != after[0]:
        parts.append(f"{before[0]:,} -> {after[0]:,} numbers")
    if before[1] != after[1]:
        parts.append(f"{after[1] / max(1, after[0]):.1%} of them zero")
    if before[2] != after[2]:
        parts.append(f"{before[2] / 1e6:.1f} -> {after[2] / 1e6:.1f} MB")
    says = ", ".join(parts) or ("runs in another way" if modifier.exact else "other weights")
    if modifier.simulated:
        says += "; simulated: no speed-up here"
    pairs = list(zip(before, after, strict=True))
    return Change(
        step=step, parameters=pairs[0], zeros=pairs[1], bytes=pairs[2], simulated=modifier.simulated, says=says
    )


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}


def _size(model: nn.Module) -> tuple[int, int, int]:
    """Numbers, zeros among them, bytes; a tied weight counts once."""
    seen = {(value.data_ptr(), tuple(value.shape)): value for value in _tensors(model).values()}
    values = list(seen.values())
    zeros = sum(value.numel() - int(torch.count_nonzero(value)) for value in values)
    return sum(v.numel() for v in values), zeros, sum(v.numel() * v.element_size() for v in values)


def _fingerprint(model: nn.Module) -> str:
    """One text for models with equal modules, weights and settings of them."""
    digest = hashlib.blake2b(digest_size=16)
    for path, module in model.named_modules():
        digest.update(f"{path}:{type(module).__name__};".encode())
        if isinstance(module, Rebuilt):
            digest.update(json.dumps(module.structure(), sort_keys=True).encode())
    digest.update(type(getattr(model, EXECUTOR, None)).__name__.encode())
    for name, value in _tensors(model).items():
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _keep(folder: Path, recipe: Recipe, model: PreTrainedModel, changes: list[Change]) -> None:
    """The model after a step; whole or not at all, and only the newest."""
    draft, place = folder / f"step-{len(changes)}.part", folder / f"step-{len(changes)}"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(draft)
    state = {"recipe": json.loads(recipe.model_dump_json()), "changes": [asdict(one) for one in changes]}
    (draft / DONE).write_text(json.dumps(state), encoding="utf-8")
    os.replace(draft, place)
    for older in folder.glob("step-*"):
        if older != place:
            shutil.rmtree(older, ignore_errors=True)


def _held(folder: Path, recipe: Recipe) -> tuple[PreTrainedModel, list[Change]] | None:
    """The newest step that was finished, of this recipe."""
    finished = [one for one in folder.glob("step-*") if (one / DONE).exists() and one.suffix != ".part"]
    if not finished:
        return None
    newest = max(finished, key=lambda one: int(one.name.removeprefix("step-")))
    state: dict[str, Any] = json.loads((newest / DONE).read_text(encoding="utf-8"))
    if state["recipe"] != json.loads(recipe.model_dump_json()):
        raise FormwrightError(f"{folder} holds an unfinished run of another recipe: choose another folder.")
    changes = [
        Change(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}) for one in state["changes"]
    ]
    return load(newest), changes
