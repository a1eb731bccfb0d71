"""The calls on which a candidate is tried, of families of inputs that make mistakes visible above rounding.

    for name, family in families(mechanism).items():
        call = draw(mechanism, name, claim, seed)      a Call that the candidate's Claim covers, or None: there is none

Of dot-product attention, what each family is for: FAMILIES. Sizes, heads and options are drawn alike for all of them,
options three at a time, because many mistakes need two: a mask and causal, a bias and grouped heads. Only the family
empty_rows has queries without keys, where conventions differ. Of every other mechanism the calls are those that its
own `example` draws, some of them larger, and changes of those: CHANGES.
"""

import inspect
import math
from typing import Any, NamedTuple

import numpy as np

from refattn.attention.dot_product import dot_product_attention, scaled_dot_product, streaming
from refattn.core import Call, leaves, tree_map
from refattn.draw import RandomDraw
from refattn.oracle.arithmetic import Format, round_to
from refattn.oracle.canonical import as_it_was
from refattn.oracle.contract import Claim

LONG = 16, 40  # how much a stretched size is more than its least
SHOWN = 8  # arrays, when a call is put into words
LARGEST = 3000  # numbers in the arguments of a stretched call, or in its output


class Family(NamedTuple):
    """A way to draw numbers, and what it exposes."""

    name: str
    words: str
    generic: bool  # chance has the say: the statistical bounds hold
    change: Any  # of attention: change(rng, Numbers) -> (q, k, v); of other mechanisms: change(first argument) -> it
    dout: Any = None  # dout(rng, shape) -> array; None: from a normal distribution
    queries: tuple = (3, 7, 16, 20, 33, 40, 65, 100)  # lengths, of attention
    keys: tuple = (3, 7, 16, 20, 33, 40, 65, 100)
    features: tuple = (4, 8, 16, 32, 64)
    needs: tuple = ()  # one of these options has to be there
    without: tuple = ()  # none of these options may be there


def families(mechanism):
    """{name: Family} of a mechanism."""
    if not _is_attention(mechanism):
        return CHANGES
    known = FAMILIES | {"example": CHANGES["example"]}
    if mechanism.forward is scaled_dot_product.forward:  # in its gradient of what is masked 0 times NaN stays NaN
        del known["poisoned_keys"], known["poisoned_values"]
    return known


def draw(mechanism, family, claim, seed):
    """The Call of a seed, a list of ints, in the mechanism's own layout; None where this family has none for it."""
    if _is_attention(mechanism) and family in FAMILIES:
        return draw_attention_call(mechanism, family, claim, seed)
    turn = int(np.random.default_rng(seed).integers(2**16))  # which size is stretched does not follow the family
    call = draw_call(mechanism, mechanism.example, [*seed, turn])
    if family == "example":
        return call
    args = tree_map(np.asarray, call.args)
    paths = [path for path, x in leaves(args) if x.dtype.kind == "f"]
    if not paths:
        return None
    changed = iter([path == paths[0] for path, _ in leaves(args)])
    args = tree_map(lambda x: CHANGES[family].change(x) if next(changed) else x, args)
    try:
        with np.errstate(all="ignore"):
            out, _ = mechanism.forward(*args, **call.options)
    except ValueError:
        return None
    return Call(args, call.options) if all(np.isfinite(y).all() for _, y in leaves(out)) else None


def draw_dout(mechanism, family, out, rng):
    """A gradient of the output, a tree like it, that goes with the family."""
    dout = families(mechanism)[family].dout or _normal
    return tree_map(lambda y: dout(rng, np.shape(y)), out)


def _normal(rng, shape):
    return rng.normal(size=shape)


def _is_attention(mechanism):
    own = dot_product_attention.forward, streaming.forward, scaled_dot_product.forward
    return any(mechanism.forward is forward for forward in own)


# --- families of dot-product attention -------------------------------------------------------------------------


