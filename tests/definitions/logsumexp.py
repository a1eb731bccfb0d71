"""The logarithm of a sum of exponentials, in 80 digits."""

import mpmath


def element(args, options, where, index):
    (s,) = args
    axis, mask = options["axis"] % s.ndim, options["mask"]
    rest = [i for position, i in enumerate(index) if position != axis] if options["keepdims"] else list(index)
    with mpmath.workdps(80):
        total = mpmath.mpf(0)
        for i in range(s.shape[axis]):
            at = (*rest[:axis], i, *rest[axis:])
            if mask is None or mask[at]:
                total += mpmath.exp(mpmath.mpf(s[at]))
        return complex(mpmath.log(total))
