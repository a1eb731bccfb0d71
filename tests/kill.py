"""Kill one mutant: `python -m tests.kill NAME` fails if anything notices that the file NAME is not what it was.

First what is quick, the laws on calls drawn from seeds; only a mutant that survives those meets the test suite.
"""

import os
import sys

import numpy as np
import pytest

SUITES = {  # of the files that are no mechanism
    "laws": ("tests/test_laws.py",),
    "derivatives": ("tests/test_core.py", "tests/test_laws.py"),
    "compare": ("tests/test_compare.py", "tests/test_check.py"),
    "noise": ("tests/test_noise.py", "tests/test_check.py"),
    **dict.fromkeys(("bounds", "worst_case", "statistical", "attention_part", "arithmetic"), ("tests/test_bounds.py",)),
    **dict.fromkeys(("diagnose", "mistakes", "region"), ("tests/test_diagnose.py",)),
    "behaviour": ("tests/test_behaviour.py",),
    "trial": ("tests/test_check.py", "tests/test_generic_power.py"),
    "shrink": ("tests/test_check.py", "tests/test_reproduce.py"),
    "check": ("tests/test_check.py", "tests/test_cli.py"),
    "contract": ("tests/test_check.py", "tests/test_cli.py"),
    "inputs": ("tests/test_inputs.py", "tests/test_check.py"),
}
OF_ALL = ("primitives", "relations", "defaults")
OF_FAMILY = {"dot_product": ("streaming", "caches", "conventions", "heads", "positions", "normalisers")}
OF_A_MECHANISM = ("every_mechanism", "definitions", "errors", "teeth")


def noticed_by_laws(name):
    from refattn.draw import RandomDraw
    from refattn.oracle.derivatives import Inconclusive
    from refattn.oracle.laws import laws_of
    from refattn.registry import find

    mechanism = find(name)
    for seed in range(12):
        call = mechanism.example(RandomDraw(seed))
        for law in laws_of(mechanism):
            try:
                law(mechanism, call, np.random.default_rng(seed))
            except Inconclusive:
                continue
            except Exception:
                return True
    return False


def noticed_by_recordings(name):
    from refattn.registry import find
    from tests.test_golden import FILES, Record, case_of, test_recording

    for path in FILES:
        if case_of(Record.load(path)).module is find(name).module:
            try:
                test_recording(path)
            except Exception:
                return True
    return False


def main(name):
    if name in SUITES:
        return pytest.main(["-x", "-q", "-p", "no:cacheprovider", *SUITES[name]])
    from refattn.registry import find

    np.seterr(all="ignore")
    if noticed_by_laws(name) or noticed_by_recordings(name):
        return 1
    os.environ["HYPOTHESIS_PROFILE"] = "mutation"
    family = OF_FAMILY.get(find(name).family, ())
    return tested(OF_ALL) or tested(OF_A_MECHANISM, "-k", name) or (family and tested(family, "-m", "not frameworks"))


def tested(parts, *options):
    return pytest.main(["-x", "-q", "-p", "no:cacheprovider", *options, *(f"tests/test_{part}.py" for part in parts)])


if __name__ == "__main__":
    try:
        sys.exit(1 if main(sys.argv[1]) else 0)  # of other codes mutmut thinks that the mutant survived
    except Exception as error:  # the mutant breaks the package itself
        sys.exit(f"{type(error).__name__}: {error}")
