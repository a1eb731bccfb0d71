"""TensorFlow against the reference: what it is asked, and that the check can fail."""

import os
import subprocess
import sys

import numpy as np
import pytest

from refattn.oracle.arithmetic import FORMATS, half_ulp
from refattn.oracle.check import check
from refattn.oracle.contract import Departure
from refattn.primitives.linear import Params

pytestmark = pytest.mark.frameworks


@pytest.fixture(scope="module")
def tensorflow():
    pytest.importorskip("tensorflow", reason="tensorflow is not installed: pip install 'refattn[tensorflow]'")
    from refattn.frameworks import tensorflow

    return tensorflow


def test_run_gives_numpy_back_in_the_dtype_that_came(tensorflow):
    import tensorflow as tf

    for dtype in ("float64", "float32", "float16", tf.bfloat16.as_numpy_dtype):
        x, dout = np.array([1.0, 2.0], dtype), np.array([3.0, 5.0], dtype)
        y, (dx, nothing) = tensorflow.run(lambda x, z, *, by: x * x * by, (x, None), {"by": np.array(2, dtype)}, dout)
        assert y.dtype == dx.dtype == x.dtype and nothing is None
        np.testing.assert_array_equal(y, [2, 8])
        np.testing.assert_array_equal(dx, [12, 40])
    assert tensorflow.run(lambda x: x + 1, (x,), {}, None)[1] is None


def test_a_gradient_that_is_not_there_is_none(tensorflow):
    import tensorflow as tf

    x = np.ones(2, np.float32)
    _, (dx, dz) = tensorflow.run(lambda x, z: tf.stop_gradient(x) + z, (x, x), {}, x)
    assert dx is None and dz.tolist() == [1, 1]


def test_wrong_answers_differ(tensorflow):
    import tensorflow as tf

    def wrong_axis(s, *, axis):
        return tf.nn.softmax(s, -1 if axis == 0 else axis)

    def no_gradient(s, *, axis):
        return tf.nn.softmax(tf.stop_gradient(s), axis)

    for function, name in ((wrong_axis, "out"), (no_gradient, "ds")):
        report = check(function, "softmax", framework="tensorflow", max_examples=12)
        assert not report.ok and not report.verdicts[name].conforms, str(report)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_said_to_be_summed_in_16_bits_is(tensorflow, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    n, rng = 3000, np.random.default_rng(0)
    terms, space = (rng.uniform(1, 2, m).astype(getattr(ml_dtypes, dtype, dtype)) for m in (n, 2 * n - 1))
    total, averages = terms.astype(float).sum(), np.convolve(space.astype(float), np.ones(n), "valid") / n
    ones, spike = np.ones_like(space), np.zeros_like(space)
    spike[n - 1] = 1
    pool = {"kernel": (n,), "stride": 1, "padding": (0,)}

    def of(name, x, dout, params=(), **options):
        function = next(t for t in tensorflow.TARGETS if t.name == name).function
        return tensorflow.run(function, (x, *params), options, dout)

    _, (looked_up,) = of("nn.embedding_lookup", ones[:1, None], terms[:, None], ids=np.zeros(n, int), padding_idx=None)
    _, (pooled,) = of("nn.max_pool", spike[None, None], terms[None, None], **pool, dilation=(1,))
    average, _ = of("nn.avg_pool", space[None, None], terms[None, None], **pool, count_include_pad=True)
    three, one = np.repeat(terms[:, None, None], 3, axis=1), (ones[:3], 0 * ones[:3])
    _, (_, shifted) = of("nn.batch_normalization", three, three, [one], stats=one[::-1])
    found = {
        "nn.embedding_lookup": (looked_up[0, 0], total),
        "nn.max_pool": (pooled[0, 0, n - 1], total),
        "nn.avg_pool": (average[0, 0], averages),
        "nn.batch_normalization": (shifted[1], total),
    }
    for target in tensorflow.TARGETS:
        if target.name in found:
            y, expected = found.pop(target.name)
            off = np.abs(y.astype(float) - expected) / half_ulp(expected, FORMATS[dtype]) / 2
            assert (off.max() > 1.1) == (dtype in target.arithmetic), f"{target.name}: off by {off.max()}"
    assert not found


def test_what_departs_is_passed_over(tensorflow):
    """Three tokens, whose biases meet in bfloat16, and two items with one matrix; with less than that all is right."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    linears = [t.function for t in tensorflow.TARGETS if t.like == "linear"]
    for dtype, by_tensordot, by_matmul in (
        (np.float32, (3, 2), (2, 3)),
        (ml_dtypes.bfloat16, (2, 1), (1, 2)),
        (np.float16, (3, 2), (1, 3)),
    ):
        for linear, lead in zip(linears, (by_tensordot, by_matmul)):
            x, w = np.ones((*lead, 2), dtype), np.ones((3, 2), dtype)
            y, (_, grads) = tensorflow.run(linear, (x, Params(w, w[:, 0])), {}, np.ones((*lead, 3), dtype))
            assert (y == 3).all() and (grads.bias == np.prod(lead)).all() and (grads.weight == np.prod(lead)).all()
    for linear, dtype, lead, finding in (
        (linears[0], ml_dtypes.bfloat16, (1, 3), "tensorflow-16-bit-sums"),
        (linears[1], np.float16, (2, 1), "tensorflow-matmul-weight-gradient"),
    ):
        x, w = np.ones((*lead, 2), dtype), np.ones((3, 2), dtype)
        with pytest.raises(Departure) as raised:
            tensorflow.run(linear, (x, Params(w, w[:, 0])), {}, None)
        assert raised.value.finding == finding


WITHOUT_ONEDNN = """
from refattn.frameworks import tensorflow as adapter
from refattn.trials import judged

(conv,) = (t for t in adapter.TARGETS if t.name == "nn.convolution")
for dtype in ("bfloat16", "float16"):
    rows = conv, conv._replace(arithmetic={})
    print(dtype, *(judged(row, "tensorflow", dtype, max_examples=12, seed=1).ok for row in rows))
"""


def test_without_onednn_sums_are_of_16_bits(tensorflow):
    """It is found out, and what is promised then conforms; what is promised with oneDNN would not."""
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ONEDNN], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.stdout == "bfloat16 True False\nfloat16 True False\n", done.stdout + done.stderr
