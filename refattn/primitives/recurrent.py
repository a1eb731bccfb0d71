r"""Recurrent layers: a cell over a sequence, in one direction or both.

Shapes
    N sequences of T steps, I features in, H hidden units, L cells: one per layer, or two where direction="both".
    O features out: H, or 2 H where direction="both".

Forward, for each layer and direction; s is the state, h its visible part
    s'_t = cell(x_t, s_t-1)                            rnn_cell, gru_cell or lstm_cell, whose Params are given
    s_t  = m_t s'_t + (1 - m_t) s_t-1                  the state waits where mask is False
    y_t  = m_t h_t                                     or h_t where padded="hold"
    backward in time: the same with t-1 replaced by t+1;   both directions: y_t = [forward y_t; backward y_t]
    the next layer reads y

Backward, with a bar for "gradient of the loss with respect to", from the last step to the first
    sbar_t   = what comes from later, plus m_t ybar_t in its h                                  (or ybar_t)
    s'bar_t  = m_t sbar_t
    xbar_t, sbar_t-1, and a share of the parameters' gradient: from the cell's backward at s'bar_t
    sbar_t-1 = that + (1 - m_t) sbar_t

Choices
    Which cell: that of the Params. Layers and directions are ordered as in torch: layer 0 forward, layer 0 backward,
    layer 1 forward, ...; torch's states are (L, N, H), here they are (N, L, H). state=None starts with zeros.
    The mask is True where a sequence has a step; lengths are np.arange(T) < lengths[:, None]. With padding at the end
    the backward direction starts where the sequence ends, as in torch's packed sequences, whose padded outputs are 0.
    GroundHog and Keras hold the last state as the padded output: padded="hold".
    reset_after and z_weighs are those of gru_cell.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped, tree_map
from refattn.primitives import recurrent_cell

DIRECTIONS = {"forward": (1,), "backward": (-1,), "both": (1, -1)}  # the steps in time


class Params(NamedTuple):
    cells: tuple  # L Params of one kind of cell


class State(NamedTuple):
    h: Shaped[Array, "N L H"]
    c: Shaped[Array, "N L H"] | None = None  # of LSTMs


class Out(NamedTuple):
    y: Shaped[Array, "N T O"]
    state: State  # after the last step in each direction


class Saved(NamedTuple):
    scans: tuple  # of L tuples of T cell.Saved, in the order of time
    started: bool  # with a given state
    direction: str
    mask: Shaped[Bools, "N T"] | None
    padded: str


def init(rng, inputs, hidden, *, cell="gru", layers=1, direction="forward", bias=True):
    """As the cell's own init, for every layer and direction."""
    ways = len(DIRECTIONS[direction])
    widths = [inputs] * ways + [ways * hidden] * ways * (layers - 1)
    return Params(tuple(recurrent_cell.CELLS[cell].init(rng, width, hidden, bias) for width in widths))


@shaped
def forward(
    x: Shaped[Array, "N T I"],
    state: State | None,
    params: Params,
    *,
    direction: str = "forward",
    mask: Shaped[Bools, "N T"] | None = None,
    padded: str = "zero",
    reset_after: bool = True,
    z_weighs: str = "old",
) -> tuple[Out, Saved]:
    _check(x, state, params, direction, padded)
    options = {"reset_after": reset_after, "z_weighs": z_weighs}
    steps = DIRECTIONS[direction]
    y, finals, scans = x, [], []
    for layer in range(0, len(params.cells), len(steps)):
        outputs = []
        for i, step in enumerate(steps, start=layer):
            start = recurrent_cell.zeros(x, params.cells[i]) if state is None else _unstack(state, i)
            output, final, scan = _scan(y, start, params.cells[i], step, mask, padded, options)
            outputs.append(output)
            finals.append(final)
            scans.append(scan)
        y = np.concatenate(outputs, axis=2)
    return Out(y, _stack(finals)), Saved(tuple(scans), state is not None, direction, mask, padded)


@shaped
def backward(dout: Out, saved: Saved) -> tuple[Shaped[Array, "N T I"], State | None, Params]:
    steps, count = DIRECTIONS[saved.direction], len(saved.scans)
    dy, dstates, dcells = dout.y, [None] * count, [None] * count
    for layer in reversed(range(0, count, len(steps))):
        dx = 0
        for i, (step, doutput) in enumerate(zip(steps, np.split(dy, len(steps), axis=2)), start=layer):
            dfinal = _unstack(dout.state, i)
            dinput, dstates[i], dcells[i] = _scan_backward(doutput, dfinal, saved.scans[i], step, saved)
            dx = dx + dinput
        dy = dx
    return dy, _stack(dstates) if saved.started else None, Params(tuple(dcells))


