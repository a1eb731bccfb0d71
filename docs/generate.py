"""Writes the catalogue and one page per mechanism and primitive, from the registry."""

import inspect
from pathlib import Path
from textwrap import dedent

from refattn.oracle.laws import DECLARED, UNIVERSAL
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


def pages(folder):
    """catalogue.md, laws.md, mechanisms/*.md and primitives/*.md below `folder`; only what changed is written."""
    written = set()
    for m in everything().values():
        place = "primitives" if m.family == "primitives" else "mechanisms"
        written.add(_write(folder / place / f"{m.name}.md", _page(m)))
    _write(folder / "catalogue.md", _catalogue())
    _write(folder / "laws.md", _laws())
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
    lines = [f"# {title.rstrip('.')}", "", f"`{m.module.__name__}`", "", "```text", body.strip(), "```", ""]
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


def _laws():
    lines = [LAWS]
    for title, laws in (("Universal", UNIVERSAL), ("Declared", DECLARED.values())):
        lines += [f"## {title}", ""]
        lines += [f"`{law.__name__}`\n: {' '.join(law.__doc__.split())}\n" for law in laws]
    return "\n".join(lines)
