"""Luong, Pham and Manning 2015, equation 5 and figure 4, in lists of floats."""

import math

from tests.definitions import gru_cell, local_attention, lstm_cell, multiplicative


def element(args, options, where, index):
    inputs, memory, state, params = args
    n, lengths = index[0], options.get("lengths")
    states = [list(memory[n, s]) for s in range(memory.shape[1] if lengths is None else lengths[n])]
    h, c = list(state.h[n]), [None] * len(state.h[n]) if state.c is None else list(state.c[n])
    rows = [list(inputs[n, t]) for t in range(inputs.shape[1])]
    attentional, h, c = decode(rows, states, h, c, params, options, memory.shape[2])
    return {"attentional": attentional, "state.h": h, "state.c": c}[where][index[1]][index[2]]


def decode(rows, states, h, c, params, options, width):
    """The attentional vectors, and the h and c of every layer after the last step."""
    w, b = params.combine
    fed, attentional, layers = [0.0] * len(w), [], range(len(h))
    for t, row in enumerate(rows, start=1):
        x = row + fed if options["feed"] else row
        for layer in layers:
            cell = params.cells.cells[layer]
            if c[layer] is None:
                h[layer] = gru_cell.step(x, h[layer], cell, {"reset_after": True, "z_weighs": "old"})
            else:
                h[layer], c[layer] = lstm_cell.step(x, h[layer], c[layer], cell)
            x = h[layer]
        if hasattr(params.attention, "position"):
            weights = local_attention.alignment(x, states, params.attention, options, t)
            weights = {s - 1: a for s, a in weights.items()}
        else:
            weights = multiplicative.alignment(x, dict(enumerate(states)), params.attention, options["score"])
        both = [sum(a * states[s][k] for s, a in weights.items()) for k in range(width)] + list(x)
        u = [sum(w[i, j] * both[j] for j in range(len(both))) for i in range(len(w))]
        fed = [math.tanh(u[i] if b is None else u[i] + b[i]) for i in range(len(w))]
        attentional.append(fed)
    return attentional, h, c
