"""Draws the pictures of the docs, each for a light and a dark page, before a build: `draw(folder)`.

A second build draws nothing: the folder remembers what its pictures were made from, which is every file of the package
that they show, this one, and the versions of NumPy and matplotlib.
"""

import hashlib
from pathlib import Path

import numpy as np
from generate import FAMILIES

import refattn
from refattn import plot, subjects
from refattn.attention.dot_product import scaled_dot_product, streaming
from refattn.attention.temporal import luong_encoder_decoder, multiplicative
from refattn.core import Call
from refattn.examples import blocked_attention_with_a_bug
from refattn.oracle import html
from refattn.oracle.arithmetic import ARITHMETICS, BFLOAT16, round_to
from refattn.oracle.bounds import attention_bounds
from refattn.registry import mechanisms

PICTURE = "What it attends to, with parameters that were never trained, on what [the gallery](../gallery.md) looks at:"
MASKS = (
    "causal()", "causal() & window(3, 0)", "window(2, 2)", "causal() & chunked(4)", "prefix(5)", "dilated(2, 3)",
    "causal() & (window(3, 0) | strided(4))", "document(lengths=(5, 4, 7)) & causal()", "neighbourhood(4, 4, 3)",
)  # fmt: skip
LENGTHS = 2 ** np.arange(5, 14)
THEMES = "light", "dark"


