"""The script of a report: it fails as the candidate did, and passes with a candidate that is right."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import refattn
from refattn.core import Call
from refattn.examples import blocked_attention, blocked_attention_with_a_bug
from refattn.oracle import contract
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT32
from refattn.oracle.check import Report, check
from refattn.oracle.reproduce import script
from refattn.oracle.trial import Judge, try_call
from refattn.registry import find

CANDIDATES = """
    import numpy as np

    def weights(q, k, is_causal=False):
        s = q @ np.swapaxes(k, -1, -2) / q.dtype.type(np.sqrt(q.shape[-1]))
        if is_causal:
            s = np.where(np.tril(np.ones(s.shape[-2:], bool)), s, s.dtype.type(-np.inf))
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        return p / p.sum(axis=-1, keepdims=True)

    def right(q, k, v, *, is_causal=False):
        return weights(q, k, is_causal) @ v

    def backward(dout, q, k, v, out, *, is_causal=False):
        p, turn = weights(q, k, is_causal), lambda x: np.swapaxes(x, -1, -2)
        dp, scale = dout @ turn(v), q.dtype.type(1 / np.sqrt(q.shape[-1]))
        ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True)) * scale
        return ds @ k, turn(ds) @ q, turn(p) @ dout

    def twice_dk(dout, q, k, v, out, **options):
        dq, dk, dv = backward(dout, q, k, v, out, **options)
        return dq, 2 * dk, dv

    def no_dk(dout, q, k, v, out, **options):
        dq, dk, dv = backward(dout, q, k, v, out, **options)
        return dq, None, dv

    def wrong(q, k, v, *, is_causal=False):
        return right(q, k, v, is_causal=is_causal) * q.dtype.type(1.01)

    def a_little(q, k, v, *, is_causal=False):
        out = right(q.astype(float), k.astype(float), v.astype(float), is_causal=is_causal)
        return (out * 1.0004).astype(q.dtype)

    def exact(q, k, v, *, is_causal=False):
        return right(q.astype(float), k.astype(float), v.astype(float), is_causal=is_causal).astype(q.dtype)

    def raises(q, k, v):
        raise ZeroDivisionError("no")

    def shape(q, k, v):
        return right(q, k, v)[..., :0]

    def dtype(q, k, v):
        return right(q, k, v).astype(float)

    def a_list(q, k, v):
        return right(q, k, v).tolist()

    def nothing(q, k, v):
        return None

    def changes(q, k, v):
        out = right(q, k, v)
        q += 1
        return out

    def is_nan(q, k, v):
        return right(q, k, v) * q.dtype.type(np.nan)

    def linear(x, params):
        return x @ params.weight.T + (0 if params.bias is None else params.bias)

    def wrong_linear(x, params):
        return linear(x, params) + x.dtype.type(1)

    def linear_backward(dout, x, params, out):
        x, flat = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
        return dout @ params.weight, (flat.T @ x, None if params.bias is None else flat.sum(axis=0))

    def no_bias(dout, x, params, out):
        dx, (weight, bias) = linear_backward(dout, x, params, out)
        return dx, (weight, None if bias is None else 0 * bias)
"""
TORCH = """
    import torch

    def right(q, k, v, *, is_causal=False):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    def detached(q, k, v, *, is_causal=False):
        return right(q, k.detach(), v, is_causal=is_causal)

    def wrong(q, k, v, *, is_causal=False):
        return right(q, k, v, is_causal=is_causal) * 1.1

    def wrong_gradient(q, k, v, *, is_causal=False):
        return right(q, 2 * k - k.detach(), v, is_causal=is_causal)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "candi dates.py"
    path.write_text(textwrap.dedent(CANDIDATES))
    return path


def load(path, name):
    namespace = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace[name]


def judged(path, name, like="scaled_dot_product", backward=None, **options):
    """The script for a function of a file."""
    spec = (str(path), name, *((str(path), backward) if backward else ()))
    backward = load(path, backward) if backward else None
    options = {"max_examples": 6} | options
    report = check(load(path, name), like, backward=backward, spec=spec, name=name, **options)
    assert report.smallest is not None, str(report)
    return script(report), report


