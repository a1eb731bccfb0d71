"""A report as one page of HTML that needs nothing else: verdicts, the explanation, and maps of error over bound.

    pathlib.Path("report.html").write_text(refattn.check(my_attention, like="dot_product_attention").to_html())

The maps show a failing call as it was drawn, one for every item and head of an array, up to MAPS of them, the worst
first.
They can be read without colour: what is outside its bound is hatched, and the worst element is marked and named.
Pictures are drawn twice, for light and for dark. They need matplotlib.
"""

import base64
import html
import io
import platform

import numpy as np

import refattn
from refattn.oracle.compare import CONFORMS, OUTSIDE, SUSPECT

MAPS = 6  # of each array
LEAST, MOST = 1e-3, 1e3  # of the colours: error / allowed
CELLS = 512  # rows or columns of a map; of a larger one, the part around the worst element
THEMES = {"light": ("white", "#1b1f24"), "dark": ("#16191d", "#e4e7eb")}  # of the pictures: paper, ink
WORDS = {CONFORMS: "good", SUSPECT: "doubtful", OUTSIDE: "doubtful"}

STYLE = """
:root { color-scheme: light dark; --paper: white; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --box: #f6f8fa;
        --good: #1a7f37; --bad: #cf222e; --doubtful: #9a6700; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #e4e7eb; --soft: #9aa4af; --line: #373e47; --box: #1f242a;
          --good: #57ab5a; --bad: #f47067; --doubtful: #d9a441; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); } .doubtful { color: var(--doubtful); }
.kind { font-weight: 700; white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: 14px/1.45 ui-monospace, monospace; }
pre { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow: auto;
      max-height: 40rem; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); }
img { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; }
"""


def page(report):
    """The page of a report."""
    draw = drawing()  # before all else: without matplotlib there is no page
    word, tone = _headline(report)
    promise = report.dtype if report.arithmetic == report.dtype else f"{report.dtype}, arithmetic {report.arithmetic}"
    promise += f", convention {report.convention}" if report.convention else ""
    title = f"{report.candidate}, like {report.like}"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<title>{_text(title)}: {word}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f'<header>\n<h1>{_text(title)}: <span class="{tone}">{word}</span></h1>',
        f'<p class="soft">{_text(report.framework)} {_text(promise)}; {report.examples} examples</p>',
        "</header>\n<main>",
        _section("Verdicts", _verdicts(report)),
        _section("What explains it", _explanations(report)),
        _section("The smallest case that fails", _case(report.smallest)),
        _section("Where the errors are, in a larger one", _case(report.largest or report.smallest, draw)),
        _section("Reproduce it", _script(report)),
        _section("What was tried", _tried(report)),
    ]
    versions = f"refattn {refattn.__version__}, NumPy {np.__version__}, Python {platform.python_version()}"
    parts += [f'</main>\n<footer><p class="soft">{versions}; seed {report.seed}</p></footer>\n</body>\n</html>\n']
    return "\n".join(part for part in parts if part)


def _text(x):
    return html.escape(str(x))


def _section(title, content):
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""


def _headline(report):
    if not report.examples:
        return "NOT JUDGED", "doubtful"
    return ("conforms", "good") if report.ok else ("DIFFERS", "bad")


# --- words ---------------------------------------------------------------------------------------------------


def _verdicts(report):
    head = ("array", "verdict", "error / allowed", "differs in", "the worst element")
    rows = []
    for name, v in report.verdicts.items():
        differs = f"{report.failures.get(name, 0)} of {report.examples}"
        where = f'<br><span class="soft">in {_text(v.example)}</span>' if v.example and not v.conforms else ""
        rows.append(
            f'<tr><td><code>{_text(name)}</code></td><td class="kind {WORDS.get(v.kind, "bad")}">{_text(v.kind)}</td>'
            f'<td class="number">{"" if v.problem or not v.size else f"{v.ratio:.3g}"}</td>'
            f'<td class="number">{differs}</td><td>{_text(v)}{where}</td></tr>'
        )
    return _table(head, rows)


