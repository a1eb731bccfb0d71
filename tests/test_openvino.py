"""OpenVINO next to the reference: every target conforms, and a fault planted in one is noticed."""

import numpy as np
import pytest

from refattn import frameworks
from tests.test_frameworks import in_every_dtype, judged

pytestmark = pytest.mark.frameworks
openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'refattn[openvino]'")


def test_it_is_available():
    status = frameworks.available()["openvino"]
    assert (status.version, status.reason) == (openvino.__version__, "")


@pytest.mark.parametrize(("target", "dtype"), in_every_dtype("openvino"))
def test_it_conforms(target, dtype):
    report = judged(target, "openvino", dtype, max_examples=4 * target.times, seed=1)
    assert report.ok and report.examples == 4 * target.times and report.gradients == "not asked for", str(report)


@pytest.mark.parametrize(("target", "dtype"), in_every_dtype("openvino"))
def test_a_planted_fault_is_noticed(target, dtype):
    """The largest element of the first output is off by a thousandth, in low precision by a half."""

    def faulty(*args, **options):
        result = right(*args, **options)
        first = result[0] if isinstance(result, tuple) else result
        one = abs(np.nan_to_num(first.astype(float))).argmax()
        first.flat[one] = first.flat[one].astype(float) * (1.001 if dtype == "float32" else 1.5)
        return result

    right = target.function
    faulty.__wrapped__ = right  # its signature is the other's
    report = judged(target, "openvino", dtype, faulty, max_examples=4, seed=1)
    assert any(not v.conforms and name[0] != "d" for name, v in report.verdicts.items()), str(report)


def test_rows_without_keys_and_poison():
    target = frameworks.load("openvino").TARGETS[0]
    families = "empty_rows", "poisoned_values", "nan_query"
    report = judged(target, "openvino", "float32", families=families, max_examples=9, seed=1)
    assert report.ok and set(report.families) == set(families), str(report)
    report = judged(target._replace(convention=None), "openvino", "float32", families="empty_rows", max_examples=3)
    assert not report.ok, str(report)  # zero, where no convention is asked for
