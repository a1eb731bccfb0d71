"""Keras against the reference, on each of its backends: a process has it on one, so all of it runs in others."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.frameworks

BACKENDS = "tensorflow", "jax", "torch"


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=900
    )


@pytest.fixture(params=BACKENDS)
def backend(request):
    for module in ("keras", request.param):
        found = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True)
        if found.returncode:
            pytest.skip(f"{module} is not installed: pip install 'refattn[keras]'")
    return request.param


def test_a_process_has_one_backend(backend):
    other = "torch" if backend == "jax" else "jax"
    done = python(
        "-c",
        f"""
import keras
from refattn import frameworks
try:
    frameworks.load("keras_{backend}")
except ImportError as error:
    print(error)
""",
        KERAS_BACKEND=other,
    )
    assert f"keras is loaded already, on {other}" in done.stdout, done.stdout + done.stderr


def test_version_names_both(backend):
    done = python("-c", f"from refattn import frameworks; print(frameworks.load('keras_{backend}').VERSION)")
    assert done.stdout.split()[1] == backend, done.stdout + done.stderr


WRONG = """
import sys
import keras
from refattn import frameworks
from refattn.oracle.check import check

backend = sys.argv[1]
frameworks.load("keras_" + backend)
from refattn.frameworks import _keras


def wrong_gate(x, h, params, *, reset_after, z_weighs):
    return _keras.gru_cell(x, h, params, reset_after=not reset_after, z_weighs=z_weighs)


def wrong_heads(q, k, v, params, *, heads, mask, key_mask, is_causal):
    swapped = params._replace(q=params.k, k=params.q) if params.q.weight.shape == params.k.weight.shape else params
    return _keras.multi_head_attention_scores(q, k, v, swapped, heads=heads, mask=mask, key_mask=key_mask,
                                              is_causal=is_causal)


for function, like, example in (
    (wrong_gate, "gru_cell", None),
    (wrong_heads, "multi_head", _keras.multi_head_example),
):
    report = check(function, like, framework="keras_" + backend, example=example, max_examples=12)
    print(like, report.ok)
"""


def test_wrong_answers_differ(backend):
    done = python("-c", WRONG, backend)
    assert "gru_cell False" in done.stdout and "multi_head False" in done.stdout, done.stdout + done.stderr


def test_every_target_conforms(backend, tmp_path):
    report, name = tmp_path / "report.json", f"keras_{backend}"
    done = python("-m", "refattn", "check", name, "--jobs", "1", "--examples", "2", "--json", str(report))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    targets = json.loads(report.read_text())["frameworks"][name]["targets"]
    assert targets and all(target["ok"] for target in targets)
