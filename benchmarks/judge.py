"""How good the judge is at dot-product attention: right kernels accepted, planted bugs caught, on emulated kernels.

    python -m benchmarks.judge soundness [--sizes 40,200] [--seeds 1] [--arithmetics ...] [--families ...] [--json FILE]
    python -m benchmarks.judge power [--sizes 200] [--arithmetics bf16_flash] [...]
    python -m benchmarks.judge diagnosis [...]

soundness: for right kernels (tests.emulated), elements outside a bound and the largest |error| / bound, of outputs and
gradients. The worst case must have none on any inputs, the statistical bound none on generic ones.
power: of the bugs in tests.planted, how many each rule catches, on Gaussian inputs and on all families. A catch counts
only on a call on which the rule accepts the right kernels; how often it does not is its rate of false alarms. Bugs that
change no bit on any call are left out and named. The rules of others, as they are used, stand beside the judge's:
    assert_close    torch.testing.assert_close with its defaults
    allclose 1e-2   rtol and atol of 1e-2
    twice           at most twice the error of a low-precision reference, plus twice what adding 0.3 and taking it away
                    does to the reference in the storage format (as flash-attention's tests do)
diagnosis: of the bugs that have a name in the table of mistakes, how many are called by it.
"""

import argparse
import json
import math
import zlib
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np

from refattn.attention.dot_product import dot_product_attention
from refattn.core import Call
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT32, Arithmetic, round_to
from refattn.oracle.bounds import attention_bounds, outside_the_model, reference
from refattn.oracle.compare import BUG, LIKELY, SUSPECT, compare
from refattn.oracle.contract import claim, with_backward
from refattn.oracle.diagnose import explain
from refattn.oracle.inputs import FAMILIES, Family, Numbers, draw, draw_dout, rounded
from refattn.oracle.trial import Judge, _along_scale, try_call
from tests.emulated import Hooks
from tests.planted import FAULTS, KINDS, kernel

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


SETTINGS = tuple(settings(np.random.default_rng(0), 1, 1, 8, 8))


def calls(family, size, seeds):
    """Yield (setting, Call, dout): as refattn.check draws them, if size is 0; else of that size, in every setting."""
    rule, claimed = FAMILIES[family], claim(kernel(ARITHMETICS["float32"])[0], dot_product_attention)
    for seed in range(seeds):
        for number, setting in enumerate(SETTINGS):
            rng = np.random.default_rng([seed, number, zlib.crc32(family.encode())])
            if size:
                call = _large(rule, setting, size, rng)
            else:
                call = draw(dot_product_attention, family, claimed, [seed, number])
            if call is not None:
                shape = *call.args[0].shape[:3], call.args[2].shape[3]
                yield setting, call, draw_dout(dot_product_attention, family, np.empty(shape), rng)


def _large(family, setting, size, rng):
    """A Call, unless the family needs other options."""
    lengths = {"queries": size, "keys": size + 3}
    for name in lengths:
        if getattr(family, name) != Family._field_defaults[name]:
            lengths[name] = int(rng.choice(getattr(family, name)))
    queries, keys = lengths.values()
    queries = 1 if setting == "one query" else queries
    batch, heads, features = 2 if size <= 400 else 1, 4, max(family.features)
    shape, sinks, options = settings(rng, batch, heads, queries, keys)[setting]
    there = options.keys() | {"sinks"} if sinks else options.keys()
    if there & set(family.without) or (family.needs and not there & set(family.needs)):
        return None
    shapes = (heads, queries, features), (2, keys, features), (2, keys, features + 8)
    q, k, v = (rng.normal(size=(batch, *shape)) for shape in shapes)
    seen = dot_product_attention.forward(q, k, v, **options)[1].seen
    seen = np.ones((batch, heads, queries, keys), bool) if seen is None else seen
    scale = options.get("scale", features**-0.5)
    bias, sinks = None if shape is None else rng.normal(size=shape), rng.normal(size=heads) if sinks else None
    return Call((*family.change(rng, Numbers(q, k, v, scale, seen)), bias, sinks), options)


