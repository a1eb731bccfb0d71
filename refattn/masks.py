"""Masks as values: which keys a query may attend to, as a function of where both stand.

A mask is called with the positions of queries and keys, two arrays of integers that broadcast, and answers True where
the key takes part. So it can be asked for one block at a time, and no array of all pairs need ever exist:

>>> mask = causal() & window(2, 0)
>>> mask
causal() & window(2, 0)
>>> bool(mask(5, 3)), bool(mask(5, 2))
(True, False)
>>> print(mask.show(5, 5))
■ · · · ·
■ ■ · · ·
■ ■ ■ · ·
· ■ ■ ■ ·
· · ■ ■ ■
>>> int(mask.array(5, 5).sum())
12

What differs from item to item (lengths, ids of documents) answers with (B, 1, Q, K), and what differs from head to head
with (H, Q, K): all of it broadcasts against scores (B, H, Q, K). &, | and ~ combine masks. Positions count from 0;
queries that continue a sequence of P keys stand at P, P + 1, ...: `mask.array(queries, keys, offset=P)`.
"""

import functools
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields

import numpy as np

from refattn.core import DtypeError, expect

__all__ = [
    "Mask", "block_sparse", "causal", "chunked", "dilated", "document", "everything", "neighbourhood", "nothing",
    "padding", "prefix", "strided", "window",
]  # fmt: skip


class Mask:
    """What all masks can do. A kind of mask is a frozen dataclass with a method `allows(i, j)`."""

    def __call__(self, i, j):
        """True where the key at j takes part for the query at i: (..., *their common shape)."""
        i, j = _positions("i", i), _positions("j", j)
        axes = max(i.ndim, j.ndim)
        i, j = (x.reshape((1,) * (axes - x.ndim) + x.shape) for x in (i, j))
        allowed = self.allows(i, j)
        lead = allowed.shape[: allowed.ndim - axes]
        return np.broadcast_to(allowed, (*lead, *np.broadcast_shapes(i.shape, j.shape)))

    def array(self, queries, keys, offset=0):
        """The whole of it, for queries at offset, offset + 1, ... and keys at 0, 1, ...: (..., queries, keys)."""
        for name, value in (("queries", queries), ("keys", keys)):
            _whole(f"masks.array: {name}", value, 0)
        _whole("masks.array: offset", offset)
        return np.array(self(offset + np.arange(queries)[:, None], np.arange(keys)))

    def blocks(self, queries, keys, block, offset=0):
        """ "full", "partial" or "empty" for every block, `block` long or (queries, keys) long; the last are shorter."""
        rows, columns = _block("masks.blocks: block", block)
        starts = np.arange(0, keys, columns)
        lengths = np.minimum(starts + columns, keys) - starts
        lines = []
        for start in range(0, queries, rows):
            some = self.array(min(rows, queries - start), keys, offset + start)
            count = np.add.reduceat(some.sum(axis=-2), starts, axis=-1) if keys else some.sum(axis=-2)
            partial = np.where(count == 0, "empty", "partial")
            lines.append(np.where(count == some.shape[-2] * lengths, "full", partial))
        return np.stack(lines, axis=-2) if lines else np.empty((0, len(starts)), "<U7")

    def show(self, queries, keys, offset=0):
        """The whole of it to read: a line per query, ■ where the key takes part; one picture per item and head."""
        shown = []
        for title, allowed in self.pictures(queries, keys, offset):
            lines = [" ".join("■" if takes_part else "·" for takes_part in row) for row in allowed]
            shown.append("\n".join([f"{title}:", *lines] if title else lines))
        return "\n\n".join(shown)

    def pictures(self, queries, keys, offset=0):
        """Yield ("item 0, head 1", what it says there) for every item and head that it tells apart; else ("", all)."""
        whole = self.array(queries, keys, offset)
        names = ("item", "head")[4 - whole.ndim :]
        for index in np.ndindex(whole.shape[:-2]):
            told = [f"{name} {n}" for name, n, many in zip(names, index, whole.shape) if many > 1]
            yield ", ".join(told), whole[index]

    def __and__(self, other):
        return _And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other):
        return _Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self):
        return _Not(self)

    def __bool__(self):
        raise TypeError(f"masks: {self!r} is neither true nor false, expected & for and, | for or, ~ for not")

    def __repr__(self):
        """The expression that makes it: fields without a default by place, the others by name if they differ."""
        said = []
        for field in fields(self):
            value, by_place = getattr(self, field.name), field.default is MISSING
            if by_place or value != field.default:
                said.append(repr(value) if by_place else f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(said)})"


