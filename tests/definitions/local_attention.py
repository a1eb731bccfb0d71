"""Luong, Pham and Manning 2015, section 3.2, equations 9 and 10; positions count from 1, as in the paper."""

import math

from tests.definitions.alignment_score import energy


def element(args, options, where, index):
    query, memory, (score, position) = args
    n, t, last = index
    lengths, window = options.get("lengths"), options["window"]
    length = memory.shape[1] if lengths is None else int(lengths[n])
    h = list(query[n, t])
    if position is None:
        p = centre = min(options["start"] + t + 1, length)
    else:
        w, v = position
        u = sum(v[r] * math.tanh(sum(w[r, q] * h[q] for q in range(len(h)))) for r in range(len(v)))
        p = 1 + length / (1 + math.exp(-u))
        centre = math.floor(p)

    def gaussian(s):
        return 1.0 if position is None else math.exp(-((s - p) ** 2) / (2 * (window / 2) ** 2))

    inside = [s for s in range(centre - window, centre + window + 1) if 1 <= s <= length]
    e = {s: energy(h, list(memory[n, s - 1]), score, options["score"]) for s in inside}
    if options["gaussian"] == "scores":
        e = {s: e[s] * gaussian(s) for s in inside}
    a = {s: 1 / sum(math.exp(min(e[r] - e[s], 700)) for r in inside) for s in inside}
    if options["gaussian"] == "weights":
        a = {s: a[s] * gaussian(s) for s in inside}
    return a.get(last + 1, 0.0) if where == "weights" else sum(a[s] * memory[n, s - 1, last] for s in inside)
