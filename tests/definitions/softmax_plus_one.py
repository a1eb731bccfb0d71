"""p_i = e^{s_i} / (1 + sum_j e^{s_j}) over what the mask allows, in 50 digits."""

import mpmath


def element(args, options, where, index):
    (s,) = args
    axis, mask = options["axis"] % s.ndim, options["mask"]
    if mask is not None and not mask[index]:
        return 0.0
    with mpmath.workdps(50):
        total = mpmath.mpf(1)
        for j in range(s.shape[axis]):
            at = (*index[:axis], j, *index[axis + 1 :])
            if mask is None or mask[at]:
                total += mpmath.exp(float(s[at]))
        return mpmath.exp(float(s[index])) / total
