"""The command line: what it prints, and how it ends."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import refattn
from refattn import frameworks, report, trials
from refattn.__main__ import main
from refattn.examples import blocked_attention, blocked_attention_with_a_bug
from refattn.registry import everything

RICH = importlib.import_module("rich") if importlib.util.find_spec("rich") else None


@pytest.fixture(autouse=True)
def plain_text(monkeypatch):
    """As without rich: a table that does not depend on a terminal."""
    monkeypatch.setitem(sys.modules, "rich", None)


def with_rich(monkeypatch):
    """As it was found before; another copy of it would not know the modules that belong to this one."""
    if RICH is None:
        pytest.skip("rich is not installed: pip install 'refattn[cli]'")
    monkeypatch.setitem(sys.modules, "rich", RICH)


@pytest.fixture
def refattn_cli(capsys):
    def run(*arguments):
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as end:  # argparse
            status = end.code
        return status, *capsys.readouterr()

    return run


def process(*arguments, without=(), **options):
    """A process of its own, in which some packages cannot be imported."""
    hide = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    code = f"import sys; {hide}from refattn.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": 300} | options)


# --- list and show -------------------------------------------------------------------------------------------


def test_version(refattn_cli):
    assert refattn_cli("--version") == (0, f"refattn {refattn.__version__}\n", "")


def test_list(refattn_cli):
    status, out, err = refattn_cli("list")
    assert status == 0 and err == ""
    for m in everything().values():
        assert any(line.split()[:2] == [m.name, m.family] for line in out.splitlines())


def test_list_as_json(refattn_cli):
    status, out, _ = refattn_cli("list", "--json")
    records = {record["name"]: record for record in json.loads(out)}
    assert status == 0 and set(records) == set(everything())
    record = records["squeeze_excitation"]
    assert record["family"] == "channel" and "CVPR 2018" in record["paper"] and "batch_independent" in record["laws"]


@pytest.mark.parametrize("name", ["squeeze_excitation", "linear", "lstm_cell", "scaled_dot_product"])
def test_show(refattn_cli, name):
    status, out, _ = refattn_cli("show", name)
    m = everything()[name]
    assert status == 0 and out.count(m.title + ".\n") == 1  # the docstring is not shown again with the source
    assert "\nforward(" in out and "\nbackward(" in out and "Saved(" in out and "\n@shaped\ndef forward(" in out


def test_show_spells_the_shapes(refattn_cli):
    out = refattn_cli("show", "linear")[1]
    assert "Params(weight: (O, I), bias: (O,) or None)" in out and "init(rng, inputs, outputs, bias=True)" in out
    assert "forward(x: (*L, I), params: linear.Params) -> ((*L, O), linear.Saved)" in out


# --- bad use -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, text in {
        "good.py": """
            from beside import multiply
            LIST = [1]
            def f(x, params):
                return multiply(x, params.weight) + (0 if params.bias is None else params.bias)
            def attend(q, k, v):
                return v
            def wrong(x, params):
                return 1.01 * multiply(x, params.weight)
            def takes_more(x, params, y):
                return x
            def backward(dout, x, params, out):
                flat_x, flat = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
                bias = None if params.bias is None else flat.sum(0)
                return dout @ params.weight, (flat.T @ flat_x, bias)
            """,
        "text.txt": "",
        "record.py": """
            from __future__ import annotations
            import dataclasses
            @dataclasses.dataclass
            class Kept:
                x: object = None
            kept = Kept()
            def f(x, params):
                kept.x = x.copy()
                return x @ params.weight.T + (0 if params.bias is None else params.bias)
            def backward(dout, x, params, out):
                assert (kept.x == x).all()
                flat_x, flat = x.reshape(-1, x.shape[-1]), dout.reshape(-1, dout.shape[-1])
                return dout @ params.weight, (flat.T @ flat_x, flat.sum(0))
            """,
        "beside.py": "def multiply(x, w):\n    return x @ w.T\n",
        "raises.py": "1 / 0\n",
        "exits.py": "import sys\nsys.exit(0)\n",
        "syntax.py": "def f(:\n",
        "empty.py": "",
    }.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "command, words",
    [
        ("", "required: COMMAND"),
        ("chekc", "invalid choice: 'chekc'"),
        ("show", "required: name"),
        ("show squeeze_exitation", "no mechanism 'squeeze_exitation'; did you mean squeeze_excitation"),
        ("check squeeze_exitation", "did you mean squeeze_excitation"),
        ("check tortch", "or the framework torch"),
        ("check linear --seed one", "invalid whole number value: 'one'"),
        ("check linear --seed -1", "-1 is less than 0"),
        ("check linear --jobs 0", "0 is less than 1"),
        ("check linear --examples 1.5", "invalid whole number value: '1.5'"),
        ("check linear --exampels 3", "unrecognized arguments"),
        ("check linear --like softmax", "--like needs FILE.py:FUNCTION"),
        ("check linear --dtype float32", "--dtype needs FILE.py:FUNCTION"),
        ("check linear --forward-only", "--forward-only needs FILE.py:FUNCTION"),
        ("check linear --arithmetic float32", "--arithmetic needs FILE.py:FUNCTION"),
        ("check linear --convention jax", "--convention needs FILE.py:FUNCTION"),
        ("check linear --families gaussian", "--families needs FILE.py:FUNCTION"),
        ("check linear --html out.html", "--html needs FILE.py:FUNCTION"),
        ("check linear --script out.py", "--script needs FILE.py:FUNCTION"),
        ("check good.py:f --like linear --html nowhere/out.html", "--html: cannot write to nowhere"),
        ("check good.py:f --like linear --script folder", "--script: folder is a folder"),
        ("check good.py:f --like linear --arithmetic bf16", "arithmetic is 'bf16', expected one of float64, "),
        ("check good.py:f --like linear --arithmetic bf16_flash --dtype float16", "expected one that holds bfloat16"),
        ("check good.py:attend --like dot_product_attention --convention pytorch", "expected one of torch_sdpa, "),
        ("check good.py:f --like linear --convention jax", "convention is 'jax', expected none"),
        ("check good.py:f --like linear --families gausian", "families has 'gausian', expected some of"),
        ("check linear --json nowhere/out.json", "cannot write to nowhere"),
        ("check linear --json folder", "folder is a folder"),
        ("check good.py:f", "needs --like NAME"),
        ("check good.py:f --like liner", "did you mean linear"),
        ("check good.py:f linear --like linear", "one FILE.py:FUNCTION at a time"),
        ("check good.py --like linear", "good.py: expected FILE.py:FUNCTION"),
        ("check good.py: --like linear", "expected FILE.py:FUNCTION"),
        ("check bad.py:f --like linear", "bad.py: no such file"),
        ("check folder:f --like linear", "folder: no such file"),
        ("check good.py:g --like linear", "no function g; it has multiply, f, attend, wrong, takes_more, backward"),
        ("check good.py:LIST --like linear", "has no function LIST"),
        ("check text.txt:f --like linear", "text.txt: not a Python file"),
        ("check empty.py:f --like linear", "empty.py has no function f; it has none"),
        ("check raises.py:f --like linear", "raises.py cannot be imported: ZeroDivisionError: division by zero"),
        ("check exits.py:f --like linear", "exits.py cannot be imported: SystemExit"),
        ("check syntax.py:f --like linear", "syntax.py cannot be imported: SyntaxError"),
        ("check good.py:f --like linear --backward good.py:g", "has no function g"),
        ("check good.py:f --like linear --dtype int8", "invalid choice: 'int8'"),
        ("check good.py:f --like linear --framework torhc", "framework is 'torhc', expected one of"),
        ("check good.py:takes_more --like linear", "takes_more takes y, expected x, params"),
        ("check good.py:f --like scaled_dot_product", "expected q, k, v"),
        ("check nowhere.kernels:f --like linear", "nowhere.kernels cannot be imported: ModuleNotFoundError"),
        ("check refattn.core:nothing --like linear", "refattn.core has no function nothing; it has "),
        ("check all linear", "all stands alone"),
        ("check linear --page out.md", "--page needs `refattn check all`"),
        ("check all --page nowhere/out.md", "--page: cannot write to nowhere"),
        ("check good.py:f --like linear --resume", "--resume and --page are not for one function"),
        ("discover", "required: TARGET"),
        ("discover linear", "linear: expected FILE.py:FUNCTION, MODULE:FUNCTION or one of "),
        ("discover torch --framework torch", "--framework needs FILE.py:FUNCTION; torch is one"),
        ("discover good.py:f", "f does not take v, expected q, k, v"),
        ("discover good.py:attend --framework torhc", "framework is 'torhc', expected one of"),
        ("discover good.py:attend --dtype int8", "invalid choice: 'int8'"),
    ],
)
def test_bad_use(refattn_cli, files, command, words):
    status, out, err = refattn_cli(*command.split())
    assert status == 2 and out == "" and words in err and "Traceback" not in err, err


# --- check: a function of your own ---------------------------------------------------------------------------


def test_a_file_that_conforms(refattn_cli, files):
    status, out, err = refattn_cli("check", "good.py:f", "--like", "linear", "--examples", 4)
    assert (status, err) == (0, "") and "good.py:f like linear, numpy float32: conforms (4 examples)" in out
    assert "gradients are not judged: no backward is given" in out


def test_a_file_with_a_backward(refattn_cli, files):
    command = ("check", files / "good.py:f", "--like", "linear", "--backward", "good.py:backward", "--examples", 4)
    status, out, _ = refattn_cli(*command, "--dtype", "float64")
    assert status == 0 and "ok  dparams.weight" in out and "float64: conforms" in out
    status, out, _ = refattn_cli(*command, "--forward-only")
    assert status == 0 and "gradients are not judged: not asked for" in out


def test_forward_and_backward_share_their_file(refattn_cli, files):
    command = ("check", "record.py:f", "--like", "linear", "--backward", "record.py:backward", "--examples", 4)
    status, out, _ = refattn_cli(*command)
    assert status == 0 and "dparams.bias" in out, out


def test_a_file_that_differs(refattn_cli, files):
    command = ("check", "good.py:wrong", "--like", "linear", "--examples", 4, "--seed", 3)
    status, out, _ = refattn_cli(*command, "--json", "out.json")
    assert status == 1 and "DIFFERS (4 examples)" in out and "times the allowed" in out
    content = json.loads((files / "out.json").read_text())
    assert content["ok"] is False and content["seed"] == 3 and content["refattn"] == refattn.__version__
    verdict = content["verdicts"]["out"]
    assert verdict["kind"].startswith("BUG") and verdict["ratio"] > 1 and len(verdict["index"]) >= 2
    assert sorted(path.name for path in files.iterdir() if path.name.startswith(".")) == []  # nothing half-written


def test_a_page_and_a_script(refattn_cli, files):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'refattn[plot]'")
    command = ("check", "good.py:wrong", "--like", "linear", "--examples", 4, "--dtype", "float64")
    status, out, err = refattn_cli(*command, "--html", "out.html", "--script", "out.py", "--json", "out.json")
    assert (status, err) == (1, "") and "DIFFERS" in out
    assert (files / "out.html").read_text().startswith("<!doctype html>")
    assert json.loads((files / "out.json").read_text())["spec"] == [str(files / "good.py"), "wrong"]
    ended = subprocess.run([sys.executable, "out.py"], cwd=files, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "AssertionError" in ended.stderr and "expected" in ended.stdout
    fixed = (files / "out.py").read_text().replace("module.wrong", "module.f")
    ended = subprocess.run([sys.executable, "-"], input=fixed, cwd="/", capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_a_script_of_a_gradient(refattn_cli, files):
    (files / "gradient.py").write_text(
        "from good import f\nfrom good import backward as right\n"
        "def backward(*arguments):\n    dx, dparams = right(*arguments)\n    return 2 * dx, dparams\n"
    )
    command = ("check", "gradient.py:f", "--like", "linear", "--backward", "gradient.py:backward", "--examples", 4)
    status, out, _ = refattn_cli(*command, "--script", "out.py")
    assert status == 1 and "BUG" in out
    ended = subprocess.run([sys.executable, files / "out.py"], cwd="/", capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stdout.startswith("dx["), ended.stderr


def test_nothing_fails_no_script(refattn_cli, files):
    command = ("check", "good.py:f", "--like", "linear", "--examples", 2, "--script", "out.py")
    status, out, _ = refattn_cli(*command)
    assert status == 0 and "nothing fails: out.py is not written" in out and not (files / "out.py").exists()


def test_a_page_without_matplotlib(refattn_cli, files, monkeypatch):
    """It is said before anything is tried."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    status, out, err = refattn_cli("check", "good.py:f", "--like", "linear", "--html", "out.html")
    assert status == 2 and out == "" and "pip install 'refattn[plot]'" in err and not (files / "out.html").exists()