_mask = functools.partial(dataclass, frozen=True, repr=False)


# --- along a line -------------------------------------------------------------------------------------------


@_mask
class everything(Mask):
    """Every key, for every query."""

    def allows(self, i, j):
        return np.ones((1,) * i.ndim, bool)


@_mask
class nothing(Mask):
    """No key, for no query."""

    def allows(self, i, j):
        return np.zeros((1,) * i.ndim, bool)


@_mask
class causal(Mask):
    """j <= i + offset: no key after the query. With offset = keys - queries the last query sees the last key."""

    offset: int = 0

    def __post_init__(self):
        _whole("masks.causal: offset", self.offset)

    def allows(self, i, j):
        return j <= i + self.offset


@_mask
class window(Mask):
    """i + offset - left <= j <= i + offset + right: that many keys on either side, and the query's own; None: all.

    Mistral's and Hugging Face's window of w keys is window(w - 1, 0), Longformer's is window(w, w).
    """

    left: int | None
    right: int | None
    offset: int = 0

    def __post_init__(self):
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                _whole(f"masks.window: {name}", getattr(self, name), 0, " or None")
        _whole("masks.window: offset", self.offset)

    def allows(self, i, j):
        own = i + self.offset
        after = np.ones_like(j, bool) if self.left is None else j >= own - self.left
        before = np.ones_like(j, bool) if self.right is None else j <= own + self.right
        return after & before


@_mask
class dilated(Mask):
    """Up to `window` keys on either side, `dilation` apart, and the query's own: j = i + dilation t, |t| <= window.

    Who counts positions instead of keys (attention-gym) says w where this is dilated(w // dilation, dilation).
    """

    window: int
    dilation: int

    def __post_init__(self):
        _whole("masks.dilated: window", self.window, 0)
        _whole("masks.dilated: dilation", self.dilation, 1)

    def allows(self, i, j):
        return ((i - j) % self.dilation == 0) & (np.abs(i - j) <= self.window * self.dilation)


@_mask
class strided(Mask):
    """Every stride-th key, counted from the query: (i - j) divides by stride.

    The strided pattern of Child et al., "Generating Long Sequences with Sparse Transformers", 2019 (arXiv:1904.10509),
    is causal() & (window(stride, 0) | strided(stride)).
    """

    stride: int

    def __post_init__(self):
        _whole("masks.strided: stride", self.stride, 1)

    def allows(self, i, j):
        return (i - j) % self.stride == 0


@_mask
class chunked(Mask):
    """Keys of the query's own chunk, of `size` positions. Llama 4 has causal() & chunked(8192)."""

    size: int

    def __post_init__(self):
        _whole("masks.chunked: size", self.size, 1)

    def allows(self, i, j):
        return i // self.size == j // self.size


# --- what an array of lengths or ids says -------------------------------------------------------------------


@_mask
class prefix(Mask):
    """j < length or j <= i: a prefix that all see, causal after it. One length, or one for every item."""

    length: int | Sequence[int]

    def __post_init__(self):
        _keep(self, "length", _lengths("masks.prefix: length", self.length))

    def allows(self, i, j):
        return (j < _of_items(self.length, i.ndim)) | (j <= i)


