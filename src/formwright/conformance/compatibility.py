"""Which parts combine, found by building and running a tiny Transformer of each pair.

    python -m formwright.conformance.compatibility          writes docs/generated/compatibility.md
    python -m formwright.conformance.compatibility --check  exits with 1 when the file is stale

The text depends on the code alone: no date, no timing, no number.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from formwright import catalog
from formwright.catalog.evidence import checkout, defined
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerModel

PAGE = Path("docs/generated/compatibility.md")
TOLERANCE = 1e-4
LENGTH, REAL = 7, (4, 7)

HEAD = """Every cell is a Transformer of one layer that was built and run;
`python -m formwright.conformance.compatibility` writes this.

| Letter | What was run |
|---|---|
| B | an encoder: every token sees all others |
| C | a decoder: no token sees later ones |
| P | the same with left padding, each row equal to the row alone |
| D | step-by-step decoding with a cache, equal to the full forward |

A dot stands for what is refused; the sentences under a table are the refusals. Of several names for one part the first
stands here.
"""


class Differs(Exception):
    """A combination runs, but gives another result than it must."""


def names(*slots: str) -> list[str]:
    """The built parts of some slots by name; of several names for one part the first in the alphabet."""
    parts = [part for part in catalog.provided() if part.slot in slots and defined(part.module, part.attribute)]
    by_target: dict[str, list[str]] = {}
    for part in parts:
        by_target.setdefault(part.target, []).append(part.name)
    return sorted(min(called) for called in by_target.values())


def model(architecture: str, parts: Mapping[str, str]) -> TransformerModel:
    """A Transformer of one layer with some parts chosen and the others plain (no position)."""
    config = TransformerConfig(
        architecture=architecture,
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
        **{"position": "none", **parts},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TransformerModel(config).eval()


def _ids() -> Tensor:
    return torch.randint(0, 11, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def _equal(a: Tensor, b: Tensor, what: str) -> None:
    away = ((a - b).abs().max() / b.abs().max()).item()
    if not away <= TOLERANCE:
        raise Differs(f"{what} differs by {away:.0e} of the largest value.")


def plain(chosen: TransformerModel) -> None:
    """It runs, and what it gives is finite."""
    if not torch.isfinite(chosen(input_ids=_ids(), use_cache=False).last_hidden_state).all():
        raise Differs("The output is not finite.")


def padded(chosen: TransformerModel) -> None:
    """Rows padded on the left equal the rows alone."""
    ids = _ids()
    mask = (torch.arange(LENGTH) >= LENGTH - torch.tensor(REAL)[:, None]).long()
    y = chosen(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    for row, real in enumerate(mask.bool()):
        alone = chosen(input_ids=ids[row : row + 1, real], use_cache=False).last_hidden_state
        _equal(y[row : row + 1, real], alone, "A padded row")


def decoded(chosen: TransformerModel) -> None:
    """A prefill and single steps equal the full forward."""
    ids, cache, outputs = _ids(), chosen.new_cache(), []
    for piece in (ids[:, :4], ids[:, 4:5], ids[:, 5:6], ids[:, 6:]):
        outputs.append(chosen(input_ids=piece, past_key_values=cache, use_cache=True).last_hidden_state)
    full = chosen(input_ids=ids, use_cache=False).last_hidden_state
    _equal(torch.cat(outputs, dim=1), full, "Decoding with the cache")


RUNS: tuple[tuple[str, str, Callable[[TransformerModel], None]], ...] = (
    ("B", "encoder", plain),
    ("P", "encoder", padded),
    ("C", "decoder", plain),
    ("P", "decoder", padded),
    ("D", "decoder", decoded),
)


def cell(parts: Mapping[str, str], reasons: list[str]) -> str:
    """The letters of one pair; new refusals are added to the reasons."""
    letters: list[str] = []
    for letter, architecture, run in RUNS:
        refusal = _refusal(architecture, parts, run)
        letters.append("." if refusal is not None else letter)
        if refusal is not None and refusal not in reasons:
            reasons.append(refusal)
    encoder, decoder = "".join(letters[:2]), "".join(letters[2:])
    return f"`{encoder} {decoder}`"


def _refusal(architecture: str, parts: Mapping[str, str], run: Callable[[TransformerModel], None]) -> str | None:
    try:
        with torch.no_grad():
            built = model(architecture, parts)
            _present(built, parts)
            run(built)
    except FormwrightError as refused:  # UnsupportedContext, or a size the pair cannot have
        return re.sub(r"'[^']*'", "'..'", str(refused))
    except Differs as wrong:
        raise AssertionError(f"{dict(parts)} as {architecture}: {wrong}") from wrong
    return None


def _present(built: TransformerModel, parts: Mapping[str, str]) -> None:
    """No chosen part may be left out in silence."""
    classes = {type(module) for module in built.modules()}
    for slot, name in parts.items():
        if name == "none":
            continue
        slots = ("attention", "mixer") if slot == "mixer" else (slot,)
        targets = {p.target for p in catalog.provided() if p.slot in slots and p.name == name}
        if not any(catalog.resolve(target) in classes for target in targets):
            raise Differs(f"{slot} {name} was dropped in silence.")


def table(title: str, slot: str, columns: list[str], rows: list[str]) -> str:
    """Mixers down, the parts of another slot across, and the refusals underneath."""
    reasons: list[str] = []
    lines = [f"## {title}", "", f"| mixer | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for mixer in rows:
        cells = [cell({"mixer": mixer, slot: column}, reasons) for column in columns]
        lines.append(f"| {mixer} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {reason}" for reason in reasons), ""])


def page() -> str:
    """The whole page."""
    mixers = names("attention", "mixer")
    return "\n".join(
        [
            HEAD,
            table("Mixers and positions", "position", ["none", *names("position")], mixers),
            table("Mixers and blocks", "block", names("block"), mixers),
            table("Mixers and feed-forward layers", "feedforward", names("feedforward"), mixers),
            table("Mixers and norms", "norm", names("norm"), mixers),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the file is as it would be written")
    check = parser.parse_args(arguments).check
    path = (checkout() or Path.cwd()) / PAGE
    text = page()
    if check:
        fresh = path.is_file() and path.read_text(encoding="utf-8") == text
        print(f"{PAGE} is {'up to date' if fresh else 'stale: run python -m formwright.conformance.compatibility'}.")
        return 0 if fresh else 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{PAGE} written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
