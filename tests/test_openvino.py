"""OpenVINO next to the reference: some targets conform, and a fault planted in any is noticed.

Every target in every dtype is what `refattn check all` does.
"""

import numpy as np
import pytest

from refattn import frameworks
from refattn.trials import judged
from tests.foreign import in_every_dtype, target, with_one_off, wrong

pytestmark = pytest.mark.frameworks
openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'refattn[openvino]'")


def test_it_is_available():
    assert frameworks.status("openvino")[:2] == (openvino.__version__, "")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ScaledDotProductAttention", "bfloat16"), ("GRUCell", "float16"), ("Interpolate", "float32")],
)
def test_it_conforms(name, dtype):
    report = judged(target("openvino", name), "openvino", dtype, max_examples=4, seed=1)
    assert report.ok and report.examples == 4 and report.gradients == "not asked for", str(report)


@pytest.mark.parametrize(("target", "dtype"), in_every_dtype("openvino"))
def test_a_planted_fault_is_noticed(target, dtype):
    """The largest element of the first output is off by a thousandth, in low precision by a tenth.

    By a half in two cells in bfloat16, where every step may be rounded to 8 bits.
    """
    low = 1.5 if (target.name in ("RNNCell", "LSTMCell") and dtype == "bfloat16") else 1.1
    factor = 1.001 if dtype == "float32" else low

    def spoil(y):
        one = abs(np.nan_to_num(y.astype(float))).argmax()
        y.flat[one] = y.flat[one].astype(float) * factor
        return y

    report = judged(target, "openvino", dtype, with_one_off(target.function, spoil), max_examples=4, seed=1)
    assert wrong(report)[0], str(report)


def test_a_masked_row_of_bfloat16(monkeypatch):
    """Passed over where this CPU gives it a mean: otherwise it would differ."""
    adapter, sdpa = frameworks.load("openvino"), target("openvino", "ScaledDotProductAttention")
    asked = {"families": ("gaussian", "empty_rows"), "max_examples": 8, "seed": 1}
    report = judged(sdpa, "openvino", "bfloat16", **asked)
    if not adapter._masks_by_a_number():
        assert report.ok and not report.departures, str(report)
        return
    assert report.ok and list(report.departures) == ["openvino-bf16-masked-row"], str(report)
    monkeypatch.setattr(adapter, "_masks_by_a_number", lambda: False)
    assert not judged(sdpa, "openvino", "bfloat16", **asked).ok


def test_rows_without_keys_and_poison():
    sdpa = target("openvino", "ScaledDotProductAttention")
    families = "empty_rows", "poisoned_values", "nan_query"
    report = judged(sdpa, "openvino", "float32", families=families, max_examples=9, seed=1)
    assert report.ok and set(report.families) == set(families), str(report)
    report = judged(sdpa._replace(convention=None), "openvino", "float32", families="empty_rows", max_examples=3)
    assert not report.ok, str(report)  # zero, where no convention is asked for
