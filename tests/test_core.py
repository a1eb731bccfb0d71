"""Trees, derivatives from values, scalar functions and the drawing of examples."""

import math

import mpmath
import numpy as np
import pytest

from refattn import elementwise
from refattn.core import Call, leaves, tree_map
from refattn.draw import RandomDraw
from refattn.oracle.derivatives import Inconclusive, central, complex_step, hessian_vector, inner, largest
from refattn.primitives.linear import Params


def test_leaves_and_tree_map_walk_nested_tuples_and_skip_none():
    tree = (np.ones(2), Params(np.ones((1, 2)), None), (np.zeros(3),))
    assert [path for path, _ in leaves(tree)] == ["0", "1.weight", "2.0"]
    doubled = tree_map(lambda a, b: a + b, tree, tree)
    assert isinstance(doubled[1], Params) and doubled[1].bias is None
    assert doubled[1].weight.tolist() == [[2, 2]]
    with pytest.raises(ValueError, match="zip"):
        tree_map(lambda a, b: a, (1, 2), (1,))


def test_complex_step_is_exact():
    x, v = np.array([0.3, -2.0, 0.0]), np.array([1.5, 0.25, -3.0])
    (got,) = complex_step(lambda a: (np.exp(a) * np.sin(a),), (x,), (v,))
    expected = np.exp(x) * (np.sin(x) + np.cos(x)) * v
    assert np.abs(got - expected).max() <= 4e-16 * np.abs(expected).max()


def test_complex_step_of_single_precision_is_not_lost():
    (got,) = complex_step(lambda a: (a * a,), (np.float32([3]),), (np.float32([1]),))
    assert got == 6


def test_complex_step_takes_the_branch_of_a_kink():
    zero, one = np.zeros(1), np.ones(1)
    assert complex_step(lambda a: (elementwise.relu(a),), (zero,), (one,))[0] == 0
    product = complex_step(lambda a, b: (elementwise.relu(a * b),), (zero, zero), (one, one))[0]
    assert product == 0  # the real part of (0 + ih)(0 + ih) is exactly 0


def test_central_differences_know_where_they_cannot_judge():
    for x in (0.0, 4e-4):
        with pytest.raises(Inconclusive):
            central(lambda a: (np.abs(a),), (np.array([x]),), (np.ones(1),))
    (got,) = central(lambda a: (np.sin(a),), (np.array([0.7]),), (np.ones(1),))
    assert abs(got[0] - math.cos(0.7)) < 1e-11


def test_hessian_vector():
    def forward(x):
        return (x * x * x).sum(), x

    x, v = np.array([1.0, 2.0]), np.array([0.5, -1.0])
    (got,) = hessian_vector(forward, lambda d, saved: (d * 3 * saved * saved,), (x,), np.float64(2), (v,))
    assert np.abs(got - 12 * x * v).max() < 1e-14


def test_inner_and_largest():
    tree = (np.array([1.0, -3.0]), (np.array(2.0),))
    assert inner(tree, tree) == 14
    assert largest(tree) == 3
    assert largest(()) == 0


@pytest.mark.parametrize("x", [-800.0, -30.0, -1.0, 0.0, 1e-9, 2.0, 40.0, 800.0])
def test_sigmoid_against_mpmath(x):
    expected = float(1 / (1 + mpmath.exp(-mpmath.mpf(x))))
    got = elementwise.sigmoid(np.array(x))
    assert abs(got - expected) <= 4e-16 * expected
    s = expected
    (slope,) = complex_step(lambda a: (elementwise.sigmoid(a),), (np.array(x),), (np.array(1.0),))
    assert abs(slope - s * (1 - s)) <= 1e-15


def test_random_draw_is_reproducible_and_in_range():
    a, b = RandomDraw(3), RandomDraw(3)
    assert [a.size("n") for _ in range(50)] == (sizes := [b.size("n") for _ in range(50)])
    assert set(sizes) == {1, 2, 3, 4}
    ids = a.integers(2, 5, 200)
    assert set(ids.tolist()) == {2, 3, 4, 5}
    assert a.choice("c", "only") == "only"
    assert a.mask(3, 2).dtype == bool
    like = a.like(Call((np.zeros(2), None), ()))
    assert like.args[0].shape == (2,) and like.args[1] is None and (like.args[0] != 0).all()
