"""y_i = log(e^{s_i} / sum_j e^{s_j}), in 50 digits."""

import mpmath


def element(args, options, where, index):
    (s,) = args
    axis = options["axis"] % s.ndim
    with mpmath.workdps(50):
        row = [float(s[(*index[:axis], j, *index[axis + 1 :])]) for j in range(s.shape[axis])]
        return mpmath.log(mpmath.exp(float(s[index])) / sum(mpmath.exp(e) for e in row))
