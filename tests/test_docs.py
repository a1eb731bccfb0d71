"""Every python fence of the README and the docs runs, and so does every doctest of the package."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import refattn

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {"mechanisms", "primitives"}  # source listings, which run elsewhere
FENCED = [p for p in PAGES if p.exists() and p.parent.name not in GENERATED and "```python\n" in p.read_text()]
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
        generated = GENERATED | {"catalogue.md", "laws.md"}
        if not generated & {Path(target).name, Path(target).parent.name}:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
