"""p_i = e^{s_i} / sum_j e^{s_j} over what is kept: those that fewer than k others come before."""

import math


def element(args, options, where, index):
    (s,) = args
    axis, mask = options["axis"] % s.ndim, options["mask"]
    row = {}
    for j in range(s.shape[axis]):
        at = (*index[:axis], j, *index[axis + 1 :])
        if mask is None or mask[at]:
            row[j] = float(s[at])

    def kept(j):
        before = [i for i in row if row[i] > row[j] or (row[i] == row[j] and i < j and options["ties"] == "first")]
        return len(before) < options["k"]

    if index[axis] not in row or not kept(index[axis]):
        return 0.0
    return 1 / sum(math.exp(row[j] - row[index[axis]]) for j in row if kept(j))