def _table(head, rows):
    if not rows:
        return ""
    columns = "".join(f'<th scope="col">{_text(column)}</th>' for column in head)
    rows = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _explanations(report):
    rows = [f"<li><code>{_text(e.name)}</code>: {_text(e.words)}</li>" for e in report.explanations]
    parts = ["<ol>", *rows, "</ol>"] if rows else []
    if report.consistent_with:
        parts.append(f"<p>Consistent with a coarser arithmetic: {_text(report.consistent_with)}.</p>")
    if report.where:
        parts.append(f"<p>Where: {_text(report.where)}.</p>")
    if not report.explanations and not report.consistent_with and report.smallest is not None:
        parts.append("<p>No mistake, convention or coarser arithmetic that refattn knows explains all of it.</p>")
    return "\n".join(parts)


def _script(report):
    return f"<pre>{_text(report.script())}</pre>" if report.smallest is not None else ""


def _tried(report):
    facts = [("inputs", ", ".join(f"{name} {count}" for name, count in report.families.items()))]
    facts += [("gradients", report.gradients if report.gradients == "judged" else f"not judged: {report.gradients}")]
    facts += [("never exercised", ", ".join(report.never))]
    facts += [("outside the model", f"{count} examples: {why}") for why, count in report.outside.items()]
    facts += [("passed over", f"{count} examples: {why}") for why, count in report.passed_over.items()]
    facts += [("departs, as is known", ", ".join(report.departures))]
    if report.accuracy:
        facts += [("accuracy", f"the reference's own error is at most {report.accuracy:.1e} of what is allowed")]
    rows = [f"<dt>{name}</dt><dd>{_text(fact)}</dd>" for name, fact in facts if fact]
    return "\n".join(["<dl>", *rows, "</dl>"])


# --- pictures ------------------------------------------------------------------------------------------------


def _case(trial, draw=None):
    """A trial: the call, and its verdicts, with maps if there is a function to draw them."""
    if trial is None:
        return ""
    parts = [f"<p><code>{_text(trial.words)}</code>, inputs of the family {_text(trial.family)}</p>"]
    for verdict in trial.verdicts:
        parts.append(f'<p><code>{_text(verdict.name)}</code>: <span class="kind {WORDS.get(verdict.kind, "bad")}">'
                     f"{_text(verdict.kind)}</span>. {_text(verdict)}</p>")  # fmt: skip
        ratio = None if draw is None else ratios(trial, verdict.name)
        if ratio is not None:
            parts.append(_figure(verdict.name, ratio, draw))
    return "\n".join(parts)


def ratios(trial, name):
    """|error| / bound of every element, at least two axes; None where there is nothing to compare."""
    expected, got, bound = trial.expected.get(name), trial.got.get(name), trial.bounds.get(name)
    if bound is None or bound.least is None or got is None or np.shape(got) != np.shape(expected) or not np.size(got):
        return None
    with np.errstate(all="ignore"):
        got = np.asarray(got).astype(np.float64)
        same = (got == expected) | (np.isnan(got) & np.isnan(expected))
        ratio = np.where(same, 0, np.abs(got - expected) / bound.least)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    return ratio.reshape((1,) * (2 - ratio.ndim) + ratio.shape)


def _figure(name, ratio, draw):
    """The maps of one array, each for light and for dark."""
    leads = sorted(np.ndindex(ratio.shape[:-2]), key=lambda lead: -ratio[lead].max())
    maps = [(lead, ratio[lead]) for lead in leads[:MAPS]]
    images = {theme: base64.b64encode(draw(name, maps, *colours)).decode() for theme, colours in THEMES.items()}
    outside, size = int((~(ratio <= 1)).sum()), ratio.size
    words = f"{name}: |error| / allowed; {outside} of {size} elements outside"
    if len(leads) > 1:
        words += f"; {len(maps)} of {len(leads)} items and heads, the worst first"
    return (
        f'<figure>\n<picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="data:image/png;base64,{images["dark"]}">\n'
        f'<img alt="{_text(words)}" src="data:image/png;base64,{images["light"]}"></picture>\n'
        f"<figcaption>{_text(words)}. Hatched: outside. Circle: the worst element.</figcaption>\n</figure>"
    )


