"""One step of any cell: the three definitions, by the number of their gates."""

from tests.definitions import gru_cell, lstm_cell, rnn_cell


def element(args, options, where, index):
    x, (h, c), params = args
    n, j = index
    new_h, new_c = step(list(x[n]), list(h[n]), None if c is None else list(c[n]), params, options)
    return (new_h if where == "h" else new_c)[j]


def step(x, h, c, params, options):
    """The new state of one item: two lists of floats."""
    if params.w_h.ndim == 2:
        return rnn_cell.step(x, h, params), c
    if len(params.w_h) == 3:
        return gru_cell.step(x, h, params, options), c
    return lstm_cell.step(x, h, c, params)