class Numbers(NamedTuple):
    """What a family changes: numbers from a normal distribution, and what it should know of the call."""

    q: np.ndarray  # (B, H, Q, D)
    k: np.ndarray  # (B, G, K, D)
    v: np.ndarray  # (B, G, K, E)
    scale: float
    seen: np.ndarray  # (B, H, Q, K): which keys take part


FAMILIES = {}


def _family(generic=True, **more):
    """The function below is the change of a family; its docstring is the family in words."""

    def add(change):
        FAMILIES[change.__name__] = Family(change.__name__, inspect.getdoc(change), generic, change, **more)
        return change

    return add


HIDING = "attn_mask", "is_causal", "window", "kv_seqlens"
EDGES = 1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129
SHIFTED = {"without": ("softcap", "sinks")}  # which would swallow the shift


@_family()
def gaussian(rng, n):
    """All numbers are from a normal distribution."""
    return n.q, n.k, n.v


@_family()
def low_entropy(rng, n):
    """Logits differ by much (a standard deviation of 4 to 9): few keys have all the weight."""
    return _with_spread(n, rng.uniform(4, 9)), n.k, n.v


@_family(dout=lambda rng, shape: 1 + rng.normal(size=shape))
def offset_values(rng, n):
    """Values are 4 and noise, dout is 1 and noise: what is subtracted in the gradient of the softmax cancels."""
    return n.q, n.k, 4 + n.v


def _one_hot(rng, shape):
    return np.eye(shape[-1])[rng.integers(shape[-1], size=shape[:-1])]


@_family(dout=_one_hot)
def one_hot(rng, n):
    """Values and dout are 0 but for a 1 in every row: an output is a sum of probabilities, and shows each error."""
    return 3 * n.q, n.k, _one_hot(rng, n.v.shape)


@_family(**SHIFTED | {"needs": HIDING, "features": (4, 8, 16)})
def far_below(rng, n):
    """All logits are near -2e4, so that a key that is masked with -1e4 wins."""
    return *_with_common(n, -min(2e4, 5e4 * abs(n.scale))), n.v  # q k stays below 65504


@_family(queries=EDGES, keys=EDGES)
def tile_edges(rng, n):
    """Lengths are those of tiles, one more and one less."""
    return n.q, n.k, n.v


@_family()
def ramp_up(rng, n):
    """Logits rise along the keys: the running maximum moves in every tile."""
    return *_ramp(n, 0, 12), n.v


@_family(needs=HIDING)
def large_masked_values(rng, n):
    """What is masked has large values, and if nobody sees it, large keys: a little of it is much."""
    unseen, some = ~_by_key(n, np.any), ~_by_key(n, np.all)
    return n.q, np.where(unseen, 20 * n.k, n.k), np.where(some, 300 * n.v, n.v)


@_family(**SHIFTED)
def shifted_down(rng, n):
    """All logits are near -200: a maximum that begins at 0 or a mask of -100 shows, and exp without it is 0."""
    return *_with_common(n, -200), n.v


@_family(**SHIFTED)
def shifted_up(rng, n):
    """All logits are near 120: exp without the maximum is infinite."""
    return *_with_common(n, 120), n.v


@_family(dout=lambda rng, shape: rng.choice([-1.0, 1.0], shape))
def signs(rng, n):
    """Values and dout are 1 or -1: products with them are exact, what remains is the error of probabilities."""
    return n.q, n.k, np.where(n.v < 0, -1.0, 1.0)


@_family(needs=("attn_mask", "kv_seqlens", "q_offset", "window"))
def empty_rows(rng, n):
    """Some queries have no keys."""
    return n.q, n.k, n.v


@_family(queries=(1,))
def one_query(rng, n):
    """One query and many keys, as in decoding."""
    return n.q, n.k, n.v


@_family(keys=(1, 2, 3))
def few_keys(rng, n):
    """One to three keys: every weight is large."""
    return n.q, n.k, n.v


@_family()
def growing_values(rng, n):
    """Values grow along the keys: what is rounded or left out late is large."""
    return n.q, n.k, n.v * np.linspace(0.1, 30, n.v.shape[2])[:, None]


@_family()
def ramp_down(rng, n):
    """Logits fall along the keys: the first tile has the maximum, later ones must not be rescaled."""
    return *_ramp(n, 12, 0), n.v