def _scan(x, state, cell, step, mask, padded, options):
    """One cell, from one end of x to the other: (outputs, last state, what the cell saved at every step)."""
    times = range(x.shape[1])
    outputs, scan = [None for _ in times], [None for _ in times]
    for t in times[::step]:
        new, scan[t] = recurrent_cell.forward(x[:, t], state, cell, **options)
        state = _where(mask, t, new, state)
        outputs[t] = state.h if padded == "hold" else _where(mask, t, new.h, np.zeros_like(new.h))
    return np.stack(outputs, axis=1), state, tuple(scan)


def _scan_backward(doutputs, dstate, scan, step, saved):
    times, mask, dcell = range(len(scan)), saved.mask, None
    dx, nothing = [None for _ in times], tree_map(np.zeros_like, dstate)
    for t in times[::-step]:
        doutput = doutputs[:, t] if saved.padded == "hold" else _where(mask, t, doutputs[:, t], nothing.h)
        dstate = dstate._replace(h=dstate.h + doutput)
        dx[t], dbefore, share = recurrent_cell.backward(_where(mask, t, dstate, nothing), scan[t])
        dstate = tree_map(np.add, dbefore, _where(mask, t, nothing, dstate))
        dcell = share if dcell is None else tree_map(np.add, dcell, share)
    return np.stack(dx, axis=1), dstate, dcell


def _where(mask, t, real, waiting):
    """Leaf by leaf: `real` for the sequences that have step t, `waiting` for the others."""
    return real if mask is None else tree_map(lambda a, b: np.where(mask[:, t, None], a, b), real, waiting)


def _unstack(state, i):
    """The state of cell i, of (N, L, H)."""
    return recurrent_cell.State(*tree_map(lambda part: part[:, i], state))


def _stack(states):
    """The states of L cells as one, (N, L, H)."""
    return State(*tree_map(lambda *parts: np.stack(parts, axis=1), *states))


def _check(x, state, params, direction, padded):
    where, cells = "recurrent.forward:", params.cells
    expect(direction in DIRECTIONS, f"{where} direction", direction, f"one of {tuple(DIRECTIONS)}")
    expect(padded in ("zero", "hold"), f"{where} padded", padded, "'zero' or 'hold'")
    expect(x.shape[1] > 0, f"{where} x.shape", x.shape, "at least one step")
    ways = len(DIRECTIONS[direction])
    whole = len(cells) > 0 and len(cells) % ways == 0
    expect(whole, f"{where} len(params.cells)", len(cells), f"a positive multiple of {ways} for {direction!r}")
    kinds = {type(cell).__module__.rpartition(".")[2] for cell in cells}
    one = len(kinds) == 1 and type(cells[0]) in recurrent_cell.OF_PARAMS
    expect(one, f"{where} params.cells", kinds, "Params of one of rnn_cell, gru_cell, lstm_cell")
    hidden = cells[0].w_h.shape[-1]
    for i, cell in enumerate(cells):
        name, inputs = f"{where} params.cells[{i}]", x.shape[2] if i < ways else ways * hidden
        expect(cell.w_h.shape[-1] == hidden, f"{name}.w_h.shape", cell.w_h.shape, f"H = {hidden}, from params.cells[0]")
        fits = cell.w_x is None or cell.w_x.shape[-1] == inputs
        expect(fits, f"{name}.w_x.shape", np.shape(cell.w_x), f"a last axis of {inputs}")
    if state is not None:
        shape = len(x), len(cells), hidden
        expect(state.h.shape == shape, f"{where} state.h.shape", state.h.shape, f"(N, L, H) = {shape}")
        recurrent_cell.check(state, cells[0], where)


def example(draw):
    n, t, inputs, hidden = (draw.size(name, high=high) for name, high in (("N", 2), ("T", 3), ("I", 2), ("H", 2)))
    cell, direction = draw.choice("cell", "rnn", "gru", "lstm"), draw.choice("direction", *DIRECTIONS)
    layers, bias = draw.choice("layers", 1, 2), draw.choice("bias", True, False)
    params = init(draw.rng, inputs, hidden, cell=cell, layers=layers, direction=direction, bias=bias)
    shape = n, len(params.cells), hidden
    state = State(draw.array(*shape), draw.array(*shape) if cell == "lstm" else None)
    args = draw.array(n, t, inputs), draw.choice("state", state, None), draw.like(params)
    options = {
        "direction": direction,
        "mask": draw.mask(n, t) if draw.choice("masked", True, False) else None,
        "padded": draw.choice("padded", "zero", "hold"),
    }
    if cell == "gru":
        options["reset_after"] = draw.choice("reset_after", True, False)
        options["z_weighs"] = draw.choice("z_weighs", "old", "new")
    return Call(tree_map(lambda a: a / 8, args), options)  # a saturated gate hides mistakes


ABOUT = About(laws=("batch_independent",), witnesses=("authors' code", "framework", "definition", "relation"))
