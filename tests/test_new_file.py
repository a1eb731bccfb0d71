"""Adding a mechanism is adding one file: write one into a copy of the package, and find it listed, tested and shown."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import refattn

HERE = Path(__file__).parent

NEW = '''r"""Temperature gate.

Paper: Nobody, "A gate for a test", 2026.

Forward
    y = x sigmoid(t x)

Backward
    xbar = ybar (s + x t s (1 - s)),   tbar = sum ybar x^2 s (1 - s)

Choices
    None.
"""

from typing import NamedTuple

from refattn.core import About, Array, Call, Shaped, shaped
from refattn.elementwise import sigmoid


class Saved(NamedTuple):
    x: Shaped[Array, "N C"]
    t: Shaped[Array, ""]
    s: Shaped[Array, "N C"]


@shaped
def forward(x: Shaped[Array, "N C"], t: Shaped[Array, ""]) -> tuple[Shaped[Array, "N C"], Saved]:
    s = sigmoid(t * x)
    return x * s, Saved(x, t, s)


@shaped
def backward(dy: Shaped[Array, "N C"], saved: Saved) -> tuple[Shaped[Array, "N C"], Shaped[Array, ""]]:
    x, t, s = saved
    slope = dy * x * s * (1 - s)
    return dy * s + t * slope, (x * slope).sum()


def example(draw):
    return Call((draw.array(draw.size("N"), draw.size("C")), draw.array()), {})


ABOUT = About(weights="s", laws=("batch_independent", "weights_in_unit_interval"), witnesses=("relation",))
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("copy")
    shutil.copytree(Path(refattn.__file__).parent, place / "refattn", ignore=shutil.ignore_patterns("__pycache__"))
    (place / "tests").mkdir()
    for name in ("__init__.py", "conftest.py", "strategies.py", "test_every_mechanism.py", "test_teeth.py"):
        shutil.copy(HERE / name, place / "tests" / name)
    shutil.copy(HERE.parent / "setup.cfg", place)
    (place / "refattn" / "attention" / "channel" / "temperature_gate.py").write_text(NEW)
    return place


def run(place, *command):
    environment = os.environ | {"PYTHONPATH": str(place)}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )


def test_it_is_listed(place):
    listed = run(place, "refattn", "list")
    assert listed.returncode == 0, listed.stderr
    assert "temperature_gate" in listed.stdout and "channel" in listed.stdout


def test_it_is_shown(place):
    shown = run(place, "refattn", "show", "temperature_gate")
    assert shown.returncode == 0, shown.stderr
    assert "y = x sigmoid(t x)" in shown.stdout and "N C" in shown.stdout


def test_it_is_tested(place):
    tested = run(place, "pytest", "-q", "-p", "no:cacheprovider", "-k", "temperature_gate", "tests")
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert "25 passed" in tested.stdout  # 11 universal and 2 declared laws, 6 faults in each of 2 gradients


def test_a_wrong_one_fails(place):
    file = place / "refattn" / "attention" / "channel" / "temperature_gate.py"
    file.write_text(NEW.replace("dy * s + t * slope", "dy * s + slope"))
    tested = run(place, "pytest", "-q", "-p", "no:cacheprovider", "-k", "temperature_gate and complex_step", "tests")
    assert tested.returncode == 1 and "gradient of argument 0" in tested.stdout, tested.stdout[-3000:]
