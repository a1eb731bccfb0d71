"""How good the judge is at dot-product attention: right kernels accepted, planted bugs caught and named; and its cost.

    python -m benchmarks.judge soundness [--sizes 40,200] [--seeds 1] [--arithmetics ...] [--families ...] [--json FILE]
    python -m benchmarks.judge elsewhere [--sizes 40,200] [--implementations bfloat16] [--most 3] [...]
    python -m benchmarks.judge power [--sizes 200] [--arithmetics bf16_flash] [--most 2] [--faults ...] [...]
    python -m benchmarks.judge diagnosis [--sizes 40] [...]
    python -m benchmarks.judge cost

soundness: for right kernels (tests.emulated), elements outside a bound and the largest |error| / bound, of outputs and
gradients. The worst case must have none on any inputs, the statistical bound none on generic ones.
elsewhere: the same for what frameworks compute on a CPU (benchmarks.elsewhere), each by the arithmetic that fits.
power: of the bugs in tests.planted, how many each rule catches, on Gaussian inputs and on all families. A catch counts
only on a call on which the rule accepts the right kernels; how often it does not is its rate of false alarms. Bugs that
change no bit on any call are left out and named. The rules of others, as they are used, stand beside the judge's:
    assert_close    torch.testing.assert_close with its defaults
    allclose 1e-2   rtol and atol of 1e-2
    twice           at most twice the error of a low-precision reference, plus twice what adding 0.3 and taking it away
                    does to the reference in the storage format (as flash-attention's tests do)
diagnosis: of the bugs that have a name in the table of mistakes, how many are called by it; no right kernel may be.
cost: the time of one tier of the bounds over that of the value in float64, plain and streaming in one thread.
"""

import argparse
import functools
import json
import math
import statistics
import time
import zlib
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np

from benchmarks.elsewhere import IMPLEMENTATIONS
from refattn.attention.dot_product import dot_product_attention, streaming
from refattn.core import Call
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT32, Arithmetic, round_to
from refattn.oracle.bounds import TIERS, attention_bounds, reference
from refattn.oracle.check import EXPLAINED
from refattn.oracle.compare import BUG, LIKELY, SUSPECT, compare
from refattn.oracle.contract import claim, with_backward
from refattn.oracle.diagnose import explain
from refattn.oracle.inputs import FAMILIES, Family, Numbers, draw, draw_dout, rounded
from refattn.oracle.trial import Judge, _attention, _poisoned, _with_poison, of_constants, try_call
from tests.emulated import Hooks
from tests.planted import FAULTS, HELD_OUT, KINDS, kernel

NAMES = "out", "lse", "dq", "dk", "dv", "dattn_bias", "dsinks"
RULES = "worst", "stat", "stat + lse", "stat + lse + together", "assert_close", "allclose 1e-2", "twice"
CLOSE = {"float32": (1.3e-6, 1e-5), "bfloat16": (1.6e-2, 1e-5), "float16": (1e-3, 1e-5)}  # torch's defaults

RIGHT = {  # name -> (algorithm, sizes)
    "naive": ("naive", {}),
    "flash 64": ("flash", {"queries": 64, "keys": 64}),
    "flash 16, random": ("flash", {"queries": 16, "keys": 16, "order": "random"}),
    "flash 128, reversed": ("flash", {"queries": 32, "keys": 128, "order": "reversed"}),
    "split in 4": ("splitk", {"queries": 64, "keys": 16, "splits": 4}),
}
LOW = {"bfloat16": "bf16_eager", "float16": "f16_eager"}  # the low-precision reference of `twice`


