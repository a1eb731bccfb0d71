"""What the tests of frameworks share: their targets, and a fault to plant in one."""

import pytest

from refattn import frameworks


def targets(framework):
    """The targets of a framework; none where it is not installed."""
    try:
        return frameworks.load(framework).TARGETS
    except ImportError:
        return ()


def target(framework, name):
    return next(t for t in frameworks.load(framework).TARGETS if t.name == name)


def in_every_dtype(framework):
    return [
        pytest.param(t, dtype, id=f"{t.name}, {dtype}", marks=pytest.mark.skipif(bool(lacking), reason=lacking or "-"))
        for t in targets(framework)
        for lacking in [t.lacks and t.lacks()]
        for dtype in t.dtypes
    ]


def with_one_off(right, spoil):
    """The same function, but of its first output one element is off; spoil(y) gives y with that."""

    def faulty(*args, **options):
        result = right(*args, **options)
        several = isinstance(result, (tuple, list))
        first, *rest = result if several else (result,)
        return (spoil(first), *rest) if several else spoil(first)

    faulty.__wrapped__ = right  # its signature is the other's
    return faulty


def last_of_tensor(factor):
    """spoil() for torch: the last element is so many times what it was."""

    def spoil(y):
        factors = y.new_ones(y.numel())
        factors[-1:] = factor
        return y * factors.reshape(y.shape)

    return spoil


def wrong(report):
    """Names of what does not conform: (outputs, gradients)."""
    names = {name for name, verdict in report.verdicts.items() if not verdict.conforms}
    gradients = {name for name in names if name[0] == "d"}
    return names - gradients, gradients
