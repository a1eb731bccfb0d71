"""Pictures, for those who have matplotlib: pip install 'refattn[plot]'.

    with style():                                     # or style(dark=True)
        figure = draw("cbam")                         # what it attends to, on a photograph
        axes = draw_attention(saved.attn[0])          # (heads, queries, keys)

What is drawn of a mechanism is the field of its Saved that ABOUT names, and the same of the mechanisms inside it. How
it is drawn follows from the axes of that field: "N C" is a bar for every channel, "N 1 H W" lies over the image,
"B H Q K" is a map for every head. refattn.subjects makes the call.

All can be read without colour: maps grow lighter with the value and mark the largest of a row, small ones and bars have
numbers, what lies over an image has contours.
"""

import ast
import dataclasses
import difflib
import io
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

import numpy as np

from refattn import attention, masks, report
from refattn.core import expect, leaves, tree_map
from refattn.oracle.html import THEMES
from refattn.registry import everything, find
from refattn.subjects import Picture, Sentence, axes_of, call_on, matplotlib, read_input, sees, usual

MAP = "cividis"  # as good without colours: lightness grows with the value
LINES = "#4c8fc7", "#d08c1f", "#9a6fb8", "#8a929b"  # told apart by lightness, dashes and marks too; on white and dark
HEADS, PANELS = 4, 8  # maps of one array, and pictures of one figure, at most


def style(dark=False):
    """The look of all pictures, as a context: `with style(): ...`. It needs matplotlib."""
    matplotlib()
    from matplotlib import rc_context

    paper, ink = THEMES["dark" if dark else "light"]
    inked = "text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"
    return rc_context(dict.fromkeys(inked, ink) | {
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.labelsize": 10,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "image.cmap": MAP,
        "image.interpolation": "nearest",
        "hatch.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "refattn",  # the same picture is the same file
    })  # fmt: skip


# --- one array, one picture ---------------------------------------------------------------------------------


def draw_mask(mask, queries, keys, ax=None, *, offset=0):
    """Draw a mask of refattn.masks, a row per query, dark where the key takes part: see Mask.array for the sizes.

    It is drawn into `ax`, or into a new figure. A mask that is not the same for all items and heads makes one picture
    for each, side by side in a new figure. Returns the Axes; a list of them, if there are several.
    """
    pictures = list(mask.pictures(queries, keys, offset))
    one = len(pictures) == 1
    expect(one or ax is None, "plot.draw_mask: ax", ax, f"None, for {len(pictures)} pictures")
    if ax is None:
        ax = _new_axes(len(pictures), 4)
    axes = ax if isinstance(ax, list) else [ax]
    for each, (title, allowed) in zip(axes, pictures, strict=True):
        _allowed(each, allowed, offset)
        each.set_title(title or repr(mask), fontsize="medium", wrap=True)
    return axes[0] if one else axes


def _allowed(ax, allowed, offset=0):
    rows, columns = allowed.shape
    edges = -0.5, columns - 0.5, offset + rows - 0.5, offset - 0.5
    ax.imshow(allowed, cmap="Blues", vmin=-0.1, vmax=1.2, extent=edges, interpolation="nearest")
    _label(ax, "key", "query")


def draw_attention(weights, ax=None, *, queries=None, keys=None, rows="query", columns="key"):
    """Draw attention weights, (queries, keys) or (heads, queries, keys), a row per query, lighter where more goes.

    `queries` and `keys` are words to stand at rows and columns, which are called what `rows` and `columns` say. A ring
    marks the largest weight of a row; a small map has numbers. All heads have one scale. Returns the Axes, or a list
    of them, one for each head, in a new figure.
    """
    weights = np.asarray(weights)
    expect(weights.ndim in (2, 3), "plot.draw_attention: weights", weights.shape, "(Q, K), or (H, Q, K)")
    expect(weights.size > 0, "plot.draw_attention: weights", weights.shape, "one query and one key at least")
    heads = weights if weights.ndim == 3 else weights[None]
    expect(len(heads) == 1 or ax is None, "plot.draw_attention: ax", ax, f"None, for {len(heads)} heads")
    several = ax is None and weights.ndim == 3
    ax = _new_axes(len(heads), 4) if ax is None else [ax]
    low, high = float(heads.min()), float(heads.max())
    if 0 <= low < 0.8 * high:  # else there would be one colour
        low = 0.0
    high = high if high > low else low + 1
    for n, (axes, head) in enumerate(zip(ax, heads)):
        lengthy = max(head.shape) > 1.8 * min(head.shape)
        image = axes.imshow(head, cmap=MAP, vmin=low, vmax=high, aspect="auto" if lengthy else "equal")
        _label(axes, columns, rows)
        _words(axes, queries, keys)
        _numbers_or_rings(axes, image, head)
        _bar(axes, image)
        if several:
            axes.set_title(f"head {n}")
    return ax if several else ax[0]


