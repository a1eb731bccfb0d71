"""The point of the simplex that is closest to the scores: tau is sought among all supports, in exact fractions."""

import itertools
from fractions import Fraction


def element(args, options, where, index):
    (s,) = args
    axis, mask = options["axis"] % s.ndim, options["mask"]
    row = {}
    for j in range(s.shape[axis]):
        at = (*index[:axis], j, *index[axis + 1 :])
        if mask is None or mask[at]:
            row[j] = Fraction(float(s[at]))
    if index[axis] not in row:
        return 0.0
    candidates = []
    for size in range(1, len(row) + 1):
        for support in itertools.combinations(row, size):
            tau = (sum(row[j] for j in support) - 1) / size
            p = {j: row[j] - tau if j in support else Fraction(0) for j in row}
            if min(p.values()) >= 0:
                candidates.append((sum((p[j] - row[j]) ** 2 for j in row), p[index[axis]]))
    return float(min(candidates)[1])
