"""Luong, Pham and Manning 2015, section 3.2, equations 9 and 10; positions count from 1, as in the paper."""

import math

from tests.definitions.alignment_score import energy
from tests.definitions.multiplicative import normalised


def element(args, options, where, index):
    query, memory, params = args
    n, t, last = index
    lengths = options.get("lengths")
    states = [list(memory[n, s]) for s in range(memory.shape[1] if lengths is None else lengths[n])]
    weights = alignment(list(query[n, t]), states, params, options, options["start"] + t + 1)
    if where == "weights":
        return weights.get(last + 1, 0.0)
    return sum(a * states[s - 1][last] for s, a in weights.items())


def alignment(h, states, params, options, t):
    """{s: weight} of the states in the window of decoder state h, which is number t."""
    score, position = params
    length, window = len(states), options["window"]
    if position is None:
        p = centre = min(t, length)
    else:
        w, v = position
        u = sum(v[r] * math.tanh(sum(w[r, q] * h[q] for q in range(len(h)))) for r in range(len(v)))
        p = 1 + length / (1 + math.exp(-u))
        centre = math.floor(p)

    def gaussian(s):
        return 1.0 if position is None else math.exp(-((s - p) ** 2) / (2 * (window / 2) ** 2))

    inside = [s for s in range(centre - window, centre + window + 1) if 1 <= s <= length]
    e = {s: energy(h, states[s - 1], score, options["score"]) for s in inside}
    if options["gaussian"] == "scores":
        return normalised({s: e[s] * gaussian(s) for s in inside})
    return {s: a * gaussian(s) for s, a in normalised(e).items()}
