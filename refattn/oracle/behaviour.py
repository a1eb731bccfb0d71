"""What an attention function owes to anybody, without a reference: laws of its behaviour.

    causal(candidate, call, rng)      "" if it holds, a problem in words if not; None where the call has nothing to try

Every law is a function of (candidate, call, rng, *, run, allowed, dout). `call` is one of dot_product_attention or of
scaled_dot_product; `run` is a refattn.oracle.contract.runner. Two answers may differ by `allowed`: a number, or a
function of a call that gives {"out": number or array, "lse": ...}; 0, the default, is to the bit. NaN agrees with NaN.
With a `dout`, `pure` and `layout` look at the gradients too: "dq", "dk", ...

What a law changes becomes large, so that a little of what should not be seen is much. A query without keys may get
anything, and is not looked at.
"""

import functools

import numpy as np

from refattn.core import Call, leaves, tree_map
from refattn.oracle.arithmetic import ARITHMETICS, numpy_dtype
from refattn.oracle.bounds import attention_bounds
from refattn.oracle.canonical import as_dot_product
from refattn.oracle.contract import NotHandled, claim, claimed, handed_over, raised, runner, with_backward
from refattn.oracle.inputs import cast_call, draw, rounded, visible_keys
from refattn.registry import find

NUMPY = with_backward(None)
NAMES = "out", "lse"
GRADIENTS = "dq", "dk", "dv", "dattn_bias", "dsinks"


# --- what nobody may see ------------------------------------------------------------------------------------


def causal(candidate, call, rng, *, run=NUMPY, allowed=0, dout=None):
    """Changing later keys and values changes no earlier output."""
    if not _is_causal(call):
        return None
    hidden = _hidden(call, "is_causal", *_offsets(call))
    later = [slice(j, None) for j in _some_keys(hidden, rng)]
    return _unseen(candidate, call, rng, run, allowed, hidden, later, "later keys")


def window(candidate, call, rng, *, run=NUMPY, allowed=0, dout=None):
    """Changing keys and values outside of the window of a query does not change its output."""
    if call.options.get("window") is None:
        return None
    hidden = _hidden(call, "window", *_offsets(call))
    return _unseen(candidate, call, rng, run, allowed, hidden, _single(hidden, rng), "keys outside of the window")


def mask(candidate, call, rng, *, run=NUMPY, allowed=0, dout=None):
    """Changing keys and values that are masked, or beyond the length of the item, changes nothing."""
    names = [name for name in ("attn_mask", "mask", "kv_seqlens") if call.options.get(name) is not None]
    if not names:
        return None
    hidden = _hidden(call, *names)
    return _unseen(candidate, call, rng, run, allowed, hidden, _single(hidden, rng), "masked keys")


def _some_keys(hidden, rng):
    """Places of keys that are hidden from some query: the first and the last of them, and three more."""
    places = np.flatnonzero(hidden.any(axis=(0, 1, 2)))
    chosen = [*places[:1], *places[-1:], *rng.choice(places, min(3, len(places)), replace=False)]
    return sorted({int(j) for j in chosen})


def _single(hidden, rng):
    return [slice(j, j + 1) for j in _some_keys(hidden, rng)]


def _offsets(call):
    """The options that say where the queries stand."""
    offset, convention = call.options.get("q_offset"), call.options.get("convention")
    offset = convention.q_offset if offset is None and convention is not None else offset
    by_lengths = isinstance(offset, str) and offset == "bottom_right"
    return ("q_offset", "q_seqlens", "kv_seqlens") if by_lengths else ("q_offset",)


def _hidden(call, *names):
    """(B, H, Q, K): which keys these options hide."""
    return ~_seen(call, {name: x for name, x in call.options.items() if name in (*names, "convention")})


def _is_causal(call):
    """As asked for, or else as the convention has it."""
    asked, convention = call.options.get("is_causal"), call.options.get("convention")
    return bool(convention and convention.is_causal) if asked is None else asked


def _seen(call, options):
    q, k, v = (x if x.ndim == 4 else x[:, None] for x in call.args[:3])
    mask = options.get("mask")
    options = {name: x for name, x in options.items() if name != "mask"}
    if mask is not None:
        options["attn_mask"] = mask if mask.ndim == 4 else mask[:, None]
    return visible_keys(q, k, v, options)[0]


