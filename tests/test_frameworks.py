"""Frameworks next to the reference: every target conforms, and a fault planted in one is noticed."""

import sys

import numpy as np
import pytest

from refattn import frameworks, trials
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT8_E4M3, FLOAT8_E5M2
from refattn.oracle.check import check
from refattn.oracle.contract import NotHandled
from refattn.trials import judged
from tests.foreign import in_every_dtype, last_of_tensor, target, targets, with_one_off, wrong


def test_what_cannot_be_imported_says_which_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "refattn.frameworks.torch", raising=False)
    version, reason, found = frameworks.status("torch")
    assert version == "" and found == () and "torch cannot be imported" in reason
    assert reason.endswith("pip install 'refattn[torch]'")
    with pytest.raises(ImportError, match="torch cannot be imported"):
        check(lambda x, params: x, "linear", framework="torch")


def test_one_that_dies_when_it_is_imported_harms_nobody(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import os; os._exit(3)")
    (tmp_path / "jax.py").write_text("raise RuntimeError('no device')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = frameworks.available(["torch", "jax"], jobs=2)
    assert found["torch"] == ("", "torch cannot be imported: it ends with status 3", ())
    assert found["jax"] == ("", "jax cannot be imported: RuntimeError: no device", ())


def test_one_that_takes_too_long(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(frameworks, "PATIENCE", 0.5)
    assert frameworks.available(["torch"])["torch"].reason == "torch cannot be imported within 0.5 seconds"


def test_every_family_of_frameworks_is_there():
    assert {name for family in frameworks.FAMILIES.values() for name in family} <= set(frameworks.names())
    assert not set(frameworks.FAMILIES) & set(frameworks.names())


def test_an_unknown_framework():
    with pytest.raises(ValueError, match="framework is 'torchh', expected one of"):
        frameworks.load("torchh")


def fault(target, dtype):
    """By what to multiply: in 16 bits no bound is narrower than a few roundings; that by noise is of 24 deviations."""
    closed = "dot_product" in target.like
    return 1.001 if dtype in ("float64", "float32") else 1.1 if closed else 3


DEPARTURES = {  # finding -> target, dtype, which calls
    "torch-nan-query-row": ("scaled_dot_product_attention", "float32", {"families": "nan_query"}),
    "torch-causal-nonpositive-scale": (
        *("scaled_dot_product_attention, options, causal", "float32"),
        {"families": ("gaussian", "one_query"), "max_examples": 24},
    ),
    "torch-mha-causal-extra-tokens": ("nn.MultiheadAttention, is_causal", "float64", {"max_examples": 8}),
    "torch-mha-weights-nan": ("nn.MultiheadAttention, weights", "float64", {"max_examples": 16}),
    "torch-logsumexp-gradient": ("logsumexp", "bfloat16", {"families": "outliers", "max_examples": 24}),
}


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
        found = frameworks.available(["torch"])["torch"]
        assert found == frameworks.status("torch") and found[:2] == (torch.__version__, "")
        assert [row[:3] for row in found.targets] == [(t.name, t.like, tuple(t.dtypes)) for t in targets("torch")]

    def test_what_the_issue_asks_for_is_there(self):
        names = {t.name for t in targets("torch")}
        assert len(names) == len(targets("torch"))
        sdpa = {"scaled_dot_product_attention" + variant for variant in ("", ", causal", ", mask")}
        layers = {"nn.MultiheadAttention", "nn.TransformerEncoderLayer", "nn.GRUCell", "nn.LSTMCell"}
        assert names >= sdpa | layers | {"conv1d, conv2d, conv3d", "batch_norm, training", "batch_norm, inference"}
        assert names >= {"scaled_dot_product_attention, options" + variant for variant in ("", ", math", ", causal")}
        slow = {"flex_attention", "flex_attention, compiled"}
        assert names >= slow | {"scaled_dot_product_attention, compiled"}
        every = "float64", "float32", "bfloat16", "float16"
        assert all(t.dtypes == every for t in targets("torch") if t.name not in slow)

    @pytest.mark.parametrize(("target", "dtype"), in_every_dtype("torch"))
    def test_it_conforms(self, target, dtype):
        report = judged(target, "torch", dtype, max_examples=8 * target.times, seed=1)
        gradients = "judged" if target.gradients else "not asked for"
        assert report.ok and report.examples == 8 * target.times and report.gradients == gradients, str(report)

    @pytest.mark.parametrize(("target", "dtype"), in_every_dtype("torch"))
    def test_a_planted_fault_is_noticed(self, target, dtype):
        """One element of every output is off, and so are its gradients."""
        faulty = with_one_off(target.function, last_of_tensor(fault(target, dtype)))
        report = judged(target, "torch", dtype, faulty, max_examples=6, seed=1)
        outputs, gradients = wrong(report)
        assert outputs and (gradients or not target.gradients), str(report)

    def test_a_dtype_that_numpy_has_not(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        rows = {dtype: trials.Target("torch", "linear", dtype, 1, 0).run().row for dtype in ("bfloat16", "float32")}
        assert rows["bfloat16"][4] == "not judged: no ml_dtypes" and rows["float32"][4] == "ok", rows

    def test_calls_that_are_passed_over_show(self):
        name = "scaled_dot_product_attention, options, causal"
        outcome = trials.Target("torch", name, "float64", 8, 0).run()
        assert outcome.row[4].startswith("ok, ") and "passed over" in outcome.row[4]
        assert "causal with a scale of 0 or less: torch 2.13's fused kernel gives NaN" in outcome.record["passed_over"]
        assert "torch-causal-nonpositive-scale" in outcome.record["departures"]

    @pytest.mark.parametrize("finding", DEPARTURES)
    def test_what_is_passed_over_differs(self, finding, monkeypatch):
        """The same calls without the refusal: they do not conform."""
        name, dtype, options = DEPARTURES[finding]
        (target,) = (t for t in targets("torch") if t.name == name)
        report = judged(target, "torch", dtype, **options)
        assert report.ok and finding in report.departures, str(report)
        monkeypatch.setattr(frameworks.load("torch"), "departs", lambda *refusal: None)
        assert not judged(target, "torch", dtype, **options).ok

    @pytest.mark.parametrize("form", [FLOAT8_E4M3, FLOAT8_E5M2], ids=lambda form: form.name)
    def test_arrays_of_8_bits(self, torch, form):
        """In float32 from tensors of 8 bits; autograd gives gradients of the same dtype."""
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: pip install 'refattn[lowp]'")

        def attend(q, k, v, *, scale=None):
            assert q.dtype == k.dtype == v.dtype == getattr(torch, form.name)
            q, k, v = q.float(), *(x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
            return (scores.softmax(-1) @ v).bfloat16()

        promised = ARITHMETICS["fp8_flash"]._replace(inputs=form, grad=form, probs=form)
        options = {"framework": "torch", "arithmetic": promised, "max_examples": 16, "seed": 1}
        report = check(attend, "dot_product_attention", **options)
        assert report.ok and report.gradients == "judged" and report.dtype == form.name, str(report)
        faulty = with_one_off(attend, last_of_tensor(1.5))
        assert not check(faulty, "dot_product_attention", **options).ok

    def test_without_a_compiler_nothing_is_compiled(self, monkeypatch):
        monkeypatch.setattr(frameworks.load("torch")._flex.shutil, "which", lambda name: None)
        outcome = trials.Target("torch", "scaled_dot_product_attention, compiled", "float32", 2, 0).run()
        reason = "torch.compile needs a C++ compiler"
        assert outcome.ok and outcome.row[4] == f"not judged: {reason}" and outcome.record["not_judged"] == reason

    def test_one_that_handles_nothing_does_not_pass(self, monkeypatch):
        """What an adapter passes over, all of it, is no lack of this machine."""
        adapter = frameworks.load("torch")

        def handles_nothing(x, params):
            raise NotHandled("anything")

        linear = target("torch", "linear")
        monkeypatch.setattr(adapter, "TARGETS", (linear._replace(function=handles_nothing),))
        assert not trials.Target("torch", "linear", "float32", 2, 0).run().ok

    @pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_convolutions_without_onednn_sum_in_16_bits(self, torch, dtype):
        adapter, conv = frameworks.load("torch"), target("torch", "conv1d, conv2d, conv3d")
        with torch.backends.mkldnn.flags(enabled=False):
            for promise, kept in ((adapter.SUMS, True), (adapter.UPCAST, False)):
                report = judged(conv._replace(arithmetic=promise), "torch", dtype, max_examples=12, seed=1)
                assert report.ok == kept, str(report)

    def test_lengths_that_compiled_flex_attention_does_not_do(self):
        flex = target("torch", "flex_attention, compiled")
        report = judged(flex, "torch", "float32", max_examples=8, seed=1)
        assert report.ok and list(report.departures) == ["torch-flex-compiled-keys"], str(report)

    def test_backends_of_another_device(self, torch):
        """There is no GPU here: the CPU stands in for one, and its kernels for those."""
        math, efficient, flash, cudnn = frameworks.load("torch").cuda_targets("cpu")
        assert math.name.endswith("cpu, MATH") and cudnn.dtypes == flash.dtypes == ("bfloat16", "float16")
        assert judged(math, "torch", "float16", max_examples=8).ok
        report = judged(flash, "torch", "bfloat16", families="gaussian", max_examples=2, seed=1)
        assert report.verdicts and report.passed_over, str(report)
        report = judged(efficient, "torch", "float32", max_examples=1)
        assert not report.ok and set(report.passed_over) >= {"EFFICIENT_ATTENTION has no kernel for it"}, str(report)

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


@pytest.mark.frameworks
class TestJAX:
    @pytest.fixture(autouse=True)
    def jax(self):
        return pytest.importorskip("jax", reason="jax is not installed: pip install 'refattn[jax]'")

    def test_it_is_available(self, jax):
        assert frameworks.status("jax")[:2] == (jax.__version__, "")

    @pytest.mark.parametrize(("target", "dtype"), in_every_dtype("jax"))
    def test_it_conforms(self, target, dtype):
        report = judged(target, "jax", dtype, max_examples=6 * target.times, seed=1)
        assert report.ok and report.examples == 6 * target.times and report.gradients == "judged", str(report)

    def test_rows_without_keys_and_poison(self):
        (target,) = (t for t in targets("jax") if t.like == "dot_product_attention")
        families = "empty_rows", "poisoned_keys", "nan_query"
        report = judged(target, "jax", "float32", families=families, max_examples=6, seed=1)
        assert report.ok and set(report.families) == set(families), str(report)
        report = judged(target._replace(convention=None), "jax", "float32", families="empty_rows", max_examples=2)
        assert not report.ok and any(e.name == "jax" for e in report.explanations), str(report)

    @pytest.mark.parametrize("target", targets("jax"), ids=lambda t: t.name)
    def test_a_planted_fault_is_noticed(self, target):
        faulty = with_one_off(target.function, lambda y: y.at[(-1,) * y.ndim].multiply(1.001))
        report = judged(target, "jax", "float32", faulty, max_examples=4, seed=1)
        outputs, gradients = wrong(report)
        assert "out" in outputs and gradients, str(report)

    def test_what_comes_back(self, jax):
        def linear(x, params):
            return x @ params.weight.T + (0 if params.bias is None else params.bias)

        options, before = {"framework": "jax", "max_examples": 2}, jax.config.jax_enable_x64
        assert check(linear, "linear", **options).ok and check(linear, "linear", dtype="float64", **options).ok
        assert jax.config.jax_enable_x64 == before
        report = check(lambda x, params: jax.lax.stop_gradient(linear(x, params)), "linear", **options)
        assert report.verdicts["out"].conforms and not report.verdicts["dx"].conforms
        report = check(lambda x, params: [linear(x, params).astype("float16"), "text"], "linear", **options)
        assert report.verdicts["out"].problem == "has dtype float16, expected float32"
        assert report.verdicts["dx"].problem == "nothing came back"

    def test_an_error_leaves_the_configuration_as_it_was(self, jax):
        before = jax.config.jax_enable_x64  # other tests of this process may have set it
        try:
            jax.config.update("jax_enable_x64", False)
            report = check(lambda x, params: x @ x.reshape(7, -1, 3), "linear", framework="jax", dtype="float64")
            assert report.verdicts["call"].problem.startswith("raised ") and not jax.config.jax_enable_x64
        finally:
            jax.config.update("jax_enable_x64", before)


def test_the_extra_of_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "refattn.frameworks.onnxruntime", raising=False)
    assert frameworks.status("onnxruntime").reason.endswith("pip install 'refattn[onnx]'")


def linear_like(torch, candidate, **options):
    return check(candidate, "linear", framework="torch", max_examples=6, **options)


def test_numpy_is_no_framework():
    report = check(lambda x, params: x @ params.weight.T * np.nan, "linear", framework="numpy", max_examples=1)
    assert not report.ok and report.framework == "numpy"