def drawing():
    """The function draw(name, maps, paper, ink) that makes a PNG; an ImportError without matplotlib."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(f"matplotlib cannot be imported ({error}): pip install 'refattn[plot]'") from error

    def draw(name, maps, paper, ink):
        columns = min(3, len(maps))
        rows = -(-len(maps) // columns)
        figure = Figure(figsize=(1.5 + 3.4 * columns, 0.4 + 3 * rows), layout="constrained", facecolor=paper)
        grid = figure.subplots(rows, columns, squeeze=False)
        norm = LogNorm(LEAST, MOST, clip=True)
        for axes in grid.flat[len(maps) :]:
            axes.set_visible(False)
        for axes, (lead, ratio) in zip(grid.flat, maps):
            part, top, left = _around_the_worst(ratio)
            edges = left - 0.5, left + part.shape[1] - 0.5, top + part.shape[0] - 0.5, top - 0.5
            shown = np.clip(part, LEAST, MOST)
            image = axes.imshow(shown, norm=norm, cmap="cividis", extent=edges, aspect="auto", interpolation="nearest")
            _hatch(axes, part, edges)
            _worst(axes, part, top, left)
            where = f"{name}{list(lead)}" if lead else name
            axes.set_title(f"{where}: at most {ratio.max():.3g}", color=ink, fontsize="medium")
            axes.tick_params(colors=ink)
            for spine in axes.spines.values():
                spine.set_color(ink)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        bar = figure.colorbar(image, ax=list(grid.flat), extend="both", label="|error| / allowed")
        bar.ax.axhline(1, color="white", linewidth=3)
        bar.ax.axhline(1, color="black", linewidth=1)
        bar.ax.tick_params(colors=ink)
        bar.set_label("|error| / allowed", color=ink)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()

    return draw


def _around_the_worst(ratio):
    """At most CELLS rows and columns, and where they begin."""
    i, j = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    top, left = (int(np.clip(at - CELLS // 2, 0, max(0, n - CELLS))) for at, n in zip((i, j), ratio.shape))
    return ratio[top : top + CELLS, left : left + CELLS], top, left


def _hatch(axes, ratio, edges):
    """Hatch what is outside its bound, in black and white, so that it is seen on any colour."""
    outside = ~(ratio <= 1)
    if not outside.any():
        return
    fine = max(2, min(24, 1024 // max(ratio.shape)))  # dots to a cell
    i, j = np.indices([n * fine for n in ratio.shape])
    stripe = (i + j) % 8
    dots = np.zeros((*stripe.shape, 4))
    dots[..., :3] = (stripe >= 2)[..., None]
    dots[..., 3] = (stripe < 4) & np.kron(outside, np.ones((fine, fine), bool))
    axes.imshow(dots, extent=edges, aspect="auto", interpolation="nearest")


def _worst(axes, ratio, top, left):
    i, j = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    for colour, width in (("white", 4), ("black", 1.5)):
        axes.plot(left + j, top + i, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour,
                  markeredgewidth=width)  # fmt: skip
    left_half, upper_half = j < ratio.shape[1] / 2, i < ratio.shape[0] / 2
    axes.annotate(
        f"{ratio[i, j]:.3g} at [{top + i}, {left + j}]",
        (left + j, top + i),
        xytext=(12 if left_half else -12, -12 if upper_half else 12),
        textcoords="offset points",
        ha="left" if left_half else "right",
        va="top" if upper_half else "bottom",
        color="black",
        bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "black"},
    )
