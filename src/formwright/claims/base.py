"""What a claim is, and how its seeds are run, kept and judged."""

import concurrent.futures
import hashlib
import importlib
import inspect
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import formwright
from formwright import catalog
from formwright.errors import FormwrightError

Scale = Literal["smoke", "full"]
Verdict = Literal["holds", "holds in direction", "does not hold here"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

FOLDER = Path(__file__).resolve().parent
LEAST_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one seed showed.

    Attributes:
        scale: "smoke" (seconds, says only that it runs) or "full".
        seed: of weights and order of data.
        measured: finite numbers by name, those of the claim.
        baseline: finite numbers by name, those it is compared with.
        seconds: wall time of the run, filled in by `reproduce`.
    """

    scale: Scale
    seed: int
    measured: Mapping[str, float | int]
    baseline: Mapping[str, float | int] = field(default_factory=dict)
    seconds: float | int = 0.0

    def __post_init__(self) -> None:
        for name, value in (*self.measured.items(), *self.baseline.items()):
            if not math.isfinite(value):
                raise FormwrightError(
                    f"Seed {self.seed} gave {name} = {value}; record a run that diverged as a number of its own, "
                    "diverged = 1, and let the rule say what it means."
                )
        for name in ("measured", "baseline"):
            object.__setattr__(self, name, {key: float(value) for key, value in getattr(self, name).items()})


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement and the rule that judges it.

    Attributes:
        shows: the numbers of an outcome that belong to it; none = all of them.
    """

    statement: str
    paper: Mapping[str, Any]
    rule: str
    verdict: Callable[[Sequence[Outcome]], Verdict]
    shows: tuple[str, ...] = ()

    def judge(self, outcomes: Sequence[Outcome]) -> Verdict:
        """The verdict; anything but the three words is an error of the claim."""
        verdict = self.verdict(outcomes)
        if verdict not in VERDICTS:
            raise FormwrightError(f"A verdict is one of {', '.join(VERDICTS)}, got {verdict!r}.")
        return verdict


@dataclass(frozen=True, kw_only=True)
class Study:
    """All claims of a system and the run that feeds them."""

    slug: str
    claims: tuple[Claim, ...]
    seeds: tuple[int, ...]
    run: Callable[[Scale, int], Outcome]
    code: str  # a hash of the claim file and of the system's own parts: outcomes of other code do not count


def available() -> tuple[str, ...]:
    """Slugs of the systems with a claim file, in alphabetical order."""
    files = (path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "base", "support"))
    return tuple(sorted(stem.replace("_", "-") for stem in files))


def load(name: str) -> Study:
    """The claims of the system called `name` (slug, number or the name of a part).

    Raises:
        FormwrightError: unknown system, no claim file yet, or a claim file that lacks something.
    """
    slug = name if name in available() else catalog.card(name).slug
    if slug not in available():
        known = ", ".join(available()) or "none yet"
        raise FormwrightError(
            f"{slug} has no claim to reproduce: its status is {catalog.card(slug).status}. Systems with one: {known}."
        )
    module = importlib.import_module(f"formwright.claims.{slug.replace('-', '_')}")
    return study(slug, module)


def study(slug: str, module: ModuleType) -> Study:
    """A claim module, checked.

    Raises:
        FormwrightError: something is missing, a statement or rule is empty, or there are fewer than three seeds.
    """
    single = () if hasattr(module, "CLAIMS") else ("STATEMENT", "PAPER", "RULE", "verdict")
    missing = [name for name in (*single, "SEEDS", "run") if not hasattr(module, name)]
    if missing:
        raise FormwrightError(f"The claim of {slug} does not define {', '.join(missing)}; see formwright.claims.")
    if single:
        only = Claim(statement=module.STATEMENT, paper=module.PAPER, rule=module.RULE, verdict=module.verdict)
    claims = (only,) if single else tuple(module.CLAIMS)
    if not claims or not all(claim.statement.strip() and claim.rule.strip() and claim.paper for claim in claims):
        raise FormwrightError(f"The claim of {slug} has an empty statement, rule or paper's figure.")
    seeds = tuple(module.SEEDS)
    if len(set(seeds)) < LEAST_SEEDS:
        raise FormwrightError(f"The claim of {slug} has the seeds {seeds}, but a verdict needs three different ones.")
    return Study(slug=slug, claims=claims, seeds=seeds, run=module.run, code=_code(slug, module))


def _code(slug: str, module: ModuleType) -> str:
    """A hash of the text of the claim file and of the modules its card provides."""
    paths = [Path(inspect.getfile(module))] if hasattr(module, "__file__") else []
    for system in catalog.cards():
        if system.slug == slug:
            parts = {Path(*part.module.split(".")[1:]).with_suffix(".py") for part in system.provides}
            paths += sorted(FOLDER.parent / part for part in parts)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:16]