@_family()
def hard_selection(rng, n):
    """One key of each head is ahead of all others by 60."""
    q, k = _with_common(n, 60)
    chosen = rng.integers(k.shape[2], size=(*k.shape[:2], 1)) == np.arange(k.shape[2])
    k[..., 0] = np.where(chosen, k[..., 0], 0)
    return q, k, n.v


@_family()
def outlier_channels(rng, n):
    """One feature of the queries is 8 times, one of the keys 20 times, one of the values 8 times larger."""
    return tuple(_enlarged(rng, x, times) for x, times in ((n.q, 8), (n.k, 20), (n.v, 8)))


@_family()
def heavy_tail(rng, n):
    """All numbers are from Student's distribution with 3 degrees of freedom: some are very large."""
    return tuple(rng.standard_t(3, x.shape) for x in (n.q, n.k, n.v))


@_family()
def high_entropy(rng, n):
    """All logits are nearly the same."""
    return _with_spread(n, 0.02), n.k, n.v


@_family(generic=False)
def ties(rng, n):
    """Keys are equal in groups of four, values and dout positive: rounding errors conspire."""
    return n.q, np.repeat(n.k, 4, axis=2)[:, :, : n.k.shape[2]], np.abs(n.v)


FAMILIES["ties"] = FAMILIES["ties"]._replace(dout=lambda rng, shape: np.abs(rng.normal(size=shape)))


@_family(generic=False)
def nan_query(rng, n):
    """One query is NaN: its row is, and no other."""
    q = n.q.copy()
    q[tuple(rng.integers(length) for length in q.shape[:3])] = np.nan
    return q, n.k, n.v


@_family(generic=False, needs=HIDING)
def poisoned_keys(rng, n):
    """A key that some query must not see is NaN in one feature; the convention says what comes out."""
    return n.q, _poisoned(rng, n, n.k), n.v


@_family(generic=False, needs=HIDING)
def poisoned_values(rng, n):
    """A value that some query must not see is NaN in one feature; the convention says what comes out."""
    return n.q, n.k, _poisoned(rng, n, n.v)


def _poisoned(rng, n, x):
    x, hidden = x.copy(), np.argwhere(~_by_key(n, np.all)[..., 0])
    if len(hidden):
        x[(*hidden[rng.integers(len(hidden))], rng.integers(x.shape[-1]))] = np.nan
    return x


def _with_spread(n, spread):
    """q, such that logits have this standard deviation."""
    return n.q * (spread / (abs(n.scale) * math.sqrt(n.q.shape[-1])))


def _with_common(n, level):
    """q and k, in whose first feature alone they would have logits of this level."""
    q, k, size = n.q.copy(), n.k.copy(), math.sqrt(abs(level / n.scale))
    q[..., 0], k[..., 0] = math.copysign(size, level * n.scale), size
    return q, k


def _ramp(n, first, last):
    q, k = _with_common(n, max(first, last))
    k[..., 0] *= np.linspace(first, last, k.shape[2]) / max(first, last)
    return q, k


def _enlarged(rng, x, times):
    factors = np.ones(x.shape[-1])
    factors[rng.integers(len(factors))] = times
    return x * factors


def _by_key(n, rule):
    """(B, G, K, 1): whether any, or all, of the queries that share a head see the key."""
    shared = n.seen.reshape(*n.k.shape[:2], -1, *n.seen.shape[2:])
    return rule(shared, axis=(2, 3))[..., None]


# --- a call of dot-product attention ---------------------------------------------------------------------------


def draw_attention_call(mechanism, family, claim, seed):
    """The Call of a seed in the mechanism's own layout; None where the candidate lacks what the family needs."""
    drawing, textbook = RandomDraw(seed), mechanism.forward is scaled_dot_product.forward
    if textbook:
        claim = Claim(3, frozenset({"mask": "attn_mask"}.get(name, name) for name in claim.options))
    call = attention_call(drawing, FAMILIES[family], claim, grouped=not textbook)
    if call is None:
        return None
    if textbook:
        rank = drawing.choice("rank", 3, 4)
        call = as_it_was(mechanism, call, Call((np.empty((1,) * rank),), {}))
    arguments = inspect.signature(mechanism.forward).parameters
    options = {name: arguments[name].default for name in claim.options if name in arguments} | call.options
    if textbook and "attn_mask" in claim.options:
        options.setdefault("mask", None)
    return Call(call.args, options)