def settings(rng, batch, heads, queries, keys):
    """{name: (shape of attn_bias or None, sinks or not, options)}, as the test matrix of attention wants them."""
    lengths = rng.integers((keys + 1) // 2, keys + 1, batch)
    lengths[0] = max(1, keys - 3)
    return {
        "plain": (None, False, {}),
        "causal": (None, False, {"is_causal": True}),
        "bottom right, softcap, bias": (
            (heads, 1, keys),
            True,
            {"is_causal": True, "q_offset": "bottom_right", "softcap": 3.0},
        ),
        "window, offset, mask": (
            None,
            False,
            {
                "window": (keys // 4, keys // 8),
                "q_offset": 5,
                "attn_mask": rng.random((batch, heads, queries, keys)) < 0.7,
            },
        ),
        "causal, mask, bias": (
            (batch, 1, queries, keys),
            False,
            {"is_causal": True, "attn_mask": _with_empty_row(rng.random((queries, keys)) < 0.7), "scale": 0.2},
        ),
        "padded": (None, True, {"kv_seqlens": lengths}),
        "padded, bottom right": (
            None,
            False,
            {"kv_seqlens": lengths, "is_causal": True, "q_offset": "bottom_right"},
        ),
        "dropout": (
            (1, 1, queries, 1),
            False,
            {"dropout_keep": rng.random((batch, heads, queries, keys)) < 0.8, "dropout_p": 0.2, "softcap": 2.0},
        ),
        "one query": (None, True, {"attn_mask": rng.random((batch, heads, queries, keys)) < 0.7}),
    }


def _with_empty_row(mask):
    mask[len(mask) // 3] = False
    return mask


def settings_elsewhere(rng, batch, heads, queries, keys):
    """Those that every framework has."""
    mask = rng.random((batch, 1, queries, keys)) < 0.7
    mask[..., 0] = True  # no query without keys: there frameworks differ
    return {
        "plain": (None, False, {}),
        "causal": (None, False, {"is_causal": True}),
        "mask": (None, False, {"attn_mask": mask}),
        "causal, scale": (None, False, {"is_causal": True, "scale": 0.2}),
        "one query": (None, False, {"attn_mask": mask}),
    }


def calls(family, size, seeds, most=None, table=settings, wider=8):
    """Yield (setting, Call, dout): as refattn.check draws them, if size is 0; else of that size, in every setting.

    `most`: settings of a family other than the Gaussian, which take turns. `wider`: features of values beyond those of
    keys.
    """
    rule, claimed = FAMILIES[family], claim(kernel(ARITHMETICS["float32"])[0], dot_product_attention)
    for seed in range(seeds):
        names = list(table(np.random.default_rng(0), 1, 1, 8, 8))
        names, found = [(i, names[i]) for i in _turns(family, seed, len(names))], 0
        for number, setting in names:
            rng = np.random.default_rng([seed, number, zlib.crc32(family.encode())])
            if size:
                call = _large(rule, setting, size, rng, table, wider)
            else:
                call = draw(dot_product_attention, family, claimed, [seed, number])
            if call is not None and (family == "gaussian" or most is None or found < most):
                found += 1
                shape = *call.args[0].shape[:3], call.args[2].shape[3]
                yield setting, call, draw_dout(dot_product_attention, family, np.empty(shape), rng)


def _turns(family, seed, count):
    """Numbers of settings, each family beginning with another."""
    first = list(FAMILIES).index(family) + seed if family != "gaussian" else 0
    return [(first + i) % count for i in range(count)]


def _large(family, setting, size, rng, table, wider):
    """A Call, unless the family needs other options."""
    lengths = {"queries": size, "keys": size + 3}
    for name in lengths:
        if getattr(family, name) != Family._field_defaults[name]:
            lengths[name] = int(rng.choice(getattr(family, name)))
    queries, keys = lengths.values()
    queries = 1 if setting == "one query" else queries
    batch, heads = (2, 4) if size <= 100 else (1, 2)  # as many as are affordable
    if 100 < size <= 400:
        batch, heads = (2, 2) if rng.integers(2) else (1, 4)
    features = max(family.features)
    shape, sinks, options = table(rng, batch, heads, queries, keys)[setting]
    there = options.keys() | {"sinks"} if sinks else options.keys()
    if there & set(family.without) or (family.needs and not there & set(family.needs)):
        return None
    shapes = (heads, queries, features), (heads // 2, keys, features), (heads // 2, keys, features + wider)
    q, k, v = (rng.normal(size=(batch, *shape)) for shape in shapes)
    seen = dot_product_attention.forward(q, k, v, **options)[1].seen
    seen = np.ones((batch, heads, queries, keys), bool) if seen is None else seen
    scale = options.get("scale", features**-0.5)
    bias, sinks = None if shape is None else rng.normal(size=shape), rng.normal(size=heads) if sinks else None
    return Call((*family.change(rng, Numbers(q, k, v, scale, seen)), bias, sinks), options)


class Case(NamedTuple):
    """One call with all that it is judged by, as refattn.oracle.trial has it."""

    family: str
    setting: str
    size: int
    call: Call  # numbers of the arithmetic's format, in float64
    dout: Any
    expected: dict
    poison: Any  # what is right as well, where keys that are masked are NaN
    bounds: dict
    along: dict  # name -> {words: direction}
    arithmetic: Arithmetic


def cases(arithmetic, sizes, families=None, seeds=1, **which):
    """Every family in every setting; calls on which the arithmetic predicts nothing are left out."""
    for size in sizes:
        for family in families or FAMILIES:
            for setting, call, dout in calls(family, size, seeds, **which):
                case = case_of(arithmetic, family, setting, size, call, dout)
                if case is not None:
                    yield case


def case_of(arithmetic, family, setting, size, call, dout):
    """The Case of a call; None where the arithmetic predicts nothing."""
    call, dout = rounded(call, arithmetic.inputs), rounded(Call((dout,), {}), arithmetic.out).args[0]
    judge = Judge(None, dot_product_attention, None, arithmetic, None, True)
    chance = family if FAMILIES[family].generic else ""
    due, along, outside = _attention(judge, call, dout, (None, True), None, chance, (0,))  # out, and lse: both are due
    if outside:
        return None
    expected, bounds = ({row[0]: row[i] for row in due} for i in (1, 2))
    return Case(family, setting, size, call, dout, expected, _poisoned(call, dout), bounds, along, arithmetic)


def expected_of(case, name, got):
    """Of what is right where masked keys are NaN, what comes closest."""
    if case.poison is None:
        return case.expected[name]
    return _with_poison(name, case.expected[name], np.isnan(got), *(x[name] for x in case.poison))


def run(case, algorithm, fault=None, arithmetic=None, **sizes):
    """{name: array} of an emulated kernel, in the promised arithmetic or another."""
    arithmetic = arithmetic or case.arithmetic
    dtype = np.float64 if arithmetic.inputs.precision > FLOAT32.precision else np.float32
    args = [None if x is None else x.astype(dtype) for x in case.call.args]
    forward, backward = kernel(arithmetic, algorithm, fault, **sizes)
    out, lse = forward(*args, **case.call.options)
    found = out, lse, *backward(case.dout.astype(dtype), *args, out, lse, **case.call.options)
    return {name: x for name, x in zip(NAMES, found) if name in case.expected}


# --- soundness --------------------------------------------------------------------------------------------------


def soundness(arithmetics, sizes, families=None, seeds=1, most=None):
    """Rows {"arithmetic", "kernel", "family", "runs", "elements", "outside": {tier: n}, "kinds": {kind: n}, ...}."""
    rows = {}
    for name in arithmetics:
        for words, arithmetic in models(name).items():
            for case in cases(arithmetic, sizes, families, seeds, most=most):
                for right, (algorithm, tiles) in RIGHT.items():
                    if (algorithm == "splitk") == (arithmetic.splits > 1):
                        _count(_row(rows, words, right, case), case, run(case, algorithm, **tiles))
    return list(rows.values())


def elsewhere(sizes, families=None, seeds=1, some="", most=None):
    """(rows as of `soundness`, {implementation: modules that are not installed}): what frameworks compute on a CPU.

    `some`: a part of the names of those that are wanted.
    """
    wanted = {name: each for name, each in IMPLEMENTATIONS.items() if some in name}
    missing = {name: each.missing for name, each in wanted.items() if each.missing}
    there = {name: each for name, each in wanted.items() if name not in missing}
    rows, of = {}, defaultdict(dict)
    for name, each in there.items():
        of[each.arithmetic._replace(name="")][name] = each
    without = {"empty_rows"}  # there frameworks differ
    families = [family for family in families or FAMILIES if family not in without]
    for arithmetic, implementations in of.items():
        for case in cases(arithmetic, sizes, families, seeds, table=settings_elsewhere, wider=0, most=most):
            arrays = [x.astype(np.float32) for x in (*case.call.args[:3], case.dout)]
            for name, each in implementations.items():
                _count(_row(rows, each.arithmetic.name, name, case), case, each.run(*arrays, **case.call.options))
    return list(rows.values()), missing


def _row(rows, arithmetic, kernel, case):
    key = arithmetic, kernel, case.family
    start = {
        "runs": 0,
        "elements": 0,
        "outside": Counter(),
        "largest": defaultdict(dict),
        "kinds": Counter(),
        "bad": [],
    }
    return rows.setdefault(key, dict(zip(("arithmetic", "kernel", "family"), key)) | start)


def models(name):
    """The arithmetic, and what tensor cores and split keys make of it."""
    plain = ARITHMETICS[name]
    found = {name: plain, f"{name}, split": plain._replace(splits=4)}
    if plain.operands is not None or plain.inputs.precision < FLOAT32.precision:
        found[f"{name}, truncating"] = plain._replace(accumulator_truncates=True)
    return found


def _count(row, case, got):
    row["runs"] += 1
    for name, x in got.items():
        row["elements"] += x.size
        found = verdict(case, name, x)
        row["kinds"][found.kind] += 1
        if not found.conforms:
            row["bad"].append(f"{case.setting}, {case.size}: {found.kind} {name}: {found}")
        for tier in ("worst", "stat"):
            allowed = getattr(case.bounds[name], tier)
            if allowed is None:
                continue
            ratio = ratios(expected_of(case, name, x), x, allowed)
            row["outside"][tier] += int((ratio > 1).sum())
            kind = "forward" if name in ("out", "lse") else "backward"
            found = row["largest"][tier]
            found[kind] = max(found.get(kind, 0.0), float(ratio.max(initial=0)))


@np.errstate(all="ignore")
def ratios(expected, got, allowed):
    """|error| / allowed; inf where NaN or infinity is on one side only, or where nothing is allowed."""
    got = got.astype(np.float64)
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    error = np.where(same, 0, np.abs(got - expected))
    ratio = np.where(same, 0, error / allowed)
    return np.where(same | (error <= allowed) | (ratio > 1), ratio, np.inf)


# --- power ------------------------------------------------------------------------------------------------------


def power(name, size, families=None, seeds=1, most=None, faults=None, rules=RULES):
    """{"rules": {rule: {"false alarms": ..., "caught": ..., "missed": ...}}, "faults": {kind: n}, ...}."""
    arithmetic = ARITHMETICS[name]
    alarms, ready = defaultdict(Counter), []
    for case in cases(arithmetic, [size], families, seeds, most=most):
        low = low_precision(case)
        accepted = set(rules)
        for algorithm, tiles in RIGHT.values():
            flagged = judged(case, run(case, algorithm, **tiles), low)
            accepted -= flagged
            for where in ("gaussian", "all")[case.family != "gaussian" :]:
                alarms[where].update(flagged)
                alarms[where]["runs"] += 1
        plain = {algorithm: run(case, algorithm) for algorithm in ("flash", "splitk")}
        ready.append((case, low, accepted, plain))
    ready.sort(key=lambda each: each[0].family != "gaussian")
    every = FAULTS | HELD_OUT
    caught = {fault: _caught(every[fault], ready) for fault in faults or every}
    inert, held_out = [fault for fault, by in caught.items() if by is None], {}
    for fault in HELD_OUT.keys() & caught.keys() - set(inert):
        held_out[fault] = {where: [rule for rule in RULES if rule in by] for where, by in caught[fault].items()}
    live = [fault for fault in caught if fault in FAULTS and fault not in inert]
    report = {"arithmetic": name, "size": size, "cases": len(ready), "rules": {}}
    report["faults"] = dict(Counter(FAULTS[fault].kind for fault in live))
    report["inert"], report["held out"] = sorted(inert), held_out
    for rule in rules:
        row = {"false alarms": {where: (n[rule], n["runs"]) for where, n in alarms.items()}, "caught": {}}
        for where in ("gaussian", "all"):
            found = [fault for fault in live if rule in caught[fault][where]]
            row["caught"][where] = dict(Counter(FAULTS[fault].kind for fault in found))
            row["missed"] = sorted(set(live) - set(found))
        report["rules"][rule] = row
    return report


def _caught(fault, ready):
    """{"gaussian": rules, "all": rules}; None where no bit differs on any call. The Gaussian calls come first."""
    found, moved = {"gaussian": set(), "all": set()}, False
    algorithm = fault.build(Hooks()).algorithm or "flash"
    for case, low, accepted, plain in ready:
        wanted = accepted - found["all"]
        if not wanted and moved:
            continue
        got = run(case, algorithm, fault)
        if all(np.array_equal(got[name], x, equal_nan=True) for name, x in plain[algorithm].items()):
            continue
        moved = True
        found["all"] |= judged(case, got, low) & wanted
        if case.family == "gaussian":
            found["gaussian"] = set(found["all"])
    return found if moved else None


@np.errstate(all="ignore")
def judged(case, got, low):
    """The rules that object."""
    kinds = {name: verdict(case, name, x).kind for name, x in got.items()}
    values = {name: kind for name, kind in kinds.items() if name != "lse"}
    flagged = set()
    if BUG in values.values():
        flagged.add("worst")
    if {BUG, LIKELY} & set(values.values()):
        flagged.add("stat")
    if {BUG, LIKELY} & set(kinds.values()):
        flagged.add("stat + lse")
    if {BUG, LIKELY, SUSPECT} & set(kinds.values()):
        flagged.add("stat + lse + together")
    form = case.arithmetic.out
    close = {"assert_close": CLOSE.get(form.name, CLOSE["float32"]), "allclose 1e-2": (1e-2, 1e-2)}
    for name in values:
        expected = round_to(case.expected[name], form)
        for rule, (rtol, atol) in close.items():
            if not np.allclose(got[name].astype(np.float64), expected, rtol, atol, equal_nan=True):
                flagged.add(rule)
        if not _largest(got[name], case.expected[name]) <= low[name]:
            flagged.add("twice")
    return flagged


def verdict(case, name, x):
    about = {"along": case.along.get(name), "constants": of_constants(case.arithmetic)}
    return compare(expected_of(case, name, x), x, case.bounds[name], name=name, **about)


@np.errstate(all="ignore")
def low_precision(case):
    """{name: the error that `twice` allows}."""
    form = case.arithmetic.out
    arithmetic = ARITHMETICS[LOW.get(form.name, "float32")]
    found = {}
    for name, x in run(case, "naive", arithmetic=arithmetic).items():
        expected = round_to(case.expected[name], form)
        shaken = round_to(round_to(expected + 0.3, form) - 0.3, form)
        found[name] = 2 * _largest(x, case.expected[name]) + 2 * _largest(shaken, expected)
    return found


def _largest(got, expected):
    """The largest error; inf where NaN or infinity is on one side only."""
    return float(ratios(expected, got, 1.0).max(initial=0))


# --- diagnosis --------------------------------------------------------------------------------------------------


def diagnosis(name, size, faults=None):
    """{"faults": {fault: names that explain it, best first, or None}, "right": counts}; of faults that have a name.

    None: it was not caught, on Gaussian inputs.
    """
    named = [fault for fault in FAULTS.values() if fault.diagnosis is not None and fault.name in (faults or FAULTS)]
    found = {fault.name: _names(name, size, fault.build(Hooks()).algorithm or "flash", fault)[0] for fault in named}
    right = Counter()
    for algorithm, tiles in RIGHT.values():
        names, count = _names(name, size, algorithm, None, **tiles)
        right.update({"trials": count, "accused": int(names is not None), "named": int(bool(names))})
    return {"faults": found, "right": dict(right)}


def _names(name, size, algorithm, fault, queries=16, keys=16, **tiles):
    """(names of explanations of what failed, or None where nothing did; how many calls were tried)."""
    arithmetic, mechanism = ARITHMETICS[name], dot_product_attention
    forward, backward = kernel(arithmetic, algorithm, fault, queries=queries, keys=keys, **tiles)
    judge = Judge(forward, mechanism, with_backward(backward), arithmetic, np.dtype(np.float32), True)
    drawn = [call for _, call, _ in calls("gaussian", size, 1)]
    trials = [try_call(judge, call, "gaussian", True, (0, i)) for i, call in enumerate(drawn)]
    failed = [trial for trial in trials if trial.failed]
    if not failed:
        return None, len(trials)
    shown = [*failed[:EXPLAINED], *[trial for trial in trials if not trial.failed][:EXPLAINED]]
    return [x.name for x in explain(mechanism, shown, arithmetic)], len(trials)


# --- cost -------------------------------------------------------------------------------------------------------


def cost(shapes=((1, 4, 1024, 64), (1, 1, 4096, 64), (1, 2, 200, 64)), name="bf16_flash", rounds=3):
    """Rows of milliseconds: one tier of the bounds, and the value it belongs to, by turns; medians."""
    rows = []
    for shape in shapes:
        rng, arithmetic = np.random.default_rng(0), ARITHMETICS[name]
        q, k, v, dout = (round_to(rng.normal(size=shape), arithmetic.inputs) for _ in range(4))
        for passes, dy in (("forward", None), ("both", dout)):
            values = reference(Call((q, k, v), {}), dy)
            work = {
                "plain": functools.partial(_value, dot_product_attention, q, k, v, dy),
                "streaming": functools.partial(_value, streaming, q, k, v, dy, jobs=1),
                **{tier: functools.partial(_bound, (q, k, v), dy, arithmetic, tier, values) for tier in TIERS},
            }
            times = _by_turns(work, rounds)
            for tier in TIERS:
                row = {"shape": shape, "tier": tier, "passes": passes, "bound": times[tier]}
                rows.append(row | {what: times[what] for what in ("plain", "streaming")})
    return rows


def _by_turns(work, rounds):
    times = defaultdict(list)
    for _ in range(rounds):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def _value(mechanism, q, k, v, dout, **options):
    _, saved = mechanism.forward(q, k, v, **options)
    if dout is not None:
        mechanism.backward(dout, saved)


def _bound(args, dout, arithmetic, tier, values):
    attention_bounds(Call(args, {}), dout, arithmetic, (tier,), values)


# --- tables -----------------------------------------------------------------------------------------------------


POISON = "nan_query", "poisoned_keys", "poisoned_values"
SHOWN = 3  # verdicts of a kernel that do not conform


def print_soundness(rows, missing=None):
    """Families together, those with NaN apart; the family of the largest ratio is named."""
    print(f"{'largest |error| / bound':69}{'runs':>6}{'elements':>13}   outside: worst stat", end="")
    print("  worst (out, grads)   stat (out, grads)   in family")
    together = {}
    for row in rows:
        what = f"{row['arithmetic']:33} {row['kernel']:31}", row["family"] in POISON
        total = together.setdefault(what, {"runs": 0, "elements": 0, "worst": 0, "stat": 0, "largest": {}})
        for name in ("runs", "elements"):
            total[name] += row[name]
        for tier in ("worst", "stat"):
            total[tier] += row["outside"][tier]
            for kind, ratio in row["largest"][tier].items():
                known = total["largest"].get((tier, kind), (-1, ""))
                total["largest"][tier, kind] = max(known, (ratio, row["family"]))
    columns = [(tier, kind) for tier in ("worst", "stat") for kind in ("forward", "backward")]
    for (what, poison), total in sorted(together.items(), key=lambda item: item[0][1]):
        found = [total["largest"].get(column, (math.nan, "")) for column in columns]
        numbers = "".join(f"{ratio:10.3f}" for ratio, _ in found)
        families = ", ".join(dict.fromkeys(family for _, family in found if family))
        print(f"{what}{' NaN' if poison else '':4}{total['runs']:6}{total['elements']:13,}", end="")
        print(f"{total['worst']:17}{total['stat']:5}{numbers}   {families}")
    kinds = sum((row["kinds"] for row in rows), Counter())
    runs, elements = (sum(row[name] for row in rows) for name in ("runs", "elements"))
    print(f"all: {runs:,} runs, {elements:,} elements; outside", end=" ")
    print({t: sum(row["outside"][t] for row in rows) for t in ("worst", "stat")}, "verdicts", dict(kinds))
    shown = Counter()
    for row in sorted(rows, key=lambda row: row["family"] in POISON):
        for line in row["bad"]:
            shown[row["arithmetic"], row["kernel"]] += 1
            if shown[row["arithmetic"], row["kernel"]] <= SHOWN:
                print(f"  {row['arithmetic']}, {row['kernel']}, {row['family']}: {line}")
    print("  and", sum(max(0, n - SHOWN) for n in shown.values()), "verdicts more that do not conform")
    for name, modules in (missing or {}).items():
        print(f"  {name}: not installed: {', '.join(modules)}")


def print_power(report):
    faults = report["faults"]
    print("\n{arithmetic}, {size} queries, {cases} calls; live faults".format(**report), faults)
    heads = "".join(f"{kind:>16}" for kind in KINDS)
    print(f"{'':26}{'false alarms':>24}{'caught':>16}{heads}      (Gaussian / all families)")
    for rule, row in report["rules"].items():
        alarms = " / ".join(f"{k / max(1, n):.1%}" for k, n in (row["false alarms"][w] for w in ("gaussian", "all")))
        gaussian, everywhere = row["caught"]["gaussian"], row["caught"]["all"]
        both = [f"{sum(gaussian.values())} / {sum(everywhere.values())}"]
        both += [f"{gaussian.get(kind, 0)} / {everywhere.get(kind, 0)}" for kind in KINDS]
        print(f"{rule:26}{alarms:>24}{''.join(f'{x:>16}' for x in both)}")
    strictest = [rule for rule in RULES[:4] if rule in report["rules"]][-1]
    print("missed by", strictest + ":", ", ".join(report["rules"][strictest]["missed"]) or "none")
    print("inert:", ", ".join(report["inert"]) or "none")
    if report["held out"]:
        both = {
            w: {r: sum(r in by[w] for by in report["held out"].values()) for r in report["rules"]}
            for w in ("gaussian", "all")
        }
        counts = ", ".join(f"{rule} {both['gaussian'][rule]} / {both['all'][rule]}" for rule in report["rules"])
        print(f"held out, {len(report['held out'])} live: {counts}")
        missed = [name for name, by in report["held out"].items() if strictest not in by["all"]]
        print("  missed by", strictest + ":", ", ".join(sorted(missed)) or "none")


def print_diagnosis(name, found):
    faults, right = found["faults"], found["right"]
    count = Counter()
    for fault, named in faults.items():
        wanted = FAULTS[fault].diagnosis
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        if named is None:
            count["not caught"] += 1
            continue
        place = next((i for i, x in enumerate(named) if x in wanted), None)
        count["caught"] += 1
        count["first"] += place == 0
        count["among five"] += place is not None and place < 5
        count["without a name"] += not named
        count["only wrong names"] += bool(named) and place is None
        if place != 0:
            print(f"  {fault:36}wanted {', '.join(wanted)}; named {', '.join(named) or 'none'}")
    print(f"diagnosis, {name}: {len(faults)} bugs;", dict(count), "right kernels:", right)


def print_cost(rows):
    print(f"{'bound over value in float64':28}{'':12}{'plain, ms':>10}{'streaming':>10}{'bound':>8}", end="")
    print(f"{'over plain':>12}{'over streaming':>16}")
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        print(f"{shape:20}{row['tier']:8}{row['passes']:12}", end="")
        print(f"{row['plain']:10.1f}{row['streaming']:10.1f}{row['bound']:8.1f}", end="")
        print(f"{row['bound'] / row['plain']:12.2f}{row['bound'] / row['streaming']:16.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["soundness", "elsewhere", "power", "diagnosis", "cost"])
    parser.add_argument(
        "--sizes", default="200", help="queries, separated by commas (keys: three more); 0: as refattn.check draws them"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arithmetics", default="float32,bf16_flash,f16_flash")
    parser.add_argument("--families", help="names separated by commas; all of them")
    parser.add_argument("--most", type=int, help="settings at most of each family other than the Gaussian")
    parser.add_argument("--rules", help="of power, separated by commas; all of them, those of others too")
    parser.add_argument("--faults", help="names of planted bugs separated by commas; all of them")
    parser.add_argument("--implementations", default="", help="part of their names in benchmarks.elsewhere")
    parser.add_argument("--json", help="write the tables to this file as well")
    given = parser.parse_args()
    sizes, arithmetics = [int(n) for n in given.sizes.split(",")], given.arithmetics.split(",")
    families, faults = given.families and given.families.split(","), given.faults and given.faults.split(",")
    rules = given.rules.split(",") if given.rules else RULES
    if given.what == "soundness":
        results = soundness(arithmetics, sizes, families, given.seeds, given.most)
        print_soundness(results)
    elif given.what == "elsewhere":
        results, missing = elsewhere(sizes, families, given.seeds, given.implementations, given.most)
        print_soundness(results, missing)
    elif given.what == "diagnosis":
        results = {}
        for name in arithmetics:
            for size in sizes:
                results[f"{name} {size}"] = diagnosis(name, size, faults)
                print_diagnosis(f"{name}, {size} queries", results[f"{name} {size}"])
    elif given.what == "cost":
        results = cost()
        print_cost(results)
    else:
        results = []
        for name in arithmetics:
            for size in sizes:
                results.append(power(name, size, families, given.seeds, given.most, faults, rules))
                print_power(results[-1])
    if given.json:
        with open(given.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