def _unseen(candidate, call, rng, run, allowed, hidden, places, what):
    """The queries from which the keys at one of these places are hidden have the answers they had."""
    convention = call.options.get("convention")
    if convention is not None and convention.softcap_after == "mask" and call.options.get("softcap") is not None:
        return None  # the cap lets hidden keys in again
    q, k, v, *others = call.args
    before, found = _answers(candidate, call, run), None
    for place in places:
        rows = hidden[..., place].all(axis=-1) & _answered(call)
        if not rows.any():
            continue
        changed = Call((q, _renewed(rng, k, place, 4), _renewed(rng, v, place, 100), *others), call.options)
        after = _answers(candidate, changed, run)
        rows = rows if q.ndim == 4 else rows[:, 0]
        problem = _differ(*(_only(rows, y, q.ndim) for y in (before, after)), allowed, call)
        if problem:
            where = f"{place.start} to {place.stop or k.shape[-2]}"
            return f"{what}, from {where}, change what does not see them: {problem}"
        found = ""
    return found


def _answered(call):
    """(B, H, Q): the queries that have a key and are not padding."""
    some = _seen(call, call.options).any(axis=-1)
    lengths = call.options.get("q_seqlens")
    return some if lengths is None else some & (np.arange(some.shape[2]) < lengths[:, None, None])


def _renewed(rng, x, place, size):
    """x with other numbers for some keys."""
    x = x.copy()
    x[..., place, :] = (size * rng.normal(size=x[..., place, :].shape)).astype(x.dtype)
    return x


def _only(rows, answers, rank):
    """What came back for these queries; NaN for the others, which agrees with NaN."""
    return {
        name: np.where(rows[..., None] if y.ndim == rank else rows, y.astype(np.float64), np.nan)
        for name, y in answers.items()
    }


# --- what does not depend on one another ---------------------------------------------------------------------


def batch_independent(candidate, call, rng, *, run=NUMPY, allowed=0, dout=None):
    """Other items of the batch may be anything."""
    return _independent(candidate, call, rng, run, allowed, 0, "items")


def head_independent(candidate, call, rng, *, run=NUMPY, allowed=0, dout=None):
    """Other heads may be anything."""
    return None if call.args[0].ndim < 4 else _independent(candidate, call, rng, run, allowed, 1, "heads")


def _independent(candidate, call, rng, run, allowed, axis, what):
    q, k, v, *others = call.args
    count = q.shape[axis]
    if count < 2:
        return None
    kept = int(rng.integers(count))
    own = (slice(None),) * axis + (slice(kept, kept + 1),)

    def renewed(x, size):
        if x.shape[axis] != count:  # heads of keys that are shared
            return x
        new = (size * rng.normal(size=x.shape)).astype(x.dtype)
        new[own] = x[own]
        return new

    def alone(answers):
        found = {name: np.full(y.shape, np.nan) for name, y in answers.items()}
        for name, y in answers.items():
            found[name][own] = y[own]
        return found

    changed = Call((renewed(q, 4), renewed(k, 4), renewed(v, 100), *others), call.options)
    before, after = (alone(_answers(candidate, c, run)) for c in (call, changed))
    problem = _differ(before, after, allowed, call)
    return f"other {what} change number {kept}: {problem}" if problem else ""


def key_permutation(candidate, call, rng, *, run=NUMPY, allowed=0, dout=None):
    """In another order of the keys, with all that belongs to them, the answer is the same."""
    keys, get = call.args[1].shape[-2], call.options.get
    if _is_causal(call) or get("window") is not None or get("kv_seqlens") is not None or keys < 2:
        return None
    order = rng.permutation(keys)

    def reordered(x, axis=-1):
        return x if x is None or x.shape[axis] != keys else np.take(x, order, axis=axis)

    q, k, v, *others = call.args
    args = q, reordered(k, -2), reordered(v, -2), *map(reordered, others[:1]), *others[1:]
    masks = {n: reordered(x) for n, x in call.options.items() if n in ("attn_mask", "mask", "dropout_keep")}
    after = _answers(candidate, Call(args, call.options | masks), run)
    problem = _differ(_answers(candidate, call, run), after, allowed, call)
    return f"the order of the keys changes the answer: {problem}" if problem else ""


# --- manners ------------------------------------------------------------------------------------------------


def pure(candidate, call, rng, *, run=NUMPY, allowed=0, dout=None):
    """The arguments are left as they are, and the same call has the same answer."""
    kept = tree_map(np.copy, call.args), {name: np.copy(x) for name, x in _arrays(call.options)}
    first = _of_these(candidate, call, run, dout)
    names = [path for (path, a), (_, b) in zip(leaves(kept[0]), leaves(call.args)) if not _identical(a, b)]
    changed = [f"argument {path}" for path in names]
    changed += [name for name, x in _arrays(call.options) if not _identical(kept[1][name], x)]
    if changed:
        return f"{', '.join(changed)}: changed by the candidate"
    problem = _differ(first, _of_these(candidate, call, run, dout), allowed, call)
    return f"the same call again has another answer: {problem}" if problem else ""


