"""The page of a report: one file, nothing loaded, everything escaped, maps that can be read without colour."""

import base64
import functools
import html.parser
import re
import sys
import warnings

import numpy as np
import pytest

from refattn.core import Call
from refattn.oracle.check import Report
from refattn.oracle.compare import Bound, Verdict
from refattn.oracle.diagnose import Explanation
from refattn.oracle.html import CELLS, MAPS, STYLE, THEMES, _around_the_worst, drawing, page, ratios
from refattn.oracle.trial import Trial


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'refattn[plot]'")


SHAPE = 2, 4, 5, 3


def failing():
    """A report made by hand: 3 elements of `out` are outside; lse conforms; nothing came back for dq."""
    rng = np.random.default_rng(0)
    expected = {"out": rng.normal(size=SHAPE), "lse": rng.normal(size=SHAPE[:3]), "dq": rng.normal(size=SHAPE)}
    bounds = {name: Bound(np.full(x.shape, 0.5)) for name, x in expected.items()}
    got = {"out": expected["out"] + 0.25, "lse": expected["lse"], "dq": None}
    got["out"][1, 2, 3] += 1000
    wrong = Verdict("out", "BUG", "", (1, 2, 3, 0), 1.0, 1001.25, 1000.25, 0.5, 2000.5, 3, 120, "q <here>")
    lse, dq = Verdict("lse", "CONFORMS", size=40), Verdict("dq", "BUG", "nothing came back")
    call = Call((np.zeros(SHAPE),) * 3, {})
    trial = Trial(call, "gaussian", None, expected, bounds, got, (wrong, lse, dq), "q (2, 4, 5, 3) <b>", (0, 1))
    named = {v.name: v for v in trial.verdicts}
    likely = Verdict("dk", "BUG p < 1e-6", "", (0,), 1.0, 2.0, 1.0, 0.5, 2.0, 1, 2, "q")
    return Report(
        *("<script>alert(1)</script>&", "dot_product_attention", "numpy", "bfloat16", "bf16_flash", "torch_sdpa", 3),
        *(named | {"dk": likely}, {"out": 7, "lse": 0, "dq": 1, "dk": 1}, 12, {"gaussian": 8, "large": 4}),
        *({"scores overflow <float16>": 2}, {"no": 1}, {"torch-<page>": 1}, ("window", "sinks"), "judged"),
        explanations=(Explanation("scale_missing", "the scale is <missing>"),),
        consistent_with="sums of bfloat16",
        where="item 1, rows > 3",
        smallest=trial,
        accuracy=1.5e-9,
        spec=("/tmp/no<where>.py", "f"),
    )


@functools.cache
def failing_page():
    return page(failing())