def draw(folder):
    """NAME-light.png and NAME-dark.png in `folder`, and gallery.txt, which shows those of all mechanisms."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    stamp, made_from = folder / "made-from.txt", _inputs()
    if stamp.exists() and stamp.read_text() == made_from:
        return
    usual = {kind: subjects.usual(kind) for kind in ("image", "sequence", "numbers")}
    has_picture = {m.name: _of_mechanism(m, usual, folder) for m in mechanisms().values()}
    parts = {"photograph": _photograph, "masks": _masks, "rounding": _rounding, "gradients": _gradients}
    for name, part in parts.items():
        paint = part()
        for theme in THEMES:
            with plot.style(theme == "dark"):
                plot.save(paint(), folder / f"{name}-{theme}.png", dpi=110)
    _errors(folder)
    plot.write_whole(folder / "gallery.txt", _gallery(has_picture).encode())
    plot.write_whole(stamp, made_from.encode())


def on_derivation_pages(app, docname, source):
    """Put the picture of a mechanism, if it has one, at the end of the first section of its derivation page."""
    folder, _, name = docname.rpartition("/")
    here = Path(app.srcdir) / "drawn"
    if folder == "derivations" and (here / f"{name}-light.png").exists():
        model, heading, rest = source[0].partition("\n## Forward\n")
        shown = "\n".join(_both(name, f"What {name} attends to", "../drawn"))
        source[0] = f"{model}\n{PICTURE}\n\n{shown}{heading}{rest}"


def _inputs():
    """A line that changes with whatever a picture is made from."""
    import matplotlib

    package = Path(refattn.__file__).parent
    files = [Path(__file__), *sorted(package.rglob("*.py"))]
    content = (path.read_bytes() for path in files if "frameworks" not in path.parts)
    digest = hashlib.sha256(b"\0".join(content)).hexdigest()
    return f"{digest}, NumPy {np.__version__}, matplotlib {matplotlib.__version__}\n"


# --- the gallery --------------------------------------------------------------------------------------------


def _of_mechanism(m, usual, folder):
    """Draw what it attends to; False if there is nothing to draw."""
    kind = subjects.sees(m)
    for theme in THEMES:
        with plot.style(theme == "dark"):
            try:
                figure = plot.draw(m, usual[kind], panels=3 if kind == "image" else 2, beside=False)
            except plot.NothingToDraw:
                return False
            plot.save(figure, folder / f"{m.name}-{theme}.png", dpi=100)
    return True


def _gallery(has_picture):
    """The part of gallery.md that lists the mechanisms, family by family."""
    lines = []
    for family, question in FAMILIES.items():
        ours = [m for m in mechanisms().values() if m.family == family]
        if not ours:  # primitives, which are no mechanisms
            continue
        lines += [f"## {family.replace('_', ' ')}", "", f"*{question}.*", ""]
        for m in ours:
            if has_picture[m.name]:
                lines += [f"[{m.name}](reference/mechanisms/{m.name}.md): {m.title}.", "", *_both(m.name, m.title)]
        without = [f"[{m.name}](reference/mechanisms/{m.name}.md)" for m in ours if not has_picture[m.name]]
        if without:
            lines += [f"Without an attention map: {', '.join(without)}.", ""]
    return "\n".join(lines)


def _both(name, words, folder="drawn"):
    """A picture on a page, the light or the dark one."""
    for theme in THEMES:
        said = f":class: only-{theme}", f":alt: {words}", ":loading: lazy"  # nobody fetches those of the other theme
        yield from (f"```{{image}} {folder}/{name}-{theme}.png", *said, "```", "")


# --- single pictures: each computes what it needs once, and returns a function that draws it ---------------


def _photograph():
    data = subjects.usual("image")
    names = ["all", *data.names]
    maps = [data.grey, *data.features]

    def paint():
        figure, axes = _figure(2, 5, 11, 4.8)
        axes[-1].set_visible(False)
        for ax, name, pixels in zip(axes, names, maps):
            ax.imshow(pixels, cmap="gray", vmax=np.quantile(pixels, 0.995), interpolation="antialiased")
            ax.set_title(name)
            ax.set_xticks([])
            ax.set_yticks([])
        return figure

    return paint


def _masks():
    drawn = [(text, plot.read_mask(text)) for text in MASKS]

    def paint():
        figure, axes = _figure(3, 3, 9.5, 10)
        for ax, (text, mask) in zip(axes, drawn):
            plot.draw_mask(mask, 16, 16, ax)
            ax.set_title(text.replace(" & (", "\n& ("))
        return figure

    return paint


def _rounding():
    lines = {
        "float32": ("plain", "in blocks of 64", "model: float32"),
        "bfloat16": ("every result stored", "in blocks, float32 inside", "in blocks, sums stored", "model: bf16_flash"),
    }
    looks = [("o", "-"), ("s", "--"), ("^", "-.")]
    found = [_errors_at(int(length)) for length in LENGTHS]

    def paint():
        figure, axes = _figure(1, 2, 10, 4.2)
        for ax, (title, (*computed, model)) in zip(axes, lines.items()):
            for name, (mark, dashes), colour in zip(computed, looks, plot.LINES):
                values = [errors[name] for errors in found]
                ax.loglog(LENGTHS, values, marker=mark, linestyle=dashes, color=colour, markersize=5, label=name)
            ax.loglog(LENGTHS, [errors[model] for errors in found], ":", color=plot.LINES[-1], label=model)
            ax.set_title(title)
            ax.set_xlabel("keys")
            ax.set_ylabel("error / value, both root mean square")
            ax.set_xscale("log", base=2)
            ax.grid(alpha=0.25)
            ax.legend()
        return figure

    return paint


def _errors_at(length):
    """{name: the error of attention over so many keys, computed like that}, relative to the output."""
    rng = np.random.default_rng(length)
    q, k, v = (_bfloat16(rng.normal(size=(1, 1, count, 64))) for count in (32, length, length))
    exact = scaled_dot_product.forward(*(x.astype(np.float64) for x in (q, k, v)))[0]
    outs = {
        "plain": scaled_dot_product.forward(q, k, v)[0],
        "in blocks of 64": streaming.forward(q, k, v, block=(32, 64), jobs=1)[0],
        "every result stored": _stored(q, k, v),
        "in blocks, float32 inside": _in_blocks(q, k, v, lambda x: x),
        "in blocks, sums stored": _in_blocks(q, k, v, _bfloat16),
    }
    errors = {name: out - exact for name, out in outs.items()}
    call = Call(tuple(x.astype(np.float64) for x in (q, k, v)), {})
    for name in ("float32", "bf16_flash"):
        errors[f"model: {name}"] = attention_bounds(call, None, ARITHMETICS[name])["out"].sd
    return {name: float(np.sqrt(np.mean(e**2) / np.mean(exact**2))) for name, e in errors.items()}


def _bfloat16(x):
    return round_to(x.astype(np.float32), BFLOAT16)


def _stored(q, k, v):
    """Attention as a framework runs it in bfloat16, one operation after the other."""
    scores = _bfloat16(_bfloat16(q @ k.swapaxes(-1, -2)) / np.float32(np.sqrt(q.shape[-1])))
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return _bfloat16(_bfloat16(p / p.sum(axis=-1, keepdims=True)) @ v)


def _in_blocks(q, k, v, store, size=64):
    """Attention as a fused kernel runs it: `store` is what becomes of its running sums after each block of keys."""
    top = np.full((*q.shape[:-1], 1), -np.inf, q.dtype)
    total, y = np.zeros_like(top), np.zeros_like(q)
    for start in range(0, k.shape[-2], size):
        scores = q @ k[..., start : start + size, :].swapaxes(-1, -2) / np.float32(np.sqrt(q.shape[-1]))
        higher = np.maximum(top, scores.max(axis=-1, keepdims=True))
        shrink, p = np.exp(top - higher), np.exp(scores - higher)
        total = store(shrink * total + p.sum(axis=-1, keepdims=True))
        y = store(shrink * y + _bfloat16(p) @ v[..., start : start + size, :])
        top = higher
    return _bfloat16(y / total)


def _gradients():
    call, words = _encoder_decoder(), subjects.sentence().words
    weights = luong_encoder_decoder.forward(*call.args)[1].weights[0]
    flow = plot.gradient_flow(luong_encoder_decoder, call)
    norms = plot.gradient_norms(luong_encoder_decoder, call)

    def paint():
        figure, (left, middle, right) = _figure(1, 3, 15, 5)
        for ax, title, values in ((left, "attention weights", weights), (middle, "gradient that arrives", flow)):
            plot.draw_attention(values, ax, queries=words, keys=words)
            ax.set_title(title)
            ax.set_xlabel("source")
            ax.set_ylabel("target")
        plot.draw_gradients(norms, right)
        return figure

    return paint


def _encoder_decoder():
    """A call of an untrained one, which reads the sentence and writes it."""
    rng, x = np.random.default_rng(0), subjects.sentence().vectors[None, :, :16]
    params = luong_encoder_decoder.init(rng, 16, 16, 32, 32, multiplicative.init(rng, 32, 32))
    return Call((x, x, params), {})


def _errors(folder):
    """Error over bound of the bundled kernel with a bug, by the function that draws the maps of HTML reports.

    Later keys have the larger scores in head 0, so that the running maximum moves, and the smaller ones in head 1.
    """
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 2, 96, 32)).astype(np.float32) for _ in "qkv")
    rise = np.geomspace(0.1, 3, 96, dtype=np.float32)[:, None]
    k = k * np.stack([rise, rise[::-1]])
    call = Call(tuple(x.astype(np.float64) for x in (q, k, v)), {"is_causal": True})
    exact = scaled_dot_product.forward(*call.args, **call.options)[0]
    bound = attention_bounds(call, None, ARITHMETICS["float32"])["out"].least
    ratio = np.abs(blocked_attention_with_a_bug.forward(q, k, v, is_causal=True)[0] - exact) / bound
    maps = [((head,), ratio[0, head]) for head in range(2)]
    for theme in THEMES:
        content = html.drawing()("out", maps, *html.THEMES[theme])
        plot.write_whole(folder / f"errors-{theme}.png", content)


def _figure(rows, columns, width, height):
    """An empty figure, and its Axes in one list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
