"""The verdict on one array: NaN fails, and so does everything else that should."""

import numpy as np
import pytest

from refattn.oracle.compare import Bound, compare

NAN, INF = np.nan, np.inf
Y = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def off(index, by):
    y = Y.copy()
    y[index] += by
    return y


def test_inside_conforms():
    verdict = compare(Y, off((1, 0), 0.5), np.full(Y.shape, 1.0), name="dq")
    assert verdict.conforms and verdict.name == "dq" and verdict.outside == 0 and verdict.size == 6
    assert verdict.index == (1, 0) and verdict.ratio == 0.5


def test_outside_is_shown_with_its_place_and_both_values():
    verdict = compare(Y, off((0, 2), -0.75) + 0.125, np.full(Y.shape, 0.25))
    assert not verdict.conforms and verdict.outside == 1 and verdict.index == (0, 2)
    assert (verdict.expected, verdict.got, verdict.error, verdict.allowed) == (3.0, 2.375, 0.625, 0.25)
    assert verdict.ratio == 2.5
    text = str(verdict)
    assert "2.375 at [0, 2], expected 3" in text and "2.5 times the allowed 0.25" in text and "1 of 6" in text


def test_the_worst_is_relative_to_what_is_allowed():
    allowed = np.ones(Y.shape)
    allowed[1, 1] = 1e-3
    verdict = compare(Y, off((0, 0), 0.5) + (off((1, 1), 0.1) - Y), allowed)
    assert verdict.index == (1, 1) and not verdict.conforms and verdict.outside == 1


@pytest.mark.parametrize(
    "expected, got, conforms",
    [
        (1.0, NAN, False),
        (NAN, NAN, True),
        (NAN, 1.0, False),
        (INF, INF, True),
        (-INF, -INF, True),
        (INF, -INF, False),
        (1.0, INF, False),
        (1.0, -INF, False),
        (INF, 1.0, False),
        (NAN, INF, False),
        (0.0, -0.0, True),
    ],
)
@pytest.mark.parametrize("allowed", [0.5, 1e300])
def test_special_values(expected, got, conforms, allowed):
    verdict = compare(np.array([0.0, expected]), np.array([0.0, got]), allowed)
    assert verdict.conforms is conforms
    assert conforms or (verdict.index == (1,) and verdict.outside == 1 and verdict.ratio == INF)


def test_where_nothing_is_allowed_only_the_same_will_do():
    assert compare(Y, Y, 0.0).conforms
    verdict = compare(Y, off((1, 2), 1e-300) if 6 + 1e-300 != 6 else off((1, 2), 1e-12), 0.0)
    assert not verdict.conforms and verdict.ratio == INF


@pytest.mark.parametrize("allowed", [NAN, INF])
def test_an_allowance_that_is_no_number_is_outside_the_model(allowed):
    verdict = compare(Y, off((0, 1), 1e-9), np.full(Y.shape, allowed))
    assert verdict.kind == "OUTSIDE THE MODEL" and not verdict.conforms
    assert verdict.problem == "nothing is predicted for 1 of 6 elements"
    some = np.full(Y.shape, 0.1)
    some[0, 1] = allowed
    assert compare(Y, off((0, 2), 1), some).kind == "BUG"
    assert compare(Y, off((0, 1), 1) + 0.2, some).kind == "BUG"


@pytest.mark.parametrize(
    "got, words",
    [
        (None, "nothing came back"),
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "is a list, expected an array"),
        (Y.T, "has shape (3, 2), expected (2, 3)"),
        (Y[0], "has shape (3,), expected (2, 3)"),
        (Y[..., None], "has shape (2, 3, 1), expected (2, 3)"),
        (Y.astype(np.float32), "has dtype float32, expected float64"),
        (Y.astype(int), "has dtype int64, expected float64"),
    ],
)
def test_what_cannot_be_compared_fails_in_words(got, words):
    verdict = compare(Y, got, 1e9, dtype=np.float64)
    assert not verdict.conforms and verdict.problem == words == str(verdict)


