"""Every finding about a framework is reproduced by the script on its page, and an adapter names every page."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import refattn

ROOT = Path(refattn.__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs/findings").glob("*.md") if path.stem != "index")
FENCE = re.compile(r"^```(python|text)\n(.*?)^```$", re.S | re.M)
ADAPTERS = ROOT / "refattn/frameworks"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


def parts(text):
    """(script, what it prints)."""
    fences = FENCE.findall(text)
    assert [kind for kind, _ in fences[:2]] == ["python", "text"], "a script, then what it prints"
    return fences[0][1], fences[1][1]


def imported(script):
    """The packages that a script needs."""
    return sorted(set(re.findall(r"^ *(?:import|from) (\w+)", script, re.M)) - set(sys.stdlib_module_names))


def printed(script):
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=os.environ | THREADS | QUIET
    )
    return ended.stdout if ended.returncode == 0 else f"{ended.stdout}ends with {ended.returncode}\n{ended.stderr}"


@pytest.mark.frameworks
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_it_is_so(page):
    script, expected = parts(page.read_text())
    for name in {*imported(script), page.stem.split("-")[0]}:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if "torch.compile" in script and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler, which is not here")
    if "AMX" in page.read_text() and "amx" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AMX, which this is about")
    assert printed(script) == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_its_form(page):
    text = page.read_text()
    assert text.startswith("# ") and text.splitlines()[1] == "" and text.endswith("\n")
    assert re.search(r"\d+\.\d+", FENCE.sub("", text)), "which version"
    script, expected = parts(text)
    assert expected.strip() and imported(script) and len(script.splitlines()) <= 40
    frameworks = {path.stem for path in ADAPTERS.glob("*.py")} | {"keras"}
    assert page.stem.split("-")[0] in frameworks, "named by its framework"


def test_every_departure_has_its_page_and_every_page_its_departure():
    named = set()
    for path in ADAPTERS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Departure":
                named |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    pages = {page.stem for page in PAGES}
    assert named <= pages, f"no page: {named - pages}"
    mentioned = {page for page in pages if any(page in path.read_text() for path in ADAPTERS.glob("*.py"))}
    assert mentioned == pages, f"no adapter knows of {pages - mentioned}"


def test_a_script_that_prints_something_else_is_noticed():
    assert printed("print(1)") == "1\n"
    assert "ends with 1" in printed("print(1); raise SystemExit(1)")
    with pytest.raises(AssertionError, match="a script, then"):
        parts("# Title\n\n```text\n1\n```\n")
    assert imported("import torch.nn\nfrom jax import numpy\nimport os") == ["jax", "torch"]
