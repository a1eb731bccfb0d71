"""Streaming attention is dot_product_attention, whatever the blocks and whoever computes them, NaN included."""

import concurrent.futures
import multiprocessing
import tracemalloc

import numpy as np
import pytest

from refattn import blocks, masks
from refattn.attention.dot_product import dot_product_attention, streaming
from refattn.attention.dot_product.dot_product_attention import Convention, Out
from refattn.core import leaves, tree_map
from refattn.draw import RandomDraw

BLOCKS = [(1, 1), (2, 2), (1, 3), None]
RULES = ["zero", "nan", "zero_masked_only", "zero_probs"]


def same(expected, got, tolerance=1e-12):
    for (path, a), (_, b) in zip(leaves(expected), leaves(got), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, path
        finite = np.isfinite(a)
        assert np.array_equal(np.isnan(a), np.isnan(b)), f"{path}: NaN elsewhere"
        assert np.array_equal(a[np.isinf(a)], b[np.isinf(a)]), f"{path}: infinity elsewhere"
        worst, size = np.abs(a[finite] - b[finite]).max(initial=0), np.abs(a[finite]).max(initial=0)
        assert worst <= tolerance * (1 + size), f"{path} differs by {worst:.3g}"


def drawn(seed):
    """A call with all kinds of options and conventions, and with NaN or inf somewhere in half of the calls."""
    rng = np.random.default_rng(seed)
    args, options = dot_product_attention.example(RandomDraw(seed))
    del options["return_scores"]
    args, options["return_lse"] = list(args), True
    say = options["convention"]._replace(
        mask_value=float(rng.choice([-np.inf, -np.inf, -1e9, -1e38])), fully_masked=str(rng.choice(RULES))
    )
    place = rng.integers(8)
    if place < 3 or (place == 3 and args[3] is not None):
        x = args[place].copy()
        x.reshape(-1)[rng.integers(x.size)] = -np.inf if place == 3 else rng.choice([np.nan, np.inf, -np.inf])
        args[place] = x
        if say.fully_masked == "zero_probs":  # there NaN of a masked value goes another way: see below
            say = say._replace(fully_masked="zero")
    return args, options | {"convention": say}, rng


@pytest.mark.parametrize("seed", range(120))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_same_as_the_plain_file(seed):
    args, options, rng = drawn(seed)
    out, saved = dot_product_attention.forward(*args, **options)
    dout = tree_map(lambda y: rng.normal(size=y.shape), out)
    expected = out, tuple(dot_product_attention.backward(dout, saved))
    block = BLOCKS[seed % len(BLOCKS)]
    out, saved = streaming.forward(*args, **options, block=block, jobs=1)
    same(expected, (out, streaming.backward(dout, saved)))
    same(expected, streaming.forward_backward(*args, dout=dout, **options, block=block, jobs=1))


def test_nan_in_a_masked_value_under_zero_probs_shows_in_the_same_outputs():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 1, 3, 4))
    v[0, 0, 2, 1] = np.nan
    options = {"is_causal": True, "convention": Convention(fully_masked="zero_probs", mask_value=-1e9)}
    same(dot_product_attention.forward(q, k, v, **options)[0], streaming.forward(q, k, v, **options, jobs=1)[0])


def problem(rng, length=70, keys=90, heads=2, shared=1, features=5):
    q = rng.normal(size=(2, heads, length, features))
    k, v = rng.normal(size=(2, 2, shared, keys, features))
    return q, k, v


@pytest.mark.parametrize("block", [(1, 90), (7, 1), (16, 32), (128, 1024)])
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_blocks_and_jobs_do_not_matter(block, jobs, kept, monkeypatch):
    monkeypatch.setattr(streaming, "KEPT", 2**20 if kept else 0)
    monkeypatch.setattr(streaming, "PART", 2)
    rng = np.random.default_rng(0)
    args, options = problem(rng), {"is_causal": True, "window": (30, 0), "q_offset": "bottom_right"}
    y, saved = dot_product_attention.forward(*args, **options)
    dout = rng.normal(size=y.shape)
    expected = y, tuple(dot_product_attention.backward(dout, saved))
    same(expected, streaming.forward_backward(*args, dout=dout, **options, block=block, jobs=jobs))
    out, saved = streaming.forward(*args, **options, block=block, jobs=jobs)
    same(expected, (out, streaming.backward(dout, saved)))


def test_the_result_does_not_depend_on_who_computes_it(monkeypatch):
    monkeypatch.setattr(streaming, "PART", 1)
    rng = np.random.default_rng(0)
    args = problem(rng)
    dout = rng.normal(size=args[0].shape)
    one = streaming.forward_backward(*args, dout=dout, block=(16, 32), jobs=1)
    for options in ({"jobs": 3}, {"executor": Backwards()}):
        many = streaming.forward_backward(*args, dout=dout, block=(16, 32), **options)
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(one), leaves(many), strict=True))


class Backwards(concurrent.futures.Executor):
    """An executor that does the last task first, when the first result is asked for."""

    def __init__(self):
        self.waiting = []

    def submit(self, function, /, *args):
        future = Later(self)
        self.waiting.append((future, function, args))
        return future


class Later(concurrent.futures.Future):
    def __init__(self, executor):
        super().__init__()
        self.executor = executor

    def result(self, timeout=None):
        while self.executor.waiting:
            future, function, args = self.executor.waiting.pop()
            future.set_result(function(*args))
        return super().result(timeout)