def draw_gate(gate, ax=None, *, names=None):
    """Draw a gate over channels, (C,), as bars, with numbers if they are few. `names` are those of the channels."""
    gate = np.asarray(gate)
    expect(gate.ndim == 1 and gate.size > 0, "plot.draw_gate: gate", gate.shape, "(C,)")
    ax = ax or _new_axes(1, 4)[0]
    ink = _ink(ax)
    bars = ax.bar(np.arange(len(gate)), gate, color=LINES[0], edgecolor=ink, linewidth=0.5)
    if len(gate) <= 16:
        ax.bar_label(bars, [f"{g:.2f}".lstrip("0") for g in gate], fontsize=9, padding=2, color=ink)
    _label(ax, "channel", "gate")
    if names is not None:
        ax.set_xticks(np.arange(len(gate)), names, rotation=90)
        ax.set_xlabel("")
    if gate.min() >= 0 and gate.max() <= 1:
        ax.set_ylim(0, 1.1)
        ax.set_yticks([0, 0.5, 1])
    return ax


def draw_spatial(gate, ax=None, *, image=None, label=""):
    """Draw a gate over an image, (H, W); `image`, any (h, w), lies below it in grey.

    Contours, which the scale has too, enclose the most (drawn through) and the least (dashed) of what is around.
    """
    gate = np.asarray(gate)
    expect(gate.ndim == 2 and gate.size > 0, "plot.draw_spatial: gate", gate.shape, "(H, W)")
    ax = ax or _new_axes(1, 4)[0]
    height, width = gate.shape
    edges = -0.5, width - 0.5, height - 0.5, -0.5
    if image is not None:
        ax.imshow(image, cmap="gray", vmin=-0.5, vmax=1.5, extent=edges, interpolation="antialiased")
    ax.set_xticks([])
    ax.set_yticks([])
    low, high = np.quantile(gate, [0.005, 0.995])
    same = high - low <= 1e-9 * max(abs(high), abs(low))
    alpha = 1 if image is None else 0.7
    shown = ax.imshow(gate, cmap=MAP, alpha=alpha, extent=edges, vmin=low - same, vmax=high + same)
    if same:
        ax.set_xlabel(f"{high:.3g}{f' {label}' if label else ''}, everywhere")
        return ax
    bar = _bar(ax, shown, label)
    from scipy.ndimage import gaussian_filter  # slow to import

    smooth = gaussian_filter(gate, max(gate.shape) / 24)
    levels = np.quantile(smooth, [0.25, 0.9])
    if min(gate.shape) >= 8 and levels[1] - levels[0] > 1e-6 * abs(levels[1]):
        styles = {"colors": ["white", "black"], "linestyles": ["--", "-"], "linewidths": 1.2}
        ax.contour(smooth, levels, **styles)
        for level, colour, line in zip(levels, styles["colors"], styles["linestyles"]):
            bar.ax.axhline(level, color=colour, linestyle=line, linewidth=1.2)
    return ax


def draw_gradients(norms, ax=None):
    """Draw the norm of each argument's gradient, {name: norm}, as bars on a logarithmic scale, with numbers."""
    expect(len(norms) > 0, "plot.draw_gradients: norms", norms, "one at least")
    ax = ax or _new_axes(1, 4)[0]
    values = np.array(list(norms.values()))
    positive = values[values > 0]
    least = positive.min() / 10 if positive.size else 0.1
    bars = ax.barh(np.arange(len(values)), np.maximum(values, least), color=LINES[0], height=0.7)
    ax.set_xscale("log")
    ax.set_xlim(least, (positive.max() if positive.size else 1) * 20)
    ax.bar_label(bars, [f"{v:.1e}" if v else "0" for v in values], fontsize=9, padding=3, color=_ink(ax))
    ax.set_yticks(np.arange(len(values)), list(norms))
    ax.invert_yaxis()
    ax.set_xlabel("norm of the gradient")
    return ax