def test_arithmetic_convention_and_families(refattn_cli, files):
    (files / "kernel.py").write_text(
        "import numpy as np\n"
        "def attend(q, k, v):\n"
        "    s = (q.astype(float) @ k.astype(float).swapaxes(-1, -2)) / np.sqrt(q.shape[-1])\n"
        "    p = np.exp(s - s.max(axis=-1, keepdims=True))\n"
        "    return (p / p.sum(axis=-1, keepdims=True) @ v.astype(float)).astype(q.dtype)\n"
    )
    command = ("check", "kernel.py:attend", "--like", "dot_product_attention", "--examples", 4, "--json", "out.json")
    more = ("--arithmetic", "f16_upcast", "--convention", "torch_sdpa", "--families", "gaussian")
    status, out, _ = refattn_cli(*command, *more)
    assert "numpy float16, arithmetic f16_upcast, convention torch_sdpa: conforms" in out and status == 0, out
    content = json.loads((files / "out.json").read_text())
    assert content["families"] == {"gaussian": 4} and content["convention"] == "torch_sdpa"
    status, out, _ = refattn_cli(*command, "--arithmetic", "f16_upcast", "--dtype", "float32")
    assert "numpy float32, arithmetic f16_upcast" in out and content["arithmetic"] == "f16_upcast", out


