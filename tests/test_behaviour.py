"""Laws on foreign functions: what is right keeps them all, and whoever breaks one is told so, and of that one alone."""

import math

import numpy as np
import pytest

from refattn.attention.dot_product import dot_product_attention
from refattn.attention.dot_product.dot_product_attention import Convention
from refattn.core import Call
from refattn.oracle import behaviour
from refattn.oracle.behaviour import LAWS, TORCH_VIEWS, VIEWS, check_behaviour
from refattn.oracle.bounds import exact
from refattn.oracle.check import check
from refattn.oracle.contract import NotHandled
from refattn.oracle.conventions import PRESETS

NAMES = {law.__name__ for law in LAWS}


@np.errstate(invalid="ignore")
def attention(q, k, v, is_causal, window, attn_mask, kv_seqlens, return_lse, ahead=0, wider=0, hidden=-np.inf, bias=0):
    """Written here, and right, unless one of the last four says otherwise."""
    dtype, times = q.dtype, q.shape[1] // k.shape[1]
    q, k, v = (x.astype(np.result_type(x, np.float32)) for x in (q, k, v))
    k, v = np.repeat(k, times, axis=1), np.repeat(v, times, axis=1)
    s = (q / math.sqrt(q.shape[-1])) @ k.swapaxes(-1, -2) + np.asarray(bias, q.dtype)
    i, j = np.arange(s.shape[2])[:, None], np.arange(s.shape[3])
    if is_causal:
        s = np.where(j > i + ahead, -np.inf, s)
    if window is not None:
        left, right = (s.shape[3] + s.shape[2] if n is None else n for n in window)
        s = np.where((j < i - left - wider) | (j > i + right), -np.inf, s)
    if attn_mask is not None:
        s = np.where(attn_mask, s, hidden)
    if kv_seqlens is not None:
        s = np.where(j < kv_seqlens[:, None, None, None], s, hidden)
    s = s.astype(q.dtype)  # of where, which makes float64
    top = s.max(axis=-1, keepdims=True)
    e = np.exp(s - top)
    total = e.sum(axis=-1, keepdims=True)
    y = ((e / total) @ v).astype(dtype)
    return (y, (top + np.log(total))[..., 0]) if return_lse else y


def right(q, k, v, *, is_causal=None, window=None, attn_mask=None, kv_seqlens=None, return_lse=False):
    return attention(q, k, v, is_causal, window, attn_mask, kv_seqlens, return_lse)


def altered(change=None, **wrong):
    """A candidate that is wrong in one way: change(right answer, q, k, v) -> y, or what `attention` was told."""

    def candidate(q, k, v, *, is_causal=None, window=None, attn_mask=None, kv_seqlens=None, return_lse=False):
        result = attention(q, k, v, is_causal, window, attn_mask, kv_seqlens, return_lse, **wrong)
        if change is None:
            return result
        y = change(result[0] if return_lse else result, q, k, v)
        return (y, result[1]) if return_lse else y

    return candidate


def checked(candidate, **options):
    return check_behaviour(candidate, "dot_product_attention", **options)


def broken(candidate, **options):
    return {law for law, problem in checked(candidate, **options).items() if problem}


# --- all laws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("arithmetic", ["float32", "f16_upcast", "bf16_upcast"])
def test_a_right_function_keeps_all_laws(seed, arithmetic):
    found = checked(right, arithmetic=arithmetic, seed=seed)
    assert found == dict.fromkeys(NAMES, "")


def leaky(y, q, k, v):
    """A little of the values of all items."""
    return y + v.mean(axis=(0, 1, 2), keepdims=True)[..., :1] * np.asarray(1e-3, y.dtype)


def mixed_items(y, q, k, v):
    return y + np.asarray(1e-2, y.dtype) * y[::-1]


def mixed_heads(y, q, k, v):
    return y + np.asarray(1e-2, y.dtype) * y[:, ::-1]