def _new_axes(count, size):
    """`count` Axes side by side, in a new figure."""
    matplotlib()
    from matplotlib import pyplot

    _, axes = pyplot.subplots(1, count, figsize=(size * count, size), squeeze=False, layout="constrained")
    return list(axes[0])


def _bar(ax, image, label=""):
    """The scale beside it, with few and short numbers."""
    from matplotlib.ticker import MaxNLocator

    low, high = image.get_clim()
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10])
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.75, pad=0.02, ticks=ticks, label=label)
    digits = max(0, 1 - math.floor(math.log10(high - low)))
    bar.ax.yaxis.set_major_formatter(f"{{x:.{digits}f}}")
    return bar


def _label(ax, x, y):
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)


def _words(ax, queries, keys):
    if keys is not None:
        ax.set_xticks(np.arange(len(keys)), keys, rotation=90)
        ax.set_xlabel("")
    if queries is not None:
        ax.set_yticks(np.arange(len(queries)), queries)
        ax.set_ylabel("")


def _numbers_or_rings(ax, image, weights):
    """What the colours say, without them."""
    short = weights.min() > -0.005 and weights.max() < 1.005
    if max(weights.shape) <= (9 if short else 6):
        for (i, j), w in np.ndenumerate(weights):
            light = image.norm(w) > 0.55
            text = re.sub(r"^(-?)0\.", r"\1.", f"{w:.2f}")
            ax.text(j, i, text, ha="center", va="center", fontsize=8, color="black" if light else "white")
    elif weights.shape[0] <= 64:
        columns = weights.argmax(axis=1)
        size = min(5, 160 / max(weights.shape))
        for colour, width in (("white", 2), ("black", 0.8)):
            ax.plot(columns, np.arange(len(weights)), "o", markersize=size, markerfacecolor="none",
                    markeredgecolor=colour, markeredgewidth=width)  # fmt: skip


def _ink(ax):
    return ax.xaxis.label.get_color()


# --- the flow of gradients: arrays to draw ------------------------------------------------------------------


def gradient_norms(mechanism, call, seed=0):
    """{argument: the norm of its gradient}, for a random gradient of the output: {"x": 0.3, "params.w1": 0.02}."""
    out, saved = mechanism.forward(*call.args, **call.options)
    rng = np.random.default_rng(seed)
    grads = mechanism.backward(tree_map(lambda y: rng.normal(size=y.shape), out), saved)
    paths = [f"{name}.{path}" for name, grad in zip(mechanism.forward.hints, grads) for path, _ in leaves((grad,))]
    names = [path.replace(".0", "", 1) for path in paths]  # "params.0.w1" is params.w1
    return {name: float(np.sqrt((g * g).sum())) for name, (_, g) in zip(names, leaves(grads))}


def gradient_flow(mechanism, call, argument=0, seed=0):
    """How much the output at t depends on an argument at s, for sequences (N, T, D) and (N, S, E): norms (T, S).

    Each is the norm over E of the gradient that arrives at s, where the output has a random gradient at t and none
    elsewhere. Of several outputs the first counts.
    """
    first = _first_leaf(mechanism.forward(*call.args, **call.options)[0])
    places = [(0, t) for t in range(first.shape[1])]
    grads = (_gradient_from(mechanism, call, place, argument, seed) for place in places)
    return np.array([np.sqrt((g[0] ** 2).sum(axis=-1)) for g in grads])


def receptive_field(mechanism, call, pixel, seed=0):
    """How much the output (N, C, H, W) at a pixel (i, j) depends on the image at every other: norms (H, W)."""
    g = _gradient_from(mechanism, call, (0, slice(None), *pixel), 0, seed)
    return np.sqrt((g[0] ** 2).sum(axis=0))


def _gradient_from(mechanism, call, place, argument, seed):
    """The gradient of an argument, where that of the first output is random at a place and 0 elsewhere."""
    out, saved = mechanism.forward(*call.args, **call.options)
    dout = tree_map(np.zeros_like, out)
    there = _first_leaf(dout)[place]
    _first_leaf(dout)[place] = np.random.default_rng(seed).normal(size=there.shape)
    return mechanism.backward(dout, saved)[argument]


