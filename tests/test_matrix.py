"""The conformance matrix, from outcomes made by hand; the whole of it is made where frameworks are installed."""

import json
import re

import numpy as np
import pytest

from refattn import frameworks, matrix, trials
from refattn.__main__ import main
from refattn.oracle.check import check
from refattn.registry import find

ROWS = (
    ("softmax", "softmax", ("float64", "float32"), False),
    ("attention", "dot_product_attention", ("float32",), True),
)
STATUS = {
    "torch": frameworks.Status("2.13", "", ROWS),
    "jax": frameworks.Status("0.10", "", tuple((n, "softmax", ("bfloat16",), False) for n in ("softmax", "fused"))),
    "mlx": frameworks.Status("", "mlx cannot be imported"),
}


def outcome(framework, name, dtype, ok=True, **record):
    ratios = {"out": 0.25, "ds": 0.5, "dparams.w": 0.1, "dparams.b": "nan"}
    verdicts = {array: {"ratio": ratio} for array, ratio in ratios.items()}
    known = {"verdicts": verdicts, "gradients": "judged", "examples": 8, "arithmetic": dtype, "convention": ""}
    record = known | {"departures": {}, "passed_over": {}} | record
    return trials.Outcome(trials.Target(framework, name, dtype, 8, 0), ok, (), "the whole story", record)


def outcomes():
    found = {"convention": "Convention(mask_op='add')", "presets": ["torch_sdpa", "torch_mha"]}
    return [
        outcome("torch", "softmax", "float64"),
        outcome("torch", "softmax", "float32", gradients="no backward is given", passed_over={"odd": 3}),
        outcome("torch", "attention", "float32", departures={"torch-odd": 2}, convention="torch_sdpa"),
        trials.Outcome(trials.Discovery("torch", "attention"), True, (), "", found),
        outcome("jax", "softmax", "bfloat16"),
        outcome("jax", "fused", "bfloat16", ok=False),
    ]


def test_the_machine_and_its_instructions():
    assert re.fullmatch(r"\w+ \(\w+( \w+)*\), \w+", matrix.table(outcomes(), STATUS)["machine"])


def test_every_cell_has_a_state_and_its_worst_decides():
    rows = matrix.table(outcomes(), STATUS)["mechanisms"]
    states = {m: {f: [cell["state"] for cell in cells.values()] for f, cells in row.items()} for m, row in rows.items()}
    none = "not offered"
    assert states == {
        "softmax": {"torch": ["conforms", "conforms", none, none], "jax": [none, none, "differs", none]},
        "dot_product_attention": {"torch": [none, "departs", none, none], "jax": [none] * 4},
    }
    assert all(tuple(cells) == matrix.DTYPES for row in rows.values() for cells in row.values())


def test_what_a_target_says():
    rows = matrix.table(outcomes(), STATUS)["mechanisms"]
    (attention,) = rows["dot_product_attention"]["torch"]["float32"]["targets"]
    assert attention["convention found"] == "Convention(mask_op='add')" and attention["findings"] == ["torch-odd"]
    assert attention["presets that agree"] == ["torch_sdpa", "torch_mha"] and "diagnosis" not in attention
    good, bad = rows["softmax"]["jax"]["bfloat16"]["targets"]
    assert good["forward"] == {"out": 0.25} and set(good["gradients"]) == {"ds", "dparams.w", "dparams.b"}
    assert bad["diagnosis"] == "the whole story" and bad["state"] == "differs"
    assert rows["softmax"]["torch"]["float32"]["targets"][0]["gradients"] == "no backward is given"
    json.dumps(rows, allow_nan=False)


def test_what_cannot_be_judged():
    record = {"candidate": "softmax", "dtype": "bfloat16", "ok": True, "not_judged": "no ml_dtypes"}
    task = trials.Target("jax", "softmax", "bfloat16", 8, 0)
    rows = matrix.table([trials.Outcome(task, True, (), "", record)], STATUS)["mechanisms"]
    cell = rows["softmax"]["jax"]["bfloat16"]
    assert cell["state"] == "not judged" and cell["targets"][0]["reason"] == "no ml_dtypes"
    assert "· · ? ·" in matrix.page(content([trials.Outcome(task, True, (), "", record)]))


