"""Every python fence of the README and the docs runs, and so does every doctest of the package."""

import argparse
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import refattn
from refattn.__main__ import _parser
from refattn.oracle.behaviour import LAWS
from refattn.oracle.inputs import CHANGES, FAMILIES
from refattn.oracle.laws import DECLARED, UNIVERSAL
from refattn.oracle.mistakes import MISTAKES
from refattn.registry import everything

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {"mechanisms", "primitives"}  # source listings, which run elsewhere
DERIVATIONS = ROOT / "docs" / "derivations"
FINDINGS = ROOT / "docs" / "findings"  # whose scripts tests/test_findings.py runs
RUN_HERE = [p for p in PAGES if p.exists() and p.parent.name not in GENERATED and p.parent != FINDINGS]
FENCED = [p for p in RUN_HERE if "```python\n" in p.read_text()]
MODULES = [m.name for m in pkgutil.walk_packages(refattn.__path__, "refattn.") if "__main__" not in m.name]


def fences(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("page", FENCED, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_fences_run(page):
    """All fences of a page in one namespace, top to bottom."""
    namespace = {"__name__": "fence"}
    for fence in fences(page.read_text(), "python"):
        exec(compile(fence, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("refattn.frameworks.")])
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_readme_begins_with_its_two_commands():
    text = (ROOT / "README.md").read_text()
    languages = re.findall(r"^```(\w+)$", text, re.M)
    assert languages[:2] == ["bash", "bash"] and languages.count("bash") == 2
    first, second = fences(text, "bash")
    assert first.strip().splitlines()[-1].endswith("refattn check")
    assert "pytest" in second.strip().splitlines()[-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.M | re.S)  # x[i](y) in code is no link
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        generated = GENERATED | {"catalogue.md", "laws.md", "judge.md", "conformance.md", "index.md"}
        if not generated & {Path(target).name, Path(target).parent.name}:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


HEADINGS = ("The model", "Forward", "Backward", "The code", "An example", "The last formula, literally")


def problems(mechanism, text):
    """What a derivation page lacks."""
    file = Path(mechanism.module.__file__).relative_to(ROOT)
    kind = "primitives" if mechanism.family == "primitives" else "mechanisms"
    wanted = {
        f"begins with # {mechanism.title.rstrip('.')}": text.startswith(f"# {mechanism.title.rstrip('.')}\n"),
        "a link to its reference": f"](../reference/{kind}/{mechanism.name}.md)" in text,
        f"the headings {HEADINGS}": tuple(re.findall("^## (.+)$", text, re.M)) == HEADINGS,
        "a drawing in its model": "```{flow}" in text.partition("## Forward")[0],
        "equations": text.count("$$") >= 4,
        "an assertion at its end": "assert " in text.partition("## The last formula, literally")[2],
    }
    for function in ("forward", "backward"):
        included = f"```{{literalinclude}} ../../{file.as_posix()}\n:pyobject: {function}\n```"
        wanted[f"{function}, included from {file}"] = included in text
    return [name for name, there in wanted.items() if not there]


@pytest.mark.parametrize("mechanism", everything().values(), ids=str)
def test_every_mechanism_is_derived(mechanism):
    page = DERIVATIONS / f"{mechanism.name}.md"
    assert page.exists(), f"{mechanism.name} has no derivation page"
    assert problems(mechanism, page.read_text()) == []


def test_a_derivation_page_that_lacks_something():
    mechanism, text = everything()["softmax"], (DERIVATIONS / "scaled_dot_product.md").read_text()
    assert len(problems(mechanism, text)) == 4
    assert problems(everything()["scaled_dot_product"], text) == []
    assert problems(everything()["scaled_dot_product"], text.replace("assert ", "").replace("{flow}", "")) == [
        "a drawing in its model", "an assertion at its end",
    ]  # fmt: skip


def test_every_derivation_page_is_of_something():
    assert {page.stem for page in DERIVATIONS.glob("*.md")} - {"index"} <= set(everything())


# --- everything is documented --------------------------------------------------------------------------------


def undocumented_options(mechanisms, glossary):
    """(mechanism, option) that neither the mechanism's docstring nor the page of options tells about."""
    told = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^(`.*`)\n: ", glossary, re.M))))
    missing = []
    for m in mechanisms:
        options = [p.name for p in inspect.signature(m.forward).parameters.values() if p.kind is p.KEYWORD_ONLY]
        own = set(re.findall(r"\w+", m.module.__doc__))
        missing += [(m.name, option) for option in options if option not in told | own]
    return missing


def test_every_option_is_documented():
    glossary = (ROOT / "docs/reference/options.md").read_text()
    assert undocumented_options(everything().values(), glossary) == []
    assert ("simam", "lam") in undocumented_options(everything().values(), glossary.replace("`lam`", "`lamb`"))


def test_no_option_is_documented_that_is_not_there():
    glossary = (ROOT / "docs/reference/options.md").read_text()
    known = {name for m in everything().values() for name in inspect.signature(m.forward).parameters}
    named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^(`.*`)\n: ", glossary, re.M))))
    assert named <= known, named - known


def undocumented_commands(parser, text, path=("refattn",)):
    """What the page of the command line does not mention."""
    missing = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                missing += [] if " ".join([*path, name]) in text else [" ".join([*path, name])]
                missing += undocumented_commands(command, text, (*path, name))
        unknown = set(action.option_strings) - {"-h", "--help"} - set(re.findall(r"--[\w-]+", text))
        missing += [f"{' '.join(path)} {option}" for option in sorted(unknown)]
    return missing


def test_every_command_is_documented():
    text = (ROOT / "docs/reference/cli.md").read_text()
    assert undocumented_commands(_parser(), text) == []
    assert undocumented_commands(_parser(), text.replace("--resume", "")) == ["refattn check --resume"]


def test_every_law_family_and_mistake_has_a_sentence():
    for law in (*UNIVERSAL, *DECLARED.values(), *LAWS):
        assert law.__doc__ and law.__doc__.strip().endswith("."), law.__name__
    for name, about in (*FAMILIES.items(), *CHANGES.items()):
        assert about.words.strip(), name
    assert all(m.words.strip() for m in MISTAKES)


def test_every_page_is_in_a_table_of_contents():
    entries = set()
    for page in [p for p in PAGES if p.is_relative_to(ROOT / "docs")]:
        for fence in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.M | re.S):
            lines = [line for line in fence.splitlines() if line and not line.startswith(":")]
            entries |= {(page.parent / line).with_suffix(".md") for line in lines if "*" not in line}
    generated = {ROOT / "docs" / "findings", ROOT / "docs" / "derivations"}  # whose index is made from the folder
    pages = {p for p in PAGES if p.is_relative_to(ROOT / "docs") and p.parent.name not in GENERATED}
    lost = {p for p in pages - entries if p.parent not in generated and p.name not in ("index.md", *OWN_PAGES)}
    assert not lost, f"in no toctree: {sorted(p.name for p in lost)}"


OWN_PAGES = "catalogue.md", "laws.md", "judge.md", "conformance.md"  # generated, and in the index by name
