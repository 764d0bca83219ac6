"""A recipe: which methods, in which order, with which options. Written as YAML, checked before anything runs.

steps:
  - prune: {score: magnitude, structure: neuron, amount: 0.3}
  - distill: {steps: 300}
  - padding-free: {precision: bfloat16}
seed: 0
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from formwright.build import Spec, build, format_spec, parse_spec
from formwright.compress.modifier import Modifier
from formwright.errors import FormwrightError


class Recipe(pydantic.BaseModel):
    """The steps of a compression, by name and options.

    Args:
        steps: each {"name": ..., option: value}; read from any form a part may be written in.
        seed: of what a step draws at random.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    steps: list[dict[str, Any]] = pydantic.Field(min_length=1)
    seed: int = 0

    @pydantic.field_validator("steps", mode="before")
    @classmethod
    def _steps(cls, given: Any) -> list[dict[str, Any]]:
        if not isinstance(given, list):
            raise ValueError("it must be a list of steps")
        return [_step(one) for one in given]

    def modifiers(self) -> list[Modifier]:
        """The methods, ready to run.

        Raises:
            FormwrightError: an unknown method or option, or an option out of its range.
        """
        return [build("modifier", step) for step in self.steps]

    def label(self) -> str:
        return " + ".join(format_spec(step) for step in self.steps)

    def to_yaml(self) -> str:
        steps = [_short(step) for step in self.steps]
        return yaml.safe_dump({"steps": steps, "seed": self.seed}, sort_keys=False)

    @staticmethod
    def read(source: "Recipe | str | Path | Spec | Sequence[Spec]") -> "Recipe":
        """A recipe from a YAML file, a list of steps, or one step.

        Raises:
            FormwrightError: no such file, no YAML, or no recipe in it; the message says which line or field.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Path) or (isinstance(source, str) and source.endswith((".yaml", ".yml"))):
            return _checked(_parsed(Path(source)), str(source))
        if isinstance(source, Mapping) and "steps" in source:
            return _checked(source, "The recipe")
        steps = [source] if isinstance(source, str | Mapping) else list(source)
        return _checked({"steps": steps}, "The recipe")


def _step(given: Any) -> dict[str, Any]:
    """`prune`, `prune(amount=0.3)`, {"name": "prune", "amount": 0.3} or {"prune": {"amount": 0.3}}."""
    if isinstance(given, Mapping) and "name" not in given:
        if len(given) != 1:
            raise ValueError(f"{dict(given)} is no step: write one method and its options")
        ((name, options),) = given.items()
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"the options of {name} must be a table, such as {{amount: 0.3}}")
        given = {"name": name, **(options or {})}
    try:
        return parse_spec(given)
    except FormwrightError as wrong:
        raise ValueError(str(wrong)) from wrong


def _short(step: Mapping[str, Any]) -> Any:
    options = {name: value for name, value in step.items() if name != "name"}
    return {step["name"]: options} if options else step["name"]


def _parsed(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as wrong:
        raise FormwrightError(f"There is no recipe {path}: give the path of a YAML file.") from wrong
    except (yaml.YAMLError, UnicodeDecodeError) as wrong:
        where = getattr(wrong, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise FormwrightError(f"{path}{line} is no YAML: write steps: and a list of methods under it.") from wrong


def _checked(values: Any, what: str) -> Recipe:
    if not isinstance(values, Mapping):
        raise FormwrightError(f"{what} holds no recipe: write steps: and a list of methods under it.")
    try:
        return Recipe(**values)
    except pydantic.ValidationError as wrong:
        first = wrong.errors()[0]
        where = ".".join(str(one) for one in first["loc"])
        says = first["msg"].removeprefix("Value error, ")
        raise FormwrightError(f"{what}: {where} cannot be read ({says}).") from wrong