def test_what_died():
    dead = trials._died(trials.Target("jax", "softmax", "bfloat16", 8, 0))
    cell = matrix.table([dead], STATUS)["mechanisms"]["softmax"]["jax"]["bfloat16"]
    assert cell["state"] == "differs" and "jax softmax bfloat16: DIED" in cell["targets"][0]["diagnosis"]
    assert "· · ✗ ·" in matrix.page(content([dead]))
    assert len(trials._died(trials.Discovery("jax", "softmax")).row) == 4


def content(found):
    status = {name: about._asdict() for name, about in STATUS.items()}
    return {"refattn": "0.1", "seed": 0, "frameworks": status, "matrix": matrix.table(found, STATUS)}


def test_the_page():
    text = matrix.page(json.loads(json.dumps(content(outcomes()))))
    assert "| mlx | not here: mlx cannot be imported |" in text and "| torch | 2.13 |" in text
    assert "| [softmax](primitives/softmax.md) | ✓ ✓ · · | · · ✗ · |" in text
    assert "| [dot_product_attention](mechanisms/dot_product_attention.md) | · ✓* · · |  |" in text
    assert "departs, [torch-odd](../findings/torch-odd.md) | out 0.25 | ds 0.5, dparams nan |" in text
    assert "](primitives/softmax.md) | float32 | conforms | out 0.25 | no backward is given |" in text
    assert "* `softmax` is not asked for: odd (3 examples)" in text
    assert "found by experiment: Convention(mask_op='add'); agrees with `torch_sdpa`, `torch_mha`" in text
    widths = [line.count(" | ") for line in text.splitlines() if line.startswith("| ") and "](primitives" in line]
    assert set(widths[1:]) == {5}, "a table has as many cells in every row"


@pytest.mark.frameworks
def test_the_command(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    from refattn.frameworks import torch as adapter

    some = [t for t in adapter.TARGETS if t.name in ("softmax", "scaled_dot_product_attention, options, causal")]
    monkeypatch.setattr(adapter, "TARGETS", tuple(t._replace(dtypes=("float32",)) for t in some))
    here = {"torch": frameworks.status("torch"), "jax": frameworks.Status("", "jax cannot be imported")}
    monkeypatch.setattr(frameworks, "available", lambda wanted, jobs: here)
    command = ["check", "all", "--examples", "2", "--jobs", "1", "--json", str(tmp_path / "all.json")]
    assert main([*command, "--page", str(tmp_path / "all.md")]) == 0
    out = capsys.readouterr().out
    assert "jax is not cross-checked: jax cannot be imported" in out and "torch: conventions" in out
    assert "All 3 as they should be." in out
    written = json.loads((tmp_path / "all.json").read_text())
    assert (tmp_path / "all.md").read_text() == matrix.page(written)
    assert written["matrix"]["mechanisms"]["softmax"]["torch"]["float32"]["state"] == "conforms"
    assert written["frameworks"]["torch"]["conventions"][0]["version"] == here["torch"].version


@pytest.mark.frameworks
def test_a_convention_that_is_not_what_was_said():
    pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    from refattn.frameworks import torch as adapter

    (target,) = (t for t in adapter.TARGETS if t.name == "scaled_dot_product_attention, options, math")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "TARGETS", (target._replace(convention="jax"),))
        found = trials.Discovery("torch", target.name).run()
    assert not found.ok and found.row[-1] == "NOT WHAT WAS SAID"
    assert trials.Discovery("torch", target.name).run().ok


def test_version_and_device_are_in_every_report():
    def forward(s, *, axis):
        return find("softmax").forward(s, axis=axis)[0]

    report = check(forward, "softmax", max_examples=1)
    assert (report.framework, report.version, report.device) == ("numpy", np.__version__, "cpu")
    target = frameworks.Target("softmax", "softmax", forward, gradients=False, device="abacus")
    elsewhere = trials.judged(target, None, "float32", max_examples=1).as_dict()
    assert elsewhere["device"] == "abacus" and elsewhere["version"] == np.__version__
    named = report._replace(framework="torch", version="2.13.0", device="cuda")
    assert "  with torch 2.13.0 on cuda" in str(named).splitlines()
