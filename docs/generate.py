"""Writes what can be said from the code itself: the catalogue, a page per mechanism, indices, and the matrix."""

import inspect
import json
from pathlib import Path
from textwrap import dedent

from refattn import matrix
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT32
from refattn.oracle.conventions import PRESETS
from refattn.oracle.inputs import CHANGES
from refattn.oracle.inputs import FAMILIES as INPUTS
from refattn.oracle.laws import DECLARED, UNIVERSAL
from refattn.oracle.mistakes import MISTAKES
from refattn.registry import everything
from refattn.shapes import spelled

FAMILIES = {
    "channel": "What to look at",
    "spatial": "Where to look",
    "temporal": "When to look",
    "dot_product": "Self- and cross-attention",
    "mixed": "Hybrids",
    "primitives": "What they are made of",
}

CATALOGUE = """# Catalogue

Generated from the files themselves. *Evidence* says who, beside the gradient tests, confirms the forward pass:
recordings of the authors' code, a framework, the paper's equation written out again in plain Python, or a relation to
another mechanism.
"""

LAWS = """# Laws

A law is a plain function `(mechanism, call, rng)` that raises an `AssertionError` with a readable story. It works on
anything that has `forward`, `backward` and `ABOUT`, yours included. Every law has a wrong mechanism in the tests that
it rejects.
"""

JUDGE = """# What the judge knows

Generated from the code: the names that `refattn check` takes, and those that it gives. What they mean is explained in
[Check your own implementation](../how-to/check-your-own.md), [Rounding](../explanation/rounding.md) and
[Verdicts](../explanation/verdicts.md).
"""


DERIVATIONS = """# Derivations

How every backward pass here was found: the model, its picture, the forward pass, the derivation step by step, the code,
and at the end of each page its last formula, evaluated as it stands there and compared with the code. How to read them:
[Deriving a backward pass](../explanation/deriving-a-backward.md).
"""

FINDINGS = """# Findings

Where a framework departs from the reference, and from what it says itself: the smallest case, what comes out, what is
right. Each script runs in the tests, wherever the framework is installed. What conforms is in
[the matrix](../reference/conformance.md).
"""


def pages(folder):
    """The pages below `folder`, which is docs/reference, and the indices beside it; only what changed is written."""
    written = set()
    for m in everything().values():
        place = "primitives" if m.family == "primitives" else "mechanisms"
        written.add(_write(folder / place / f"{m.name}.md", _page(m)))
    _write(folder / "catalogue.md", _catalogue())
    _write(folder / "laws.md", _laws())
    _write(folder / "judge.md", _judge())
    _write(folder / "conformance.md", matrix.page(json.loads((folder / "conformance.json").read_text())))
    _write(folder.parent / "derivations" / "index.md", _derivations())
    _write(folder.parent / "findings" / "index.md", _findings(folder.parent / "findings"))
    for place in ("mechanisms", "primitives"):
        for stale in set((folder / place).glob("*.md")) - written:
            stale.unlink()


def _write(path, text):
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def _page(m):
    about = m.ABOUT
    doc = inspect.cleandoc(m.module.__doc__)
    title, _, body = doc.partition("\n")
    derived = f"[derived step by step](../../derivations/{m.name}.md)"
    lines = [f"# {title.rstrip('.')}", "", f"`{m.module.__name__}`, {derived}.", "", "```text", body.strip(), "```", ""]
    for kind in ("Params", "Stats", "State", "Out"):
        if hasattr(m.module, kind):
            lines += [f"## {kind}", "", "```text", spelled(getattr(m.module, kind)), "```", ""]
    lines += ["## Signature", "", "```text", spelled(m.forward), "", spelled(m.backward), "```", ""]
    lines += ["## Evidence", "", f"* witnesses of the forward: {', '.join(about.witnesses) or 'gradient only'}"]
    lines += [f"* declared laws: {', '.join(f'`{law}`' for law in about.laws) or 'none beyond the universal ones'}"]
    lines += [f"* exempt from `{law}`: {reason}" for law, reason in about.exempt]
    source = Path(inspect.getsourcefile(m.module)).read_text()
    code = source.partition('"""\n\n')[2]  # what follows the docstring, which stands above
    return "\n".join([*lines, "", "## Source", "", "```python", dedent(code).strip(), "```", ""])


def _row(m, place):
    evidence = ", ".join(m.ABOUT.witnesses) or "gradient only"
    return f"| [{m.name}]({place}/{m.name}.md) | {m.title} | {m.paper or '—'} | {evidence} |"


def _catalogue():
    lines = [CATALOGUE]
    for family, question in FAMILIES.items():
        place = "primitives" if family == "primitives" else "mechanisms"
        lines += [f"## {family.replace('_', ' ')}", "", f"*{question}.*", "", "| file | what | paper | evidence |"]
        lines += ["|---|---|---|---|"]
        lines += [_row(m, place) for m in everything().values() if m.family == family]
        lines += [""]
    lines += ["```{toctree}", ":hidden:", ":glob:", "", "mechanisms/*", "primitives/*", "```", ""]
    return "\n".join(lines)


def _derivations():
    lines = [DERIVATIONS]
    for family, question in FAMILIES.items():
        lines += [f"## {family.replace('_', ' ')}", "", f"*{question}.*", "", "```{toctree}", ":maxdepth: 1", ""]
        lines += [m.name for m in everything().values() if m.family == family]
        lines += ["```", ""]
    return "\n".join(lines)


def _findings(folder):
    names = sorted(path.stem for path in folder.glob("*.md") if path.stem != "index")
    return "\n".join([FINDINGS, "```{toctree}", ":maxdepth: 1", "", *names, "```", ""])


def _laws():
    lines = [LAWS]
    for title, laws in (("Universal", UNIVERSAL), ("Declared", DECLARED.values())):
        lines += [f"## {title}", ""]
        lines += [f"`{law.__name__}`\n: {' '.join(law.__doc__.split())}\n" for law in laws]
    return "\n".join(lines)


def _judge():
    lines = [JUDGE, "## Arithmetics", "", "Where a field is empty, no rounding of its own is allowed for.", ""]
    columns = "scaled_query", "scores", "probs", "dprobs", "dscores", "operands", "shared_heads", "partial"
    lines += [f"| name | q, k, v | out | gradients | {' | '.join(columns)} |", "|---" * (4 + len(columns)) + "|"]
    for a in ARITHMETICS.values():
        cells = [a.name, a.inputs.name, a.out.name, a.grad.name]
        cells += [getattr(a, column).name if getattr(a, column) else "" for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    other = ", ".join(f"`{a.name}`" for a in ARITHMETICS.values() if a.accumulator != FLOAT32)
    lines += ["", f"The accumulator is float32, but float64 in {other}.", ""]
    for title, found in (("of dot-product attention", INPUTS), ("of every other mechanism", CHANGES)):
        lines += [f"## Families of inputs, {title}", "", *(f"`{n}`\n: {f.words}\n" for n, f in found.items())]
    lines += ["## Conventions", "", "| name | measured |", "|---|---|"]
    lines += [f"| `{name}` | {convention.measured} |" for name, convention in PRESETS.items()]
    words = [(m.name, m.words.replace("{}", "...").replace("|", "\\|")) for m in MISTAKES]
    lines += ["", "## Mistakes", "", *(f"`{name}`\n: {text}\n" for name, text in words)]
    return "\n".join(lines)
