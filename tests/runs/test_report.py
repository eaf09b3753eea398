"""The report: made from a run's files alone, true to them, safe with hostile texts, usable in a browser."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest

from helpers import METHODS, QUERIES, edit_json, read_table, write_csv, write_run
from router.cli import main as cli
from router.pipeline.evidence import Evidence
from router.runs.load import load
from router.runs.report.data import layers, places_of
from router.runs.report.layout import layout
from router.runs.report.page import write_report

MINUS = "\N{MINUS SIGN}"
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>document.title = 'owned'</script>",
    "<!-- <script> \u2028 line \u2029 paragraph",
    "\"quotes\" & 'quotes' <b onmouseover=alert(1)>bold</b> {{ 7 * 7 }} {% raw %} ${1}",
    "مرحبا \u202eabc 🙂👩‍👩‍👧 \x00\x1b NUL",
]
ADAPTERS = ["one", "two", "<img src=x onerror=alert(1)>", "four", "five/six"]
EVIDENCE = "run.evidence.safetensors"
MODULES = [f"model.layers.{n}.{kind}" for n in range(3) for kind in ("self_attn.q_proj", "mlp.down_proj")]


def evidence_of(n, rng, threshold):
    """Every query is one adapter's, or in every fifth case nobody's."""
    scores = rng.normal(size=(n, len(ADAPTERS)))
    own = rng.integers(len(ADAPTERS), size=n)
    scores[np.arange(n), own] += np.where(np.arange(n) % 5 == 4, 0, 4)
    votes = rng.normal(2, 1, size=(n, len(MODULES)))
    votes[:, 1] = np.nan
    responses = rng.uniform(0.03, 0.1, size=scores.shape)
    return Evidence(
        ADAPTERS, MODULES, responses=responses, scores=scores, base_score=np.full(n, threshold),
        residual=scores.max(1), votes=votes, frame=np.zeros(n), later=np.zeros(n),
    )  # fmt: skip


def close(candidates):
    """Queries whose two best candidates are less than half a standard deviation apart."""
    return np.array([np.subtract(*sorted(row)[:-3:-1]) < 0.5 for row in candidates])


def synthetic(folder, texts, threshold=2.5):
    """A finished run's files, with a variant for each top candidate; returns the output folder."""
    rng, n = np.random.default_rng(0), len(texts)
    evidence = evidence_of(n, rng, threshold)
    weights = np.exp((evidence.candidates - evidence.candidates.max(1, keepdims=True)) / 0.5)
    weights = (weights / weights.sum(1, keepdims=True)).round(6)
    _, labels = np.unique(weights.argmax(1), return_inverse=True)
    means = [weights[labels == k].mean(0).tolist() for k in range(labels.max() + 1)]
    variants = [
        {"queries": int((labels == k).sum()), "weights": dict(zip([*ADAPTERS, "base"], row, strict=True))}
        for k, row in enumerate(means)
    ]
    out = write_run(
        folder / "run", weights.tolist(), inputs=texts, names=ADAPTERS, labels=labels, variants=variants,
        seconds={"load": 1.5, "probe": 62.0}, peak_mib={"load": 900, "probe": 2048},
    )  # fmt: skip
    write_csv(out / "run.csv", ("id", "prediction"), [(f"q{k}", text[::-1]) for k, text in enumerate(texts)])
    evidence.save(out / EVIDENCE)
    return out


def sentences(n):
    return [f"Please sort {k % 97} and {k % 89} for me, case {k}." for k in range(n)]


