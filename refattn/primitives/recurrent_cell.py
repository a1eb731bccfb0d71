r"""One step of a recurrent network, whichever cell the Params belong to.

Shapes
    N items, I features in, H hidden units.

Forward
    (h', c') = cell(x, (h, c))                         rnn_cell, gru_cell or lstm_cell; c is None but for an LSTM

Backward, with a bar for "gradient of the loss with respect to"
    xbar, (hbar, cbar), paramsbar = the cell's backward at (h'bar, c'bar)

Choices
    reset_after and z_weighs are those of gru_cell; the other cells have no options.
"""

from typing import NamedTuple

import numpy as np

from refattn.core import About, Array, Call, Shaped, expect, shaped
from refattn.primitives import gru_cell, lstm_cell, rnn_cell

CELLS = {"rnn": rnn_cell, "gru": gru_cell, "lstm": lstm_cell}
OF_PARAMS = {cell.Params: cell for cell in CELLS.values()}
OF_SAVED = {cell.Saved: cell for cell in CELLS.values()}


class State(NamedTuple):
    h: Shaped[Array, "N H"]
    c: Shaped[Array, "N H"] | None = None


class Saved(NamedTuple):
    cell: tuple  # the cell's own Saved


@shaped
def forward(
    x: Shaped[Array, "N I"], state: State, params: tuple, *, reset_after: bool = True, z_weighs: str = "old"
) -> tuple[State, Saved]:
    check(state, params, "recurrent_cell.forward:")
    if isinstance(params, lstm_cell.Params):
        new, saved = lstm_cell.forward(x, lstm_cell.State(*state), params)
        return State(*new), Saved(saved)
    options = {"reset_after": reset_after, "z_weighs": z_weighs} if isinstance(params, gru_cell.Params) else {}
    new, saved = OF_PARAMS[type(params)].forward(x, state.h, params, **options)
    return State(new), Saved(saved)


@shaped
def backward(dnew: State, saved: Saved) -> tuple[Shaped[Array, "N I"], State, tuple]:
    (step,) = saved
    if isinstance(step, lstm_cell.Saved):
        dx, dstate, dparams = lstm_cell.backward(lstm_cell.State(*dnew), step)
        return dx, State(*dstate), dparams
    dx, dh, dparams = OF_SAVED[type(step)].backward(dnew.h, step)
    return dx, State(dh), dparams


def zeros(x, params):
    """The state of no past, for a batch like x."""
    h = np.zeros((len(x), params.w_h.shape[-1]), x.dtype)
    return State(h, h if isinstance(params, lstm_cell.Params) else None)


def check(state, params, where, name="params"):
    """Raise what a wrong kind of params or state deserves."""
    expect(type(params) in OF_PARAMS, f"{where} {name}", type(params), "Params of rnn_cell, gru_cell or lstm_cell")
    lstm = isinstance(params, lstm_cell.Params)
    given = type(state.c).__name__
    expect((state.c is not None) == lstm, f"{where} type of state.c", given, "an array for an LSTM, None for others")


def example(draw):
    cell = draw.choice("cell", *CELLS)
    (x, state, params), options = CELLS[cell].example(draw)
    return Call((x, State(*state) if cell == "lstm" else State(state), params), options)


ABOUT = About(laws=("batch_independent",), witnesses=("definition",))