def attention_call(draw, family, claim, grouped=True):
    """A canonical Call, with those options that are on. `draw` answers `size` and `choice`, and has an `rng`."""
    rng = draw.rng
    batch, heads = draw.choice("B", 1, 2), draw.choice("H", 1, 2, 4)
    shared = draw.choice("G", *[g for g in (1, 2, 4) if heads % g == 0]) if grouped else heads
    queries, keys = draw.choice("Q", *family.queries), draw.choice("K", *family.keys)
    features = draw.choice("D", *family.features)
    wide = draw.choice("E", *dict.fromkeys((features, 8, 24)))
    chosen = _choose(draw, family, claim)
    if chosen is None:
        return None
    q, k, v = (
        rng.normal(size=(batch, *shape))
        for shape in ((heads, queries, features), (shared, keys, features), (shared, keys, wide))
    )
    options = _values(draw, chosen, batch, heads, queries, keys)
    bias, sinks = options.pop("attn_bias", None), options.pop("sinks", None)
    seen = _settled(q, k, v, options, rng if family.name == "empty_rows" else None)
    if seen is None:
        return None
    scale = options.get("scale") or 1 / math.sqrt(features)
    args = *family.change(rng, Numbers(q, k, v, scale, seen)), bias, sinks
    return Call(args[: claim.count], options)


def _choose(draw, family, claim):
    """Names of up to three options, and of what has to go with them; None where what the family needs is not taken."""
    pairs = {"dropout_keep": ("dropout_p",)}
    able = [name for name in ATTENTION_OPTIONS if {name, *pairs.get(name, ())} <= claim.options]
    able += [name for place, name in ((3, "attn_bias"), (4, "sinks")) if claim.count > place]
    positioned = [name for name in ("is_causal", "window") if name in able]
    able = [name for name in able if name not in family.without and (name != "q_offset" or positioned)]
    chosen = {draw.choice("option", None, *able) for _ in range(3)} - {None}
    if family.needs:
        usable = [name for name in family.needs if name in able]
        if not usable:
            return None
        chosen.add(draw.choice("needed", *usable))
    if "q_offset" in chosen and not chosen & set(positioned):
        chosen.add(draw.choice("positioned", *positioned))
    if "return_lse" in claim.options and draw.choice("return_lse", False, True):
        chosen.add("return_lse")
    return chosen


ATTENTION_OPTIONS = (
    *("is_causal", "attn_mask", "scale", "softcap", "window", "q_offset", "kv_seqlens", "q_seqlens", "dropout_keep"),
)


