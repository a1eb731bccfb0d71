"""The command line as its user types it: exit status, words, files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import refattn
from refattn import report, trials
from refattn.__main__ import main
from refattn.registry import everything, mechanisms

EXAMPLES = Path(refattn.__file__).parent / "examples"
RIGHT = f"{EXAMPLES / 'blocked_attention.py'}:forward"
WRONG = f"{EXAMPLES / 'blocked_attention_with_a_bug.py'}:forward"
BACKWARD = f"{EXAMPLES / 'blocked_attention.py'}:backward"

ONE_LAW = ("softmax", "--examples", "2", "--jobs", "1")


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in everything())


def test_list_as_json(capsys):
    assert main(["list", "--json"]) == 0
    facts = {fact["name"]: fact for fact in json.loads(capsys.readouterr().out)}
    assert set(facts) == set(everything())
    assert facts["squeeze_excitation"]["family"] == "channel"
    assert "2018" in facts["squeeze_excitation"]["paper"]


def test_show(capsys):
    assert main(["show", "squeeze_excitation"]) == 0
    shown = capsys.readouterr().out
    assert "Squeeze-and-Excitation." in shown and "Backward" in shown and "def backward(" in shown
    assert "forward(x: (N, C, H, W)" in shown and "Params(w1: (R, C)" in shown


def test_check_of_one_mechanism(capsys):
    assert main(["check", *ONE_LAW]) == 0
    assert "All 1 as they should be." in capsys.readouterr().out


def test_check_in_several_processes(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert main(["check", "softmax", "linear", "--examples", "1", "--jobs", "2", "--json", str(file)]) == 0
    capsys.readouterr()
    assert [law["name"] for law in json.loads(file.read_text())["laws"]] == ["softmax", "linear"]


def test_a_mechanism_that_fails_its_laws(capsys, monkeypatch):
    module = everything()["softmax"].module
    right = module.backward
    monkeypatch.setattr(module, "backward", lambda dp, saved: (1.01 * right(dp, saved)[0],))
    assert main(["check", *ONE_LAW]) == 1
    printed = capsys.readouterr().out
    assert "FAILS" in printed and "gradient_matches_complex_step" in printed and "1 of 1 differ." in printed


def test_a_right_kernel_conforms(capsys):
    assert main(["check", RIGHT, "--like", "scaled_dot_product", "--backward", BACKWARD, "--examples", "6"]) == 0
    printed = capsys.readouterr().out
    assert "conforms" in printed and "never exercised: scale, mask" in printed


def test_a_wrong_kernel_differs(capsys, tmp_path):
    file = tmp_path / "out.json"
    assert main(["check", WRONG, "--like", "scaled_dot_product", "--forward-only", "--json", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "DIFFERS" in printed and "times the allowed" in printed and "gradients are not judged" in printed
    written = json.loads(file.read_text())
    assert written["ok"] is False
    assert written["verdicts"]["out"]["ratio"] > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_the_seed_decides(capsys):
    printed = []
    for seed in ("3", "3", "4"):
        main(["check", RIGHT, "--like", "scaled_dot_product", "--forward-only", "--examples", "4", "--seed", seed])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


BAD_USE = [
    (["check", "sotmax"], "did you mean softmax"),
    (["show", "no_such"], "no mechanism 'no_such'"),
    (["check", RIGHT], "needs --like NAME"),
    (["check", "no_such_file.py:f", "--like", "softmax"], "no_such_file.py: no such file"),
    (["check", f"{EXAMPLES / 'blocked_attention.py'}:nothing", "--like", "softmax"], "has no function nothing; it has"),
    (["check", RIGHT, "--like", "softmax"], "check: forward takes"),
    (
        ["check", RIGHT, "--like", "scaled_dot_product", "--framework", "theano"],
        "framework is 'theano', expected one of",
    ),
    (["check", "--like", "softmax"], "--like needs FILE.py:FUNCTION"),
    (["check", "softmax", "--json", "no_such_folder/out.json"], "--json: cannot write to no_such_folder"),
]


@pytest.mark.parametrize(("argv", "words"), BAD_USE, ids=[words for _, words in BAD_USE])
def test_bad_use(argv, words, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("argv", [[], ["chekc"], ["check", "--jobs", "0"], ["check", "--dtype", "float8"]])
def test_what_argparse_refuses(argv, capsys):
    with pytest.raises(SystemExit) as refused:
        main(argv)
    assert refused.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_file_that_raises_on_import(capsys, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    assert main(["check", f"{tmp_path / 'broken.py'}:f", "--like", "softmax"]) == 2
    assert "cannot be imported: ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and refattn.__version__ in capsys.readouterr().out


def test_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["check", *ONE_LAW]) == 0
    printed = capsys.readouterr().out
    assert "mechanism  family" in printed and "All 1 as they should be." in printed


@pytest.mark.parametrize("rich", [True, False])
def test_progress_on_a_terminal(rich, capsys, monkeypatch):
    if rich:
        pytest.importorskip("rich", reason="needs rich: pip install 'refattn[cli]'")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with report.progress(2) as done:
        done("softmax")
        done("conv")
    if not rich:
        assert "[###############...............] 1/2 softmax" in capsys.readouterr().err


def test_without_torch_it_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; from refattn.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "check", "torch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "pip install 'refattn[torch]'" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_traceback():
    pipe = f"{sys.executable} -m refattn list | head -1"
    done = subprocess.run(pipe, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_an_interrupt_is_no_traceback(capsys, monkeypatch):
    def interrupted(tasks, jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "run", interrupted)
    assert main(["check"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "out.json"
    file.write_text("before")
    with pytest.raises(TypeError, match="not JSON serializable"):
        report.write_json(file, {"x": object()})
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["out.json"]


def test_the_main_job_has_every_mechanism_and_both_kernels(monkeypatch, capsys):
    """What `refattn check` would try; that it comes out well is what CI runs."""
    seen = []

    def note(tasks, jobs):
        seen.extend(tasks)
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "run", note)
    main(["check"])
    assert {t.name for t in seen if isinstance(t, trials.Laws)} == set(everything()) > set(mechanisms())
    kernels = {t.name: t.has_bug for t in seen if isinstance(t, trials.Kernel)}
    assert kernels == {"blocked_attention": False, "blocked_attention_with_a_bug": True}
