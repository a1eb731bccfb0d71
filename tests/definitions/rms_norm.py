"""Zhang and Sennrich 2019, equation 4, with eps under the root: 80 digits."""

import mpmath


def element(args, options, where, index):
    x, params = args
    *lead, d = index
    with mpmath.workdps(80):
        a = [mpmath.mpf(x[(*lead, i)]) for i in range(x.shape[-1])]
        rms = mpmath.sqrt(sum(number**2 for number in a) / len(a) + options["eps"])
        return complex(a[d] / rms * (1 if params is None else params.gamma[d]))