def _first_leaf(tree):
    return next(leaf for _, leaf in leaves((tree,)))


# --- the picture of a mechanism -----------------------------------------------------------------------------


class Shown(NamedTuple):
    """One array that is drawn, of the first item of a batch."""

    name: str  # its path in Saved, or "out"
    axes: list  # without that of the batch
    value: np.ndarray
    part: bool = False  # of the input only: one tile, one sequence of several


def attention_of(mechanism, out, saved):
    """The attention maps of one call: that which ABOUT names, and those of the mechanisms inside; Shown after Shown."""
    found = []
    _collect(mechanism.module if hasattr(mechanism, "module") else mechanism, saved, "", found)
    result = axes_of(_first(mechanism.forward.result_hint))
    if not found and result[:1] == ["H"] and len(result) == 3:  # a bias of the scores is itself a map
        found.append(Shown("out", result, out))
    return found


def _collect(module, saved, path, found):
    about = module.ABOUT
    if about.weights and getattr(saved, about.weights) is not None:
        axes, value = axes_of(module.Saved.__annotations__[about.weights]), getattr(saved, about.weights)
        batch = next((n for n, letter in enumerate(axes) if letter in ("N", "B")), None)
        if batch is not None:
            axes, value = axes[:batch] + axes[batch + 1 :], value.take(0, axis=batch)
        if axes[-2:] == ["H", "W"] and (value == value[:1]).all():
            value = value[:1]  # one map for all channels
        shown = Shown(path + about.weights, axes, value, part="." in path and path.split(".")[-2].isdigit())
        if not any(np.array_equal(shown.value, other.value) for other in found):
            found.append(shown)
    _look_inside(saved, path, found)


def _look_inside(tree, path, found):
    names = getattr(tree, "_fields", range(len(tree)))
    for name, child in zip(names, tree):
        if not isinstance(child, tuple):
            continue
        if type(child).__name__ == "Saved" and _is_attention(type(child)):
            _collect(sys.modules[type(child).__module__], child, f"{path}{name}.", found)
        elif not hasattr(child, "_fields") and not found:  # tiles, packed sequences; steps of what is drawn already
            _look_inside(child, f"{path}{name}.", found)


def _is_attention(thing):
    """Whether it is of a file of refattn.attention."""
    return thing.__module__.startswith(attention.__name__ + ".")


def _first(hint):
    """Of the hint of (out, saved), that of out."""
    return get_args(hint)[0] if get_origin(hint) is tuple else hint


class NothingToDraw(ValueError):
    """There is no attention map."""


def draw(mechanism, data=None, *, seed=0, panels=PANELS, beside=True, figure=None):
    """A Figure of what a mechanism attends to, on a Picture or a Sentence; without one, on a photograph or a sentence.

    `mechanism` is a name, or anything that has forward, example, Saved and ABOUT. There is a picture for every map, up
    to `panels` of them: the title says how many there are; `beside` them stands the image. `figure` is an empty one of
    your own.
    """
    mechanism = find(mechanism) if isinstance(mechanism, str) else mechanism
    kind = sees(mechanism)
    data = usual(kind) if data is None else data
    wanted = {"image": Picture, "sequence": Sentence}.get(kind, object)
    given = type(data).__name__
    expect(isinstance(data, wanted), "plot.draw: data", given, f"a {wanted.__name__}, for {mechanism}")
    shown = []
    if mechanism.ABOUT.weights or _is_attention(mechanism.forward):
        call = call_on(mechanism, data, seed)
        shown = attention_of(mechanism, *mechanism.forward(*call.args, **call.options))
    for one in shown:
        if not np.isfinite(one.value).all():
            raise ValueError(f"{one.name} of {mechanism} is not finite everywhere on this input")
    if not shown:
        raise NothingToDraw(f"{mechanism} has no attention map: there is nothing to draw")
    found = [("the image", lambda ax: _plain(ax, data.grey))] if kind == "image" and beside else []
    for one in shown:
        found += _panels(one, data if kind == "image" else getattr(data, "words", ()))
    return _sheet(str(mechanism), found, panels, figure)


