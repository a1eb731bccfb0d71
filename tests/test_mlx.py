"""MLX next to the reference: every target conforms, a fault planted in one is noticed, and what departs is known."""

import numpy as np
import pytest

from refattn import frameworks
from refattn.oracle.check import check
from tests.test_frameworks import in_every_dtype, judged

pytestmark = pytest.mark.frameworks
mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'refattn[mlx]'")


def target(name):
    return next(t for t in frameworks.load("mlx").TARGETS if t.name == name)


def test_it_is_available():
    status = frameworks.available()["mlx"]
    assert (status.version, status.reason) == (mx.__version__, "")


@pytest.mark.parametrize(("target", "dtype"), in_every_dtype("mlx"))
def test_it_conforms(target, dtype):
    report = judged(target, "mlx", dtype, max_examples=8 * target.times, seed=1)
    assert report.ok and report.examples == 8 * target.times and report.gradients == "judged", str(report)


@pytest.mark.parametrize(("target", "dtype"), in_every_dtype("mlx"))
def test_a_planted_fault_is_noticed(target, dtype):
    """One element of the first output is off by a thousandth (in low precision, a half), and so are its gradients."""
    right, factor = target.function, 1.001 if dtype in ("float64", "float32") else 1.5

    def faulty(*args, **options):
        result = right(*args, **options)
        first, *rest = result if isinstance(result, tuple) else (result,)
        one = np.ones(first.shape)
        one.flat[abs(np.array(first.astype(mx.float32))).argmax()] = factor
        first = first * mx.array(one).astype(first.dtype)
        return (first, *rest) if rest else first

    report = judged(target, "mlx", dtype, as_if(faulty, right), max_examples=6, seed=1)
    wrong = [name for name, v in report.verdicts.items() if not v.conforms]
    assert any(name[0] == "d" for name in wrong) and any(name[0] != "d" for name in wrong), str(report)


def as_if(function, right):
    function.__wrapped__ = right  # its signature is the other's
    return function


def test_rows_without_keys_and_poison():
    families = "empty_rows", "poisoned_keys", "nan_query"
    sdpa = target("fast.scaled_dot_product_attention")
    report = judged(sdpa, "mlx", "float32", families=families, max_examples=12, seed=1)
    assert report.ok and set(report.families) == set(families), str(report)
    report = judged(sdpa._replace(convention=None), "mlx", "float32", families="empty_rows", max_examples=4)
    assert not report.ok, str(report)  # zero, where no convention is asked for


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
        run(target(name).function, args, options, None)
    assert raised.value.finding == finding