def test_bfloat16(refattn_cli, files, monkeypatch):
    (files / "kernel.py").write_text(
        "import numpy as np\n"
        "def attend(q, k, v):\n"
        "    q, k, v, dtype = *(x.astype(float) for x in (q, k, v)), q.dtype\n"
        "    s = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])\n"
        "    p = np.exp(s - s.max(axis=-1, keepdims=True))\n"
        "    return (p / p.sum(axis=-1, keepdims=True) @ v).astype(dtype)\n"
    )
    command = ("check", "kernel.py:attend", "--like", "scaled_dot_product", "--dtype", "bfloat16", "--examples", 4)
    if importlib.util.find_spec("ml_dtypes"):
        status, out, err = refattn_cli(*command)
        assert status == 0 and "numpy bfloat16, arithmetic bf16_eager: conforms" in out, out + err
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    status, out, err = refattn_cli(*command)
    assert status == 2 and out == "" and "pip install 'refattn[lowp]'" in err


# --- check: mechanisms and frameworks ------------------------------------------------------------------------


def test_mechanisms_by_name(refattn_cli, tmp_path):
    command = ("check", "squeeze_excitation", "linear", "--examples", 2, "--json", tmp_path / "out.json")
    status, out, err = refattn_cli(*command, "--jobs", 1)
    assert (status, err) == (0, "") and "All 2 as they should be." in out and "torch" not in out
    assert "worst gradient error" in out and "witnesses" in out and "channel" in out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["ok"] and [record["name"] for record in content["laws"]] == ["squeeze_excitation", "linear"]
    assert content["frameworks"] == {} and content["kernels"] == []
    record = content["laws"][0]
    assert record["ok"] and record["worst"] < 1e-12 and record["examples"] == 2 and record["laws"] == 14


