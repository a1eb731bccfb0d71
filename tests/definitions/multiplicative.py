"""Luong, Pham and Manning 2015, equation 7 and the context vector of section 3.1."""

import math

from tests.definitions.alignment_score import energy


def element(args, options, where, index):
    query, memory, params = args
    n, t, last = index
    mask = options["mask"]
    allowed = [s for s in range(memory.shape[1]) if mask is None or mask[n, s]]
    energies = {s: energy(list(query[n, t]), list(memory[n, s]), params, options["score"]) for s in allowed}
    total = {s: sum(math.exp(min(energies[r] - energies[s], 700)) for r in allowed) for s in allowed}
    if where == "weights":
        return 1 / total[last] if last in allowed else 0.0
    return sum(memory[n, s, last] / total[s] for s in allowed)
