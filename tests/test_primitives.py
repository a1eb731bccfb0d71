"""What the laws cannot say of primitives: ties, NaN, padding, rounding, and that parts make the whole."""

import numpy as np
import pytest

from refattn import blocks
from refattn.core import leaves
from refattn.primitives import (
    adaptive_max_pool,
    average_pool,
    batch_norm,
    bilinear_resize,
    conv,
    embedding,
    log_softmax,
    max_pool,
)

NAN, INF = np.nan, np.inf


def image(*rows):
    return np.array(rows, float)[None, None]


# --- ties, NaN, padding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool, options", [(max_pool, {"kernel": 2}), (adaptive_max_pool, {"size": 1})])
def test_the_first_of_equals_takes_the_gradient(pool, options):
    y, saved = pool.forward(image([1, 3], [3, 3]), **options)
    (dx,) = pool.backward(np.full_like(y, 5), saved)
    assert np.array_equal(y, image([3]))
    assert np.array_equal(dx, image([0, 5], [0, 0]))


@pytest.mark.parametrize("pool, options", [(max_pool, {"kernel": 2}), (adaptive_max_pool, {"size": (1, 2)})])
@pytest.mark.parametrize("kind", [float, complex])
def test_nan_stays_in_its_window(pool, options, kind):
    for where in np.ndindex(2, 2):
        x = image([0, 1, 2, 3], [4, 5, 6, 7]).astype(kind)
        x[0, 0][where] = NAN
        y, _ = pool.forward(x, **options)
        assert np.isnan(y[0, 0, 0, 0]) and y[0, 0, 0, 1] == 7


def test_average_pooling_keeps_inf_in_its_window():
    y, _ = average_pool.forward(image([INF, 1, 2, 4]), kernel=(1, 2))
    assert np.array_equal(y, image([INF, 3]))


def test_padding_never_wins():
    y, _ = max_pool.forward(image([-3, -2], [-4, -5]), kernel=3, padding=1, stride=1)
    assert np.array_equal(y, image([-2, -2], [-2, -2]))


def test_repeated_ids_add_up_and_padding_has_no_gradient():
    table, ids = np.arange(6.0).reshape(3, 2), np.array([[1, 1], [2, 0]])
    y, saved = embedding.forward(table, ids=ids, padding_idx=2)
    (dtable,) = embedding.backward(np.ones_like(y), saved)
    assert np.array_equal(y[1, 0], table[2])
    assert np.array_equal(dtable, [[1, 1], [2, 2], [0, 0]])


def test_scores_of_minus_infinity():
    y, saved = log_softmax.forward(np.array([[0, -INF], [-INF, -INF]]))
    (ds,) = log_softmax.backward(np.ones((2, 2)), saved)
    assert np.array_equal(y, [[0, -INF], [-INF, -INF]])
    assert np.array_equal(ds, [[-1, 1], [1, 1]])


@pytest.mark.parametrize("align_corners", [True, False])
def test_resizing_to_the_same_size_changes_nothing(align_corners):
    x = np.random.default_rng(0).normal(size=(1, 1, 5, 3))
    assert np.array_equal(bilinear_resize.forward(x, size=(5, 3), align_corners=align_corners)[0], x)


def test_the_variance_is_that_of_centred_values():
    x = np.random.default_rng(0).normal(size=(64, 1))
    _, saved = batch_norm.forward(x + 2.0**20)
    exact = ((x + 2.0**20).astype(np.longdouble)).var()
    assert abs(saved.stats.var[0] / exact - 1) < 1e-14


# --- parts --------------------------------------------------------------------------------------------------


def calls(rng):
    x = rng.normal(size=(2, 6, 5, 7))
    norm = batch_norm.Params(rng.normal(size=6), rng.normal(size=6))
    yield batch_norm, (x, norm), {}
    yield batch_norm, (x,), {"stats": batch_norm.Stats(rng.normal(size=6), rng.random(6) + 1)}
    yield conv, (x, conv.init(rng, 6, 12, (3, 3), groups=6)), {"groups": 6, "padding": 1, "stride": (1, 2)}
    yield conv, (x, conv.init(rng, 6, 4, (1, 1), groups=2)), {"groups": 2}
    yield conv, (x, conv.init(rng, 6, 4, (3, 1))), {}
    yield average_pool, (x,), {"kernel": 3, "stride": 2, "padding": 1, "count_include_pad": False}


@pytest.mark.parametrize("module, args, options", list(calls(np.random.default_rng(0))))
@pytest.mark.parametrize("part", [1, 2000])
def test_many_parts_make_the_whole(monkeypatch, module, args, options, part):
    def run():
        out, saved = module.forward(*args, **options)
        return out, tuple(module.backward(np.cos(out), saved))

    whole = run()
    monkeypatch.setattr(blocks, "PART", part)
    for (path, a), (_, b) in zip(leaves(whole), leaves(run()), strict=True):
        assert np.abs(a - b).max() <= 1e-14 * (1 + np.abs(a).max()), path


def test_parts_keep_the_callers_errstate_and_raise_its_errors(monkeypatch):
    monkeypatch.setattr(blocks, "PART", 1)
    zeros, before = np.zeros((1, 4)), np.getbufsize()
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        blocks.by_channels(lambda x: 1 / x, zeros)
    assert np.getbufsize() == before
    with np.errstate(divide="ignore"):
        assert np.array_equal(blocks.by_channels(lambda x: 1 / x[0], zeros), [INF] * 4)


# --- running statistics of batch normalisation ---------------------------------------------------------------


def test_the_moving_average_of_batch_statistics():
    x = np.array([[1.0], [2.0], [6.0]])  # mean 3, squares of the deviations 4 + 1 + 9
    _, saved = batch_norm.forward(x, eps=0.0)
    before = batch_norm.Stats(np.array([10.0]), np.array([20.0]))
    mean, var = batch_norm.running(before, saved)
    assert mean[0] == 0.9 * 10 + 0.1 * 3 and abs(var[0] - (0.9 * 20 + 0.1 * 14 / 2)) < 1e-14
    _, var = batch_norm.running(before, saved, momentum=0.5, unbiased=False)
    assert abs(var[0] - (10 + 14 / 3 / 2)) < 1e-14
