"""p_i = [s_i / 2 - tau]_+^2, with the tau for which they sum to 1: by bisection, in 50 digits."""

import mpmath


def element(args, options, where, index):
    (s,) = args
    axis, mask = options["axis"] % s.ndim, options["mask"]
    if mask is not None and not mask[index]:
        return 0.0
    with mpmath.workdps(50):
        row = []
        for j in range(s.shape[axis]):
            at = (*index[:axis], j, *index[axis + 1 :])
            if mask is None or mask[at]:
                row.append(mpmath.mpf(float(s[at])) / 2)
        low, high = max(row) - 1, max(row)  # the sum is at least 1 at the one, and 0 at the other
        for _ in range(120):
            tau = (low + high) / 2
            if sum(max(z - tau, 0) ** 2 for z in row) >= 1:
                low = tau
            else:
                high = tau
        return max(mpmath.mpf(float(s[index])) / 2 - low, 0) ** 2
