"""Keras against the reference, on each of its backends: a process has it on one, so all of it runs in others."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

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
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'refattn[keras]'")
    return request.param


def test_a_process_has_one_backend(backend):
    done = python(
        "-c",
        f"""
import keras
from refattn import frameworks
for name in sorted({BACKENDS}, key={backend!r}.__eq__):
    try:
        print(frameworks.load("keras_" + name).VERSION)
    except ImportError as error:
        print(error)
""",
        KERAS_BACKEND=backend,
    )
    *others, own = done.stdout.strip().splitlines()
    assert own.split()[1] == backend, done.stdout + done.stderr
    assert len(others) == 2 and all(f"keras is loaded already, on {backend}" in line for line in others), others


WRONG = """
import sys
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


for right, wrong, like, example in (
    (_keras.gru_cell, wrong_gate, "gru_cell", None),
    (_keras.multi_head_attention_scores, wrong_heads, "multi_head", _keras.multi_head_example),
):
    options = {"framework": "keras_" + backend, "example": example}
    print(like, *(check(f, like, max_examples=n, **options).ok for f, n in ((right, 4), (wrong, 12))))
"""


def test_wrong_answers_differ(backend):
    done = python("-c", WRONG, backend)
    assert "gru_cell True False" in done.stdout, done.stdout + done.stderr
    assert "multi_head True False" in done.stdout, done.stdout + done.stderr


SUMS = """
import json
import sys

import ml_dtypes
import numpy as np

from refattn import frameworks
from refattn.oracle.arithmetic import FORMATS, half_ulp

adapter = frameworks.load("keras_" + sys.argv[1])
from refattn.frameworks import _keras

N = 3000
found = {}
for name in {"bfloat16", "float16"} & set(_keras.EVERY_DTYPE):
    rng, dtype = np.random.default_rng(0), np.dtype(getattr(ml_dtypes, name, name))
    terms, table, space = (rng.uniform(1, 2, n).astype(dtype) for n in (N, 1, 2 * N - 1))
    spike = np.zeros(2 * N - 1, dtype)
    spike[N - 1] = 1
    total = terms.astype(float).sum()
    averages = np.convolve(space.astype(float), np.ones(N), "valid") / N
    pool = {"kernel": (N,), "stride": 1, "padding": (0,)}
    _, (looked_up,) = adapter.run(
        lambda x, *, ids: _keras.embedding(x, ids=ids, padding_idx=None),
        (table[:, None],),
        {"ids": np.zeros(N, np.int64)},
        terms[:, None],
    )
    _, (pooled,) = adapter.run(
        _keras.max_pool, (spike[None, None],), pool | {"dilation": (1,)}, terms[None, None]
    )
    average, (averaged,) = adapter.run(
        _keras.average_pool, (space[None, None],), pool | {"count_include_pad": False}, terms[None, None]
    )
    ulps = lambda y, expected: float(np.max(np.abs(y.astype(float) - expected) / half_ulp(expected, FORMATS[name])) / 2)
    of_average = max(ulps(average, averages), ulps(averaged[0, 0, N - 1], np.asarray(total / N)))
    kept = {"Embedding": ulps(looked_up, total), "MaxPooling": ulps(pooled[0, 0, N - 1], total), "Average": of_average}
    for layer, error in kept.items():
        (target,) = (t for t in adapter.TARGETS if t.name.startswith("layers." + layer))
        found[f"{layer} {name}"] = error, name in target.arithmetic
print(json.dumps(found))
"""


def test_what_is_said_to_be_summed_in_16_bits_is(backend):
    done = python("-c", SUMS, backend)
    assert done.returncode == 0, done.stderr
    for what, (error, is_said) in json.loads(done.stdout.strip().splitlines()[-1]).items():
        assert (error > 1.1) == is_said, f"{what} is off by {error} units in the last place"


WITHOUT_ONEDNN = """
from refattn.frameworks import keras_tensorflow as adapter
from refattn.oracle.arithmetic import ARITHMETICS
from refattn.trials import judged

eager = ARITHMETICS["bf16_eager"]
usual = {
    "ops.dot_product_attention": eager._replace(**adapter.STORED),
    "layers.Attention": eager,
    "layers.Conv1D, Conv2D, Conv3D": eager,
}
for row in adapter.TARGETS:
    if row.name in usual:
        rows = row, row._replace(arithmetic={"bfloat16": usual[row.name]})
        found = [judged(r, "keras_tensorflow", "bfloat16", max_examples=20, seed=1).ok for r in rows]
        print(row.name, *found)
"""


def test_on_tensorflow_without_onednn_sums_and_softmax_are_of_16_bits():
    """It is found out, and what is promised then conforms; what is promised with oneDNN would not."""
    for module in ("keras", "tensorflow"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'refattn[keras]'")
    done = python("-c", WITHOUT_ONEDNN, TF_ENABLE_ONEDNN_OPTS="0")
    names = "ops.dot_product_attention", "layers.Attention", "layers.Conv1D, Conv2D, Conv3D"
    assert done.stdout.splitlines() == [f"{name} True False" for name in names], done.stdout + done.stderr