class Case(NamedTuple):
    """One call with all that it is judged by."""

    family: str
    generic: bool
    setting: str
    size: int
    call: Call  # numbers of the arithmetic's format, in float64
    dout: Any
    expected: dict
    bounds: dict
    along: dict  # name -> {words: direction}
    arithmetic: Arithmetic


def cases(arithmetic, sizes, families=None, seeds=1, tiers=("worst", "stat")):
    """Every family in every setting; calls on which the arithmetic predicts nothing are left out."""
    for size in sizes:
        for family in families or FAMILIES:
            for setting, call, dout in calls(family, size, seeds):
                case = _case(arithmetic, family, setting, size, call, dout, tiers)
                if case is not None:
                    yield case


def _case(arithmetic, family, setting, size, call, dout, tiers):
    call, dout = rounded(call, arithmetic.inputs), round_to(dout, arithmetic.out)
    values = reference(call, dout)
    if outside_the_model(call, values, arithmetic):
        return None
    generic = FAMILIES[family].generic
    bounds = attention_bounds(call, dout, arithmetic, tiers if generic else tiers[:1], values)
    along = {"out": {"along the scale, by {:.2g} of it": _along_scale(call)}} if generic else {}
    return Case(family, generic, setting, size, call, dout, values, bounds, along, arithmetic)


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


def soundness(arithmetics, sizes, families=None, seeds=1):
    """Rows {"arithmetic", "kernel", "family", "elements", "outside": {tier: n}, "largest": {tier: {pass: ratio}}}."""
    rows = {}
    for name in arithmetics:
        for words, arithmetic in models(name).items():
            for case in cases(arithmetic, sizes, families, seeds):
                for right, (algorithm, tiles) in RIGHT.items():
                    if (algorithm == "splitk") != (arithmetic.splits > 1):
                        continue
                    start = {"elements": 0, "outside": Counter(), "largest": defaultdict(dict)}
                    key = words, right, case.family
                    row = rows.setdefault(key, dict(zip(("arithmetic", "kernel", "family"), key)) | start)
                    _count(row, case, run(case, algorithm, **tiles))
    return list(rows.values())


def models(name):
    """The arithmetic, and what tensor cores and split keys make of it."""
    plain = ARITHMETICS[name]
    found = {name: plain, f"{name}, split": plain._replace(splits=4)}
    if plain.operands is not None or plain.inputs.precision < FLOAT32.precision:
        found[f"{name}, truncating"] = plain._replace(accumulator_truncates=True)
    return found


def _count(row, case, got):
    for name, x in got.items():
        row["elements"] += x.size
        for tier in ("worst", "stat"):
            allowed = getattr(case.bounds[name], tier)
            if allowed is None:
                continue
            ratio = ratios(case.expected[name], x, allowed)
            row["outside"][tier] += int((ratio > 1).sum())
            kind = "forward" if name in ("out", "lse") else "backward"
            found = row["largest"][tier]
            found[kind] = max(found.get(kind, 0.0), float(ratio.max(initial=0)))


@np.errstate(all="ignore")
def ratios(expected, got, allowed):
    """|error| / allowed; inf where NaN or infinity is on one side only."""
    got = got.astype(np.float64)
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    ratio = np.where(same, 0, np.abs(got - expected) / allowed)
    return np.where(np.isnan(ratio), np.inf, ratio)


# --- power ------------------------------------------------------------------------------------------------------


def power(name, size, families=None, seeds=1):
    """{"rules": {rule: {"false alarms": ..., "caught": ..., "missed": ...}}, "faults": {kind: n}, ...}."""
    arithmetic = ARITHMETICS[name]
    alarms, ready = defaultdict(Counter), []
    for case in cases(arithmetic, [size], families, seeds):
        low = low_precision(case)
        accepted = set(RULES)
        for algorithm, tiles in RIGHT.values():
            flagged = judged(case, run(case, algorithm, **tiles), low)
            accepted -= flagged
            for where in ("gaussian", "all")[case.family != "gaussian" :]:
                alarms[where].update(flagged)
                alarms[where]["runs"] += 1
        plain = {algorithm: run(case, algorithm) for algorithm in ("flash", "splitk")}
        ready.append((case, low, accepted, plain))
    ready.sort(key=lambda each: each[0].family != "gaussian")
    caught = {fault: _caught(fault, ready) for fault in FAULTS}
    live = [fault for fault, by in caught.items() if by is not None]
    report = {"arithmetic": name, "size": size, "cases": len(ready), "rules": {}}
    report["faults"] = dict(Counter(FAULTS[fault].kind for fault in live))
    report["inert"] = sorted(set(FAULTS) - set(live))
    for rule in RULES:
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
    algorithm = FAULTS[fault].build(Hooks()).algorithm or "flash"
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
    kinds = {name: _verdict(case, name, x) for name, x in got.items()}
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


