"""MLX next to the reference: some targets conform, a fault planted in one is noticed, and what departs is known.

Every target in every dtype is what `refattn check all` does.
"""

import numpy as np
import pytest

from refattn import frameworks
from refattn.oracle.check import check
from refattn.trials import judged
from tests.foreign import target, with_one_off, wrong

pytestmark = pytest.mark.frameworks
mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'refattn[mlx]'")


def test_it_is_available():
    assert frameworks.status("mlx")[:2] == (mx.__version__, "")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fast.scaled_dot_product_attention", "bfloat16"),
        ("nn.MultiHeadAttention", "float64"),
        ("nn.AvgPool", "float16"),
    ],
)
def test_it_conforms(name, dtype):
    report = judged(target("mlx", name), "mlx", dtype, max_examples=8, seed=1)
    assert report.ok and report.examples == 8 and report.gradients == "judged", str(report)


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [
        ("fast.scaled_dot_product_attention", "float32", 1.001),
        ("fast.scaled_dot_product_attention", "bfloat16", 1.1),
        ("nn.RNN, nn.GRU, nn.LSTM", "float64", 1.001),
        ("conv_general", "float32", 1.001),
        ("fast.rms_norm", "float16", 1.5),
        ("nn.AvgPool", "float16", 1.5),
    ],
)
def test_a_planted_fault_is_noticed(name, dtype, factor):
    """The largest element of the first output is off, and so are its gradients."""

    def spoil(y):
        one = np.ones(y.shape)
        one.flat[abs(np.array(y.astype(mx.float32))).argmax()] = factor
        return y * mx.array(one).astype(y.dtype)

    faulty = with_one_off(target("mlx", name).function, spoil)
    report = judged(target("mlx", name), "mlx", dtype, faulty, max_examples=4, seed=1)
    assert all(wrong(report)), str(report)


def test_rows_without_keys_and_poison():
    families = "empty_rows", "poisoned_keys", "nan_query"
    sdpa = target("mlx", "fast.scaled_dot_product_attention")
    report = judged(sdpa, "mlx", "float32", families=families, max_examples=12, seed=1)
    assert report.ok and set(report.families) == set(families), str(report)
    report = judged(sdpa._replace(convention=None), "mlx", "float32", families="empty_rows", max_examples=4)
    assert wrong(report) == ({"out"}, {"dv"}), str(report)  # zero, if no convention is asked for; here the mean of v
    smallest = report.smallest
    assert not smallest.call.options["attn_mask"].any() and not smallest.expected["out"].any()
    v = smallest.call.args[2]
    assert np.allclose(smallest.got["out"], v.mean(axis=2, keepdims=True)) and v.any()


@pytest.mark.parametrize(("dtype", "odd"), [("bfloat16", 2**8 + 1), ("float16", 2**11 + 1)])
def test_in_what_gradients_that_meet_are_summed(dtype, odd):
    """The smallest number that its dtype has not: adding ones, one after the other, does not get there."""
    from refattn.frameworks.mlx import DTYPES, SCATTERED

    kind = DTYPES[dtype]
    with mx.stream(mx.cpu):
        ids = mx.zeros(2 * odd, mx.int32)
        embed = target("mlx", "nn.Embedding").function
        _, (met,) = mx.vjp(lambda table: embed(table, ids=ids), [mx.zeros((1, 1), kind)], [mx.ones((2 * odd, 1), kind)])
        assert met.item() == odd - 1
        pool, windows = target("mlx", "nn.MaxPool").function, {"kernel": (2 * odd,), "stride": 1, "padding": (0,)}
        x = mx.zeros((1, 1, 4 * odd - 1), kind)
        x[..., 2 * odd - 1] = 1  # which all windows have
        (y,), (most,) = mx.vjp(lambda x: pool(x, **windows), [x], [mx.ones((1, 1, 2 * odd), kind)])
        assert y.shape == (1, 1, 2 * odd) and most.max().item() == odd - 1
    assert SCATTERED[dtype].accumulator.name == dtype


def test_what_comes_back():
    def linear(x, params):
        return x @ params.weight.T + (0 if params.bias is None else params.bias)

    options = {"framework": "mlx", "max_examples": 4}
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        assert check(linear, "linear", dtype=dtype, **options).ok
    report = check(lambda x, params: mx.stop_gradient(linear(x, params)), "linear", **options)
    assert report.verdicts["out"].conforms and not report.verdicts["dx"].conforms
    report = check(lambda x, params: [linear(x, params).astype(mx.float16), "text"], "linear", **options)
    assert report.verdicts["out"].problem == "has dtype float16, expected float32"
    assert report.verdicts["dx"].problem == "nothing came back"


def test_an_output_that_is_two():
    """mx.vjp loses one of two gradients of an array that is returned twice."""
    from refattn.frameworks.mlx import run

    x, douts = np.array([2.0]), (np.array([1.0]), np.array([10.0]))
    _, (dx,) = run(lambda x: (3 * x,) * 2, (x,), {}, douts)
    assert dx == 33


DEPARTURES = {
    "nn.log_softmax": ("mlx-log-softmax-crash", (np.zeros((3, 1)),), {"axis": -1}),
    "nn.BatchNorm, training": ("mlx-batch-norm-float16", (np.full((3, 1), np.float16(2**-9)),), {}),
}


@pytest.mark.parametrize("name", DEPARTURES)
def test_what_departs_is_passed_over(name):
    from refattn.frameworks.mlx import run
    from refattn.oracle.contract import Departure

    finding, args, options = DEPARTURES[name]
    with pytest.raises(Departure) as raised:
        run(target("mlx", name).function, args, options, None)
    assert raised.value.finding == finding
