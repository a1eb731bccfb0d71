"""The conformance matrix: every mechanism that a framework has, in every dtype, as data and as a page of Markdown.

A cell is "conforms", "departs" (it conforms but for calls of which docs/findings tells), "differs", "not judged", or
"not offered". Cells of one mechanism that a framework has several times are the worst of them.
"""

from refattn.registry import find
from refattn.trials import Discovery, Target, machine

DTYPES = "float64", "float32", "bfloat16", "float16"
SIGNS = {"not offered": "·", "conforms": "✓", "departs": "✓*", "not judged": "?", "differs": "✗"}
STATES = tuple(SIGNS)  # from good to bad

PAGE = """# Conformance

What frameworks answer, next to the reference: made by `refattn check all` with refattn {refattn}, seed {seed}, on
{machine}. Nothing is judged by an `atol`: a number is the largest error as a part of what rounding may do to it, in the
arithmetic of the framework.

| sign | |
|---|---|
| ✓ | conforms in every example |
| ✓* | conforms, apart from calls of which [a page of findings](../findings/index.md) tells |
| ✗ | differs |
| ? | not judged |
| · | not offered |
"""


def table(outcomes, status):
    """{"machine", "mechanisms": {mechanism: {framework: {dtype: cell}}}}; a cell has its state and its targets."""
    mechanisms = {}
    for _, found in sorted(status.items()):
        for _, like, *_ in found.targets:
            mechanisms.setdefault(like, {})
    discovered = {o.task[:2]: o.record for o in outcomes if isinstance(o.task, Discovery)}
    for outcome in outcomes:
        if isinstance(outcome.task, Target):
            framework, name, dtype, *_ = outcome.task
            like = next(like for target, like, *_ in status[framework].targets if target == name)
            cell = mechanisms[like].setdefault(framework, {}).setdefault(dtype, {"targets": []})
            cell["targets"].append(_target(name, outcome, discovered.get((framework, name))))
    for row in mechanisms.values():
        for framework, found in status.items():
            if not found.version:
                continue
            cells = {dtype: row.get(framework, {}).get(dtype, {"targets": []}) for dtype in DTYPES}
            row[framework] = {dtype: {"state": _worst(cell["targets"])} | cell for dtype, cell in cells.items()}
    return {"machine": machine(), "mechanisms": dict(sorted(mechanisms.items()))}


def _worst(targets):
    return max((target["state"] for target in targets), key=STATES.index, default=STATES[0])


def _target(name, outcome, convention):
    record = outcome.record
    target = {"name": name, "state": _state(outcome)}
    if "not_judged" in record:
        return target | {"reason": record["not_judged"]}
    if "died" in record:
        return target | {"diagnosis": record["died"]}
    ratios = {array: verdict["ratio"] for array, verdict in record["verdicts"].items()}
    gradients = {array: ratio for array, ratio in ratios.items() if array not in ("out", "lse") and array[0] == "d"}
    target |= {
        "forward": {array: ratio for array, ratio in ratios.items() if array not in gradients},
        "gradients": gradients if record["gradients"] == "judged" else record["gradients"],
        "examples": record["examples"],
        "arithmetic": record["arithmetic"],
        "findings": list(record["departures"]),
        "passed over": record["passed_over"],
    }
    if record["convention"]:
        target["convention asked for"] = record["convention"]
    if convention is not None:
        target["convention found"] = convention["convention"]
        target["presets that agree"] = convention["presets"]
    if not outcome.ok:
        target["diagnosis"] = outcome.text
    return target


def _state(outcome):
    if "not_judged" in outcome.record:
        return "not judged"
    if not outcome.ok:
        return "differs"
    return "departs" if outcome.record["departures"] else "conforms"


# --- the page -------------------------------------------------------------------------------------------------


def page(content):
    """Markdown of what `refattn check all --json` wrote."""
    found, status = content["matrix"], content["frameworks"]
    here = [name for name, about in status.items() if about["version"]]
    lines = [PAGE.format(refattn=content["refattn"], seed=content["seed"], machine=found["machine"])]
    lines += ["| framework | version |", "|---|---|"]
    lines += [f"| {name} | {status[name]['version'] or 'not here: ' + status[name]['reason']} |" for name in status]
    lines += ["", "## Overview", "", "Each cell: " + ", ".join(DTYPES) + ".", ""]
    lines += [f"| mechanism | {' | '.join(here)} |", "|---" * (1 + len(here)) + "|"]
    for mechanism, row in found["mechanisms"].items():
        cells = [" ".join(SIGNS[row[name][dtype]["state"]] for dtype in DTYPES) for name in here]
        cells = ["" if set(cell) <= {"·", " "} else cell for cell in cells]
        lines.append(f"| {_link(mechanism)} | {' | '.join(cells)} |")
    lines += ["", "An empty cell: the framework has nothing of the kind, or refattn has no adapter of it yet.", ""]
    for name in here:
        lines += _of_framework(name, status[name]["version"], found["mechanisms"])
    return "\n".join(lines) + "\n"


def _of_framework(name, version, mechanisms):
    lines = [f"## {name} {version}", "", "| what | mechanism | dtype | verdict | forward | gradients |"]
    lines.append("|---" * 6 + "|")
    conventions, reasons = {}, {}
    for mechanism, row in mechanisms.items():
        for dtype in DTYPES:
            for target in row[name][dtype]["targets"]:
                lines.append(_row(target, mechanism, dtype))
                if "convention found" in target:
                    conventions[target["name"]] = target
                for reason, count in target.get("passed over", {}).items():
                    reasons.setdefault(target["name"], {}).setdefault(reason, 0)
                    reasons[target["name"]][reason] += count
    lines.append("")
    for target, about in conventions.items():
        agree = ", ".join(f"`{preset}`" for preset in about["presets that agree"]) or "none of the presets"
        lines.append(f"* `{target}`, found by experiment: {about['convention found']}; agrees with {agree}")
    for target, counts in reasons.items():
        lines += [f"* `{target}` is not asked for: {reason} ({count} examples)" for reason, count in counts.items()]
    return [*lines, ""]


def _row(target, mechanism, dtype):
    verdict = target["state"]
    verdict += "".join(f", [{slug}](../findings/{slug}.md)" for slug in target.get("findings", ()))
    forward, gradients = _largest(target.get("forward", {})), target.get("gradients", {})
    gradients = _largest(gradients) if isinstance(gradients, dict) else gradients
    return f"| {target['name']} | {_link(mechanism)} | {dtype} | {verdict} | {forward} | {gradients} |"


def _largest(ratios):
    """The largest of each argument: dparams.w1 and dparams.b1 are dparams."""
    largest = {}
    for name, ratio in ratios.items():
        name, ratio = name.partition(".")[0], float(ratio)
        largest[name] = largest[name] if ratio <= largest.get(name, -1) else ratio
    return ", ".join(f"{name} {ratio:.2g}" for name, ratio in largest.items())


def _link(mechanism):
    place = "primitives" if find(mechanism).family == "primitives" else "mechanisms"
    return f"[{mechanism}]({place}/{mechanism}.md)"
