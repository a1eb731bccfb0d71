"""What has been computed is not computed again, and what was made otherwise is."""

import json
import sys

import pytest

from refattn import journal, trials
from refattn.__main__ import main

TASKS = [trials.Laws(name, 1, 0) for name in ("linear", "softmax", "conv")]


@pytest.fixture(autouse=True)
def plain_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "check.jsonl"


def outcome(task, ok=True):
    return trials.Outcome(task, ok, ("a", "ok"), "a story", {"ok": ok, "worst": 1e-16})


def test_what_was_put_is_there_again(path):
    first = journal.Journal(path, {"torch": "2.13"}, resume=False)
    target = trials.Target("torch", "softmax", "float32", 8, 0)
    for task in (TASKS[0], target):
        first.put(outcome(task))
    again = journal.Journal(path, {"torch": "2.13"}, resume=True)
    assert again.get(TASKS[0]) == outcome(TASKS[0]) and again.get(target) == outcome(target)
    assert again.get(TASKS[1]) is None and again.get(target._replace(seed=1)) is None
    assert again.get(trials.Discovery("torch", "softmax")) is None
    newer = journal.Journal(path, {"torch": "2.14"}, resume=True)
    assert newer.get(target) is None and newer.get(TASKS[0]) is not None


def test_without_resume_nothing_is_taken_and_nothing_is_lost(path):
    journal.Journal(path, {}, resume=False).put(outcome(TASKS[0]))
    assert journal.Journal(path, {}, resume=False).get(TASKS[0]) is None
    assert journal.Journal(path, {}, resume=True).get(TASKS[0]) is not None


@pytest.mark.parametrize("what", ["sources", "machine"])
def test_other_sources_or_machines_count_for_nothing(path, monkeypatch, what):
    journal.Journal(path, {}, resume=False).put(outcome(TASKS[0]))
    monkeypatch.setattr(journal, what, lambda: "0" * 64)
    assert journal.Journal(path, {}, resume=True).get(TASKS[0]) is None
    assert path.read_text() == "", "what is stale is dropped"


def test_the_hash_is_that_of_all_sources(monkeypatch, tmp_path):
    assert len(journal.sources()) == 64
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(journal.refattn, "__file__", str(tmp_path / "__init__.py"))
    before = journal.sources()
    (tmp_path / "a.py").write_text("2")
    assert journal.sources() != before
    (tmp_path / "a.py").write_text("1")
    assert journal.sources() == before
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert journal.sources() != before


@pytest.mark.parametrize("damage", [b'{"key": "[', b"\xff\xfe\n", b"[]\n", b"null\n", b'{"key": 3}\n', b"{}\n"])
def test_half_a_line_is_passed_over(path, damage):
    first = journal.Journal(path, {}, resume=False)
    first.put(outcome(TASKS[0]))
    with path.open("ab") as file:
        file.write(damage)
    again = journal.Journal(path, {}, resume=True)
    assert again.get(TASKS[0]) == outcome(TASKS[0])
    again.put(outcome(TASKS[1]))
    assert journal.Journal(path, {}, resume=True).get(TASKS[1]) == outcome(TASKS[1])


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("REFATTN_CACHE", str(tmp_path))
    assert journal.place() == tmp_path / "check.jsonl"
    monkeypatch.delenv("REFATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert journal.place() == tmp_path / "refattn" / "check.jsonl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sys.platform == "win32" or journal.place() == tmp_path / ".cache" / "refattn" / "check.jsonl"


def interrupt_after(monkeypatch, count):
    """Ctrl-C when so many are done. Gives the names of those that were run."""
    ran, right = [], trials.Laws.run

    def run(task):
        if len(ran) == count:
            raise KeyboardInterrupt
        ran.append(task.name)
        return right(task)

    monkeypatch.setattr(trials.Laws, "run", run)
    return ran


def test_an_interrupted_check_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("REFATTN_CACHE", str(tmp_path / "cache"))
    command = ["check", "linear", "softmax", "conv", "--examples", "1", "--jobs", "1"]
    with monkeypatch.context() as inner:
        ran = interrupt_after(inner, 2)
        assert main(command) == 130 and ran == ["linear", "softmax"]
        assert capsys.readouterr().err == "refattn: interrupted; 2 of 3 are done, and --resume goes on from there\n"
    with monkeypatch.context() as inner:
        ran = interrupt_after(inner, 100)
        assert main([*command, "--resume", "--json", str(tmp_path / "resumed.json")]) == 0 and ran == ["conv"]
    assert main([*command, "--json", str(tmp_path / "at_once.json")]) == 0
    resumed, at_once = (json.loads((tmp_path / name).read_text()) for name in ("resumed.json", "at_once.json"))
    assert resumed == at_once and len(resumed["laws"]) == 3


def test_a_place_that_cannot_be_written_to(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REFATTN_CACHE", str(tmp_path / "file"))
    command = ["check", "linear", "--examples", "1", "--jobs", "1"]
    assert main(command) == 0
    assert main([*command, "--resume"]) == 2
    assert "--resume: " in capsys.readouterr().err
