"""The directive that draws how data flows: what it reads, where things stand, and what it refuses."""

import importlib.util
import itertools
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

pytest.importorskip("docutils", reason="docutils is not installed: pip install 'refattn[docs]'")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'refattn[plot]'")
DOCS = Path(__file__).resolve().parents[1] / "docs"
loading = importlib.util.spec_from_file_location("flow", DOCS / "flow.py")
flow = importlib.util.module_from_spec(loading)
loading.loader.exec_module(flow)

GATE = "x: (N, C, H, W) -> mean -> z: (N, C) -> W1, ReLU -> times -> y: (N, C, H, W)", "x -> times"
PAGES = sorted((DOCS / "derivations").glob("*.md"))


def rows(graph):
    return [[name for name in row if isinstance(name, str)] for row in graph.rows]


def test_what_is_read():
    graph = flow.parse(GATE)
    assert graph.nodes["x"] == flow.Node("x", "(N, C, H, W)") and graph.nodes["W1, ReLU"].shape == ""
    assert rows(graph) == [["x"], ["mean"], ["z"], ["W1, ReLU"], ["times"], ["y"]]
    assert sum(isinstance(name, tuple) for name in graph.nodes) == 3, "a bend for every row that x -> times crosses"
    assert all(len(pair) == 2 for pair in graph.arrows)


def test_an_input_stands_next_to_what_it_feeds():
    graph = flow.parse(["q: (Q) -> a -> b -> c -> y: (Q)", "v: (K) -> c"])
    assert rows(graph)[2] in (["b", "v"], ["v", "b"])


def test_arrows_do_not_cross_where_they_need_not():
    graph = flow.parse(["a -> p -> x", "b -> q -> y", "c -> r -> z", "x -> end", "y -> end", "z -> end"])
    place = {name: i for row in graph.rows for i, name in enumerate(row)}
    level = {name: i for i, row in enumerate(graph.rows) for name in row}
    for (a, b), (c, d) in itertools.combinations(graph.arrows, 2):
        if level[a] == level[c]:
            assert (place[a] - place[c]) * (place[b] - place[d]) >= 0, f"{a} -> {b} crosses {c} -> {d}"


@pytest.mark.parametrize("lines", [["a -> -> b"], ["-> a"], ["a ->"]])
def test_lines_that_are_none(lines):
    with pytest.raises(ValueError, match="expected names with -> between them"):
        flow.parse(lines)


@pytest.mark.parametrize("line", ["x: N C -> a", "sum: over the keys -> y: (Q)", "x: -> a"])
def test_a_colon_that_begins_no_shape(line):
    with pytest.raises(ValueError, match="in parentheses, or no colon"):
        flow.parse([line])


def test_a_circle():
    with pytest.raises(ValueError, match="in a circle"):
        flow.parse(["a -> b -> a"])


def test_the_drawing():
    graph = flow.parse(GATE)
    drawn = flow.svg(graph, 'x "to" y')
    root = xml.fromstring(drawn)
    assert root.get("aria-label") == 'x "to" y' and root.get("role") == "img" and root.get("class") == "flow"
    assert "currentColor" in drawn and flow.INK not in drawn
    assert set(re.findall(r"#[0-9a-f]{6}", re.sub(r'href="#[^"]*"|id="[^"]*"|url\(#[^)]*\)', "", drawn))) == set()
    assert drawn == flow.svg(flow.parse(GATE), 'x "to" y'), "the same every time"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flow_of_the_derivations_is_read(page):
    for text in re.findall(r"^```\{flow\}\n(.*?)^```", page.read_text(), re.M | re.S):
        graph = flow.parse(text.splitlines())
        assert len(graph.nodes) > 2 and len(graph.rows) <= 16 and max(map(len, graph.rows)) <= 9, "it fits a page"