def test_whole_numbers_are_no_output():
    verdict = compare(Y, Y.astype(int), 1e9)
    assert not verdict.conforms and verdict.problem == "has dtype int64, expected floating point"


def test_float32_is_compared_in_float64():
    third = np.array([1 / 3])
    verdict = compare(third, third.astype(np.float32), 2.0**-26)
    assert verdict.conforms and 0 < verdict.error < 1e-8


def test_scalars_and_empty_arrays():
    assert compare(np.float64(2), np.float64(2.5), 1.0).index == ()
    assert not compare(np.float64(2), np.float64(2.5), 0.1).conforms
    empty = compare(np.ones((0, 3)), np.ones((0, 3)), 0.0)
    assert empty.conforms and empty.size == 0 and str(empty) == "empty"
    assert not compare(np.ones((0, 3)), np.ones((3, 0)), 0.0).conforms


def test_the_arrays_are_left_alone():
    got, allowed = off((0, 0), 1), np.full(Y.shape, 0.5)
    compare(Y, got, allowed)
    assert np.array_equal(got, off((0, 0), 1)) and (allowed == 0.5).all()


# --- kinds ----------------------------------------------------------------------------------------------------

LONG = np.random.default_rng(0).normal(size=(20, 30))


def noisy(by=1.0, seed=1):
    """Errors of one standard deviation, evenly spread, times `by`."""
    return LONG + by * 1e-3 * np.random.default_rng(seed).uniform(-np.sqrt(3), np.sqrt(3), LONG.shape)


WIDE = Bound(np.full(LONG.shape, 1.0), np.full(LONG.shape, 0.1), np.full(LONG.shape, 1e-3))


def one_off(by):
    y = noisy()
    y[3, 4] = LONG[3, 4] + by
    return y


@pytest.mark.parametrize(
    "got, kind",
    [
        (noisy(), "CONFORMS"),
        (one_off(0.099), "SUSPECT"),  # one element of 99 standard deviations, and all are judged together
        (one_off(0.5), "BUG p < 1e-6"),
        (one_off(1.5), "BUG"),
        (one_off(NAN), "BUG"),
        (one_off(INF), "BUG"),
        (noisy(1.5), "SUSPECT"),
        (LONG * (1 + 1e-3) + (noisy() - LONG), "SUSPECT"),
    ],
)
def test_kinds(got, kind):
    verdict = compare(LONG, got, WIDE)
    assert verdict.kind == kind and verdict.conforms is (kind == "CONFORMS"), str(verdict)


def test_all_together_in_words():
    verdict = compare(LONG, noisy(1.5), WIDE)
    assert "mean square of the errors is 2." in verdict.problem
    verdict = compare(LONG, 1.001 * noisy(), WIDE)
    assert "off together, of size, by 0.00098 of the value" in verdict.problem
    direction = np.random.default_rng(5).normal(size=LONG.shape)
    pushed = noisy() + 6e-4 * direction
    assert compare(LONG, pushed, WIDE).conforms
    verdict = compare(LONG, pushed, WIDE, along={"along the scale, by {:.2g} of it": direction})
    assert verdict.kind == "SUSPECT" and "along the scale, by 0.00056 of it" in verdict.problem


def test_what_constants_may_do_is_not_suspect():
    pushed = LONG * (1 + 4e-4) + (noisy() - LONG)
    assert compare(LONG, pushed, WIDE, constants=1e-3).conforms
    assert compare(LONG, pushed, WIDE, constants=1e-4).kind == "SUSPECT"


def test_a_few_elements_are_not_judged_together():
    few = Bound(np.full((5, 5), 1.0), None, np.full((5, 5), 1e-6))
    assert compare(LONG[:5, :5], LONG[:5, :5] + 0.5, few).conforms
    many = Bound(np.full(LONG.shape, 1.0), None, np.full(LONG.shape, 1e-6))
    assert compare(LONG, LONG + 0.5, many).kind == "SUSPECT"


def test_right_errors_are_seldom_suspect():
    assert all(compare(LONG, noisy(1.0, seed), WIDE).conforms for seed in range(300))