def test_processes_give_what_one_gives(refattn_cli, tmp_path):
    contents = []
    for jobs in (1, 2):
        path = tmp_path / f"{jobs}.json"
        status, *_ = refattn_cli("check", "linear", "softmax", "conv", "--examples", 2, "--jobs", jobs, "--json", path)
        assert status == 0
        contents.append(json.loads(path.read_text()))
    assert contents[0] == contents[1]


def test_a_mechanism_that_breaks_a_law(refattn_cli, monkeypatch, tmp_path):
    module = everything()["linear"].module
    right = module.backward
    monkeypatch.setattr(module, "backward", lambda dy, saved: (2 * right(dy, saved)[0], right(dy, saved)[1]))
    command = ("check", "linear", "softmax", "--examples", 2, "--jobs", 1, "--json", tmp_path / "out.json")
    status, out, _ = refattn_cli(*command)
    assert status == 1 and "FAILS" in out and "1 of 2 differ." in out
    assert "gradient_matches_complex_step, example 0 of seed 0: linear: gradient of argument 0" in out
    content = json.loads((tmp_path / "out.json").read_text())
    assert not content["ok"] and [record["ok"] for record in content["laws"]] == [False, True]


def test_a_framework_that_is_not_there():
    ended = process("check", "torch", "--jobs", 1, without=["torch", "rich"])
    assert ended.returncode == 2 and ended.stdout == "" and "Traceback" not in ended.stderr
    assert "torch cannot be imported" in ended.stderr and "pip install 'refattn[torch]'" in ended.stderr


