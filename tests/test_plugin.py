"""The fixture `conforms`, in suites of their own."""

import subprocess
import sys
import textwrap

import pytest

pytest_plugins = ["pytester"]

SUITE = """
    import numpy as np

    def linear(x, params):
        return x @ params.weight.T + (0 if params.bias is None else params.bias)

    def test_right(conforms):
        report = conforms(linear, like="linear")
        assert report.ok
        print("EXAMPLES", report.examples, "SEED", report.seed)

    def test_wrong(conforms):
        conforms(lambda x, params: 1.01 * linear(x, params), "linear", name="mine", dtype="float64")

    def test_its_own_seed(conforms):
        print("OWN", conforms(linear, "linear", seed=5, max_examples=3).seed)

    def test_bad_use(conforms):
        conforms(linear, "linear", arithmetic="bf17")
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """Runs pytest on a suite, in a process that has this plugin alone; installed or not."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(textwrap.dedent(SUITE))
    return lambda *arguments: pytester.runpytest_subprocess("-p", "refattn.pytest_plugin", "-s", *arguments)


def test_a_failure_is_the_report(suite):
    ended = suite("--refattn-examples", "4", "--refattn-seed", "9")
    ended.assert_outcomes(passed=2, failed=2)
    text = ended.stdout.str()
    assert "mine like linear, numpy float64: DIFFERS (4 examples)" in text and "times the allowed" in text
    assert "EXAMPLES 4 SEED 9" in text and "OWN 5" in text  # what a test says itself counts
    failure = text.partition("_ test_wrong _")[2].partition("_ test_bad_use _")[0]
    assert ".py:" not in failure and "def " not in failure and "pytest.fail" not in failure
    bad = text.partition("_ test_bad_use _")[2].partition("short test summary")[0]
    assert "arithmetic is 'bf17', expected one of float64" in bad


def test_the_defaults_are_those_of_check(suite):
    ended = suite("-k", "test_right")
    ended.assert_outcomes(passed=1, deselected=3)
    ended.stdout.fnmatch_lines(["*EXAMPLES 32 SEED 0*"])


def test_its_options_are_whole_numbers(suite):
    ended = suite("--refattn-seed", "one")
    assert ended.ret == pytest.ExitCode.USAGE_ERROR and "invalid int value: 'one'" in ended.stderr.str()


def test_it_imports_next_to_nothing():
    """Every suite in an environment with refattn loads it."""
    code = "import sys; import refattn.pytest_plugin; print(sorted({'numpy', 'scipy', 'torch'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "[]\n", ended.stderr


def test_it_is_found_where_refattn_is_installed():
    from importlib.metadata import entry_points

    found = [point.value for point in entry_points(group="pytest11") if point.name == "refattn"]
    if not found:
        pytest.skip("refattn is not installed, or was before it had a plugin: pip install -e .")
    assert found == ["refattn.pytest_plugin"]
