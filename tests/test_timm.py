"""timm's layers next to the reference: every target conforms, and a fault planted in one is noticed."""

import sys

import pytest

from refattn import frameworks
from refattn.trials import judged
from tests.foreign import in_every_dtype, last_of_tensor, targets, with_one_off, wrong

pytestmark = pytest.mark.frameworks
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
HERE = "timm"
if not targets(HERE):
    pytest.skip("timm is not installed: pip install 'refattn[timm]'", allow_module_level=True)

DEPARTURES = {  # finding -> target, how many examples
    "timm-non-local-scale": ("NonLocalAttn", 12),
    "timm-attention-pool-bias": ("AttentionPool2d", 12),
    "torch-gelu-tanh": ("Mlp", 60),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_nothing_stands_in_for_torchvision_afterwards():
    assert getattr(sys.modules.get("torchvision"), "__spec__", "") is not None
    assert frameworks.load(HERE).layers.__name__ == "timm.layers"


@pytest.mark.parametrize(("target", "dtype"), in_every_dtype(HERE))
def test_it_conforms(target, dtype):
    report = judged(target, HERE, dtype, max_examples=6, seed=1)
    assert report.ok and report.examples == 6 and report.gradients == "judged", str(report)


@pytest.mark.parametrize("target", targets(HERE), ids=lambda t: t.name)
def test_a_planted_fault_is_noticed(target):
    faulty = with_one_off(target.function, last_of_tensor(1.001))
    report = judged(target, HERE, "float32", faulty, max_examples=6, seed=1)
    outputs, gradients = wrong(report)
    assert "out" in outputs and (gradients or not target.gradients), str(report)


@pytest.mark.parametrize("finding", DEPARTURES)
def test_what_is_passed_over_differs(finding, monkeypatch):
    """The same calls without the refusal: they do not conform."""
    name, count = DEPARTURES[finding]
    (target,) = (t for t in targets(HERE) if t.name == name)
    report = judged(target, HERE, "float64", max_examples=count)
    assert report.ok and finding in report.departures, str(report)
    monkeypatch.setattr(frameworks.load(HERE), "departs", lambda *refusal: None)
    assert not judged(target, HERE, "float64", max_examples=count).ok