@_mask
class padding(Mask):
    """j < length: what comes from there on is padding. One length, or one for every item."""

    kv_lengths: int | Sequence[int]

    def __post_init__(self):
        _keep(self, "kv_lengths", _lengths("masks.padding: kv_lengths", self.kv_lengths))

    def allows(self, i, j):
        return j < _of_items(self.kv_lengths, i.ndim)


@_mask
class document(Mask):
    """Keys of the query's own document, of several packed into one sequence.

    Either `ids`, one for each position, (T,) or (B, T): document((7, 7, 3, 3, 3)); or the lengths of documents that
    follow one another: document(lengths=(2, 3)).
    """

    ids: Sequence | None = None
    lengths: Sequence[int] | None = None

    def __post_init__(self):
        one = (self.ids is None) != (self.lengths is None)
        expect(one, "masks.document: ids, lengths", (self.ids, self.lengths), "one of them, and not the other")
        if self.lengths is not None:
            _keep(self, "lengths", _lengths("masks.document: lengths", self.lengths))
            expect(isinstance(self.lengths, tuple), "masks.document: lengths", self.lengths, "one length per document")
            return
        ids = _array(self.ids, "iu")
        good = ids.ndim in (1, 2) and ids.size > 0
        expect(good, "masks.document: ids", self.ids, "ints, one for each position: (T,) or (B, T)")
        _keep(self, "ids", _tuples(ids))

    def allows(self, i, j):
        return self._at("i", i) == self._at("j", j)

    def _at(self, name, positions):
        table = self._table
        _inside("masks.document", name, positions, table.shape[-1])
        return table[positions] if table.ndim == 1 else table[:, None][..., positions]  # (B, 1, Q, K)

    @functools.cached_property
    def _table(self):
        return np.array(self.ids) if self.lengths is None else np.repeat(np.arange(len(self.lengths)), self.lengths)


# --- in blocks, and in a plane ------------------------------------------------------------------------------