def _transposed(x):
    return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def _heads_last(x):
    return np.ascontiguousarray(x.swapaxes(1, -2)).swapaxes(1, -2)


def _sliced(x):
    """Every other number of an array twice as long, in which the others are large."""
    wide = np.stack([x, x], axis=-1)
    wide[..., 1] = True if x.dtype.kind == "b" else 1000
    return wide[..., 0]


def _reversed(x):
    return np.ascontiguousarray(x[..., ::-1])[..., ::-1]


def _read_only(x):
    x = x.copy()
    x.setflags(write=False)
    return x


VIEWS = {
    "transposed": _transposed,
    "with heads after positions": _heads_last,
    "sliced": _sliced,
    "reversed": _reversed,
    "read-only": _read_only,
}
TORCH_VIEWS = "transposed", "with heads after positions", "sliced", "expanded"  # torch has no others


def layout(candidate, call, rng, *, run=NUMPY, allowed=0, dout=None, views=(*VIEWS, "expanded")):
    """Views of all sorts have the answer of contiguous arrays."""
    plain = _relaid(call, np.ascontiguousarray)
    for name in views:
        if name == "expanded":
            (contiguous, view), turned = _expanded(_relaid(plain, np.copy)), dout
        else:
            contiguous, view = plain, _relaid(plain, lambda x, name=name: VIEWS[name](x.copy()))
            turned = None if dout is None else VIEWS[name](dout)
        expected = _answers(candidate, contiguous, run, dout)
        try:
            problem = _differ(expected, _of_these(candidate, view, run, turned), allowed, contiguous)
        except Exception as error:  # of the view alone
            problem = raised(error)
        if problem:
            return f"arrays that are {name}: {problem}"
    return ""


def _relaid(call, view):
    def leaf(x):
        return view(x) if isinstance(x, np.ndarray) and x.ndim > 1 else x

    return Call(tree_map(leaf, call.args), {name: tree_map(leaf, x) for name, x in call.options.items()})


def _expanded(call):
    """The call with the keys and values of the first head for all: as contiguous arrays, and as views of stride 0."""

    def first(x):
        bits = x.view(f"u{x.itemsize}")  # as_strided does not know every dtype of ml_dtypes
        return np.lib.stride_tricks.as_strided(bits, x.shape, (0,) * (x.ndim - 2) + x.strides[-2:]).view(x.dtype)

    q, k, v, *others = call.args
    view = first(k), first(v)
    contiguous = map(np.ascontiguousarray, view)
    return Call((q, *contiguous, *others), call.options), Call((q, *view, *others), call.options)


def same_by_every_path(candidate, call, rng, *, run=NUMPY, allowed=0, dout=None, paths=None):
    """The answer is the same by every path: `paths` are other functions, or {option: value}; by default return_lse."""
    if paths is None:
        if "return_lse" not in call.options:
            return None
        paths = [{"return_lse": not call.options["return_lse"]}]
    expected = _answers(candidate, call, run)
    for path in paths:
        if isinstance(path, dict):
            words = "with " + ", ".join(f"{name}={x!r}" for name, x in path.items())
            got = _answers(candidate, call._replace(options=call.options | path), run)
        else:
            words, got = f"by {getattr(path, '__name__', path)}", _answers(path, call, run)
        both = expected.keys() & got.keys()
        problem = _differ({n: expected[n] for n in both}, {n: got[n] for n in both}, allowed, call)
        if problem:
            return f"{words} the answer is another: {problem}"
    return ""


# --- what came back, and how it compares ----------------------------------------------------------------------


def _answers(candidate, call, run, dout=None):
    """What comes of copies of the arguments, so that one who writes to them breaks no other law."""
    copies = {name: np.copy(x) if isinstance(x, np.ndarray) else x for name, x in call.options.items()}
    return _of_these(candidate, Call(tree_map(np.copy, call.args), copies), run, dout)


def _of_these(candidate, call, run, dout):
    """{name: array} of one call: out and lse; 2, 3, ... if there is more; and the gradients, if there is a dout."""
    result, grads = run(candidate, list(call.args), handed_over(candidate, call, call.options), dout)
    flat = leaves(tuple(result) if isinstance(result, (tuple, list)) else (result,))
    found = {NAMES[i] if i < len(NAMES) else str(i): np.array(y) for i, (_, y) in enumerate(flat)}
    return found | {name: np.array(g) for name, g in zip(GRADIENTS, grads or ()) if g is not None}