class Page(HTMLParser):
    """Elements, text outside of scripts, and the data block of a page, as a browser takes them apart."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], [], [], None
        self.html = path.read_text("utf-8")
        self.feed(self.html)
        self.close()
        self.data = json.loads(self.scripts[0])
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text.append(data)


@pytest.fixture()
def small(tmp_path):
    return synthetic(tmp_path, HOSTILE)


def evidence_with(out, **more):
    """Changes the evidence."""
    replace(Evidence.load(out / EVIDENCE), **more).save(out / EVIDENCE)


# The files


@pytest.mark.parametrize("method", METHODS)
def test_a_real_run_has_its_report(runs, capsys, method):
    out = runs(method)
    assert cli(["report", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    page = Page(out / "report.html")
    assert page.data["texts"] == [*(row[1] for row in QUERIES), "1 + 1 ="]
    assert page.data["file"] == [0, 0, 0, 1]
    first, choice, *_ = (row["prediction"] for row in read_table(out / "queries.csv"))
    assert page.data["predictions"][:2] == [first, f"{choice}: {['stone', 'pear'][int(choice)]}"]
    sections = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    fit = {"fit", "layers"} if method == "proto_route" else set()
    assert sections == {"queries", "variants", "cost", "settings"} | fit
    assert ("candidates" in page.data) == (method in ("proto_route", "oracle"))
    assert ("lowMargin" in page.data) == (method == "proto_route")


def test_a_large_library_is_reported_by_its_shortlists(command, capsys, monkeypatch):
    for name, value in {"LARGE": 2, "LANDMARKS": 3, "SHORT": 2}.items():
        monkeypatch.setattr(f"router.routing.large.{name}", value)
    code, out = command("proto_route")
    assert code == 0
    page = Page(out / "report.html")
    assert all(len(rows) == 3 for rows in page.data["candidates"])
    assert len(page.data["places"]) == 6 and len(page.data["prototypes"]) == 4
    assert cli(["explain", str(out), page.data["ids"][0]]) == 0


def test_what_a_run_lacks_is_left_out(small, tmp_path):
    (tmp_path / "run.csv").unlink()
    page = Page(write_report(small))
    assert page.data["texts"] == [None] * 5 and page.data["ids"] == [f"q{k}" for k in range(5)]
    edit_json(small / "run.json", base=None, adapters=None, n_variants=None, low_margin=None, variants=None)
    page = Page(write_report(small))
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["queries", "cost", "settings"]
    assert page.data["predictions"] == [text[::-1] for text in HOSTILE]


def test_the_numbers_are_those_of_the_files(tmp_path):
    out = synthetic(tmp_path, sentences(120))
    run, page = load(out), Page(write_report(out))
    evidence = Evidence.load(out / EVIDENCE)
    low = np.flatnonzero(close(run.evidence.candidates))
    assert page.data["lowMargin"] == low.tolist() and len(low)
    base = (evidence.scores.max(1) <= 2.5).sum()
    assert f"{len(low)} queries" in page.words and f"{base} queries were left" in page.words
    for q, rows in enumerate(page.data["candidates"]):
        assert sorted(row[0] for row in rows) == list(range(len(ADAPTERS) + 1))
        assert rows[0][0] == run.weights[q].argmax()
        for k, *numbers in rows:
            base = k == len(ADAPTERS)
            of_files = (2.5, 0) if base else (evidence.scores[q, k], evidence.responses[q, k])
            assert numbers == pytest.approx([run.weights[q, k], *of_files], abs=6e-5)
    assert page.data["falsePositiveRate"] == 0.1
    record = json.loads((out / "run.json").read_text())
    own = np.array([list(variant["weights"].values()) for variant in record["variants"]])
    cohesion = 1 - np.abs(run.mixes - own[run.labels]).sum(1).mean() / 2
    assert f"cohesion {cohesion:.2f}" in page.words
    before = page.html
    assert write_report(out).read_text("utf-8") == before


def test_the_table_counts_who_would_be_sent_at_other_rates(tmp_path):
    out = synthetic(tmp_path, sentences(30))
    plain = Evidence.load(out / EVIDENCE)
    assert "Does any adapter fit" not in Page(write_report(out)).words  # a run that kept no thresholds
    thresholds = {"0.01": 1.5, "0.1": 0.0, "0.5": -9.0}
    evidence_with(out, thresholds=[thresholds])
    words = Page(write_report(out)).words
    table = words[words.index("queries sent to an adapter") :]
    rare, now, common = ((plain.scores.max(1) > plain.base_score + add).sum() for add in thresholds.values())
    assert rare < now < common == 30
    assert f"0.01 {rare} 0.1 this run {now} 0.5 {common}" in " ".join(table.split())


def test_layers_are_means_of_the_votes(tmp_path):
    run = load(synthetic(tmp_path, sentences(30)))
    votes, best = run.evidence.votes, run.evidence.scores.argmax(1)
    found = layers(run)
    assert found["kinds"] == ["self_attn.q_proj", "mlp.down_proj"] and found["numbers"] == [0, 1, 2]
    groups = {group["name"]: group for group in found["groups"]}
    for name, mine in [("all queries", best >= 0), ("two", best == 1)]:
        cells = groups[name]["cells"]
        assert groups[name]["queries"] == mine.sum()
        assert cells[0][2] == pytest.approx(votes[mine, 4].mean(), abs=0.006)
        assert cells[1][0] is None  # nowhere measured
        assert cells[2][1] == pytest.approx(votes[mine, 2:4].mean(), abs=0.006)
        assert cells[0][3] == pytest.approx(votes[mine, ::2].mean(), abs=0.006)


@pytest.mark.parametrize(
    ("modules", "kinds", "layers"),
    [
        (["model.layers.3.attn.q", "model.layers.11.mlp.up"], ["attn.q", "mlp.up"], [3, 11]),
        (["h.2.experts.7.w1", "h.2.experts.8.w1", "head"], ["h.experts.w1"] * 2 + ["head"], [2, 2, -1]),
        (["encoder.block.0.wi", "decoder.block.1.wi"], ["encoder.block.wi", "decoder.block.wi"], [0, 1]),
        (["0", "", "conv2d.proj3", f"a.{10**30}"], ["", "", "conv2d.proj3", "a"], [0, -1, -1, -1]),
    ],
)
def test_names_of_modules_of_any_shape(small, modules, kinds, layers):
    assert places_of(modules) == (kinds, layers)
    evidence_with(small, modules=[*modules, *(f"blocks.{n}" for n in range(len(MODULES) - len(modules)))])
    assert len(Page(write_report(small)).data["layers"]) > 1


def test_evidence_of_some_queries_alone_is_not_shown(runs, tmp_path):
    out = shutil.copytree(runs("proto_route"), tmp_path / "out")
    edit_json(out / "run.json", files=None)
    (out / "more.evidence.safetensors").unlink()
    assert "lowMargin" not in Page(write_report(out)).data


def test_adapters_that_stand_aside_are_named(small):
    scores = load(small).evidence.scores
    scores[:, 3] = np.nan
    evidence_with(small, scores=scores, duplicates={"four": "two"})
    homes = {"one": "the chat template", "three": "Alpaca's frame", "two": "the chat template"}
    more = {"lookalikes": {"one": "five/six"}, "silent": ["three"], "peak_gpu_mib": {"probe": 3579}}
    edit_json(small / "run.json", homes=homes, **more)
    page = Page(write_report(small))
    for said in ("four .*two", "one reads what five/six", "three reads", "2,048 3,579"):
        assert re.search(said, page.words)
    for home, names in (("the chat template", "one , two"), ("Alpaca's frame", "three")):
        assert re.search(f"{home}[^:]*: {names} ", page.words)
    assert all(row[0] != 3 for rows in page.data["candidates"] for row in rows)
    assert 3 not in [axis for axis, *_ in page.data["prototypes"]]


def test_hostile_text_stays_text_and_nothing_is_fetched(small):
    page = Page(write_report(small))
    assert "{{" not in page.scripts[1] and "{%" not in page.scripts[1]  # jinja leaves the page's script alone
    assert page.data["texts"] == HOSTILE and page.data["predictions"] == [text[::-1] for text in HOSTILE]
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    assert not {"b", "img", "iframe"} & {tag for tag, _ in page.tags}
    names = [name for _, attrs in page.tags for name in attrs]
    assert not any(name.startswith("on") or name in ("src", "srcset", "data", "action") for name in names)
    assert "\u2028" not in page.scripts[0] and "<" not in page.scripts[0]
    assert HOSTILE[0] in page.words  # as a typical query of its variant
    assert all(attrs["href"].startswith("#") for _, attrs in page.tags if "href" in attrs)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", page.html)
    (policy,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy


def test_of_many_queries_a_sample_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr("router.runs.report.page.SHOWN_QUERIES", 100)  # 2,000 take long
    out = synthetic(tmp_path, [f"{k}: {text}" * 60 for k, text in enumerate(sentences(3_000))])
    page = Page(write_report(out))
    assert max(map(len, page.data["texts"])) == 1_000 and "Texts are cut after 1,000 characters" in page.words
    variants = {row["id"]: int(row["variant"]) for row in read_table(out / "run.routing.csv")}
    shown = dict(zip(page.data["ids"], page.data["variants"], strict=True))
    assert len(shown) == 100 and shown.items() <= variants.items()
    assert set(shown.values()) == set(variants.values())
    pairs = zip(page.data["ids"], page.data["texts"], strict=True)
    assert all(text.startswith(own[1:] + ":") for own, text in pairs)
    assert "Here are 100 of the 3,000 queries" in page.words
    low = sum(close(load(out).evidence.candidates))
    assert f"{low:,} queries have a low margin" in page.words  # of all


def test_layouts_of_any_size():
    rng = np.random.default_rng(0)
    sizes = [rng.normal(size=size).clip(0) for size in ((1, 1), (1, 6), (5, 3), (9, 1))]
    for points in (*sizes, many := np.repeat(np.eye(4), 25, axis=0)):
        queries, prototypes = layout(points)
        assert queries.shape == (len(points), 2) and prototypes.shape == (points.shape[1], 2)
        both = np.vstack([queries, prototypes])
        assert np.isfinite(both).all() and both.min() >= 0 and both.max() <= 1
    apart = np.linalg.norm(queries[:, None] - queries[None], axis=2) + np.eye(len(many))
    assert apart.min() > 0.005  # those of one mix do not hide each other


# In a browser


@pytest.fixture()
def visit(browser):
    """Opens a report; afterwards nothing must have gone wrong in it, and nothing been asked of elsewhere."""
    wrong, contexts = [], []

    def go(path, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url != path.as_uri() and wrong.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#rows tr")
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The report of 125 queries, the hostile ones among them."""
    return write_report(synthetic(tmp_path_factory.mktemp("page"), [*HOSTILE, *sentences(120)]))