def _values(draw, chosen, b, h, q, k):
    """{name: value} of the options that were chosen, each drawn only if it was."""
    rng, options = draw.rng, {}
    if "is_causal" in chosen:
        options["is_causal"] = True
    if "scale" in chosen:
        options["scale"] = draw.choice("scale", 0.5, 0.25, -0.3)
    if "softcap" in chosen:
        options["softcap"] = draw.choice("softcap", 2.0, 30.0)
    if "window" in chosen:
        options["window"] = draw.choice("window", (4, 0), (2, 1), (None, 3), (7, None), (0, 0), (20, 2))
    if "q_offset" in chosen:
        options["q_offset"] = draw.choice("q_offset", "bottom_right", max(1, k - q), rng.integers(0, 4, b))
    if "attn_mask" in chosen:
        shape = draw.choice("attn_mask", (q, k), (b, 1, 1, k), (b, 1, q, k), (b, h, q, k), (1, h, q, k))
        options["attn_mask"] = rng.random(shape) < 0.7
    if "kv_seqlens" in chosen:
        options["kv_seqlens"] = rng.integers(1 + k // 3, k + 1, b)
    if "q_seqlens" in chosen:
        options["q_seqlens"] = rng.integers(1 + q // 3, q + 1, b)
    if "dropout_keep" in chosen:
        options["dropout_p"] = draw.choice("dropout_p", 0.25, 0.5)
        options["dropout_keep"] = rng.random((b, h, q, k)) >= options["dropout_p"]
    if "attn_bias" in chosen:
        shape = draw.choice("attn_bias", (b, h, q, k), (1, h, q, k), (q, k), (b, 1, 1, k), (h, 1, k), (b, h, q, 1))
        options["attn_bias"] = rng.normal(size=shape)
    if "sinks" in chosen:
        options["sinks"] = rng.normal(size=h)
    if "return_lse" in chosen:
        options["return_lse"] = True
    return options


def _settled(q, k, v, options, emptying=None):
    """Which keys take part (B, H, Q, K), after options were changed so that all queries have one.

    Where there is an rng, `emptying`, so that some have none; and None if that cannot be.
    """
    if emptying is not None:
        _empty_some(emptying, options)
        seen, empty = visible_keys(q, k, v, options)
        return seen if empty.any() else None
    mask = options.pop("attn_mask", None)
    for name in ("q_offset", "window"):
        if visible_keys(q, k, v, options)[1].any():
            options.pop(name, None)
    seen, _ = visible_keys(q, k, v, options)
    if mask is None:
        return seen
    options["attn_mask"] = mask
    empty = visible_keys(q, k, v, options)[1]
    first = seen & (np.cumsum(seen, axis=-1) == 1) & empty[..., None]
    axes = tuple(range(4 - mask.ndim)), tuple(4 - mask.ndim + i for i, n in enumerate(mask.shape) if n == 1)
    options["attn_mask"] = mask | first.any(axis=axes[1], keepdims=True).any(axis=axes[0])
    return visible_keys(q, k, v, options)[0]


def _empty_some(rng, options):
    mask, lengths = options.get("attn_mask"), options.get("kv_seqlens")
    if mask is not None:
        row = rng.integers(mask.shape[-2])
        mask[..., row, :] = False
    if lengths is not None:
        lengths[rng.integers(len(lengths))] = 0


def visible_keys(q, k, v, options):
    """(B, H, Q, K): which keys take part; (B, H, Q): which queries have none of them, and are no padding."""
    get = options.get
    rules = dot_product_attention.settle(
        *("inputs:", q, k, v, None, get("attn_mask"), None, 0.0, get("scale"), get("is_causal"), get("q_offset")),
        *(get("window"), get("softcap"), get("q_seqlens"), get("kv_seqlens"), get("convention")),
    )
    i, j, shape = np.arange(q.shape[2]), np.arange(k.shape[2]), (*q.shape[:3], k.shape[2])
    mask = dot_product_attention.mask_at(get("attn_mask"), i, j, rules.offset)
    seen = dot_product_attention.visible(rules, mask, i, j)
    seen = np.ones(shape, bool) if seen is None else np.broadcast_to(seen, shape)
    empty = ~seen.any(axis=-1)
    return seen, empty if rules.query_lengths is None else empty & (i < rules.query_lengths[..., 0])


# --- calls of every other mechanism ----------------------------------------------------------------------------


def _one_larger(x):
    """One index of the second axis, 20 times larger."""
    if x.ndim < 2:
        return 20 * x
    factors = np.where(np.arange(x.shape[1]) == x.shape[1] // 2, 20, 1)
    return x * factors.reshape(-1, *(1,) * (x.ndim - 2))


CHANGES = {
    name: Family(name, words, generic, change)
    for name, words, generic, change in (
        ("example", "As the mechanism's own example draws it.", True, lambda x: x),
        ("large", "The first argument is 8 times larger.", True, lambda x: 8 * x),
        ("offset", "The first argument is larger by 4: differences from a mean cancel.", True, lambda x: 4 + x),
        ("outliers", "One channel of the first argument is 20 times larger.", True, _one_larger),
        ("rounded", "The first argument has multiples of 1/2: many are equal.", False, lambda x: np.rint(2 * x) / 2),
        ("small", "The first argument is 64 times smaller.", True, lambda x: x / 64),
    )
}


class Stretched(RandomDraw):
    """One or two sizes are much larger than the example asks for: the tiles of a kernel must be filled, and overrun."""

    def __init__(self, seed, which):
        self.rng = np.random.default_rng(seed) if which < 0 else Bounded(np.random.PCG64(seed))
        self.asked, self.which = 0, which  # how many sizes were asked for, and which is long for certain; -1: none is

    def size(self, name, low=1, high=4):
        self.asked += 1
        long = self.asked - 1 == self.which or (self.rng.random() < 0.2 and self.which >= 0)
        return low + int(self.rng.integers(*LONG)) if long else super().size(name, low, high)

    def like(self, tree):
        """Weights get smaller as they get wider, as they do in every network: what they make is of order one."""
        return tree_map(lambda leaf: self.array(*leaf.shape) / math.sqrt(max(1, math.prod(leaf.shape[1:]))), tree)


class Bounded(np.random.Generator):
    """Refuses to draw more numbers at once than a call may have."""

    def normal(self, loc=0.0, scale=1.0, size=None):
        if math.prod(np.atleast_1d(1 if size is None else size).tolist()) > LARGEST:
            raise ValueError(f"size is {size}, expected at most {LARGEST} numbers")
        return super().normal(loc, scale, size)


def draw_call(mechanism, example, seed):
    """The call of a seed, a list of numbers. Two of three are stretched, every size in its turn, if it can be."""
    turn = seed[-1]
    if turn % 3:
        count = Stretched(seed, which=-1)
        example(count)
        for attempt in range(turn, turn + 8):
            try:
                call = example(Stretched([*seed, attempt], which=attempt % max(1, count.asked)))
                if _size(call.args) <= LARGEST and _size(mechanism.forward(*call.args, **call.options)[0]) <= LARGEST:
                    return call
            except (ValueError, IndexError):
                continue  # what was drawn as a size must fit something else: the next size, then
    return example(RandomDraw(seed))


def _size(tree):
    return sum(x.size for _, x in leaves(tree))


def cast(tree, dtype):
    """A copy in which arrays of real numbers have this dtype."""

    def leaf(x):
        real = isinstance(x, np.ndarray) and x.dtype.kind in "fV"  # V: of ml_dtypes
        return np.array(x, dtype if real else x.dtype) if isinstance(x, np.ndarray) else x

    return tree_map(leaf, tree)


def cast_call(call, dtype):
    args = tree_map(np.asarray, call.args)  # drawn scalars are arrays too; options stay what they are
    return Call(cast(args, dtype), {name: cast(value, dtype) for name, value in call.options.items()})


def rounded(call, form):
    """The call in float64, with numbers that a Format, or a dtype, holds exactly; the largest where one overflows."""
    if not isinstance(form, Format):
        return cast_call(cast_call(call, form), np.float64)
    call = cast_call(call, np.float64)

    def leaf(x):
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return x
        return round_to(np.where(np.isfinite(x), np.clip(x, -form.largest, form.largest), x), form)

    return Call(tree_map(leaf, call.args), {name: tree_map(leaf, value) for name, value in call.options.items()})


def in_words(call, names):
    """q (2, 3), k (4, 3), is_causal=True"""
    arrays = [f"{path} {x.shape}" for name, arg in zip(names, call.args) for path, x in leaves(arg, name)]
    options = [f"{k}={_short(v)}" for k, v in call.options.items() if v is not None and k != "convention"]
    more = [f"{len(arrays) - SHOWN} more"] if len(arrays) > SHOWN else []
    return ", ".join(arrays[:SHOWN] + more + options)


def _short(value):
    if isinstance(value, np.ndarray):
        return f"array{value.shape}"
    arrays = isinstance(value, tuple) and any(isinstance(x, np.ndarray) for _, x in leaves(value))
    return "..." if arrays else repr(value)
