"""Bahdanau, Cho and Bengio 2015, appendix A.2, for one sentence, in lists of floats."""

import math

from tests.definitions import additive_decoder, gru_cell


def element(args, options, where, index):
    (params,) = args
    n, hidden = index[0], params.decoder.w_h.shape[1]
    gru = {
        "paper": {"reset_after": False, "z_weighs": "new"},
        "torch": {"reset_after": True, "z_weighs": "old"},
    }[options["gru"]]
    words = [params.source[i].tolist() for i in options["source"][n]]
    length = len(words) if options["lengths"] is None else int(options["lengths"][n])
    annotations, state = encode(words, length, params.encoder.cells, gru)
    if params.start is not None:
        state = [math.tanh(a) for a in affine(params.start, state)]

    read = [params.target[i].tolist() for i in options["target"][n]]
    gates = [affine(params.read, y) for y in read]
    inputs = [[row[gate * hidden : (gate + 1) * hidden] for gate in range(3)] for row in gates]
    source = [s < length for s in range(len(words))]
    target = None if options["target_lengths"] is None else [t < options["target_lengths"][n] for t in range(len(read))]
    states, contexts = additive_decoder.unroll(inputs, annotations, state, params.decoder, source, target, gru)
    if where == "state":
        return states[-1][index[1]]

    t, v = index[1:]
    o = states[t]
    if params.deep is not None:
        pieces = affine(params.deep, [state, *states][t] + read[t] + contexts[t])
        o = [max(pieces[i : i + 2]) for i in range(0, len(pieces), 2)]
    scores = affine(params.word, o)
    return scores[v] - math.log(sum(math.exp(score) for score in scores))


def encode(words, length, cells, gru):
    """The annotation of every word, and the state that the last cell ends in."""
    hidden = cells[0].w_h.shape[-1]
    columns = []
    for cell, order in zip(cells, (range(length), reversed(range(length)))):
        state, column = [0.0] * hidden, [[0.0] * hidden for _ in words]
        for t in order:
            state = column[t] = gru_cell.step(words[t], state, cell, gru)
        columns.append(column)
    return [[unit for column in columns for unit in column[t]] for t in range(len(words))], state


def affine(params, x):
    w, b = params
    return [sum(w[i, j] * x[j] for j in range(len(x))) + (0.0 if b is None else b[i]) for i in range(len(w))]
