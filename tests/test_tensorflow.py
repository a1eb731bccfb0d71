"""TensorFlow against the reference: what it is asked, and that the check can fail."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from refattn.oracle.check import check

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


def test_every_target_conforms(tensorflow, tmp_path):
    report = tmp_path / "report.json"
    command = "-m", "refattn", "check", "tensorflow", "--jobs", "1", "--examples", "4", "--json", str(report)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    targets = json.loads(report.read_text())["frameworks"]["tensorflow"]["targets"]
    assert len(targets) == 4 * len(tensorflow.TARGETS) and all(t["ok"] for t in targets)