class Reader(html.parser.HTMLParser):
    """Text, tags that were opened and not closed, and attributes that load something."""

    VOID = "meta", "br", "img", "source"

    def __init__(self):
        super().__init__()
        self.text, self.open, self.loads, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.loads += [value for name, value in attributes if name in ("src", "srcset", "href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader, " ".join(reader.text)


def test_all_of_it_is_said(matplotlib):
    _, text = read(failing_page())
    for words in (
        "<script>alert(1)</script>&, like dot_product_attention:", "DIFFERS", "bfloat16, arithmetic bf16_flash",
        "convention torch_sdpa", "12 examples", "BUG p < 1e-6", "7 of 12", "2e+03", "nothing came back", "q <here>",
        "the scale is <missing>", "scale_missing", "sums of bfloat16", "item 1, rows > 3", "q (2, 4, 5, 3) <b>",
        "gaussian 8, large 4", "window, sinks", "2 examples: scores overflow <float16>", "1 examples: no", "1.5e-09",
        "seed 3", f"NumPy {np.__version__}", "3 of 120 elements outside", "6 of 8 items and heads", "/tmp/no<where>.py",
    ):  # fmt: skip
        assert words in text, words


def test_nothing_is_loaded_and_all_is_escaped(matplotlib):
    reader, _ = read(failing_page())
    assert reader.loads and all(value.startswith("data:image/png;base64,") for value in reader.loads)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "link", "iframe", "object", "b", "here", "missing"}
    assert "url(" not in STYLE and "@import" not in STYLE and "prefers-color-scheme: dark" in STYLE


def test_maps_for_light_and_dark(matplotlib):
    reader, _ = read(failing_page())
    images = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 2 and all("|error| / allowed" in image["alt"] for image in images)  # of out and lse
    for value in reader.loads:
        assert base64.b64decode(value.partition(",")[2]).startswith(b"\x89PNG")
    assert len({*reader.loads}) == 4


def test_a_conforming_report_has_no_maps(matplotlib):
    report = failing()
    fine = {"out": Verdict("out", "CONFORMS", size=3, ratio=0.5, expected=1.0, got=1.0, allowed=2.0)}
    report = report._replace(verdicts=fine, failures={}, smallest=None, explanations=(), consistent_with="", where="")
    reader, text = read(page(report))
    assert "conforms" in text and "DIFFERS" not in text and reader.loads == [] and "Reproduce it" not in text
    assert "What explains it" not in text
    _, text = read(page(report._replace(examples=0, verdicts={})))
    assert "NOT JUDGED" in text and "conforms" not in text


def test_nothing_explains_it(matplotlib):
    _, text = read(page(failing()._replace(explanations=(), consistent_with="")))
    assert "explains all of it" in text


def test_a_report_of_a_real_trial(matplotlib):
    from refattn.examples.blocked_attention_with_a_bug import forward
    from refattn.oracle.check import check

    report = check(forward, "scaled_dot_product", max_examples=8)
    reader, text = read(report.to_html())
    assert "DIFFERS" in text and reader.loads and report.smallest.words in text and "right = [" in text


# --- what is drawn -------------------------------------------------------------------------------------------


def test_ratios():
    trial = failing().smallest
    out = ratios(trial, "out")
    assert out.shape == SHAPE and np.allclose(out[0], 0.5) and np.allclose(out[1, 2, 3], 2000.5)
    assert ratios(trial, "lse").max() == 0 and ratios(trial, "dq") is None and ratios(trial, "call") is None
    special = np.array([np.nan, np.inf, 1.0, 1.0]), np.array([np.nan, 1.0, np.nan, 1.0])
    trial = trial._replace(expected={"y": special[0]}, got={"y": special[1]}, bounds={"y": Bound(np.zeros(4))})
    assert ratios(trial, "y").tolist() == [[0, np.inf, np.inf, 0]]
    assert ratios(trial._replace(got={"y": np.zeros(3)}), "y") is None
    assert ratios(trial._replace(bounds={"y": Bound()}), "y") is None


def test_large_maps_are_cut_around_the_worst():
    ratio = np.zeros((CELLS + 9, 4))
    ratio[-1, 2] = 5
    part, top, left = _around_the_worst(ratio)
    assert part.shape == (CELLS, 4) and (top, left) == (9, 0) and part[-1, 2] == 5


def test_what_is_outside_is_hatched_and_the_worst_is_named(matplotlib, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
    ratio = np.full((6, 5), 0.2)
    ratio[4, 1], ratio[0, 0] = 7, 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for theme in THEMES.values():
            drawing()("out", [((0, 1), ratio), ((1, 0), ratio / 10)], *theme)
    axes, fine, bar = figures[0].axes
    values, hatch = (image.get_array() for image in axes.images)
    fine_rows, fine_columns = np.nonzero(hatch[..., 3])
    edge = hatch.shape[0] // len(ratio)
    assert values.shape == ratio.shape and {*fine_rows // edge} == {4} and {*fine_columns // edge} == {1}
    assert {*np.unique(hatch[4 * edge : 5 * edge, edge : 2 * edge, :3])} == {0, 1}, "black and white, to be seen"
    assert [t.get_text() for t in axes.texts] == ["7 at [4, 1]"] and axes.get_title() == "out[0, 1]: at most 7"
    assert all(line.get_xydata().tolist() == [[1, 4]] for line in axes.lines)
    assert len(fine.images) == 1 and fine.texts[0].get_text() == "0.7 at [4, 1]"
    assert "allowed" in bar.get_ylabel() and figures[0].get_facecolor() != figures[1].get_facecolor()


def test_maps_are_limited(matplotlib):
    text = failing_page()
    assert MAPS == 6 and re.search(r"out: \|error\| / allowed; 3 of 120 elements outside; 6 of 8 items", text)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'refattn\[plot\]'"):
        page(failing())