def in_place(q, k, v, *, attn_mask=None):
    q *= np.asarray(1.5, q.dtype)
    return attention(q, k, v, None, None, attn_mask, None, False)


def option_in_place(q, k, v, *, attn_mask=None):
    if attn_mask is not None:
        attn_mask[...] = True
    return attention(q, k, v, None, None, None, None, False)


def with_a_memory():
    calls = []

    def candidate(q, k, v):
        calls.append(1)
        return attention(q, k, v, None, None, None, None, False) + np.asarray(len(calls) * 1e-6, q.dtype)

    return candidate


def placed(q, k, v):
    return attention(q, k, v, None, None, None, None, False, bias=-0.1 * np.arange(k.shape[2]))


def contiguous_only(q, k, v, *, is_causal=None):
    """Reads memory as if it were contiguous."""

    def read(x):
        strides = np.cumprod([x.itemsize, *x.shape[:0:-1]])[::-1]
        start = x if all(s >= 0 for s in x.strides) else x[..., ::-1]
        return np.lib.stride_tricks.as_strided(start, x.shape, strides).copy()

    flat = [read(x) if x.base is None or x.base.nbytes >= x.nbytes else x for x in (q, k, v)]
    return attention(*flat, is_causal, None, None, None, False)


def other_path(q, k, v, *, is_causal=None, return_lse=False):
    y = attention(q, k, v, is_causal, None, None, None, return_lse)
    return (y[0] * np.asarray(1.01, q.dtype), y[1]) if return_lse else y