def _verdict(case, name, x):
    bound = case.bounds[name]
    return compare(case.expected[name], x, bound, name=name, along=case.along.get(name)).kind


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


def diagnosis(name, size):
    """{fault: names that explain it, best first}, of those faults that have a name in the table of mistakes."""
    arithmetic, mechanism = ARITHMETICS[name], dot_product_attention
    drawn = [call for _, call, _ in calls("gaussian", size, 1)]
    found = {}
    for fault in FAULTS.values():
        if fault.diagnosis is None:
            continue
        forward, backward = kernel(arithmetic, "flash", fault, queries=16, keys=16)
        judge = Judge(forward, mechanism, with_backward(backward), arithmetic, np.dtype(np.float32), True)
        trials = [try_call(judge, call, "gaussian", True, (0, i)) for i, call in enumerate(drawn)]
        failed = [trial for trial in trials if trial.failed]
        if failed:
            found[fault.name] = [
                x.name for x in explain(mechanism, failed + [t for t in trials if not t.failed], arithmetic)
            ]
        else:
            found[fault.name] = None
    return found


# --- tables -----------------------------------------------------------------------------------------------------


def print_soundness(rows):
    print(f"{'':60}{'elements':>12}   outside: worst stat   largest: worst (fwd, bwd)   stat (fwd, bwd)")
    for row in rows:
        what = f"{row['arithmetic']:26}{row['kernel']:20}{row['family']:14}"
        largest = [
            f"{row['largest'][t].get(p, math.nan):8.3f}" for t in ("worst", "stat") for p in ("forward", "backward")
        ]
        print(f"{what}{row['elements']:12,}{row['outside']['worst']:15}{row['outside']['stat']:5}   {''.join(largest)}")
    total = sum(row["elements"] for row in rows)
    print(f"all: {total:,} elements; outside", {t: sum(row["outside"][t] for row in rows) for t in ("worst", "stat")})


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
    print("missed by", RULES[3] + ":", ", ".join(report["rules"][RULES[3]]["missed"]) or "none")
    print("inert:", ", ".join(report["inert"]) or "none")


def print_diagnosis(found):
    right = Counter()
    for name, named in found.items():
        wanted = FAULTS[name].diagnosis
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        place = next((i for i, x in enumerate(named or ()) if x in wanted), None)
        right["not caught" if named is None else "first" if place == 0 else "later" if place else "wrong"] += 1
        if place != 0:
            print(f"  {name:36}wanted {', '.join(wanted)}; named {', '.join(named or ()) or 'none'}")
    print("diagnosis:", dict(right))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["soundness", "power", "diagnosis"])
    parser.add_argument(
        "--sizes", default="200", help="queries, separated by commas (keys: three more); 0: as refattn.check draws them"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arithmetics", default="float32,bf16_flash,f16_flash")
    parser.add_argument("--families", help="names separated by commas; all of them")
    parser.add_argument("--json", help="write the tables to this file as well")
    given = parser.parse_args()
    sizes, arithmetics = [int(n) for n in given.sizes.split(",")], given.arithmetics.split(",")
    families = given.families and given.families.split(",")
    if given.what == "soundness":
        results = soundness(arithmetics, sizes, families, given.seeds)
        print_soundness(results)
    elif given.what == "diagnosis":
        results = {f"{name} {size}": diagnosis(name, size) for name in arithmetics for size in sizes}
        for found in results.values():
            print_diagnosis(found)
    else:
        results = []
        for name in arithmetics:
            for size in sizes:
                results.append(power(name, size, families, given.seeds))
                print_power(results[-1])
    if given.json:
        with open(given.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