def _differ(expected, got, allowed, call):
    """Where two answers differ by more than is allowed, in words; or nothing."""
    if expected.keys() != got.keys():
        return f"{', '.join(got) or 'nothing'} came back, and before {', '.join(expected) or 'nothing'}"
    limits = allowed(call) if callable(allowed) else dict.fromkeys(expected, allowed)
    for name, a in expected.items():
        b = got[name]
        if a.shape != b.shape:
            return f"{name} has shape {b.shape}, and had {a.shape}"
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):
            good = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= limits.get(name, 0))
            error = np.where(good, 0, np.nan_to_num(np.abs(a - b), nan=np.inf))
        if not good.all():
            at = np.unravel_index(int(np.argmax(error)), error.shape)
            story = f"{name} at {list(map(int, at))} is {b[at]:.9g}, and was {a[at]:.9g}"
            return f"{story} ({int((~good).sum())} of {a.size} elements)"
    return ""


def _identical(a, b):
    return np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind in "fV")


def _arrays(options):
    return [(name, x) for name, x in options.items() if isinstance(x, np.ndarray)]


# --- a candidate against all of them ----------------------------------------------------------------------------


LAWS = (
    *(causal, window, mask, batch_independent, head_independent, key_permutation, pure, layout),
    same_by_every_path,
)
FAMILIES = "gaussian", "tile_edges", "low_entropy", "large_masked_values", "shifted_down", "few_keys", "one_query"


def check_behaviour(
    candidate,
    like,
    *,
    framework=None,
    backward=None,
    gradients=True,
    convention=None,
    arithmetic="float32",
    dtype=None,
    examples=4,
    seed=0,
):
    """{law: "" or a problem in words}, on calls with the options that the candidate takes; a law that none tries is
    not there.

    Two answers may differ by twice the worst case of the `arithmetic`; those of the same call again not at all.
    `dtype` is that of the arrays, where they are wider than the formats of the arithmetic; a Convention says where the
    diagonal is. Gradients are looked at where a framework or a backward gives them, unless `gradients` is False.
    """
    mechanism = find(like) if isinstance(like, str) else like
    arithmetic = ARITHMETICS[arithmetic] if isinstance(arithmetic, str) else arithmetic
    run, takes, found, tried = runner(framework, backward), claim(candidate, mechanism), {}, dict.fromkeys(LAWS, 0)
    torch = framework not in (None, "numpy")
    gradients = gradients and (torch or backward is not None)
    for i in range(16 * examples):
        call = draw(mechanism, FAMILIES[i % len(FAMILIES)], takes, [seed, i])
        if call is None:
            continue
        if convention is not None:
            call = call._replace(options=call.options | {"convention": convention})
        rng = np.random.default_rng([seed, i])
        call, dout = _given(mechanism, call, takes, arithmetic, dtype, [seed, i])
        allowed = functools.partial(_twice_the_bound, mechanism, arithmetic, dout)
        for law in LAWS:
            if tried[law] >= examples or found.get(law.__name__):
                continue
            more = {"views": TORCH_VIEWS} if law is layout and torch else {}
            more |= {"dout": dout if gradients else None}
            try:
                with np.errstate(all="ignore"):
                    said = law(candidate, call, rng, run=run, allowed=0 if law is pure else allowed, **more)
            except NotHandled:
                continue
            except Exception as error:
                said = raised(error)
            if said is not None:
                found[law.__name__] = said
                tried[law] += 1
    return found


def _given(mechanism, call, takes, arithmetic, dtype, seed):
    """The call and a gradient of its output, as the candidate takes them."""
    convention = {name: x for name, x in call.options.items() if name == "convention"}
    call = claimed(call, takes, mechanism)
    call = rounded(call._replace(options=call.options | convention), arithmetic.inputs)
    shape = *call.args[0].shape[:-1], call.args[2].shape[-1]
    dout = rounded(Call((np.random.default_rng([*seed, 1]).normal(size=shape),), {}), arithmetic.out)
    given, out = (dtype or numpy_dtype(form) for form in (arithmetic.inputs, arithmetic.out))
    return cast_call(call, given), cast_call(dout, out).args[0]


def _twice_the_bound(mechanism, arithmetic, dout, call):
    canonical = as_dot_product(mechanism, cast_call(call, np.float64))
    wide = np.reshape(dout, (*canonical.args[0].shape[:3], dout.shape[-1])).astype(np.float64)
    shapes = {"out": dout.shape, "lse": call.args[0].shape[:-1]}
    shapes |= {name: x.shape for name, x in zip(GRADIENTS, call.args) if x is not None}
    bounds = attention_bounds(canonical, wide, arithmetic, ("worst",))
    return {name: 2 * bounds[name].worst.reshape(shape) for name, shape in shapes.items() if name in bounds}