def run(text, *changes):
    """Run it on its own, without refattn: (exit status, what it printed, the last line of what went wrong)."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    hidden = "import sys; sys.modules['refattn'] = None\n"
    command = [sys.executable, "-W", "error", "-"]
    ended = subprocess.run(command, input=hidden + text, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stdout, (ended.stderr.strip().splitlines() or [""])[-1]


def test_the_bundled_bug(tmp_path):
    """Its file, the file of the right kernel; neither needs refattn once it stands in a folder of its own."""
    for module in (blocked_attention, blocked_attention_with_a_bug):
        shutil.copy(module.__file__, tmp_path)
    bug = tmp_path / "blocked_attention_with_a_bug.py"
    bug.write_text(bug.read_text().replace("refattn.examples.", ""))
    wrong, spec = blocked_attention_with_a_bug, (str(bug), "forward", str(bug), "backward")
    report = check(wrong.forward, "scaled_dot_product", backward=wrong.backward, spec=spec)
    text = report.script()
    status, out, error = run(text)
    assert status == 1 and error == "AssertionError: outside the bounds"
    failing = [v for v in report.smallest.verdicts if not v.conforms]
    assert failing and out.count("\n") == len(failing)
    for v in failing:
        assert f"{v.name}{list(v.index)} is {v.got!r}, expected {v.expected!r}" in out
    assert run(text, (str(bug), str(tmp_path / "blocked_attention.py")))[::2] == (0, "")
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 120


def test_no_gradients_where_the_forward_is_wrong(file):
    text = script(by_hand(file, "wrong"))
    assert "backward = " not in text and "dout" not in text
    text = script(by_hand(file, "wrong", "backward")._replace(spec=(str(file), "wrong")))  # it cannot be imported
    assert "backward = " not in text and run(text)[2] == "AssertionError: outside the bounds"


def test_nothing_fails_nothing_to_show():
    report = check(blocked_attention.forward, "scaled_dot_product", max_examples=2)
    assert report.ok and report.script() == ""


def test_a_gradient(file):
    text, _ = judged(file, "right", backward="twice_dk")
    status, out, error = run(text)
    assert status == 1 and error == "AssertionError: outside the bounds" and out.startswith("dk[")
    assert run(text, ("module.twice_dk", "module.backward"))[::2] == (0, "")


def test_a_gradient_that_is_missing(file):
    text, _ = judged(file, "right", backward="no_dk")
    assert run(text)[::2] == (1, "AssertionError: dk nothing came back")
    assert run(text, ("module.no_dk", "module.backward"))[::2] == (0, "")


def test_options_reach_forward_and_backward(file):
    """A report made by hand: its smallest trial keeps an option."""
    text = script(by_hand(file, "wrong", "twice_dk", is_causal=True))
    assert "options = dict(is_causal=True)" in text
    status, out, _ = run(text)
    assert status == 1 and {line.partition("[")[0] for line in out.splitlines()} == {"out", "dk"}
    assert run(text, ("module.twice_dk", "module.backward"), ("module.wrong", "module.right"))[::2] == (0, "")


def by_hand(file, name, backward=None, arithmetic="float32", chance=False, sizes=(1, 2, 20, 12, 8), **options):
    b, h, queries, keys, features = sizes
    rng = np.random.default_rng(7)
    q, k, v = (rng.normal(size=(b, h, n, features)) for n in (queries, keys, keys))
    run_it = contract.runner(None, load(file, backward) if backward else None)
    mechanism = find("scaled_dot_product")
    judge = Judge(load(file, name), mechanism, run_it, ARITHMETICS[arithmetic], None, backward is not None)
    trial = try_call(judge, Call((q, k, v), options), "gaussian", chance, (1, 2))
    dtype, spec = judge.arithmetic.inputs.name, (str(file), name, *((str(file), backward) if backward else ()))
    head = name, "scaled_dot_product", "numpy", dtype, arithmetic, "", 0
    return Report(*head, {}, {}, 1, {}, {}, {}, {}, (), "judged", smallest=trial, spec=spec)


def test_numbers_are_exact_whether_written_out_or_packed(file):
    for sizes in ((1, 1, 2, 3, 4), (1, 2, 20, 12, 8)):
        report = by_hand(file, "wrong", sizes=sizes)
        text = script(report)
        assert ("unpack(" in text) == (sizes[2] == 20)
        namespace = {}
        with pytest.raises(AssertionError, match="outside the bounds"):
            exec(text, namespace)
        for name, x in zip("qkv", report.smallest.call.args):
            assert namespace[name].dtype == np.float32 and np.array_equal(namespace[name], x)


def test_all_together(file):
    """No element is outside, all are pushed along the values."""
    report = by_hand(file, "a_little", arithmetic="f16_flash", chance=True, sizes=(2, 4, 16, 20, 16))
    assert [v.kind for v in report.smallest.verdicts] == ["SUSPECT"]
    text = script(report)
    status, out, error = run(text)
    assert status == 1 and "all elements are off together" in out and error == "AssertionError: outside the bounds"
    assert run(text, ("module.a_little", "module.exact"))[::2] == (0, "")
    changed = report.smallest.verdicts[0]._replace(problem="all elements are off together, along the scale, by 1")
    text = script(report._replace(smallest=report.smallest._replace(verdicts=(changed,))))
    assert "off together, " in run(text)[1] and run(text, ("module.a_little", "module.exact"))[::2] == (0, "")
    changed = changed._replace(problem="the mean square of the errors is 3 times what is predicted")
    text = script(report._replace(smallest=report.smallest._replace(verdicts=(changed,))))
    assert "the mean square" in run(text)[1] and run(text, ("module.a_little", "module.exact"))[::2] == (0, "")
    assert run(text, ("module.a_little", "module.wrong"))[0] == 1


@pytest.mark.parametrize(
    "name, error",
    [
        ("raises", "ZeroDivisionError: no"),
        ("shape", "AssertionError: out has shape ("),
        ("dtype", "AssertionError: out has dtype float64, expected float32"),
        ("a_list", "AssertionError: out is a "),
        ("nothing", "AssertionError: out nothing came back"),
        ("changes", "AssertionError: q: changed by the candidate"),
        ("is_nan", "AssertionError: outside the bounds"),
    ],
)
def test_what_has_no_number(file, name, error):
    text, _ = judged(file, name)
    status, _, last = run(text)
    assert status == 1 and last.startswith(error)
    assert run(text, (f"module.{name}", "module.right"))[::2] == (0, "")


def test_arguments_that_are_changed_with_a_backward_in_reach_and_without(file):
    report = by_hand(file, "changes", "backward")
    for spec in (report.spec, report.spec[:2]):
        text = script(report._replace(spec=spec))
        assert ("module.backward" in text) == (len(spec) == 4)
        assert run(text)[::2] == (1, "AssertionError: q: changed by the candidate")
        assert run(text, ("module.changes", "module.right"))[::2] == (0, "")


def test_parameters_are_named_tuples(file):
    text, _ = judged(file, "wrong_linear", "linear")
    assert run(text)[::2] == (1, "AssertionError: outside the bounds") and "namedtuple('Params'" in text
    assert run(text, ("module.wrong_linear", "module.linear"))[::2] == (0, "")
    text, _ = judged(file, "linear", "linear", backward="no_bias")
    status, out, _ = run(text)
    assert status == 1 and out.startswith("dparams.bias[") and "grads[1][1]" in text
    assert run(text, ("module.no_bias", "module.linear_backward"))[::2] == (0, "")


def test_numpy_arrays_of_bfloat16(file):
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: pip install 'refattn[lowp]'")
    report = by_hand(file, "wrong", arithmetic="bf16_eager", sizes=(1, 1, 2, 2, 2))
    report = report if report.smallest.failed else report._replace(smallest=_made_to_fail(report.smallest))
    text = script(report)
    assert "import ml_dtypes" in text and "astype(ml_dtypes.bfloat16)" in text
    assert run(text)[2].startswith("AssertionError")


def _made_to_fail(trial):
    verdict = trial.verdicts[0]
    return trial._replace(verdicts=(verdict._replace(kind="BUG", allowed=0.0, expected=verdict.expected + 1),))


def test_a_function_that_cannot_be_imported(file):
    report = check(lambda q, k, v: v[..., :1, :] + 0 * q[..., :1] * v[..., :1, :], "scaled_dot_product", max_examples=4)
    text = script(report)
    assert report.spec is None and "candidate = ...  # your function" in text
    status, _, error = run(text)
    assert status == 1 and error == "TypeError: 'ellipsis' object is not callable"


def test_a_gradient_alone_asks_for_a_backward(file):
    text = script(by_hand(file, "right", "twice_dk")._replace(spec=(str(file), "right")))
    assert "backward = ...  # your function" in text and "candidate = module.right" in text
    assert "grads[1]" in text


def test_a_reference_of_ones_own(file):
    """Nobody knows the names of its arguments but itself."""
    linear = find("linear")
    own = SimpleNamespace(forward=linear.forward, backward=linear.backward, example=linear.example, name="own")
    for name, backward, words in (("wrong_linear", None, "out["), ("linear", "no_bias", "dparams.bias[")):
        text, report = judged(file, name, own, backward=backward)
        status, out, _ = run(text)
        assert status == 1 and report.like == "own" and out.startswith(words), text
        assert run(text, ("module.wrong_linear", "module.linear") if backward is None else
                   ("module.no_bias", "module.linear_backward"))[::2] == (0, "")  # fmt: skip


def test_of_an_installed_module():
    wrong = blocked_attention_with_a_bug
    text = script(check(wrong.forward, "scaled_dot_product"))
    assert "from refattn.examples.blocked_attention_with_a_bug import forward as candidate" in text
    with pytest.raises(AssertionError, match="outside the bounds"):
        exec(text, {})


# --- torch ---------------------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.parametrize(
    "name, error, names",
    [
        ("wrong", "AssertionError: outside the bounds", {"out", "dq", "dk", "dv"}),
        ("wrong_gradient", "AssertionError: outside the bounds", {"dk"}),
        ("detached", "AssertionError: dk nothing came back", set()),
    ],
)
def test_torch(tmp_path, name, error, names):
    pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    path = Path(tmp_path / "candidate.py")
    path.write_text(textwrap.dedent(TORCH))
    text, _ = judged(path, name, framework="torch")
    status, out, last = run(text)
    assert status == 1 and last == error, text
    found = {line.partition("[")[0] for line in out.splitlines()}
    assert found <= names and (found or not names)
    assert ".requires_grad_()" in text or found == {"out"}
    assert run(text, (f"module.{name}\n", "module.right\n"))[::2] == (0, "")


def test_low_formats_of_torch(file):
    """Written out only: the bits of bfloat16 are those of a float32 that ends in zeros."""
    report = by_hand(file, "wrong", arithmetic="float32", sizes=(1, 1, 2, 2, 2))
    text = script(report._replace(framework="torch", dtype="bfloat16"))
    assert text.count(").to(torch.bfloat16)") == 3 and "ml_dtypes" not in text
    assert FLOAT32.name == report.dtype and refattn.__version__ in text