def recorded(path: Path, of: Study, scale: Scale) -> dict[int, Outcome]:
    """Outcomes by seed that the file holds of this code and scale. A line cut short by a kill is no outcome."""
    found: dict[int, Outcome] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if (entry["slug"], entry["code"], entry["outcome"]["scale"]) == (of.slug, of.code, scale):
            found[entry["outcome"]["seed"]] = Outcome(**entry["outcome"])
    return {seed: found[seed] for seed in of.seeds if seed in found}


def _append(path: Path, of: Study, outcome: Outcome) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"slug": of.slug, "code": of.code, "outcome": asdict(outcome)})
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n" if torn else f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


class SeedFailed(RuntimeError):
    """A seed ended in an error; the other seeds' outcomes are kept."""


def reproduce(
    of: Study, scale: Scale, *, runs: Path, workers: int | None = None
) -> Generator[tuple[Outcome, Literal["ran", "kept"]], None, None]:
    """Outcomes as they come: those kept from an earlier call first, then one process of one thread for each seed.

    Args:
        runs: folder of `<slug>.jsonl`, to which every finished seed is appended.
        workers: processes at a time; none = as many as cores and seeds allow.

    Raises:
        FormwrightError: bad input, such as data that is not there.
        SeedFailed: after all seeds, if one of them ended in another error.
    """
    if workers is not None and workers < 1:
        raise FormwrightError(f"workers is {workers}, but at least one process must do the work.")
    path = runs / f"{of.slug}.jsonl"
    kept = recorded(path, of, scale)
    for outcome in kept.values():
        yield outcome, "kept"
    left = [seed for seed in of.seeds if seed not in kept]
    if not left:
        return
    failures: list[tuple[int, BaseException]] = []
    pool = concurrent.futures.ProcessPoolExecutor(
        max_workers=min(workers or os.cpu_count() or 1, len(left)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        waiting = {pool.submit(_run, of.run, scale, seed): seed for seed in left}
        for done in concurrent.futures.as_completed(waiting):
            try:
                outcome = done.result()
            except Exception as error:  # raised once the other seeds are safe on disk
                failures.append((waiting[done], error))
                continue
            _append(path, of, outcome)
            yield outcome, "ran"
    except BaseException:  # an interrupt, or the caller has gone: nobody waits for what is being computed
        for process in list(pool._processes.values()):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        seed, error = failures[0]
        if isinstance(error, FormwrightError):
            raise error
        raise SeedFailed(f"{of.slug}, seed {seed}: {type(error).__name__}: {error}") from error


def _start_worker() -> None:
    """One thread, and no life after the parent's: a killed `reproduce` leaves nothing running. An interrupt at the
    keyboard is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            multiprocessing.connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _run(run: Callable[[Scale, int], Outcome], scale: Scale, seed: int) -> Outcome:
    started = time.perf_counter()
    outcome = run(scale, seed)
    return replace(outcome, seconds=round(time.perf_counter() - started, 6))


def evidence(of: Study, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What evidence/<slug>.json holds: the numbers by seed and the verdicts they give.

    Raises:
        FormwrightError: a seed is missing or the scales differ.
    """
    from formwright.bench.records import environment

    by_seed = {outcome.seed: outcome for outcome in outcomes}
    scales = {outcome.scale for outcome in outcomes}
    if set(by_seed) != set(of.seeds) or len(scales) != 1:
        raise FormwrightError(
            f"{of.slug} is judged from the seeds {of.seeds} at one scale, got {sorted(by_seed)} at {sorted(scales)}."
        )
    ordered = [by_seed[seed] for seed in of.seeds]
    return {
        "slug": of.slug,
        "claims": [
            {
                "statement": claim.statement,
                "paper": dict(claim.paper),
                "measured": _summary([outcome.measured for outcome in ordered], claim.shows),
                "baseline": _summary([outcome.baseline for outcome in ordered], claim.shows),
                "rule": claim.rule,
                "verdict": claim.judge(ordered),
                "seeds": list(of.seeds),
                "scale": ordered[0].scale,
            }
            for claim in of.claims
        ],
        "seconds": round(sum(outcome.seconds for outcome in ordered), 1),
        "environment": environment(),
        "version": formwright.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _summary(rows: Sequence[Mapping[str, float | int]], shows: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation over seeds and the values in the order of the seeds."""
    names = [name for name in rows[0] if not shows or name in shows]
    columns = {name: [row[name] for row in rows] for name in names}
    return {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values), "values": values}
        for name, values in columns.items()
    }