def test_processes_can_do_it():
    rng = np.random.default_rng(0)
    args = problem(rng, length=20, keys=30)
    dout = rng.normal(size=args[0].shape)
    options = {"attn_mask": masks.causal(5), "block": (8, 8)}
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        got = streaming.forward_backward(*args, dout=dout, **options, executor=pool)
    same(streaming.forward_backward(*args, dout=dout, **options, jobs=1), got, 0)


def test_dask_can_do_it():
    distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
    rng = np.random.default_rng(0)
    args = problem(rng, length=20, keys=30)
    dout = rng.normal(size=args[0].shape)
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        got = streaming.forward_backward(*args, dout=dout, block=(8, 8), executor=client.get_executor())
    same(streaming.forward_backward(*args, dout=dout, block=(8, 8), jobs=1), got, 0)


def test_a_fault_in_a_part_is_raised_where_it_is_waited_for():
    def fail(n):
        if n == 3:
            raise ZeroDivisionError(n)
        return n

    results = blocks.in_order(fail, ((n,) for n in range(9)), jobs=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)


MASKS = {
    "causal and window": masks.causal() & masks.window(9, 0),
    "documents": masks.document(np.repeat(np.arange(9), 10)[None, :].repeat(2, axis=0)),
    "padding": masks.padding(np.array([40, 90])),
    "by head": masks.block_sparse(np.random.default_rng(0).random((2, 9, 9)) < 0.4, 10),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("offset", [0, 20, np.array([3, 11])], ids=["none", "one", "per item"])
def test_a_mask_that_is_a_value_is_the_mask_it_says(name, offset):
    rng, mask = np.random.default_rng(0), MASKS[name]
    q, k, v = problem(rng)
    by_item = [mask.array(70, 90, offset=int(o)) for o in np.broadcast_to(offset, 2)]
    by_item = [m.reshape((1,) * (4 - m.ndim) + m.shape) for m in by_item]
    dense = np.concatenate([m[b : b + 1] if len(m) > 1 else m for b, m in enumerate(by_item)])
    options = {"q_offset": offset, "block": (16, 16), "jobs": 1}
    dout = rng.normal(size=q.shape)
    expected = streaming.forward_backward(q, k, v, dout=dout, attn_mask=dense, **options)
    same(expected, streaming.forward_backward(q, k, v, dout=dout, attn_mask=mask, **options))
    plain, _ = dot_product_attention.forward(q, k, v, attn_mask=mask, q_offset=offset)
    same(expected[0], plain)


# --- chosen rows and columns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 3.0}, {"attn_mask": masks.window(20, 5)}])
@pytest.mark.parametrize("given", [True, False])
def test_chosen_rows_and_columns_are_those_of_the_whole(options, given):
    rng = np.random.default_rng(1)
    q, k, v = problem(rng, heads=4, shared=2)
    bias, sinks = rng.normal(size=(4, 70, 90)), rng.normal(size=4)
    dout = Out(rng.normal(size=q.shape), rng.normal(size=q.shape[:3]))
    out, saved = dot_product_attention.forward(q, k, v, bias, sinks, return_lse=True, **options)
    dq, dk, dv, *_ = dot_product_attention.backward(dout, saved)
    rows, columns = [69, 0, 33], [5, 88, 40, 41]
    chosen = {"rows": rows, "columns": columns} | ({"y": out.y, "lse": out.lse} if given else {})
    got = streaming.sampled(q, k, v, bias, sinks, dout=dout, block=(16, 32), **chosen, **options)
    expected = out.y[:, :, rows], out.lse[:, :, rows], dq[:, :, rows], dk[:, :, columns], dv[:, :, columns]
    same(streaming.Sample(*expected), got)


def test_no_rows_and_no_columns_are_a_choice_too():
    q, k, v = problem(np.random.default_rng(1))
    got = streaming.sampled(q, k, v, dout=q, rows=[], columns=[])
    assert got.y.shape == (2, 2, 0, 5) and got.dq.shape == (2, 2, 0, 5) and got.dk.shape == (2, 1, 0, 5)


def test_rows_alone_need_no_cotangent():
    q, k, v = problem(np.random.default_rng(1))
    got = streaming.sampled(q, k, v, rows=np.array([4]))
    same(dot_product_attention.forward(q, k, v)[0][:, :, [4]], got.y)
    assert got.dq is None and got.dk is None


# --- what is not done -------------------------------------------------------------------------------------------


def test_what_cannot_be_seen_is_not_computed(monkeypatch):
    done = []
    real = streaming.scores
    monkeypatch.setattr(streaming, "scores", lambda q, k, *rest: done.append(len(q) * len(k)) or real(q, k, *rest))
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1, 64, 4))
    for options, least in (({"is_causal": True}, 64 * 65 / 2), ({"window": (3, 0)}, 64 * 4 - 6)):
        done.clear()
        streaming.forward(q, k, v, block=(4, 4), jobs=1, **options)
        assert least <= sum(done) <= least + 64 * 8, "the blocks along the edges, and no more"
    done.clear()
    v[0, 0, 60] = np.nan  # 0 times NaN is NaN: now everything is needed
    y, _ = streaming.forward(q, k, v, block=(4, 4), jobs=1, is_causal=True)
    assert sum(done) == 64 * 64 and np.isnan(y).all()


def test_memory_grows_with_the_length_alone(monkeypatch):
    monkeypatch.setattr(streaming, "KEPT", 0)  # of which there is as much for all lengths

    def peak(length):
        q, k, v, dout = np.random.default_rng(0).normal(size=(4, 1, 1, length, 4))
        tracemalloc.start()
        streaming.forward_backward(q, k, v, dout=dout, jobs=1, block=(128, 64))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(4096) < 2.2 * peak(2048)
    assert peak(4096) < 4096**2 * 8 / 50  # the plain file holds several arrays of 4096^2
