"""The directive `flow`: a drawing of how data flows through a mechanism, from a few lines of text.

    x: (N, C, H, W) -> mean over H and W -> W1, ReLU -> W2, sigmoid -> times -> y: (N, C, H, W)
    x -> times

An array has a name, a colon and its shape, the first time it is mentioned; everything else is an operation. The lines
are what a reader without pictures gets. One drawing serves both themes: its ink is the colour of the text around it.
"""

import html
import io
import itertools
import re
from typing import NamedTuple

from docutils import nodes
from docutils.parsers.rst import Directive
from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#010203"  # replaced by the colour of the text
ROW, GAP, SIZE = 0.62, 0.28, 10  # inches between rows, inches between neighbours, points
SWEEPS, SETTLED = 8, 300  # of untangling, and of moving everything to the middle of its neighbours


class Node(NamedTuple):
    label: str
    shape: str  # empty for an operation


class Graph(NamedTuple):
    nodes: dict  # name -> Node; a tuple is a bend of an arrow that crosses a row
    arrows: list  # (name, name)
    rows: list  # of names


def parse(lines):
    """The Graph of some lines; a ValueError for a line that is none."""
    found, arrows = {}, []
    for line in filter(None, map(str.strip, lines)):
        names = []
        for part in re.split(r"\s*->\s*", line):
            name, colon, shape = (text.strip() for text in part.partition(":"))
            if not name:
                raise ValueError(f"flow: {line!r}, expected names with -> between them")
            if colon and not (shape.startswith("(") and shape.endswith(")")):
                raise ValueError(f"flow: {part!r}, expected the shape of {name} in parentheses, or no colon")
            if colon or name not in found:
                found[name] = Node(name, shape)
            names.append(name)
        arrows += [pair for pair in itertools.pairwise(names) if pair not in arrows]
    return _in_rows(found, arrows)


def _in_rows(found, arrows):
    row = dict.fromkeys(found, 0)
    for _ in found:  # the longest way from the top
        for start, end in arrows:
            row[end] = max(row[end], row[start] + 1)
    if any(row[end] <= row[start] for start, end in arrows):
        raise ValueError("flow: the arrows go in a circle")
    for start in [name for name in found if not any(end == name for _, end in arrows)]:  # next to what it feeds
        row[start] = min((row[end] - 1 for begin, end in arrows if begin == start), default=0)
    nodes_, straight = dict(found), []
    for start, end in arrows:
        bends = [(start, end, i) for i in range(row[start] + 1, row[end])]
        nodes_ |= {bend: Node("", "") for bend in bends}
        row |= {bend: bend[2] for bend in bends}
        straight += zip([start, *bends], [*bends, end])
    rows = [[name for name in nodes_ if row[name] == i] for i in range(max(row.values(), default=0) + 1)]
    return Graph(nodes_, straight, _untangled(rows, straight))


def _untangled(rows, arrows):
    """Each row in the order of what its members are joined to, from above and from below in turn."""
    for sweep in range(SWEEPS):
        for i in range(len(rows)) if sweep % 2 == 0 else reversed(range(len(rows))):
            other = i - 1 if sweep % 2 == 0 else i + 1
            if not 0 <= other < len(rows):
                continue
            place = {name: k / len(rows[other]) for k, name in enumerate(rows[other])}
            wanted = {}
            for k, name in enumerate(rows[i]):
                near = [place[x] for x in _joined(name, arrows) if x in place]
                wanted[name] = sum(near) / len(near) if near else k / len(rows[i])
            rows[i] = sorted(rows[i], key=wanted.get)
    return rows


def _joined(name, arrows):
    return [start if end == name else end for start, end in arrows if name in (start, end)]


def svg(graph, description):
    """The drawing, as an element of HTML."""
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "flow", "font.family": "DejaVu Sans", "font.size": SIZE}):
        figure = Figure()
        widths = {name: _width(figure, node) for name, node in graph.nodes.items()}
        x = _across(graph, widths)
        wide = max(x[name] + widths[name] / 2 for name in x) + 0.05
        high = ROW * len(graph.rows)
        figure.set_size_inches(wide, high)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, wide), ylim=(high, 0))
        axes.axis("off")
        y = {name: ROW * (i + 0.5) for i, row in enumerate(graph.rows) for name in row}
        for start, end in graph.arrows:
            _arrow(axes, graph, (x[start], y[start]), (x[end], y[end]), start, end)
        for name, node in graph.nodes.items():
            _draw(axes, node, x[name], y[name], widths[name])
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    label = html.escape(description, quote=True)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{label}" class="flow"', 1)


def _width(figure, node):
    """In inches."""
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    lines = [text for text in (node.label, node.shape) if text]
    if not lines:
        return 0.1
    drawn = [figure.text(0, 0, line, fontsize=SIZE) for line in lines]
    width = max(text.get_window_extent(renderer, dpi=figure.dpi).width for text in drawn) / figure.dpi
    for text in drawn:
        text.remove()
    return width + 0.3


def _across(graph, widths):
    """Where everything is from left to right: as near as can be to the middle of what it is joined to."""
    x = {}
    for row in graph.rows:
        _settle(row, dict.fromkeys(row, 0.0), widths, x)
    for sweep in range(SETTLED):
        rows = graph.rows if sweep % 2 == 0 else graph.rows[::-1]
        for row in rows:
            wanted = {}
            for name in row:
                near = [x[other] for other in _joined(name, graph.arrows)]
                wanted[name] = sum(near) / len(near) if near else x[name]
            _settle(row, wanted, widths, x)
    left = min(x[name] - widths[name] / 2 for name in x) - 0.05
    return {name: place - left for name, place in x.items()}


def _settle(row, wanted, widths, x):
    """Side by side, in order, with gaps, and as a whole where they want to be."""
    places, edge = [], None
    for name in row:
        place = wanted[name] if edge is None else max(wanted[name], edge + GAP + widths[name] / 2)
        places.append(place)
        edge = place + widths[name] / 2
    shift = sum(wanted[name] - place for name, place in zip(row, places)) / len(row)
    x |= {name: place + shift for name, place in zip(row, places)}


def _draw(axes, node, x, y, width):
    if not node.label:
        return
    if node.shape:
        axes.text(x, y - 0.01, node.label, ha="center", va="bottom", color=INK, weight="bold")
        axes.text(x, y + 0.02, node.shape, ha="center", va="top", color=INK, fontsize=SIZE - 1.5)
        return
    box = {"boxstyle": "round,pad=0.35", "facecolor": "none", "edgecolor": INK, "linewidth": 0.8}
    axes.text(x, y, node.label, ha="center", va="center", color=INK, bbox=box)


def _arrow(axes, graph, start, end, first, second):
    above = (0.21 if graph.nodes[first].shape else 0.14) if graph.nodes[first].label else 0
    below = (0.21 if graph.nodes[second].shape else 0.14) if graph.nodes[second].label else 0
    style = "-|>" if graph.nodes[second].label else "-"
    how = {"arrowstyle": style, "color": INK, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    axes.annotate("", (end[0], end[1] - below), (start[0], start[1] + above), arrowprops=how)


class Flow(Directive):
    has_content = True

    def run(self):
        try:
            graph = parse(self.content)
        except ValueError as error:
            raise self.error(str(error)) from None
        picture = svg(graph, "; ".join(self.content).replace("->", "to"))
        return [nodes.raw("", f'<div class="flow-frame">{picture}</div>', format="html")]


def setup(app):
    app.add_directive("flow", Flow)
    return {"parallel_read_safe": True}