def _sheet(title, found, most, figure):
    """A Figure of (title, paint) after (title, paint), `most` of them."""
    panels = found[:most]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    if figure is None:
        matplotlib()
        from matplotlib.figure import Figure

        figure = Figure()
    figure.set_size_inches(3.4 * columns, 3.3 * rows + 0.3)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (name, paint) in zip(grid.flat, panels):
        paint(ax)
        ax.set_title(name)
    more = f", {len(panels)} of {len(found)} pictures" if len(found) > len(panels) else ""
    figure.suptitle(title + more, fontsize=12)
    return figure


def _panels(shown, data):
    """Yield (title, paint) for one array, by its axes."""
    name, axes, value, part = shown
    if not isinstance(data, Picture):
        yield from _maps(name, axes, value, data)
    elif axes == ["C"]:
        yield name, lambda ax: draw_gate(value, ax, names=_names(len(value), data.names))
    elif [a[0] for a in axes[-2:]] == ["H", "W"]:
        for channel, gate in enumerate(value[:PANELS]):
            channels = _names(len(value), data.names) or [f"channel {n}" for n in range(len(value))]
            title = name if len(value) == 1 else f"{name}\n{channels[channel]}"
            yield title, lambda ax, gate=gate: draw_spatial(gate, ax, image=data.grey)
    elif axes[0] in ("C", "M") and value.ndim == 2:
        names, square = _names(len(value), data.names), axes[0] == axes[1]
        words = {"queries": names, "keys": names if square else None}
        kinds = {"rows": "channel", "columns": "channel" if square else "branch"}
        yield name, lambda ax: draw_attention(value, ax, **words, **kinds)
    else:
        yield from _from_pixels(name, value, None if part else data.grey)


LETTERS = {"H": "head", "*H": "head", "heads": "head", "S": "part"}  # of axes before the last two


def _maps(name, axes, value, words):
    """A map for every head; if each has one query, a map with a row for every head."""
    value = np.atleast_2d(value)
    maps = value.reshape(-1, *value.shape[-2:])
    if maps.shape[1] == 1 and len(maps) > 1:
        yield name, lambda ax: draw_attention(maps[:, 0], ax, keys=_names(maps.shape[-1], words), rows="head")
        return
    rows, columns = (_names(length, words) for length in maps.shape[1:])
    said, lead = {"queries": rows, "keys": columns}, LETTERS.get(axes[-3], "map") if len(axes) > 2 else "map"
    if axes[-2:] == ["H", "Q"]:  # of what merges parts
        said |= {"rows": "head", "columns": "query"}
    for n, weights in enumerate(maps[:HEADS]):
        title = name if len(maps) == 1 else f"{name}\n{lead} {n}"
        yield title, lambda ax, weights=weights: draw_attention(weights, ax, **said)


def _names(length, names):
    """The names of an axis that is as long as there are names; else None."""
    return names if length == len(names) <= 32 else None


