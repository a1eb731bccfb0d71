"""Who may import whom, and the fixed anatomy of every file: read from the source."""

import ast
import re
from pathlib import Path

import pytest

import refattn
from refattn.oracle.laws import DECLARED, UNIVERSAL
from refattn.registry import everything, find, mechanisms

ROOT = Path(refattn.__file__).parent
RANK = {"shapes": 0, "core": 1, "elementwise": 2, "draw": 2, "windows": 2, "blocks": 2, "masks": 2}
RANK |= {"primitives": 3, "attention": 4, "registry": 5}
FOUNDATION = ("derivatives", "arithmetic", "compare", "laws")  # the part of oracle/ that sees no mechanism
WITNESSES = {"authors' code", "framework", "definition", "relation"}
OPTIONAL = {"torch", "jax", "tensorflow", "keras", "onnx", "onnxruntime", "matplotlib", "ml_dtypes", "rich", "dask"}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path):
    """(module, whether at the top of the file) for every import of a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            yield name, node in tree.body


def part(dotted):
    """core of refattn.core, primitives of refattn.primitives.conv."""
    return dotted.split(".")[1] if "." in dotted else ""


def rank(path):
    *folders, name = path.relative_to(ROOT).with_suffix("").parts
    if folders[:1] == ["oracle"]:
        return RANK["core"] if name in FOUNDATION or name == "__init__" else RANK["registry"]
    return RANK.get((*folders, name)[0], 9)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    ours = rank(path)
    for name, at_the_top in imports(path):
        top = name.partition(".")[0]
        assert top not in {"tests", "benchmarks"}, f"{path} imports {name}"
        assert top != "pytest" or path.name == "pytest_plugin.py", f"{path} imports {name}"
        assert top != "hypothesis" or path.name == "strategies.py", f"{path} imports {name}"
        assert not (top in OPTIONAL and at_the_top) or "frameworks" in path.parts, f"{path} imports {name} at the top"
        if top == "refattn" and part(name) and ours < 9:
            foundation = name.startswith("refattn.oracle") and ours == RANK["core"]
            theirs = 0 if foundation else RANK.get(part(name), 9 if part(name) != "oracle" else RANK["registry"])
            assert theirs <= ours, f"{path.relative_to(ROOT)} imports {name}, which comes after it"


EVERYTHING = list(everything().values())


@pytest.mark.parametrize("mechanism", EVERYTHING, ids=str)
def test_anatomy(mechanism):
    tree = ast.parse(Path(mechanism.module.__file__).read_text())
    public = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]
    order = ["Params", "Saved", "init", "forward", "backward", "example"]
    present = [name for name in public if name in order]
    assert present == sorted(present, key=order.index), f"{mechanism}: {present}, but should be in the order {order}"
    missing = {"Saved", "forward", "backward", "example"} - set(present)
    assert not missing, f"{mechanism}: has no {missing}"
    assert ("Params" in present) == ("init" in present), f"{mechanism}: Params and init come together"
    last = tree.body[-1]
    assert isinstance(last, ast.Assign) and last.targets[0].id == "ABOUT", f"{mechanism}: ABOUT is not last"
    doc = mechanism.module.__doc__
    title = doc.partition("\n")[0]
    assert len(title) <= 72 and title.endswith("."), f"{mechanism}: first line {title!r}"
    for heading in ("Forward", "Backward", "Choices"):
        assert re.search(rf"^{heading}\b", doc, re.M), f"{mechanism}: the docstring has no {heading}"
    assert hasattr(mechanism.forward, "hints") and hasattr(mechanism.backward, "hints"), f"{mechanism}: not @shaped"


@pytest.mark.parametrize("mechanism", list(mechanisms().values()), ids=str)
def test_mechanisms_have_a_paper_and_a_witness(mechanism):
    assert re.search(r"(19|20)\d\d", mechanism.paper), f"{mechanism}: no 'Paper:' with a year"
    assert mechanism.ABOUT.witnesses, f"{mechanism}: nobody confirms its forward"


@pytest.mark.parametrize("mechanism", EVERYTHING, ids=str)
def test_about(mechanism):
    about = mechanism.ABOUT
    assert set(about.laws) <= set(DECLARED), f"{mechanism}: no such law: {set(about.laws) - set(DECLARED)}"
    assert set(about.witnesses) <= WITNESSES, f"{mechanism}: no such witness: {set(about.witnesses) - WITNESSES}"
    exempt = dict(about.exempt)
    assert set(exempt) <= {law.__name__ for law in UNIVERSAL}
    assert all(len(reason) > 20 for reason in exempt.values()), f"{mechanism}: an exemption needs a reason"
    assert about.weights in (None, *mechanism.Saved._fields), f"{mechanism}: Saved has no {about.weights}"


def test_names_are_unique():
    names = [p.stem for d in ("primitives", "attention") for p in (ROOT / d).rglob("*.py") if p.stem != "__init__"]
    assert len(names) == len(set(names)) == len(EVERYTHING)


def test_core_is_small():
    assert len((ROOT / "core.py").read_text().splitlines()) <= 150


def test_find_offers_near_misses():
    assert find("squeeze_excitation").family == "channel"
    with pytest.raises(KeyError, match="did you mean squeeze_excitation"):
        find("squeeze_exitation")
    with pytest.raises(ImportError, match="cannot import name"):
        from refattn import no_such_mechanism  # noqa: F401


def test_the_face():
    from refattn import squeeze_excitation

    assert squeeze_excitation is find("squeeze_excitation").module
    assert refattn.mechanisms() == mechanisms()