@pytest.mark.frameworks
def test_a_framework(refattn_cli, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    status, out, _ = refattn_cli("check", "torch", "--examples", 1, "--jobs", 2, "--json", tmp_path / "out.json")
    assert status == 0 and f"torch {torch.__version__}" in out and "nn.MultiheadAttention" in out, out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["frameworks"]["torch"]["version"] == torch.__version__
    assert len(content["frameworks"]["torch"]["targets"]) >= 40 and content["laws"] == []


@pytest.mark.frameworks
def test_a_framework_that_differs(refattn_cli, monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    from refattn.frameworks import Target
    from refattn.frameworks import torch as adapter

    doubled = Target("twice linear", "linear", lambda x, params: 2 * adapter.linear(x, params), dtypes=("float32",))
    monkeypatch.setattr(adapter, "TARGETS", (adapter.TARGETS[0], doubled))
    status, out, _ = refattn_cli("check", "torch", "--examples", 2, "--jobs", 1)
    assert status == 1 and f"1 of {len(adapter.TARGETS[0].dtypes) + 1} differ." in out
    assert "twice linear like linear, torch float32: DIFFERS" in out and "expected" in out


# --- check: everything ---------------------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch):
    """Everything is two mechanisms."""
    two = {name: everything()[name] for name in ("linear", "softmax")}
    monkeypatch.setattr("refattn.__main__.everything", lambda: two)
    here = {"torch": frameworks.Status("", "torch cannot be imported (no): pip install 'refattn[torch]'")}
    monkeypatch.setattr(frameworks, "available", lambda wanted, jobs: here)


def test_everything(refattn_cli, little, tmp_path):
    status, out, err = refattn_cli("check", "--jobs", 1, "--json", tmp_path / "out.json")
    assert (status, err) == (0, "") and "All 4 as they should be." in out
    assert "torch is not cross-checked: torch cannot be imported" in out
    assert "The bug in blocked_attention_with_a_bug is found, as it should be" in out and "times the allowed" in out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["frameworks"]["torch"]["version"] == "" and content["ok"]
    right, wrong = content["kernels"]
    assert right["ok"] and right["as_it_should_be"] and not right["has_bug"]
    assert not wrong["ok"] and wrong["as_it_should_be"] and wrong["has_bug"]


def test_a_bug_that_is_not_found_is_a_failure(refattn_cli, little, monkeypatch):
    monkeypatch.setattr(blocked_attention_with_a_bug, "forward", blocked_attention.forward)
    status, out, _ = refattn_cli("check", "--jobs", 1, "--examples", 2)
    assert status == 1 and "NOT FOUND" in out and "1 of 4 differ." in out


def test_a_right_kernel_that_goes_wrong_is_a_failure(refattn_cli, little, monkeypatch):
    right = blocked_attention.forward

    def forward(q, k, v, *, is_causal=False):
        out, lse = right(q, k, v, is_causal=is_causal)
        return out * np.float32(1.001), lse

    monkeypatch.setattr(blocked_attention, "forward", forward)
    status, out, _ = refattn_cli("check", "--jobs", 1, "--examples", 3)
    assert status == 1 and "refattn/examples/blocked_attention.py like scaled_dot_product, numpy float32: DIFF" in out


def test_the_examples_are_of_the_size_of_a_tile():
    names = {trials.Kernel(name, 1, 0).has_bug for name in trials.KERNELS}
    assert names == {True, False} and blocked_attention.KEYS == blocked_attention.QUERIES == 16


@pytest.mark.parametrize("without", [(), ("rich",)])
def test_the_whole_command(tmp_path, without):
    """With rich and without, in processes of its own, in a terminal that speaks ASCII only."""
    ended = process(
        "check", "linear", "conv", "--examples", 1, "--jobs", 2,
        without=without, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    assert "All 2 as they should be." in ended.stdout and "linear" in ended.stdout


# --- how it ends ---------------------------------------------------------------------------------------------


def test_as_a_module():
    ended = subprocess.run([sys.executable, "-m", "refattn", "list"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "squeeze_excitation" in ended.stdout


@pytest.mark.skipif(os.name == "nt", reason="there are no such signals on Windows")
@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupted(jobs):
    command = ["-m", "refattn", "check", "recurrent", "conv", "--examples", "100000", "--jobs", str(jobs)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen([sys.executable, *command], **pipes, preexec_fn=_heed_ctrl_c)
    time.sleep(3)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130 and out == "" and err == "refattn: interrupted\n"


def _heed_ctrl_c():
    """In the background of a shell it is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="processes are looked for in /proc")
def test_workers_do_not_outlive_the_command():
    command = ["-m", "refattn", "check", "recurrent", "conv", "--examples", "100000", "--jobs", "2"]
    running = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(workers := _children(running.pid)) < 3 and time.monotonic() < deadline:  # the third minds semaphores
        time.sleep(0.1)
    time.sleep(3)  # to begin with their work
    running.kill()
    running.wait()
    while (left := [pid for pid in workers if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 3 and not left


def _children(parent):
    return list(map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()))


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes on Windows")
def test_nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    ended = process("list", stdout=writer, stderr=subprocess.PIPE, capture_output=False)
    os.close(writer)
    assert ended.returncode == 141 and ended.stderr == ""


class Deadly(NamedTuple):
    """A task that ends its process, if that is its name."""

    name: str
    framework = ""

    def run(self):
        if self.name.startswith("dies"):
            os._exit(11)
        return trials.Outcome(self, True, (), "", {})


def test_a_worker_that_dies_takes_nothing_with_it():
    tasks = [Deadly(name) for name in ("lives", "dies", "lives, too", "dies, too", *"abcdef")]
    outcomes = trials.run(tasks, 2)
    assert [outcome.task for outcome in outcomes] == tasks
    assert [outcome.ok for outcome in outcomes] == [not task.name.startswith("dies") for task in tasks]
    assert "dies: DIED" in outcomes[1].text and outcomes[1].row == ("dies", "", "", "", "DIED")


def test_what_died_is_in_the_table(refattn_cli, monkeypatch):
    monkeypatch.setattr(trials, "_run_in_pool", lambda tasks, jobs, keep: list(tasks))
    status, out, _ = refattn_cli("check", "linear", "conv", "--jobs", 2, "--examples", 1)
    assert status == 1 and "linear: DIED: the process" in out and "2 of 2 differ." in out


def test_after_ctrl_c_the_workers_are_ended_not_waited_for(refattn_cli, monkeypatch):
    def interrupt(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "as_completed", interrupt)
    began = time.monotonic()
    status, _, err = refattn_cli("check", "recurrent", "conv", "--jobs", 2, "--examples", 100000)
    assert status == 130 and err == "refattn: interrupted\n" and time.monotonic() - began < 60


# --- report --------------------------------------------------------------------------------------------------


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    report.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
    if os.name != "nt":
        assert path.stat().st_mode & 0o777 == 0o666 & ~report._umask()


def test_json_that_cannot_be_replaced(refattn_cli, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", refuse)
    status, _, err = refattn_cli("check", "linear", "--examples", 1, "--jobs", 1, "--json", tmp_path / "out.json")
    assert status == 2 and "--json: the disk is full" in err and list(tmp_path.iterdir()) == []


def test_verdicts_on_a_terminal(capsys, monkeypatch):
    """Folded to its width, with their indent kept; in a pipe a line stays a line."""
    text = "f like g: DIFFERS (3 examples)\n  BUG  out  " + 30 * "word " + "\n  where: " + 20 * "word "
    report.say(text)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    report.say(text)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60 and lines[1].startswith("  BUG  out  word")
    assert all(line.startswith(12 * " " + "word") for line in lines[2:4])
    assert lines[5].startswith("  where: word") and lines[6].startswith("      word") and len(lines) == 7


def test_verdicts_in_colour(capsys, monkeypatch):
    with_rich(monkeypatch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name, value in {"COLUMNS": "60", "TERM": "xterm-256color", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    report.say("BUG like ok: DIFFERS (3 examples)\n  BUG p < 1e-6 out  a BUG\n  ok   [bold]  " + 20 * "word ")
    out = capsys.readouterr().out
    red, green = "\x1b[1;31m", "\x1b[32m"
    assert f"BUG like ok: {red}DIFFERS\x1b[0m (3" in out and f"  {red}BUG p < 1e-6\x1b[0m out  a BUG\n" in out
    assert out.count(red) == 2 and f"  {green}ok\x1b[0m   [bold]" in out and out.count("\x1b[") == 6


def test_progress_is_for_terminals(capsys, monkeypatch):
    with report.progress(2) as done:
        done("one")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with report.progress(2) as done:
        done("one")
        done("two")
    err = capsys.readouterr().err
    assert "[###############...............] 1/2 one" in err and "2/2 two" in err and err.endswith("\r\033[K")


def test_tables_and_progress_by_rich(capsys, monkeypatch):
    with_rich(monkeypatch)
    report.table("Title", ("name", "verdict"), [("linear", "ok"), ("[bold]conv[/bold]", "FAILS")])
    out = capsys.readouterr().out
    assert "Title" in out and "linear" in out and "[bold]conv[/bold]" in out and "FAILS" in out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with report.progress(1) as done:
        done("linear")


def test_a_plain_table_is_aligned():
    text = report.plain_table("T", ("a", "long name"), [("value", "1"), ("v", "2")])
    assert text.splitlines() == ["T", "", "a      long name", "-----  ---------", "value  1", "v      2"]


def test_a_framework_without_targets_says_so(capsys, monkeypatch):
    class Bare:
        VERSION, TARGETS = "1.2", ()

    monkeypatch.setattr(frameworks, "load", lambda name: Bare)
    assert main(["check", "torch", "--jobs", "1"]) == 0
    assert "torch 1.2: no targets" in capsys.readouterr().out