def ids(page):
    return page.locator("#rows .opener").all_inner_texts()


def test_the_lowest_top_weights_come_first_and_columns_sort(visit, path):
    page, data = visit(path), Page(path).data
    top = {name: rows[0][1] for name, rows in zip(data["ids"], data["candidates"], strict=True)}
    found = ids(page)
    assert len(found) == 50 and [top[name] for name in found] == sorted(top.values())[:50]
    for _ in range(2):
        page.click("#table th[data-key=weight] button")
    assert page.get_attribute("#table th[data-key=weight]", "aria-sort") == "ascending"
    page.click("#table th[data-key=weight] button")
    assert top[ids(page)[0]] == max(top.values())
    page.click("#table th[data-key=id] button")
    assert ids(page)[:3] == ["q0", "q1", "q2"]  # as numbers, so that q2 stands before q10
    for _ in range(2):
        page.click(".pager >> nth=0 >> button >> nth=1")
    assert ids(page)[-1] == "q124"
    assert page.inner_text(".pager >> nth=1 >> .range") == "101\N{EN DASH}125 of 125"


def test_filters_apply_to_table_and_map(visit, path):
    page, data = visit(path), Page(path).data
    page.select_option("#by-candidate", "1")
    mine = {name for name, rows in zip(data["ids"], data["candidates"], strict=True) if rows[0][0] == 1}
    assert set(ids(page)) == mine and 0 < len(mine) < 50
    assert page.inner_text("#count") == f"{len(mine)} of 125 queries"
    assert page.locator("#map path.off").count() > 0
    page.click("#show-all")
    assert page.inner_text("#count") == "125 queries" and page.locator("#map path.off").count() == 0
    page.fill("#by-text", "CASE 117.")
    page.locator("#count", has_text="1 of 125 queries").wait_for()
    assert ids(page) == ["q122"]
    page.click("#show-all")
    page.check("#by-margin")
    assert page.locator("#rows .badge").all_inner_texts() == ["low margin"] * len(data["lowMargin"])
    page.click("#show-all")
    page.fill("#by-text", "nothing is like this")
    page.wait_for_selector("#rows .nothing")
    page.click("[data-variant='1']")
    assert page.input_value("#by-variant") == "1"
    page.select_option("#layers-group", "1")
    found = page.locator("#layers-table td").all_inner_texts()
    flat = [value for row in data["layers"][1]["cells"] for value in row]
    expected = ["" if value is None else page.evaluate("v => v.toFixed(1)", value) for value in flat]
    assert found == [value.replace("-", MINUS) for value in expected]


