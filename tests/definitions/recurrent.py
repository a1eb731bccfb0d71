"""A recurrent layer, unrolled by hand for one sequence, in lists of floats."""

import math

from tests.definitions import gru_cell, lstm_cell


def element(args, options, where, index):
    x, state, (cells,) = args
    n = index[0]
    steps, hidden = range(x.shape[1]), cells[0].w_h.shape[-1]
    ways = {"forward": ["ltr"], "backward": ["rtl"], "both": ["ltr", "rtl"]}[options["direction"]]
    present = [options["mask"] is None or bool(options["mask"][n, t]) for t in steps]
    sequence, finals = [list(x[n, t]) for t in steps], []
    for bottom in range(0, len(cells), len(ways)):
        read, sequence = sequence, [[] for _ in steps]
        for offset, way in enumerate(ways):
            i = bottom + offset
            h = [0.0] * hidden if state is None else list(state.h[n, i])
            c = [0.0] * hidden if state is None or state.c is None else list(state.c[n, i])
            for t in steps if way == "ltr" else reversed(steps):
                if present[t]:
                    h, c = _step(read[t], h, c, cells[i], options)
                silent = not present[t] and options["padded"] == "zero"
                sequence[t] = sequence[t] + ([0.0] * hidden if silent else h)
            finals.append((h, c))
    if where == "y":
        return sequence[index[1]][index[2]]
    return finals[index[1]][0 if where == "state.h" else 1][index[2]]


def _step(x, h, c, params, options):
    if len(params.w_h.shape) == 2:
        biases = [b for b in (params.b_x, params.b_h) if b is not None]
        return [
            math.tanh(
                sum(params.w_x[j, i] * x[i] for i in range(len(x)))
                + sum(params.w_h[j, k] * h[k] for k in range(len(h)))
                + sum(b[j] for b in biases)
            )
            for j in range(len(h))
        ], c
    if len(params.w_h) == 3:
        return gru_cell.step(x, h, params, options), c
    return lstm_cell.step(x, h, c, params)
