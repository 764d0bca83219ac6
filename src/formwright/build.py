"""From a name and options to a part: `build("position", "alibi(max_bias=4)", heads=8)`.

A spec is a name, a name with options in brackets, or {"name": ..., option: value}. What the model knows (its
dimensions: dim, heads, kv_heads, head_dim, hidden, length, layers, layer, causal, grid ...) is handed to the
constructors that ask for it; the rest of their keywords are the user's options, checked against the signature's types.
"""

import ast
import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from formwright import catalog
from formwright.errors import FormwrightError

Spec = str | Mapping[str, Any]

SPEC = re.compile(r"\s*(?P<name>[\w./-]+)\s*(?:\((?P<options>.*)\))?\s*", re.DOTALL)


def split_list(text: str, at: str = ",") -> list[str]:
    """Split at the commas (or another character) outside brackets: "a,b(x=1,y=2)" -> ["a", "b(x=1,y=2)"]."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == at and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in [*parts, text[start:].strip()] if part]


def parse_spec(spec: Spec) -> dict[str, Any]:
    """Any form of a spec as {"name": ..., option: value}.

    Raises:
        FormwrightError: the text is neither `name` nor `name(option=value, ...)`.
    """
    if isinstance(spec, Mapping):
        if not isinstance(spec.get("name"), str):
            raise FormwrightError(f'A part given as a table needs its "name"; got {dict(spec)}.')
        return dict(spec)
    match = SPEC.fullmatch(spec) if isinstance(spec, str) else None
    if match is None:
        raise FormwrightError(f"{spec!r} is no part: write name or name(option=value, other=value).")
    options: dict[str, Any] = {"name": match["name"]}
    for item in split_list(match["options"] or ""):
        key, equals, text = item.partition("=")
        if not equals:
            raise FormwrightError(f"{item!r} in {spec!r} is no option: write option=value.")
        if key.strip() in options:
            raise FormwrightError(f"{spec!r} sets {key.strip()} twice; leave one out.")
        options[key.strip()] = _value(text.strip())
    return options


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def format_spec(spec: Spec) -> str:
    """The shortest text that parses back to the spec."""
    options = parse_spec(spec)
    name = options.pop("name")
    return name if not options else f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"


def build(slot: str, spec: Spec, **dimensions: Any) -> Any:
    """Construct the part `spec` of a slot.

    Args:
        slot: position, attention, mixer, feedforward, norm, block, embedding ...
        spec: name and options, see the module.
        dimensions: what the surrounding model knows; only keywords the constructor names are handed on.

    Raises:
        FormwrightError: unknown part, unknown or ill-typed option, or a dimension the part needs and nobody gave.
    """
    options = parse_spec(spec)
    name = options.pop("name")
    return construct(f"{slot} {name}", catalog.resolve(catalog.find(slot, name).target), options, dimensions)


def construct(what: str, target: Any, options: dict[str, Any], dimensions: Mapping[str, Any]) -> Any:
    """Call `target` with the dimensions it asks for and the user's options, checked against its signature.

    Args:
        what: kind and name, for the errors: "position alibi".

    Raises:
        FormwrightError: unknown or ill-typed option, or a keyword that neither side gave.
    """
    parameters = inspect.signature(target).parameters
    valid = [key for key in parameters if key not in dimensions]
    for key in options:
        if key not in parameters:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            known = f"its options are {', '.join(valid)}" if valid else "it has no options"
            raise FormwrightError(f"{what} has no option {key!r}; {known}.{hint}")
    given = {key: value for key, value in dimensions.items() if key in parameters and key not in options}
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in given and key not in options]
    if missing:
        raise FormwrightError(f"{what} needs {', '.join(missing)}: write {what.split()[-1]}({missing[0]}=...).")
    return target(**given, **_checked(what, parameters, options))


def _checked(part: str, parameters: Mapping[str, inspect.Parameter], options: dict[str, Any]) -> dict[str, Any]:
    """The options, converted to the types of the signature."""
    if not options:
        return {}
    import pydantic

    fields: dict[str, Any] = {key: (parameters[key].annotation, ...) for key in options}
    model = pydantic.create_model("Options", __config__=pydantic.ConfigDict(arbitrary_types_allowed=True), **fields)
    try:
        checked = model(**options)
    except pydantic.ValidationError as wrong:
        first = wrong.errors()[0]
        key = str(first["loc"][0])
        raise FormwrightError(
            f"{part}: {key} is {options[key]!r}, but it {_wish(first['msg'], parameters[key])}."
        ) from wrong
    return {key: getattr(checked, key) for key in options}


def _wish(message: str, parameter: inspect.Parameter) -> str:
    reason = message[0].lower() + message[1:]
    default = "" if parameter.default is parameter.empty else f" (default {parameter.default!r})"
    return f"must be {inspect.formatannotation(parameter.annotation)}{default}: {reason}"