@_mask
class block_sparse(Mask):
    """layout[i // block, j // block]; layout has bools (Q / block, K / block), or (H, Q / block, K / block).

    A block is square, or (queries, keys) long. The end of the sequence may cut off the last ones.
    """

    layout: Sequence
    block: int | tuple

    def __post_init__(self):
        layout = _array(self.layout, "biu")
        good = layout.ndim in (2, 3) and layout.size > 0 and np.isin(layout, (0, 1)).all()
        words = "bools, or 0 and 1: (Q / block, K / block), or (H, Q / block, K / block)"
        expect(good, "masks.block_sparse: layout", self.layout, words)
        _block("masks.block_sparse: block", self.block)
        _keep(self, "layout", _tuples(layout.astype(bool)))

    def allows(self, i, j):
        rows, columns = _block("masks.block_sparse: block", self.block)
        *_, height, width = self._table.shape
        _inside("masks.block_sparse", "i", i, height * rows)
        _inside("masks.block_sparse", "j", j, width * columns)
        return self._table[..., i // rows, j // columns]

    @functools.cached_property
    def _table(self):
        return np.array(self.layout)


@_mask
class neighbourhood(Mask):
    """Pixels of an image, row by row: every query sees the kernel x kernel pixels around it, `dilation` apart.

    At the border the window is moved inside, so that all queries see kernel^2 keys; dilated, it keeps to the pixels
    that are a multiple of `dilation` away. (Hassani et al., "Neighborhood Attention Transformer", CVPR 2023,
    arXiv:2204.07143.) With border="cut" what is outside of the image is missing instead.
    """

    height: int
    width: int
    kernel: int
    dilation: int = 1
    border: str = "shift"

    def __post_init__(self):
        for name in ("height", "width", "kernel", "dilation"):
            _whole(f"masks.neighbourhood: {name}", getattr(self, name), 1)
        expect(self.kernel % 2 == 1, "masks.neighbourhood: kernel", self.kernel, "an odd number")
        expect(self.border in ("shift", "cut"), "masks.neighbourhood: border", self.border, "'shift' or 'cut'")
        fits = self.border == "cut" or self.kernel * self.dilation <= min(self.height, self.width)
        words = f"kernel * dilation of at most {min(self.height, self.width)}, the shorter side; or border='cut'"
        expect(fits, "masks.neighbourhood: kernel, dilation", (self.kernel, self.dilation), words)

    def allows(self, i, j):
        for name, positions in (("i", i), ("j", j)):
            _inside("masks.neighbourhood", name, positions, self.height * self.width)
        rows = self._along(i // self.width, j // self.width, self.height)
        return rows & self._along(i % self.width, j % self.width, self.width)

    def _along(self, i, j, length):
        """Along one axis: among the pixels that are a multiple of dilation away from i, in whose order i is `own`."""
        own, residue, half = i // self.dilation, i % self.dilation, self.kernel // 2
        first = own - half
        if self.border == "shift":
            count = -(-(length - residue) // self.dilation)
            first = np.clip(first, 0, count - self.kernel)
        place = j // self.dilation
        return (j % self.dilation == residue) & (first <= place) & (place < first + self.kernel)


# --- combinations: repr has brackets where Python needs them ------------------------------------------------


@_mask
class _And(Mask):
    one: Mask
    other: Mask

    def allows(self, i, j):
        return self.one(i, j) & self.other(i, j)

    def __repr__(self):
        one, other = _bracketed(self.one, _Or), _bracketed(self.other, (_Or, _And))
        return f"{one} & {other}"


@_mask
class _Or(Mask):
    one: Mask
    other: Mask

    def allows(self, i, j):
        return self.one(i, j) | self.other(i, j)

    def __repr__(self):
        return f"{self.one!r} | {_bracketed(self.other, _Or)}"


@_mask
class _Not(Mask):
    mask: Mask

    def allows(self, i, j):
        return ~self.mask(i, j)

    def __repr__(self):
        return f"~{_bracketed(self.mask, (_And, _Or))}"


def _bracketed(mask, kinds):
    return f"({mask!r})" if isinstance(mask, kinds) else repr(mask)


# --- checks -------------------------------------------------------------------------------------------------


def _positions(name, x):
    x = np.asarray(x)
    if x.dtype.kind not in "iu":
        raise DtypeError(f"masks: {name} has dtype {x.dtype}, expected positions, which are integers")
    return x.astype(np.int64)


def _inside(where, name, positions, length):
    outside = positions[(positions < 0) | (positions >= length)]
    expect(outside.size == 0, f"{where}: {name}", outside.tolist(), f"positions from 0 to {length - 1}")


def _whole(what, value, least=None, otherwise=""):
    good = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    words = "an int" if least is None else f"an int of at least {least}"
    expect(good and (least is None or value >= least), what, value, words + otherwise)


def _lengths(what, value):
    """An int, or a tuple of ints."""
    lengths = _array(value, "iu")
    good = lengths.ndim < 2 and lengths.size > 0 and (lengths >= 0).all()
    expect(good, what, value, "an int of at least 0, or a sequence of them")
    return _tuples(lengths)


def _of_items(lengths, axes):
    """One length as it is; a length for every item as (B, 1, and as many axes as positions have)."""
    return lengths if isinstance(lengths, int) else np.array(lengths).reshape(-1, 1, *(1,) * axes)


def _block(what, block):
    """(rows, columns) of one int or two."""
    pair = block if isinstance(block, tuple) else (block, block)
    good = len(pair) == 2 and all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in pair)
    expect(good, what, block, "an int of at least 1, or two of them: (queries, keys)")
    return pair


def _array(value, kinds):
    """`value` as an array of one of these kinds; an empty one where it is none, or rows have different lengths."""
    try:
        array = np.asarray(value)
    except ValueError:
        return np.empty(0)
    return array if array.dtype.kind in kinds else np.empty(0)


def _tuples(array):
    """An array as nested tuples of Python numbers, which can be compared, hashed and printed."""
    return tuple(map(_tuples, array)) if array.ndim else array.item()


def _keep(mask, name, value):
    object.__setattr__(mask, name, value)  # of a frozen dataclass, while it is made
