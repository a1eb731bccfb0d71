"""refattn: the numerical oracle for attention. Every mechanism, forward and backward, by hand, in NumPy.

    from refattn import squeeze_excitation
    out, saved = squeeze_excitation.forward(x, params)
    dx, dparams = squeeze_excitation.backward(dout, saved)
"""

import importlib

__version__ = "0.1.0"


def mechanisms():
    """{name: Mechanism} of everything in refattn/attention, by family and name."""
    return importlib.import_module("refattn.registry").mechanisms()


def __getattr__(name):  # `from refattn import squeeze_excitation` finds the file, whatever its family
    if name in ("check", "assert_conforms"):
        return getattr(importlib.import_module("refattn.oracle.check"), name)
    if name == "discover":
        return importlib.import_module("refattn.oracle.discover").discover
    try:
        return importlib.import_module("refattn.registry").find(name).module
    except KeyError as error:
        raise AttributeError(f"module 'refattn' has no attribute {name!r}: {error.args[0]}") from None