PLANTED = {  # name: (candidate, the law that it breaks, others that cannot but notice)
    "a key ahead": (altered(ahead=1), "causal", ()),
    "a wider window": (altered(wider=1), "window", ()),
    "masked keys count a little": (altered(hidden=-20.0), "mask", ("causal", "window")),  # of calls with both
    "items mixed": (altered(mixed_items), "batch_independent", ("causal", "window", "mask")),
    "heads mixed": (altered(mixed_heads), "head_independent", ("mask",)),
    "keys have places": (placed, "key_permutation", ()),
    "q in place": (in_place, "pure", ("layout",)),  # which cannot write to what is read-only
    "a mask in place": (option_in_place, "pure", ("layout", "mask")),
    "a memory": (with_a_memory(), "pure", NAMES),
    "contiguous only": (contiguous_only, "layout", ()),
    "another path": (other_path, "same_by_every_path", ()),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_law_is_broken_by_the_one_who_breaks_it(name):
    candidate, law, others = PLANTED[name]
    found = broken(candidate)
    assert law in found, "not noticed"
    assert found <= {law, *others}, checked(candidate)


def test_every_law_has_one_who_breaks_it():
    assert {law for _, law, _ in PLANTED.values()} == NAMES


def test_a_leak_breaks_many():
    assert broken(altered(leaky)) >= {"causal", "window", "mask", "batch_independent"}


def test_laws_that_no_call_tries_are_not_there():
    assert checked(lambda q, k, v: attention(q, k, v, *[None] * 5)).keys() == NAMES - {
        *("causal", "window", "mask", "same_by_every_path")
    }


def test_what_raises_is_a_problem_and_what_is_not_handled_is_none():
    def raises(q, k, v):
        raise RuntimeError("no kernel")

    def handles_one_item(q, k, v, *, is_causal=None):
        if len(q) > 1:
            raise NotHandled("one item only")
        return attention(q, k, v, is_causal, None, None, None, False)

    found = checked(raises)
    assert found and all("RuntimeError: no kernel" in problem for problem in found.values())
    found = checked(handles_one_item)
    assert "batch_independent" not in found and not any(found.values()) and "causal" in found


def test_gradients_are_looked_at_where_there_are_some():
    def backward(dout, q, k, v, out):
        dk = np.lib.stride_tricks.as_strided(k, k.shape, np.cumprod([k.itemsize, *k.shape[:0:-1]])[::-1])
        return q, dk.copy() if k.base is None else 2 * dk, v

    found = checked(lambda q, k, v: attention(q, k, v, *[None] * 5), backward=backward)
    assert "dk at" in found["layout"] and not found["pure"]


# --- one law on one call ----------------------------------------------------------------------------------------


def call(**options):
    rng = np.random.default_rng(0)
    return Call(tuple(rng.normal(size=(2, 2, n, 4)) for n in (5, 7, 7)), options)


def given(law, candidate, case, **options):
    return law(candidate, case, np.random.default_rng(1), **options)


def test_a_law_that_has_nothing_to_try_says_none():
    for law in (behaviour.causal, behaviour.window, behaviour.mask, behaviour.same_by_every_path):
        assert given(law, right, call()) is None
    one = Call(tuple(x[:1, :1] for x in call().args), {})
    assert given(behaviour.batch_independent, right, one) is None
    assert given(behaviour.head_independent, right, one) is None
    assert given(behaviour.key_permutation, right, call(is_causal=True)) is None
    assert given(behaviour.key_permutation, right, call(kv_seqlens=np.array([3, 4]))) is None
    assert given(behaviour.mask, right, call(attn_mask=np.ones((5, 7), bool))) is None  # hides nothing


def test_to_the_bit_unless_something_is_allowed():
    def a_little(q, k, v, **options):
        return right(q, k, v, **options) + 1e-9 * next(more)

    for allowed, good in ((0, False), (1e-12, False), (1e-7, True), (lambda case: {"out": 1e-7}, True)):
        more = iter(range(9))
        problem = given(behaviour.pure, a_little, call(), allowed=allowed)
        assert (problem == "") == good, (allowed, problem)
    more = iter(range(9))
    assert given(behaviour.pure, a_little, call(), allowed=np.nan) != ""


def test_nan_agrees_with_nan_only():
    def nan_now_and_then(q, k, v):
        y = attention(q, k, v, *[None] * 5)
        y[0, 0, 0, 0] = np.nan if next(more) else 0.0
        return y

    more = iter((1, 1))
    assert given(behaviour.pure, nan_now_and_then, call(), allowed=1e9) == ""
    more = iter((0, 1))
    assert "is nan, and was 0 (1 of 80 elements)" in given(behaviour.pure, nan_now_and_then, call(), allowed=1e9)


def test_shapes_and_what_comes_back_have_to_agree():
    def other_shape(q, k, v):
        return np.zeros(next(shapes))

    shapes = iter(((2, 3), (3, 2)))
    assert "has shape (3, 2), and had (2, 3)" in given(behaviour.pure, other_shape, call())
    more = iter((True, False))
    assert "came back" in given(behaviour.pure, lambda q, k, v: right(q, k, v, return_lse=next(more)), call())


def test_the_place_of_a_query_follows_its_offset():
    """Bottom-right: the last query sees the last key. Who aligns to the top left then sees less, which is no leak."""

    def bottom_right(q, k, v, *, is_causal, q_offset):
        return attention(q, k, v, True, None, None, None, False, ahead=k.shape[2] - q.shape[2])

    for offset, good in (("bottom_right", True), (2, True), (1, False), ("top_left", False)):
        problem = given(behaviour.causal, bottom_right, call(is_causal=True, q_offset=offset))
        assert (problem == "") == good, (offset, problem)
    assert "later keys, from" in problem


def test_queries_without_keys_may_get_anything():
    hide = np.ones((5, 7), bool)
    hide[2] = False
    assert given(behaviour.mask, right, call(attn_mask=hide)) is None  # only that row hides a key, and it is empty
    hide[3, 4:] = False
    assert given(behaviour.mask, altered(hidden=-1e4), call(attn_mask=hide)) == ""  # that row is the mean of the values
    assert given(behaviour.mask, altered(hidden=-4.0), call(attn_mask=hide)) != ""


@pytest.mark.parametrize("view", [*VIEWS, "expanded"])
def test_each_view_is_what_it_says_and_has_the_same_numbers(view):
    seen = []

    def looks(q, k, v):
        seen.append((k.flags.c_contiguous, k.flags.writeable, k.strides))
        return attention(q, k, v, *[None] * 5)

    assert given(behaviour.layout, looks, call(), views=(view,), allowed=1e-12) == ""
    plain, other = seen
    assert plain[0] and plain[1]
    expected = {
        "transposed": lambda s: s[-1] > s[-2],
        "with heads after positions": lambda s: s[1] < s[2],
        "sliced": lambda s: s[-1] == 16,
        "reversed": lambda s: s[-1] < 0,
        "expanded": lambda s: s[0] == s[1] == 0,
        "read-only": lambda s: True,
    }
    assert expected[view](other[2]) and other[1] == (view != "read-only") and (view == "read-only") == other[0]


@pytest.mark.parametrize("view", [*VIEWS, "expanded"])
def test_each_view_finds_the_one_who_cannot(view):
    def cannot(q, k, v):
        if not (k.flags.c_contiguous and k.flags.writeable):
            raise BufferError("not contiguous")
        return attention(q, k, v, *[None] * 5)

    assert f"arrays that are {view}: raised BufferError" in given(behaviour.layout, cannot, call(), views=(view,))


def test_paths_may_be_functions():
    def other(q, k, v, **options):
        return 2 * right(q, k, v, **options)

    assert given(behaviour.same_by_every_path, right, call(), paths=[right, {"is_causal": None}]) == ""
    assert "by other the answer is another" in given(behaviour.same_by_every_path, right, call(), paths=[right, other])


def test_the_textbook_layout():
    def textbook(q, k, v, *, mask=None, is_causal=False, ahead=0):
        q, k, v = (x if x.ndim == 4 else x[:, None] for x in (q, k, v))
        hide = mask if mask is None or mask.ndim == 4 else mask[:, None]
        return attention(q, k, v, is_causal, None, hide, None, False, ahead=ahead)

    def shaped(y, q):
        return y if q.ndim == 4 else y[:, 0]

    def good(q, k, v, *, mask, is_causal):
        return shaped(textbook(q, k, v, mask=mask, is_causal=is_causal), q)

    def ahead(q, k, v, *, mask, is_causal):
        return shaped(textbook(q, k, v, mask=mask, is_causal=is_causal, ahead=1), q)

    found = check_behaviour(good, "scaled_dot_product", examples=8)
    assert found == dict.fromkeys(NAMES - {"window", "same_by_every_path"}, "")
    found = check_behaviour(ahead, "scaled_dot_product", examples=8)
    assert "later keys" in found["causal"] and not found["mask"]


# --- tensors --------------------------------------------------------------------------------------------------


@pytest.mark.frameworks
def test_views_stay_views_as_tensors():
    torch = pytest.importorskip("torch")
    seen = []

    def candidate(q, k, v, *, is_causal=None):
        seen.append((k.is_contiguous(), 0 in k.stride()))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=bool(is_causal), enable_gqa=True)

    found = check_behaviour(candidate, "dot_product_attention", framework="torch", arithmetic="torch_cpu_float32")
    assert found == dict.fromkeys(NAMES - {"window", "mask", "same_by_every_path"}, "")
    assert {(True, False), (False, False), (False, True)} <= set(seen)
    assert set(TORCH_VIEWS) <= {*VIEWS, "expanded"}