def test_everything_is_reached_by_pointer_and_keyboard(visit, path):
    page, data = visit(path), Page(path).data
    page.focus("#map")
    page.keyboard.press("Home")
    first = page.inner_text("#shown h4 bdi >> nth=0")
    page.keyboard.press("PageDown")
    assert page.inner_text("#shown h4 bdi >> nth=0") == ids(page)[1] != first == ids(page)[0]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    unnamed = """[...document.querySelectorAll('button,select,input,[tabindex]')].filter(
        (e) => !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).length"""
    assert page.evaluate(unnamed) == 0
    page = visit(path)
    page.locator("#map").scroll_into_view_if_needed()
    box = page.locator("#map").bounding_box()
    margin, q = 26, 60
    x, y = (
        box[edge] + margin + place * (box[side] - 2 * margin)
        for edge, side, place in zip("xy", ("width", "height"), data["places"][q], strict=True)
    )
    page.mouse.move(x, y)
    shown = page.inner_text("#shown")
    assert data["texts"][q] in shown and data["predictions"][q] in shown
    page.mouse.click(x, y)
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    assert data["texts"][q] in page.inner_text("#shown")  # a click keeps it
    page.click("#shown button")
    assert page.evaluate("document.activeElement.textContent") == data["ids"][q]


def test_a_row_says_why(visit, path):
    page, names = visit(path), [*ADAPTERS, "base model"]
    evidence = Evidence.load(path.parent / EVIDENCE)
    candidates, threshold = evidence.candidates, evidence.base_score[0]
    for to_base, low in product((True, False), repeat=2):
        wanted = ((candidates.argmax(1) == len(ADAPTERS)) == to_base) & (close(candidates) == low)
        q = np.flatnonzero(wanted)[-1]
        page.fill("#by-text", f"case {q - len(HOSTILE)}.")
        page.locator("#count", has_text="1 of 125 queries").wait_for()
        page.click(f"[data-toggle='{q}']")
        why = page.locator(f"#why-{q}")
        *_, second, best = order = candidates[q].argsort().tolist()
        sentence = why.locator("p:not(.whole):not(.note)").inner_text()
        assert names[second] in sentence and ("low margin" in sentence) == low
        assert to_base or names[best] in sentence
        margin = re.search(r"is ([\d.]+) behind", sentence)[1]
        assert float(margin) == pytest.approx(candidates[q, best] - candidates[q, second], abs=0.006)
        weights = np.exp((candidates[q] - candidates[q].max()) / 0.5)
        weights /= weights.sum()
        for line, k in zip(why.locator("tbody tr").all(), reversed(order), strict=True):
            row = line.locator("th, td").all_inner_texts()
            response = f"{evidence.responses[q, k]:.4f}" if k < len(ADAPTERS) else "\N{EN DASH}"
            assert row[:3] == [names[k], response, f"{candidates[q, k]:.2f}".replace("-", MINUS)]
            assert float(row[3].removesuffix(" %")) == pytest.approx(100 * weights[k], abs=0.6)
            assert (line.get_attribute("class") == "faint") == (candidates[q, k] < threshold)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_width_overflows_and_hostile_text_stays_text(visit, path, width, scheme):
    page = visit(path, width, scheme)
    page.click("#table th[data-key=id] button")
    page.click("#rows .opener >> nth=0")
    assert page.locator("#why-0 .whole").all_inner_texts() == [HOSTILE[0], HOSTILE[0][::-1]]
    assert page.title() == "by_hand: 125 queries" and page.locator("main img, main b").count() == 0
    assert page.evaluate("document.scripts.length") == 2
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    inner, outer = page.evaluate(wide)
    assert inner <= outer == width
    ink, paper = page.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (light[0] > light[1]) == (scheme == "dark") and abs(light[0] - light[1]) > 500
