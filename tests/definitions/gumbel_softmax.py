"""p_i = e^{(s_i + noise_i) / T} / sum_j e^{(s_j + noise_j) / T} over what the mask allows, in 50 digits."""

import mpmath


def element(args, options, where, index):
    (s,) = args
    axis, mask, noise = options["axis"] % s.ndim, options["mask"], options["noise"]
    with mpmath.workdps(50):

        def power(at):
            if mask is not None and not mask[at]:
                return mpmath.mpf(0)
            score = mpmath.mpf(float(s[at])) + (0 if noise is None else float(noise[at]))
            return mpmath.exp(score / options["temperature"])

        row = [power((*index[:axis], j, *index[axis + 1 :])) for j in range(s.shape[axis])]
        return row[index[axis]] / sum(row) if row[index[axis]] else 0.0