@pytest.mark.frameworks
def test_tensors_that_are_read_as_if_contiguous_are_noticed():
    torch = pytest.importorskip("torch")

    def candidate(q, k, v):
        k = torch.as_strided(k, k.shape, torch.empty(k.shape).stride(), k.storage_offset())
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    found = check_behaviour(candidate, "dot_product_attention", framework="torch", arithmetic="torch_cpu_float32")
    assert {law for law, problem in found.items() if problem} == {"layout"}


def from_the_end(q, k, v, *, is_causal=False, scale=None, always=False):
    """The diagonal ends at the last key; a query without keys has zeros."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    s = q @ np.swapaxes(k, -1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal or always:
        s = np.where(np.tri(*s.shape[-2:], k=s.shape[-1] - s.shape[-2], dtype=bool), s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - np.where(np.isinf(top), 0, top))
    total = p.sum(axis=-1, keepdims=True)
    return (p @ v / np.where(total == 0, 1, total)).astype(q.dtype)


def test_the_diagonal_is_where_the_convention_has_it():
    report = check(from_the_end, "dot_product_attention", convention="flash_attn")
    assert report.ok and dict(report.behaviour)["causal"] == "", str(report)
    assert check_behaviour(from_the_end, "dot_product_attention")["causal"] != ""  # from the beginning, unless said


@pytest.mark.parametrize("name", PRESETS)
def test_no_convention_is_accused_of_itself(name):
    """The reference, answering as a framework does, by its own convention."""

    def candidate(q, k, v, attn_bias=None, sinks=None, **options):
        said = {"convention": exact(PRESETS[name]), "return_lse": True}
        out, _ = dot_product_attention.forward(q, k, v, attn_bias, sinks, **options | said)
        return out.y, out.lse

    report = check(candidate, "dot_product_attention", convention=name, max_examples=40, seed=3)
    assert report.ok and {"causal", "mask", "pure", "layout"} <= set(dict(report.behaviour)), str(report)


def test_a_convention_that_is_always_causal():
    def always(q, k, v, *, scale=None):
        return from_the_end(q, k, v, scale=scale, always=True)

    said = Convention(is_causal=True, q_offset="bottom_right")
    report = check(always, "dot_product_attention", convention=said)
    behaved = dict(report.behaviour)
    assert report.ok and behaved["causal"] == "" and "key_permutation" not in behaved, str(report)


def test_where_the_convention_puts_the_queries_at_the_end_of_what_is_no_padding():
    """Lengths move the diagonal then, and the law that looks along it must know."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(1, 2, 2, 8)), rng.normal(size=(1, 2, 5, 8)), rng.normal(size=(1, 2, 5, 8))
    convention = PRESETS["ort_gqa"]
    assert convention.q_offset == "bottom_right"
    options = {"window": (0, 0), "kv_seqlens": np.array([3]), "convention": convention}

    def right(q, k, v, *, window=None, kv_seqlens=None, is_causal=True):
        given = {"window": window, "kv_seqlens": kv_seqlens, "is_causal": is_causal, "convention": convention}
        return dot_product_attention.forward(q, k, v, **given)[0]

    def one_to_the_left(q, k, v, *, window=None, kv_seqlens=None, is_causal=True):
        return right(q, k, v, window=(window[0] + 1, 0), kv_seqlens=kv_seqlens, is_causal=is_causal)

    call = Call((q, k, v), options)
    assert behaviour.window(right, call, np.random.default_rng(1)) == ""
    assert "outside of the window" in behaviour.window(one_to_the_left, call, np.random.default_rng(1))


@pytest.mark.parametrize("gradients", [True, False])
def test_gradients_that_were_not_asked_for_are_left_alone(gradients):
    def forward(q, k, v):
        return attention(q, k, v, False, None, None, None, False)

    def backward(dout, q, k, v, out):
        raise NotImplementedError("forward only")

    found = check_behaviour(forward, "dot_product_attention", backward=backward, gradients=gradients, examples=1)
    assert ("forward only" in found["pure"]) == gradients
    report = check(forward, "dot_product_attention", backward=backward, gradients=gradients, max_examples=4)
    assert report.ok == (not gradients)
