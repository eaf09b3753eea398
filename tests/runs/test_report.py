"""The report: made from a run's files alone, true to them, safe with hostile texts, usable in a browser."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from helpers import METHODS, ROOT, ROWS, read_table, write_csv
from router.pipeline.evidence import Evidence
from router.runs import explain
from router.runs.load import load
from router.runs.report.data import LIMITS, layers, place_of
from router.runs.report.layout import layout
from router.runs.report.page import main, write_report
from router.system.errors import InputError

MINUS = "\N{MINUS SIGN}"
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>document.title = 'owned'</script>",
    "<!-- <script> \u2028 line \u2029 paragraph",
    "\"quotes\" & 'quotes' <b onmouseover=alert(1)>bold</b> {{ 7 * 7 }} {% raw %} ${1}",
    "مرحبا \u202eabc 🙂👩‍👩‍👧 \x00\x1b NUL",
]
ADAPTERS = ["one", "two", "<img src=x onerror=alert(1)>", "four", "five/six"]
MODULES = [f"model.layers.{n}.{kind}" for n in range(3) for kind in ("self_attn.q_proj", "mlp.down_proj")]


def evidence_of(n, rng, threshold):
    """Every query is one adapter's, or in every fifth case nobody's."""
    scores = rng.normal(size=(n, len(ADAPTERS)))
    own = rng.integers(len(ADAPTERS), size=n)
    scores[np.arange(n), own] += np.where(np.arange(n) % 5 == 4, 0, 4)
    votes = rng.normal(2, 1, size=(n, len(MODULES)))
    votes[:, 1] = np.nan
    responses = rng.uniform(0.03, 0.1, size=scores.shape)
    frame = np.zeros(n)
    return Evidence(
        ADAPTERS, MODULES, responses=responses, scores=scores, base_score=np.full(n, threshold),
        residual=scores.max(1), votes=votes, frame=frame,
    )  # fmt: skip


def close(candidates):
    """Queries whose two best candidates are less than half a standard deviation apart."""
    return np.array([np.subtract(*sorted(row)[:-3:-1]) < 0.5 for row in candidates])


def synthetic(folder, texts, files=("queries.csv",), keep_queries=True, threshold=2.5):
    """A finished run's files, written without the code under test; returns the output folder."""
    out = folder / "out"
    out.mkdir(parents=True)
    rng, names, n = np.random.default_rng(0), [*ADAPTERS, "base"], len(texts)
    evidence = evidence_of(n, rng, threshold)
    weights = np.exp((evidence.candidates - evidence.candidates.max(1, keepdims=True)) / 0.5)
    weights /= weights.sum(1, keepdims=True)
    _, labels = np.unique(weights.argmax(1), return_inverse=True)
    variants = np.stack([weights[labels == k].mean(0) for k in range(labels.max() + 1)])
    for number, name in enumerate(files):
        part = slice(n * number // len(files), n * (number + 1) // len(files))
        ids, stem = range(part.start, part.stop), name.removesuffix(".csv")
        if keep_queries:
            header = ("id", "input", "eval_type", "answer_choices")
            write_csv(folder / name, header, [(f"q{k}", texts[k], "generation", "") for k in ids])
        write_csv(
            out / name, ("id", "prediction", "dummy_field"), [(f"q{k}", texts[k][::-1], 0) for k in ids]
        )
        rows = [(f"q{k}", labels[k], *(f"{value:.6g}" for value in weights[k])) for k in ids]
        write_csv(out / f"{stem}.routing.csv", ("id", "variant", *names), rows)
        evidence.rows(part).save(out / f"{stem}.evidence.safetensors")
    record = {
        "method": "proto_route",
        "versions": {"python": "3.11.7", "torch": "2.6.0"},
        "flags": {
            "dataset_filepaths": [str(folder / name) for name in files],
            "output_folder": str(out),
            "temperature": 0.5,
            "false_positive_rate": 0.1,
        },
        "seconds": {"load": 1.5, "probe": 62.0},
        "peak_mib": {"load": 900, "probe": 2048},
        "base": {
            "name": "some/base", "revision": None, "sha256": "ab" * 32, "dtype": "float32", "device": "cpu",
        },
        "adapters": {name: {"revision": None, "sha256": "cd" * 32} for name in ADAPTERS},
        "n_variants": len(variants),
        "low_margin": int(close(evidence.candidates).sum()),
        "variants": [
            {"folder": f"variants/{k}", "queries": int((labels == k).sum()),
             "weights": dict(zip(names, map(float, row), strict=True))}
            for k, row in enumerate(variants)
        ],
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(record))
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


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """10,000 queries with long texts of several bytes a character; the map is fitted to 300 of them."""
    texts = [f"{k}: " + "длинный текст <b>& ещё</b> " * 60 for k in range(10_000)]
    out = synthetic(tmp_path_factory.mktemp("large"), texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.runs.report.layout.MAPPED", 300)  # 2,000 take the time of all other tests here
        return write_report(out)


# The files


@pytest.mark.parametrize("method", METHODS)
def test_a_real_run_has_its_report(command, capsys, method):
    _, out = command(method)
    capsys.readouterr()
    assert main([str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    page = Page(out / "report.html")
    assert f"{method} answered 6 queries" in page.words
    assert page.data["texts"] == [row[1] for row in ROWS]
    predictions = [row["prediction"] for row in read_table(out / "queries.csv")]
    assert page.data["predictions"][0] == predictions[0]
    choice = int(predictions[1])
    assert page.data["predictions"][1] == f"{choice}: {['stone', 'pear'][choice]}"
    sections = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert sections == {"queries", "variants", "cost", "settings"} | (
        {"fit", "layers"} if method == "proto_route" else set()
    )
    assert ("places" in page.data) == (method in ("proto_route", "oracle"))
    assert ("reasons" in page.data) == (method == "proto_route")


def test_a_large_library_is_reported_by_its_shortlists(command, capsys, monkeypatch):
    for name, value in {"LARGE": 2, "LANDMARKS": 3, "SHORT": 2}.items():
        monkeypatch.setattr(f"router.routing.large.{name}", value)
    code, out = command("proto_route")
    assert code == 0
    page = Page(out / "report.html")
    assert all(len(reasons) == 2 for reasons in page.data["reasons"])
    assert len(page.data["places"]) == 6 and len(page.data["prototypes"]) == 4
    assert explain.main([str(out), page.data["ids"][0]]) == 0


def test_a_run_without_routing_has_a_report_of_its_answers(small):
    record = json.loads((small / "run.json").read_text())
    for key in ("base", "adapters", "n_variants", "low_margin", "variants"):
        del record[key]
    (small / "run.json").write_text(json.dumps(record))
    page = Page(write_report(small))
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert sections == ["queries", "cost", "settings"]
    assert page.data["predictions"] == [text[::-1] for text in HOSTILE]


def test_what_a_gpu_took_has_a_column(small):
    assert "on the GPU" not in Page(write_report(small)).words
    record = json.loads((small / "run.json").read_text())
    (small / "run.json").write_text(json.dumps(record | {"peak_gpu_mib": {"load": 270, "probe": 3579}}))
    words = Page(write_report(small)).words
    assert "on the GPU, MiB" in words and "2,048 3,579" in words and words.count("3,579") == 2


def test_the_numbers_are_those_of_the_files(tmp_path):
    out = synthetic(tmp_path, sentences(120))
    run, page = load(out), Page(write_report(out))
    evidence = Evidence.load(out / "queries.evidence.safetensors")
    low = np.flatnonzero(close(run.evidence.candidates))
    assert page.data["lowMargin"] == low.tolist() and len(low)
    assert f"{len(low)} queries have a low margin" in page.words and "1 min 4 s" in page.words
    for q, bars in enumerate(page.data["weights"]):
        assert bars[0] == run.weights[q].argmax()
        assert bars[1] == pytest.approx(1000 * run.weights[q].max(), abs=0.5)
    for q, reasons in enumerate(page.data["reasons"]):
        assert sorted(row[0] for row in reasons) == list(range(len(ADAPTERS)))
        for k, response, score in reasons:
            assert response == pytest.approx(1e4 * evidence.responses[q, k], abs=0.51)
            assert score == pytest.approx(100 * evidence.scores[q, k], abs=0.51)
    assert page.data["baseScore"] == [250] * 120 and page.data["falseAlarm"] == 0.1
    record = json.loads((out / "run.json").read_text())
    own = np.array([list(variant["weights"].values()) for variant in record["variants"]])
    cohesion = 1 - np.abs(run.weights - own[run.labels]).sum(1).mean() / 2
    assert f"cohesion {cohesion:.2f}" in page.words


@pytest.mark.parametrize(
    ("threshold", "told"),
    [
        (100.0, "120 queries were left to the base model (100.0 %), because no adapter fits: none scores "
         "above the base model."),
        (2.5, "{} queries were left to the base model ({:.1f} %), because no adapter fits"),
        (-100.0, "No query was left to the base model: some adapter always scores above it."),
    ],
)  # fmt: skip
def test_the_opening_says_how_many_queries_no_adapter_fits(tmp_path, threshold, told):
    out = synthetic(tmp_path, sentences(120), threshold=threshold)
    beaten = (Evidence.load(out / "queries.evidence.safetensors").scores < threshold).all(1).sum()
    assert told.format(beaten, 100 * beaten / 120) in Page(write_report(out)).words
    assert (threshold == 2.5) == (0 < beaten < 120)


def test_the_table_counts_who_would_be_sent_at_other_rates(tmp_path):
    out = synthetic(tmp_path, sentences(30))
    file = out / "queries.evidence.safetensors"
    plain = Evidence.load(file)
    assert "Does any adapter fit" not in Page(write_report(out)).words  # a run that kept no thresholds
    thresholds = {"0.01": 1.5, "0.1": 0.0, "0.5": -9.0}
    replace(plain, thresholds=[thresholds]).save(file)
    record = json.loads((out / "run.json").read_text())
    record["flags"]["false_positive_rate"] = 0.1
    (out / "run.json").write_text(json.dumps(record))
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
    ("module", "place"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers", "3", "self_attn.q_proj")),
        ("transformer.h.11.attn.c_attn", ("transformer.h", "11", "attn.c_attn")),
        ("model.layers.2.mlp.experts.7.w1", ("model.layers", "2", "mlp.experts.*.w1")),
        ("encoder.block.0.layer.1.wi", ("encoder.block", "0", "layer.*.wi")),
        ("0", ("", "0", "")),
        ("head", ("", "", "head")),
        ("conv2d.proj3", ("", "", "conv2d.proj3")),
        ("", ("", "", "")),
    ],
)
def test_names_of_modules_of_any_shape(module, place):
    assert place_of(module) == place


def test_modules_of_any_name_make_a_report(small):
    path = small / "queries.evidence.safetensors"
    names = ["head", "encoder.block.1.wi", "decoder.block.1.wi", "blocks.10", "0", ""]
    replace(Evidence.load(path), modules=names).save(path)
    assert len(Page(write_report(small)).data["layers"]) > 1


def test_several_query_files_are_one_report(tmp_path):
    out = synthetic(tmp_path, sentences(30), files=("first.csv", "second.csv", "third.csv"))
    page = Page(write_report(out))
    assert page.data["file"] == [0] * 10 + [1] * 10 + [2] * 10
    assert page.data["texts"] == sentences(30) and len(page.data["reasons"]) == 30
    (out / "second.evidence.safetensors").unlink()
    assert "reasons" not in Page(write_report(out)).data


def test_query_files_that_are_gone_leave_ids(tmp_path):
    out = synthetic(tmp_path, sentences(5), keep_queries=False)
    page = Page(write_report(out))
    assert page.data["texts"] == [None] * 5 and page.data["ids"] == [f"q{k}" for k in range(5)]
    assert "The texts of 5 queries of " in page.words and "are shown by their ids alone" in page.words
    (tmp_path / "queries.csv").write_text("id,input\n")
    assert Page(write_report(out)).words == page.words
    header = ("id", "input", "eval_type", "answer_choices")
    write_csv(tmp_path / "queries.csv", header, [("q1", "Another.", "generation", "")])
    page = Page(write_report(out))
    assert page.data["texts"] == [None, "Another.", None, None, None]
    assert "The texts of 4 queries of " in page.words


def test_adapters_that_may_be_hostile_are_named(small):
    record = json.loads((small / "run.json").read_text())
    more = {"lookalikes": {"four": "two"}, "silent": ["three"]}
    (small / "run.json").write_text(json.dumps(record | more))
    words = Page(write_report(small)).words
    assert "four reads what two reads and writes something else" in words
    assert "three reads directions that text hardly has" in words


def test_duplicates_stand_aside_and_are_named(small):
    path = small / "queries.evidence.safetensors"
    evidence = Evidence.load(path)
    evidence.scores[:, 3] = np.nan
    evidence.duplicates["four"] = "two"
    evidence.save(path)
    page = Page(write_report(small))
    told = (
        "1 adapter duplicates another at a different size, so it gets no weight: four (represented by two )."
    )
    assert told in page.words
    assert all(row[0] != 3 for reasons in page.data["reasons"] for row in reasons)
    assert 3 not in [axis for axis, *_ in page.data["prototypes"]]


@pytest.mark.parametrize("harm", [lambda out: shutil.rmtree(out), lambda out: (out / "queries.csv").unlink()])
def test_what_does_not_belong_together_is_one_line_and_exit_code_2(small, capsys, harm):
    harm(small)
    with pytest.raises(InputError):
        write_report(small)
    assert main([str(small)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {small}") and error.count("\n") == 1
    assert not (small / "report.html").exists()


def test_scikit_learn_is_imported_only_to_draw_a_map(tmp_path):
    """A run without a map is not kept waiting for it; the process is another, as this one has it already."""
    out = synthetic(tmp_path, sentences(20))
    code = "import sys; from pathlib import Path; from router.runs.report.page import write_report; "
    code += "write_report(Path(sys.argv[1])); print('sklearn' in sys.modules)"

    def drew():
        done = subprocess.run([sys.executable, "-c", code, out], cwd=ROOT, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout.strip()

    assert drew() == "True"
    record = json.loads((out / "run.json").read_text())
    del record["variants"]
    (out / "run.json").write_text(json.dumps(record))
    assert drew() == "False"


def test_hostile_text_stays_text(small):
    page = Page(write_report(small))
    assert "{{" not in page.scripts[1] and "{%" not in page.scripts[1]  # jinja leaves the page's script alone
    assert page.data["texts"] == HOSTILE and page.data["predictions"] == [text[::-1] for text in HOSTILE]
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    assert not {"b", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "\u2028" not in page.scripts[0] and "<" not in page.scripts[0]
    assert HOSTILE[0] in page.words  # as a typical query of its variant


def test_nothing_is_fetched_and_only_its_own_script_may_run(small):
    page = Page(write_report(small))
    assert not any(name in ("src", "srcset", "data", "action") for _, attrs in page.tags for name in attrs)
    assert all(attrs["href"].startswith("#") for _, attrs in page.tags if "href" in attrs)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", page.html)
    (policy,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_the_same_run_gives_the_same_bytes(tmp_path):
    out = synthetic(tmp_path, sentences(120))
    first = write_report(out).read_bytes()
    assert write_report(out).read_bytes() == first


def test_ten_thousand_queries_stay_below_ten_megabytes(large):
    path = large
    assert path.stat().st_size < 10_000_000
    page = Page(path)
    limit = page.data["limit"]
    assert limit in LIMITS and limit >= 100
    assert f"Texts are cut after {limit:,} characters" in page.words
    assert len(page.data["ids"]) == 10_000 and max(map(len, page.data["texts"])) <= limit
    assert "of a sample of 300" in page.words
    assert np.ptp(np.array(page.data["places"]), axis=0).min() > 5_000


def test_thirty_thousand_queries_are_a_sample_below_ten_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("router.runs.report.layout.MAPPED", 100)  # 2,000 take long
    texts = [f"{k}: {text}" * 3 for k, text in enumerate(sentences(30_000))]
    out = synthetic(tmp_path, texts, files=("queries.csv", "more.csv"))
    path = write_report(out)
    assert path.stat().st_size < 10_000_000
    page, table = Page(path), [read_table(out / f"{stem}.routing.csv") for stem in ("queries", "more")]
    told = {row["id"]: row["variant"] for rows in table for row in rows}
    assert len(told) == 30_000  # the CSV files are whole
    shown = dict(zip(page.data["ids"], map(str, page.data["variants"]), strict=True))
    assert len(shown) == 10_000 and shown.items() <= told.items()
    assert {told[own] for own in told} == set(shown.values())
    assert {own[1:2] for own in shown} == {*"0123456789"} and set(page.data["file"]) == {0, 1}
    texts = dict(zip(page.data["ids"], page.data["texts"], strict=True))
    assert all(text.startswith(own[1:] + ":") for own, text in texts.items())
    assert "30,000 queries" in page.words and "Here are 10,000 of the 30,000 queries" in page.words
    low = sum(close(load(out).evidence.candidates))
    assert f"{low:,} queries have a low margin" in page.words  # of all


@pytest.mark.parametrize(("n", "axes"), [(1, 1), (1, 6), (2, 2), (5, 3), (9, 1), (40, 4)])
def test_layouts_of_any_size(n, axes):
    points = np.random.default_rng(0).normal(size=(n, axes)).clip(0)
    queries, prototypes, _ = layout(points)
    assert queries.shape == (n, 2) and prototypes.shape == (axes, 2)
    both = np.vstack([queries, prototypes])
    assert np.isfinite(both).all() and both.min() >= 0 and both.max() <= 1


def test_queries_that_are_alike_do_not_hide_each_other():
    queries, _, _ = layout(np.repeat(np.eye(4), 25, axis=0))
    apart = np.linalg.norm(queries[:, None] - queries[None], axis=2) + np.eye(100)
    assert apart.min() > 0.005


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
    """The report of 125 queries in two files, the hostile ones among them."""
    texts = [*HOSTILE, *sentences(120)]
    return write_report(synthetic(tmp_path_factory.mktemp("page"), texts, files=("one.csv", "two.csv")))


def ids(page):
    return page.locator("#rows .opener").all_inner_texts()


def test_the_lowest_top_weights_come_first_and_columns_sort(visit, path):
    page, data = visit(path), Page(path).data
    top = {name: weights[1] for name, weights in zip(data["ids"], data["weights"], strict=True)}
    found = ids(page)
    assert len(found) == 50 and [top[name] for name in found] == sorted(top.values())[:50]
    for _ in range(2):
        page.click("#table th[data-key=weight] button")
    assert page.get_attribute("#table th[data-key=weight]", "aria-sort") == "ascending"
    page.click("#table th[data-key=weight] button")
    assert top[ids(page)[0]] == max(top.values())
    page.click("#table th[data-key=id] button")
    assert ids(page)[:3] == ["q0", "q1", "q2"]  # as numbers, so that q2 stands before q10
    page.click(".pager.above button[data-page=last]")
    assert ids(page)[-1] == "q124"
    assert page.inner_text(".pager.above .range") == "101\N{EN DASH}125 of 125"


def test_filters_apply_to_table_and_map(visit, path):
    page, data = visit(path), Page(path).data
    page.select_option("#by-candidate", "1")
    mine = {name for name, weights in zip(data["ids"], data["weights"], strict=True) if weights[0] == 1}
    assert set(ids(page)) == mine and 0 < len(mine) < 50
    assert page.inner_text("#count") == f"{len(mine)} of 125 queries"
    assert page.locator("#map path.off").count() > 0
    page.click("#reset")
    assert page.inner_text("#count") == "125 queries" and page.locator("#map path.off").count() == 0
    page.fill("#by-text", "CASE 117.")
    page.locator("#count", has_text="1 of 125 queries").wait_for()
    assert ids(page) == ["q122"]
    page.click("#reset")
    page.check("#by-margin")
    assert len(ids(page)) == len(data["lowMargin"])
    assert page.locator("#rows .badge").all_inner_texts() == ["low margin"] * len(data["lowMargin"])
    page.click("#reset")
    page.select_option("#by-file", "1")
    assert page.inner_text("#count") == "63 of 125 queries"
    page.fill("#by-text", "nothing is like this")
    page.wait_for_selector("#rows .nothing")


def test_pointing_at_a_query_shows_it(visit, path):
    page, data = visit(path), Page(path).data
    page.locator("#map").scroll_into_view_if_needed()
    box = page.locator("#map").bounding_box()
    margin, q = 26, 60
    x, y = (place / 10_000 for place in data["places"][q])
    x = box["x"] + margin + x * (box["width"] - 2 * margin)
    y = box["y"] + margin + y * (box["height"] - 2 * margin)
    page.mouse.move(x, y)
    shown = page.inner_text("#shown")
    assert data["texts"][q] in shown and data["predictions"][q] in shown
    assert data["names"][data["weights"][q][0]] in shown
    page.mouse.click(x, y)
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    assert data["texts"][q] in page.inner_text("#shown")  # a click keeps it
    page.click("#shown button")
    assert page.evaluate("document.activeElement.textContent") == data["ids"][q]
    assert page.locator(f"#why-{q}").is_visible()


def test_everything_is_reached_by_keyboard(visit, path):
    page = visit(path)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("#map")
    before = page.inner_text("#shown")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#shown") != before and page.inner_text("#spoken")
    page.keyboard.press("Home")
    first = page.inner_text("#shown .kicker bdi")
    page.keyboard.press("PageDown")
    assert page.inner_text("#shown .kicker bdi") == ids(page)[1] != first == ids(page)[0]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "false"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "opener"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) != "none"
    page.keyboard.press("Space")
    assert page.locator("#rows .opened").count() == 1
    unnamed = """[...document.querySelectorAll('button,select,input,[tabindex]')].filter(
        (e) => !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).length"""
    assert page.evaluate(unnamed) == 0


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("to_base", [True, False])
def test_a_row_says_why(visit, path, to_base, low):
    page, names = visit(path), [*ADAPTERS, "base model"]
    parts = [Evidence.load(path.parent / f"{name}.evidence.safetensors") for name in ("one", "two")]
    responses, scores = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("responses", "scores")
    )
    candidates = np.column_stack([scores, np.full(len(scores), 2.5)])
    wanted = ((candidates.argmax(1) == len(ADAPTERS)) == to_base) & (close(candidates) == low)
    q = np.flatnonzero(wanted)[-1]
    page.fill("#by-text", f"case {q - len(HOSTILE)}.")
    page.locator("#count", has_text="1 of 125 queries").wait_for()
    page.click(f"[data-toggle='{q}']")
    why = page.locator(f"#why-{q}")

    *_, second, best = order = candidates[q].argsort().tolist()
    following = names[second] if second < len(ADAPTERS) else "the base model"
    if to_base:
        told = (
            "No adapter scores above the base model, which stands at 2.50, so the base "
            f"model answers. The nearest is {names[second]} at {scores[q, second]:.2f}"
        )
    else:
        told = (
            f"{names[best]} scores {scores[q, best]:.2f}; the "
            f"base model stands at 2.50. The next candidate, {following}, is "
            f"{candidates[q, best] - candidates[q, second]:.2f} behind"
        )
    sentence = why.locator("p:not(.whole):not(.note)").inner_text()
    assert sentence == f"{told}{': a low margin' if low else ''}."
    headings = why.locator("thead th").all_text_contents()
    assert headings == ["candidate", "response", "score", "weight"]
    weights = np.exp((candidates[q] - candidates[q].max()) / 0.5)
    weights /= weights.sum()
    lines = why.locator("tbody tr").all()
    for line, k in zip(lines, reversed(order), strict=True):
        row = line.locator("th, td").all_inner_texts()
        response = f"{responses[q, k]:.4f}" if k < len(ADAPTERS) else "\N{EN DASH}"
        score = f"{candidates[q, k]:.2f}".replace("-", MINUS)
        assert row[:3] == [names[k], response, score]
        assert float(row[3].removesuffix(" %")) == pytest.approx(100 * weights[k], abs=0.6)
        assert (line.get_attribute("class") == "quiet") == (candidates[q, k] < 2.5)


def test_colour_by_variant_and_layers_by_adapter(visit, path):
    page, data = visit(path), Page(path).data
    page.check("input[value=variant]")
    assert page.locator("#legend button").count() == len(data["variantNames"])
    page.click("#legend button >> nth=0")
    assert page.input_value("#by-variant") == "0"
    page.select_option("#layers-group", "1")
    found = page.locator("#layers-table td").all_inner_texts()
    flat = [value for row in data["layers"][1]["cells"] for value in row]
    expected = ["" if value is None else page.evaluate("v => v.toFixed(1)", value) for value in flat]
    assert found == [value.replace("-", MINUS) for value in expected]


def test_hostile_text_is_read_as_it_was_written(visit, path):
    page = visit(path)
    page.click("#table th[data-key=id] button")
    page.click("#rows .opener >> nth=0")
    shown = page.locator("#why-0 .whole").all_inner_texts()
    assert shown == [HOSTILE[0], HOSTILE[0][::-1]]
    assert page.title() == "proto_route: 125 queries"
    assert page.locator("main img, main b").count() == 0
    assert page.evaluate("document.scripts.length") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_width_overflows_sideways(visit, path, width, scheme):
    page = visit(path, width, scheme)
    page.click("#rows .opener >> nth=0")
    page.check("input[value=variant]")
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    inner, outer = page.evaluate(wide)
    assert inner <= outer == width
    ink, paper = page.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (light[0] > light[1]) == (scheme == "dark") and abs(light[0] - light[1]) > 500


def test_ten_thousand_queries_stay_usable(visit, large):
    page = visit(large)
    assert page.locator("#rows > tr").count() == 50
    page.fill("#by-text", "9999:")
    page.locator("#count", has_text="1 of 10,000 queries").wait_for()
    page.click("#reset")
    page.click("#table th[data-key=query] button")
    assert ids(page)[0] == "q0" and page.locator("#rows > tr").count() == 50
