"""Hugging Face transformers next to the reference: every target conforms, and a fault planted in one is noticed."""


import numpy as np
import pytest

from refattn import frameworks
from refattn.attention.dot_product import decomposed_2d
from refattn.core import Call
from refattn.oracle.conventions import PRESETS
from refattn.trials import judged
from tests.foreign import in_every_dtype, last_of_tensor, targets, with_one_off, wrong

pytestmark = pytest.mark.frameworks
torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'refattn[transformers]'")

HERE, SIZES = "transformers", ("size", "key_size")
DEPARTURES = {  # finding -> target, dtype, which calls
    "torch-tanh-gradient": ("Gemma 2, eager_attention_forward", "float16", {"max_examples": 24}),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("target", "dtype"), in_every_dtype(HERE))
def test_it_conforms(target, dtype):
    report = judged(target, HERE, dtype, max_examples=6 * target.times, seed=1)
    gradients = "judged" if target.gradients else "not asked for"
    assert report.ok and report.examples == 6 * target.times and report.gradients == gradients, str(report)


@pytest.mark.parametrize("target", targets(HERE), ids=lambda t: t.name)
def test_a_planted_fault_is_noticed(target):
    faulty = with_one_off(target.function, last_of_tensor(1.001))
    report = judged(target, HERE, "float32", faulty, max_examples=6, seed=1)
    outputs, gradients = wrong(report)
    assert "out" in outputs and (gradients or not target.gradients), str(report)


@pytest.mark.parametrize("finding", DEPARTURES)
def test_what_is_passed_over_differs(finding, monkeypatch):
    """The same calls without the refusal: they do not conform."""
    name, dtype, options = DEPARTURES[finding]
    (target,) = (t for t in targets(HERE) if t.name == name)
    report = judged(target, HERE, dtype, **options)
    assert report.ok and finding in report.departures, str(report)
    monkeypatch.setattr(frameworks.load(HERE), "departs", lambda *refusal: None)
    assert not judged(target, HERE, dtype, **options).ok


def test_a_row_without_keys_is_the_mean_of_all_values():
    (target,) = (t for t in targets(HERE) if t.name.startswith("Llama, eager"))
    lowest = PRESETS["hf_eager"]._replace(mask_value=float(np.finfo(np.float32).min))  # the reference is of float64
    calls = {"families": "empty_rows", "max_examples": 6, "seed": 1}
    target = target._replace(gradients=False)
    report = judged(target._replace(convention=lowest), HERE, "float32", **calls)
    assert report.ok and set(report.families) == {"empty_rows"}, str(report)
    assert not judged(target._replace(convention=None), HERE, "float32", **calls).ok


def test_sizes_that_do_not_divide_each_other(monkeypatch):
    def example(draw):
        size = (8, 1), (draw.choice("keys", 6, 4), 1)
        q, k, v = (draw.array(1, n, 2) for n in (8, size[1][0], size[1][0]))
        return Call((q, k, v, decomposed_2d.Params(draw.array(15, 2), draw.array(1, 2))), dict(zip(SIZES, size)))

    (target,) = (t._replace(example=example) for t in targets(HERE) if t.like == "decomposed_2d")
    report = judged(target, HERE, "float64", max_examples=4)
    assert report.ok and set(report.departures) == {"transformers-decomposed-floor"}, str(report)
    monkeypatch.setattr(frameworks.load(HERE), "departs", lambda *refusal: None)
    assert not judged(target, HERE, "float64", max_examples=4).ok


def test_gemma_has_gradients_where_the_cap_is_far(monkeypatch):
    (target,) = (t for t in targets(HERE) if t.name.startswith("Gemma 2, eager"))
    report = judged(target, HERE, "bfloat16", families=("gaussian", "high_entropy", "few_keys"), max_examples=9)
    assert report.ok and report.gradients == "judged" and "dq" in report.verdicts, str(report)