def _from_pixels(name, weights, image):
    """Of weights (..., queries, pixels): where three queries look, or where the one of each head looks."""
    maps = weights.reshape(-1, *weights.shape[-2:])
    extra, height, width = _plane(maps.shape[-1])
    if maps.shape[1] == 1:
        queries = [(f"head {h}", h, 0, None) for h in range(min(len(maps), HEADS))]
    else:
        own = math.isqrt(maps.shape[1])
        spots = [(own // 4, own // 2), (own // 2, own // 2), (3 * own // 4, own // 5)]
        queries = [("from the cross", 0, i * own + j, ((i + 0.5) / own, (j + 0.5) / own)) for i, j in spots]
    for title, head, query, spot in queries:
        gate = maps[head, query, extra:].reshape(height, width) * maps.shape[-1]
        yield f"{name}\n{title}", lambda ax, gate=gate, spot=spot: _look(ax, gate, spot, image)


def _plane(length):
    """(what stands before the pixels, height, width) of a square image, and of one that a mean goes before."""
    side = math.isqrt(length)
    return length - side * side, side, side


def _look(ax, weights, spot, image):
    draw_spatial(weights, ax, image=image, label="times the mean")
    if spot is not None:
        height, width = weights.shape
        for colour, size, thick in (("white", 11, 4), ("black", 10, 1.8)):
            ax.plot(spot[1] * width - 0.5, spot[0] * height - 0.5, "x", color=colour, markersize=size,
                    markeredgewidth=thick)  # fmt: skip


def _plain(ax, grey):
    ax.imshow(grey, cmap="gray", interpolation="antialiased")
    ax.set_xticks([])
    ax.set_yticks([])


# --- refattn plot -------------------------------------------------------------------------------------------


def plot(name, source=None, out=None, *, seed=0, dark=False, length=16):
    """What `refattn plot` does: draw a mechanism, or a mask such as "causal() & window(3, 0)". Returns what to print.

    `source` is a file for refattn.subjects.read_input. `out` is the file that is written; without it a window opens, or
    NAME.png is written where there is no display. `length` is that of a mask, in queries and keys. What cannot be done
    is a ValueError, an ImportError or an OSError that says why.
    """
    matplotlib()
    with style(dark):
        figure = _window() if out is None else None
        shown = figure is not None
        if _names_a_mask(name):
            if source is not None:
                raise ValueError(f"{name} is a mask, which takes no input")
            figure = _figure_of_mask(name, length, figure)
        else:
            mechanism = _mechanism(name)
            data = None if source is None else read_input(source, mechanism)
            figure = draw(mechanism, data, seed=seed, figure=figure)
        if shown:
            from matplotlib import pyplot

            pyplot.show()
            return ""
        target = Path(out or f"{'-'.join(re.findall(r'[a-z0-9_]+', name))}.png")
        save(figure, target)
        return f"{name} is drawn in {target}"


def _window():
    """An empty figure with a window, or None where there is no display."""
    from matplotlib import pyplot

    try:
        figure = pyplot.figure()
    except ImportError:  # somebody asked for a window, where there can be none
        return None
    if figure.canvas.required_interactive_framework is None:
        pyplot.close(figure)
        return None
    return figure


def _mechanism(name):
    try:
        return find(name)
    except KeyError:
        near = difflib.get_close_matches(name, [*everything(), *MASKS], 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no mechanism and no mask {name!r}{hint} (refattn list shows all)") from None


# --- masks, by name -----------------------------------------------------------------------------------------

MASKS = {name: getattr(masks, name) for name in masks.__all__ if name != "Mask"}


def _names_a_mask(text):
    return text in MASKS or bool(re.search(r"\W", text))


def _figure_of_mask(text, length, figure):
    mask = read_mask(text)
    try:
        pictures = list(mask.pictures(length, length))
    except ValueError as error:
        raise ValueError(f"{text} cannot be drawn for {length} queries and keys: {error}; try --length") from None
    panels = [(title, lambda ax, allowed=allowed: _allowed(ax, allowed)) for title, allowed in pictures]
    return _sheet(repr(mask), panels, PANELS, figure)


def read_mask(text):
    """The mask that an expression of refattn.masks makes: "causal() & ~window(2, 0)". Nothing else is evaluated."""
    name = text.strip().partition("(")[0]
    try:
        return _mask(ast.parse(f"{text}()" if text in MASKS else text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error).replace("__init__() ", "")
        fields = [field.name for field in dataclasses.fields(MASKS[name])] if name in MASKS else []
        form = f"; it is written {name}({', '.join(fields)})" if fields else ""
        raise ValueError(f"{text} is no mask: {reason}{form}") from None


def _mask(node):
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        one, other = _mask(node.left), _mask(node.right)
        return one & other if isinstance(node.op, ast.BitAnd) else one | other
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_mask(node.operand)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"expected one of {', '.join(MASKS)}, with arguments, and &, |, ~ between them")
    if node.func.id not in MASKS:
        near = difflib.get_close_matches(node.func.id, MASKS, 3, 0.5) or MASKS
        raise ValueError(f"refattn.masks has no {node.func.id}, expected {' or '.join(near)}")
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    return MASKS[node.func.id](*map(ast.literal_eval, node.args), **options)


# --- files --------------------------------------------------------------------------------------------------


def save(figure, path, dpi=144):
    """Write a figure, in the format that the name ends with, whole or not at all."""
    path = Path(path)
    kinds = sorted(figure.canvas.get_supported_filetypes())
    kind = path.suffix[1:].lower()
    if kind not in kinds:
        raise ValueError(f"{path} does not say in which format: expected a name that ends in one of {', '.join(kinds)}")
    content = io.BytesIO()
    figure.savefig(
        content, format=kind, dpi=dpi, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None
    )
    write_whole(path, content.getvalue())


def write_whole(path, content):
    """Write bytes to a file, whole or not at all."""
    try:
        report.write_bytes(path, content)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
