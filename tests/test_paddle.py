"""Paddle next to the reference: some targets conform, a fault planted in one is noticed, and what departs is known.

Every target in every dtype is what `refattn check all` does.
"""

import numpy as np
import pytest

from refattn import frameworks
from refattn.oracle.check import check
from refattn.oracle.contract import Departure
from refattn.primitives import group_norm
from refattn.trials import judged
from tests.foreign import target, with_one_off, wrong

pytestmark = pytest.mark.frameworks
paddle = pytest.importorskip("paddle", reason="paddle is not installed: pip install 'refattn[paddle]'")


def test_it_is_available():
    assert frameworks.status("paddle")[:2] == (paddle.__version__, "")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("scaled_dot_product_attention", "float32"), ("group_norm", "float64"), ("nn.LSTMCell", "float32")],
)
def test_it_conforms(name, dtype):
    report = judged(target("paddle", name), "paddle", dtype, max_examples=8, seed=1)
    assert report.ok and report.examples == 8 and report.gradients == "judged", str(report)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("scaled_dot_product_attention", "float64"),
        ("nn.MultiHeadAttention", "float32"),
        ("nn.LSTMCell", "float64"),
        ("group_norm", "float32"),
        ("avg_pool", "float64"),
        ("interpolate, bilinear", "float32"),
    ],
)
def test_a_planted_fault_is_noticed(name, dtype):
    """The largest element of the first output is off by a thousandth, and so are its gradients."""

    def spoil(y):
        factor = np.ones(y.shape, dtype)
        factor.flat[abs(y.numpy()).argmax()] = 1.001
        return y * paddle.to_tensor(factor)

    faulty = with_one_off(target("paddle", name).function, spoil)
    report = judged(target("paddle", name), "paddle", dtype, faulty, max_examples=6, seed=1)
    assert all(wrong(report)), str(report)


def test_what_comes_back():
    def linear(x, params):
        return x @ params.weight.T + (0 if params.bias is None else params.bias)

    options = {"framework": "paddle", "max_examples": 4}
    assert check(linear, "linear", **options).ok and check(linear, "linear", dtype="float64", **options).ok
    report = check(lambda x, params: linear(x, params).detach(), "linear", **options)
    assert report.verdicts["out"].conforms and report.verdicts["dx"].problem == "nothing came back"
    report = check(lambda x, params: [linear(x, params).astype("float64"), "text"], "linear", **options)
    assert report.verdicts["out"].problem == "has dtype float64, expected float32"


def test_rows_without_keys():
    sdpa = target("paddle", "scaled_dot_product_attention")
    report = judged(sdpa, "paddle", "float64", families="empty_rows", max_examples=4, seed=1)
    assert report.ok, str(report)
    report = judged(sdpa._replace(convention=None), "paddle", "float64", families="empty_rows", max_examples=4)
    assert not report.ok, str(report)  # zero, where no convention is asked for


def zeros(*shape):
    return np.zeros(shape, np.float32)


HALF = np.array([True, False])
DEPARTURES = {
    "a key that nobody sees": ("paddle-softmax-floor", "scaled_dot_product_attention", [zeros(1, 1, 2, 4)] * 3,
                               {"attn_mask": HALF}),
    "NaN": ("paddle-softmax-nan", "scaled_dot_product_attention", [zeros(1, 1, 8, 4) * np.nan] * 3, {}),
    "scores far apart": ("paddle-softmax-floor", "log_softmax", [np.array([0.0, 65.0])], {"axis": 0}),
    "no gamma": ("paddle-group-norm", "group_norm", [zeros(1, 2, 3)], {"groups": 1, "eps": 0.5}),
    "a small gamma": ("paddle-group-norm", "group_norm", [zeros(1, 2, 3), group_norm.Params(zeros(2), zeros(2) + 1)],
                      {"groups": 1, "eps": 0.5}),
    "a large mean": ("paddle-group-norm", "group_norm", [zeros(1, 2, 3) + 9, group_norm.Params(zeros(2) + 1, zeros(2))],
                     {"groups": 1, "eps": 0.5}),
    "one pixel": ("paddle-interpolate-to-one", "interpolate, bilinear", [zeros(1, 1, 4, 4)],
                  {"size": (1, 2), "align_corners": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", DEPARTURES)
def test_what_departs_is_passed_over(case):
    from refattn.frameworks.paddle import run

    finding, name, args, options = DEPARTURES[case]
    with pytest.raises(Departure) as raised:
        run(target("paddle", name).function, args, options, None)
    assert raised.value.finding == finding
