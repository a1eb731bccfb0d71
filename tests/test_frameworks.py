"""Frameworks next to the reference: every target conforms, and a fault planted in one is noticed."""

import inspect
import sys

import numpy as np
import pytest

from refattn import frameworks
from refattn.oracle.check import check
from refattn.registry import everything


def test_what_cannot_be_imported_says_which_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "refattn.frameworks.torch", raising=False)
    version, reason = frameworks.available()["torch"]
    assert version == "" and reason.endswith("pip install 'refattn[torch]'") and "torch cannot be imported" in reason
    with pytest.raises(ImportError, match="torch cannot be imported"):
        check(lambda x, params: x, "linear", framework="torch")


def test_an_unknown_framework():
    with pytest.raises(ValueError, match="framework is 'torchh', expected one of"):
        frameworks.load("torchh")


def targets():
    try:
        return frameworks.load("torch").TARGETS
    except ImportError:
        return ()


@pytest.mark.frameworks
class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield torch
        torch.set_num_threads(threads)

    def test_it_is_available(self, torch):
        assert frameworks.available()["torch"] == (torch.__version__, "")

    def test_what_the_issue_asks_for_is_there(self):
        names = {t.name for t in targets()}
        assert len(names) == len(targets())
        sdpa = {"scaled_dot_product_attention" + variant for variant in ("", ", causal", ", mask")}
        layers = {"nn.MultiheadAttention", "nn.TransformerEncoderLayer", "nn.GRUCell", "nn.LSTMCell"}
        assert names >= sdpa | layers | {"conv1d, conv2d, conv3d", "batch_norm, training", "batch_norm, inference"}
        assert all(t.dtypes == ("float64", "float32") for t in targets())
        liked = {t.like for t in targets()}
        claimed = {m.name for m in everything().values() if "framework" in m.ABOUT.witnesses}
        assert claimed <= liked, f"say that a framework confirms them, but none is cross-checked: {claimed - liked}"

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("target", targets(), ids=lambda t: t.name)
    def test_it_conforms(self, target, dtype):
        options = {"framework": "torch", "dtype": dtype, "example": target.example, "max_examples": 8}
        report = check(target.function, target.like, **options, seed=1, name=target.name)
        assert report.ok and report.examples == 8 and report.gradients == "judged", str(report)

    @pytest.mark.parametrize("dtype", ["float64", "float32"])
    @pytest.mark.parametrize("target", targets(), ids=lambda t: t.name)
    def test_a_planted_fault_is_noticed(self, target, dtype, torch):
        """One element of every output is off by a thousandth; the gradients are then off where it counts."""

        def faulty(*args, **options):
            result = right(*args, **options)
            first, *rest = result if isinstance(result, tuple) else (result,)
            factor = torch.ones_like(first).flatten()
            factor[-1:] = 1.001
            first = first * factor.reshape(first.shape)
            return (first, *rest) if rest else first

        right = target.function
        faulty.__signature__ = inspect.signature(right)
        options = {"framework": "torch", "dtype": dtype, "example": target.example, "max_examples": 6}
        report = check(faulty, target.like, **options, seed=1)
        assert not report.ok, str(report)
        assert any(not v.conforms for name, v in report.verdicts.items() if name[0] != "d"), str(report)
        assert any(not v.conforms for name, v in report.verdicts.items() if name[0] == "d"), str(report)

    def test_a_gradient_that_is_none(self, torch):
        report = linear_like(torch, lambda x, params: torch.nn.functional.linear(x.detach(), *params))
        assert report.verdicts["dx"].problem == "nothing came back" and report.verdicts["dparams.weight"].conforms
        assert report.verdicts["out"].conforms and not report.ok

    def test_an_output_cut_off_from_everything(self, torch):
        report = linear_like(torch, lambda x, params: torch.nn.functional.linear(x, *params).detach())
        assert report.verdicts["out"].conforms
        assert all(v.problem == "nothing came back" for name, v in report.verdicts.items() if name != "out")

    def test_a_gradient_that_stops_halfway(self, torch):
        def candidate(x, params):
            bias = None if params.bias is None else params.bias.detach()
            return torch.nn.functional.linear(x, params.weight, bias)

        report = linear_like(torch, candidate)
        assert report.verdicts["dparams.bias"].problem == "nothing came back" and report.verdicts["dx"].conforms

    def test_wrong_dtype_and_shape(self, torch):
        report = linear_like(torch, lambda x, params: torch.nn.functional.linear(x, *params).double())
        assert report.verdicts["out"].problem == "has dtype float64, expected float32" and not report.ok
        report = linear_like(torch, lambda x, params: torch.nn.functional.linear(x, *params)[None])
        assert "has shape (1, " in report.verdicts["out"].problem and not report.ok

    def test_one_that_raises(self, torch):
        report = linear_like(torch, lambda x, params: torch.nn.functional.linear(params.weight, x.flatten()[:0]))
        assert report.verdicts["call"].problem.startswith("raised ") and not report.ok

    def test_one_that_changes_its_input(self, torch):
        def candidate(x, params):
            y = torch.nn.functional.linear(x, *params)
            x.mul_(2)
            return y

        report = linear_like(torch, candidate)
        assert "raised RuntimeError" in report.verdicts["call"].problem  # autograd itself objects
        report = linear_like(torch, candidate, gradients=False)
        assert report.verdicts["arguments"].problem == "x: changed by the candidate" and report.verdicts["out"].conforms

    def test_lists_and_more_than_is_due(self, torch):
        assert linear_like(torch, lambda x, params: [torch.nn.functional.linear(x, *params)]).ok
        assert linear_like(torch, lambda x, params: (torch.nn.functional.linear(x, *params), x, "text")).ok

    def test_masks_and_ids_arrive_as_tensors(self, torch):
        def candidate(s, *, mask, axis):
            if mask is None:
                return torch.softmax(s, axis)
            assert mask.dtype == torch.bool
            return torch.nan_to_num(torch.softmax(s.masked_fill(~mask, -torch.inf), axis))

        report = check(candidate, "softmax", framework="torch", max_examples=12)
        assert report.ok and report.never == (), str(report)

    def test_forward_alone(self, torch):
        report = linear_like(torch, lambda x, params: torch.nn.functional.linear(x, *params), gradients=False)
        assert report.ok and set(report.verdicts) == {"out"} and report.gradients == "not asked for"


def linear_like(torch, candidate, **options):
    return check(candidate, "linear", framework="torch", max_examples=6, **options)


def test_numpy_is_no_framework():
    report = check(lambda x, params: x @ params.weight.T * np.nan, "linear", framework="numpy", max_examples=1)
    assert not report.ok and report.framework == "numpy"
