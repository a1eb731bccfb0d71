"""From a report to a few lines of Python that show its smallest failure, with NumPy and the candidate alone.

    exec(refattn.check(my_attention, like="dot_product_attention").script())  # an AssertionError as long as it is wrong

The numbers are literals, exact to the last bit; larger arrays are compressed. What is expected stands there too: the
value and the bound of the worst element of every array that fails. No reference is needed any more.
"""

import base64
import math
import pprint
import re
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

import refattn
from refattn.core import leaves
from refattn.oracle import contract
from refattn.oracle.arithmetic import ARITHMETICS, FORMATS
from refattn.oracle.bounds import reference
from refattn.oracle.canonical import as_dot_product
from refattn.oracle.compare import ALONG, GAIN, GAIN_OF_GRADIENT, OUTSIDE, SUSPECT
from refattn.registry import find

LITERAL = 64  # numbers of an array, at most, that is written out
STEP = 1e-6  # of differences, relative
WIDTH = 110

HELPERS = {
    "unpack": '''
def unpack(text, kind, *shape):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind).reshape(shape)
''',
    "fits": '''
def fits(name, got, index, expected, allowed):
    got = float(got[index])
    error = abs(got - expected)
    print(f"{name}{list(index)} is {got!r}, expected {expected!r}: off by {error:.3g}, allowed {allowed:.3g}")
    return got == expected or (got != got and expected != expected) or error <= allowed
''',
    "square": '''
def square(name, got, expected, sd, most):
    some = np.isfinite(expected) & np.isfinite(got) & (sd > 0) & np.isfinite(sd)
    found = np.mean(((got - expected)[some] / sd[some]) ** 2)
    print(f"{name}: the mean square of the errors is {found:.3g} times what is predicted, at most {most:.3g} by chance")
    return found <= most
''',
    "along": '''
def along(name, got, expected, sd, direction, most):
    some = np.isfinite(expected) & np.isfinite(got) & (sd > 0) & np.isfinite(sd)
    c = direction[some] / sd[some]
    found = abs(np.sum((got - expected)[some] / sd[some] * c)) / np.sqrt(np.sum(c * c))
    print(f"{name}: all elements are off together, {found:.3g} standard deviations, at most {most:.3g} by chance")
    return found <= most
''',
}


def script(report):
    """Python that reproduces `report.smallest`; it ends in an AssertionError as long as the candidate is wrong."""
    trial, names = report.smallest, _names(report)
    inputs = names[: len(trial.call.args)]
    wrong = [v for v in trial.verdicts if not v.conforms and v.kind != OUTSIDE]
    backward = report.framework == "torch" or len(report.spec or ()) == 4  # can be had
    late = ("call", "arguments") if backward else ("call",)  # it may be the backward pass that does it
    gradients = [v for v in wrong if v.name in late or _is_gradient(trial, inputs, v.name)]
    if not backward and len(gradients) < len(wrong):
        wrong, gradients = [v for v in wrong if v not in gradients], []
    trial = trial if gradients else trial._replace(dout=None)
    about = Given(report.framework == "torch", report.dtype, _dtype_of_dout(report))
    checks = _checks(report, trial, inputs, about, wrong)
    code = [_candidate(report, trial), _arguments(trial, inputs, about), _calls(trial, inputs, about, wrong), checks]
    code = "\n\n".join("\n".join(lines) for lines in code) + "\n"
    helpers = [text for name, text in HELPERS.items() if f"{name}(" in code]
    if report.framework == "torch":
        helpers = [text.replace("float(got[index])", "float(got[index].detach())") for text in helpers]
    imports = _imports("\n".join([*helpers, code]))
    title = f"{report.candidate} is not like {report.like}: {', '.join(f'{v.name} {v.kind}' for v in wrong)}."
    small = f"{trial.words}; {report.dtype}, seed {list(trial.seed)}, refattn {refattn.__version__}"
    head = "\n".join(f"# {line}" for text in (title, small) for line in textwrap.wrap(text, WIDTH))
    return "\n\n".join([head, imports, *(f"\n{text.strip()}\n" for text in helpers), code])


class Given(NamedTuple):
    """As what the numbers are handed over."""

    torch: bool
    dtype: str
    dtype_of_dout: str


def _is_gradient(trial, inputs, name):
    return trial.dout is not None and name[0] == "d" and name[1:].partition(".")[0] in inputs


def _names(report):
    """Of the arguments. Of an unknown reference they are those of the gradients, or x0, x1, ..."""
    try:
        return contract.parameter_names(find(report.like))
    except KeyError:
        trial = report.smallest
        heads = list(dict.fromkeys(name.partition(".")[0] for name in trial.expected))
        due = [i for i, x in enumerate(trial.call.args) if any(leaf.dtype.kind == "f" for _, leaf in leaves(x))]
        known = {} if trial.dout is None else {i: head[1:] for i, head in zip(due, heads[-len(due) :])}
        return [known.get(i, f"x{i}") for i in range(len(trial.call.args))]


def _dtype_of_dout(report):
    arithmetic = ARITHMETICS.get(report.arithmetic)
    stored = arithmetic is not None and report.dtype == arithmetic.inputs.name
    return arithmetic.out.name if stored else report.dtype


def _imports(code):
    """What the code uses, in the usual order."""
    standard = [name for name in ("base64", "importlib.util", "inspect", "sys", "zlib") if f"{name}." in code]
    standard = [f"import {name}" for name in standard]
    standard += ["from collections import namedtuple"] * ("namedtuple(" in code)
    standard += ["from math import inf, nan"] * bool(re.search(r"(?<![\w.\"'])(inf|nan)(?![\w\"'])", code))
    others = ["import ml_dtypes"] * ("ml_dtypes." in code) + ["import numpy as np"]
    others += ["import torch"] * ("torch." in code)
    return "\n".join([*standard, *([""] if standard else []), *others])


# --- the candidate -------------------------------------------------------------------------------------------


def _candidate(report, trial):
    """Lines that import it and its backward. spec is (module or file, name), twice if there is a backward."""
    spec = tuple(report.spec or ())
    lines = _load("candidate", spec[:2])
    if trial.dout is not None and report.framework != "torch":
        lines += _load("backward", spec[2:4], loaded=spec[:1] == spec[2:3])
    return lines


def _load(what, spec, loaded=False):
    if len(spec) < 2 or spec[0] in (None, "__main__"):
        return [f"{what} = ...  # your function"]
    place, name = str(spec[0]), spec[1]
    if not place.endswith(".py"):
        return [f"from {place} import {name}{'' if name == what else f' as {what}'}"]
    if loaded:
        return [f"{what} = module.{name}"]
    path = Path(place)
    stem = re.sub(r"\W", "_", path.stem)
    return [
        f"sys.path.insert(0, {str(path.parent)!r})  # what lies beside it can be imported",
        f"spec = importlib.util.spec_from_file_location({stem!r}, {place!r})",
        f"module = sys.modules[{stem!r}] = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(module)",
        f"{what} = module.{name}",
    ]


# --- the arguments -------------------------------------------------------------------------------------------


def _arguments(trial, inputs, about):
    grads = about.torch and trial.dout is not None
    lines = [f"{name} = {_spell(x, about.dtype, about, grads)}" for name, x in zip(inputs, trial.call.args)]
    options = {n: _spell(x, about.dtype, about) for n, x in trial.call.options.items() if n != "convention"}
    lines.append(f"options = dict({', '.join(f'{n}={text}' for n, text in options.items())})")
    if trial.dout is not None:
        lines.append(f"dout = {_spell(trial.dout, about.dtype_of_dout, about)}")
    return lines


def _spell(x, dtype, about, grads=False):
    """A tree of arrays, or the value of an option, as Python."""
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, np.ndarray):
        return _tensor(x, dtype, grads) if about.torch else _array(x, dtype)
    if isinstance(x, tuple):
        inside = ", ".join(_spell(child, dtype, about, grads) for child in x)
        kind = f"namedtuple({type(x).__name__!r}, {x._fields!r})" if hasattr(x, "_fields") else ""
        return f"{kind}({inside}{',' if len(x) == 1 and not kind else ''})"
    return repr(x)


def _array(x, dtype):
    if x.dtype.kind != "f":
        return _numbers(x, x.dtype.name)
    if dtype in ("float16", "float32", "float64"):
        return _numbers(x, dtype)
    if dtype in ("tfloat32", "e8m13"):
        return _numbers(x, "float32")
    return f"{_numbers(x, 'float32')}.astype(ml_dtypes.{dtype})"


def _tensor(x, dtype, grads):
    plain = _array(x, "float32" if dtype not in ("float16", "float64") else dtype)
    low = x.dtype.kind == "f" and dtype not in ("float16", "float32", "float64", "tfloat32", "e8m13")
    leaf = grads and x.dtype.kind == "f"
    return f"torch.from_numpy({plain})" + f".to(torch.{dtype})" * low + ".requires_grad_()" * leaf


def _numbers(x, dtype):
    """An array of NumPy's own dtypes."""
    if x.size == 0:
        return f"np.zeros({x.shape}, {dtype!r})"
    if x.size <= LITERAL:
        text = pprint.pformat(x.tolist(), width=WIDTH - 25, compact=True)
        return f"np.array({text}, {dtype!r})" if "\n" not in text else f"np.array(\n{text},\n{dtype!r},\n)"
    kind = {"f": "<f8", "b": "|b1"}.get(x.dtype.kind, "<i8")
    return f"np.array({_packed(x, kind)}, {dtype!r})"


def _packed(x, kind="<f8"):
    text = base64.b64encode(zlib.compress(np.ascontiguousarray(x, kind).tobytes(), 9)).decode()
    lines = "\n".join(textwrap.wrap(text, WIDTH))
    return f'unpack("""\n{lines}""", {kind!r}, {", ".join(map(str, x.shape))})'


# --- the call ------------------------------------------------------------------------------------------------


def _calls(trial, inputs, about, wrong):
    problems = {v.name: v.problem for v in wrong}
    lines = [f"# {line}" for line in textwrap.wrap(problems.get("call", ""), WIDTH)]
    given = dict(zip(inputs, trial.call.args)) | {"dout": trial.dout}
    changed = [name for name in problems.get("arguments", "").partition(":")[0].split(", ") if name]
    changed = [n + p if n in given else f"options[{n!r}]{p}" for n in changed
               for p in _paths(given.get(n, trial.call.options.get(n)))]  # fmt: skip
    numbers = f"repr([x.tolist() for x in ({', '.join(changed)},)])"
    lines += [f"before = {numbers}"] if changed else []
    lines += [f"result = candidate({', '.join([*inputs, '**options'])})"]
    if trial.dout is not None:
        lines += ["outputs = result if isinstance(result, (tuple, list)) else (result,)"]
        lines += _autograd(trial, inputs) if about.torch else _backward(trial, inputs)
    return lines + ([f"assert {numbers} == before, {problems['arguments']!r}"] if changed else [])


def _backward(trial, inputs):
    lines, some = [], ""
    if set(trial.call.options) - {"convention"}:
        lines += ["takes = inspect.signature(backward).parameters"]
        lines += ["every = any(p.kind is p.VAR_KEYWORD for p in takes.values())"]
        some = ", **{n: x for n, x in options.items() if every or n in takes}"
    lines += [f"grads = backward({', '.join(['dout', *inputs, '*outputs'])}{some})"]
    if len(inputs) == 1:
        lines += ["grads = grads if isinstance(grads, (tuple, list)) and not hasattr(grads, '_fields') else (grads,)"]
    return lines


def _autograd(trial, inputs):
    douts = [f"dout{path}" for path in _paths(trial.dout)]
    inputs = [f"{name}{path}" for name, x in zip(inputs, trial.call.args) for path in _paths(x)]
    return [
        f"pairs = [(y, d) for y, d in zip(outputs, ({', '.join(douts)},)) if y.requires_grad]",
        f"inputs = [{', '.join(inputs)}]",
        "grads = torch.autograd.grad([y for y, _ in pairs], inputs, [d for _, d in pairs], allow_unused=True)",
    ]


def _paths(tree):
    """[0][1] for every leaf of a tree."""
    return ["".join(f"[{i}]" for i in path) for path in _places(tree)]


def _places(tree):
    if isinstance(tree, tuple):
        return [(i, *below) for i, child in enumerate(tree) for below in _places(child)]
    return [] if tree is None else [()]


# --- what came of it -----------------------------------------------------------------------------------------


def _checks(report, trial, inputs, about, wrong):
    structure, lines = [], []
    for v in wrong:
        if v.name in ("call", "arguments"):
            continue
        got, expected = _where(trial, inputs, about, v.name), trial.expected[v.name]
        if v.kind == SUSPECT:
            lines.append(_suspect(report, trial, about, v, got))
        elif not v.problem:
            lines.append(f"fits({v.name!r}, {got}, {v.index!r}, {float(v.expected)!r}, {float(v.allowed)!r})")
        else:
            holds = f"tuple(getattr({got}, 'shape', '?')) == {expected.shape}"
            due = v.problem.rpartition(", expected ")[2] if v.problem.startswith("has dtype") else ""
            holds += f' and str({got}.dtype).rpartition(".")[2] == {due!r}' if due in FORMATS else ""
            structure.append(f"assert {holds}, {f'{v.name} {v.problem}'!r}")
    if lines:
        lines = ["right = [", *(f"    {line}," for line in lines), "]", 'assert all(right), "outside the bounds"']
    return [*structure, *lines]


def _where(trial, inputs, about, name):
    """The expression that finds an array in what came back."""
    head, *fields = name.split(".")
    if _is_gradient(trial, inputs, name):
        i = inputs.index(head[1:])
        if not about.torch:
            return f"grads[{i}]{_below(trial.call.args[i], fields)}"
        before = sum(1 for x in trial.call.args[:i] for _ in leaves(x))  # autograd's list is flat
        return f"grads[{before + [path for path, _ in leaves(trial.call.args[i])].index('.'.join(fields))}]"
    if name == "out":
        return "result[0]" if "lse" in trial.got else "(result[0] if isinstance(result, (tuple, list)) else result)"
    if name == "lse":
        return "result[1]"
    outputs = list(dict.fromkeys(n.partition(".")[0] for n in trial.expected))  # the gradients stand behind them
    return f"result[{outputs.index(head)}]" + "".join(f"[{f}]" if f.isdigit() else f".{f}" for f in fields)


def _below(tree, fields):
    """[0][1] for the names of fields."""
    text = ""
    for field in fields:
        known = list(getattr(tree, "_fields", map(str, range(len(tree)))))
        text, tree = f"{text}[{known.index(field)}]", tree[known.index(field)]
    return text


def _suspect(report, trial, about, v, got):
    """All elements are suspect together: the whole arrays are needed."""
    expected, sd = trial.expected[v.name], trial.bounds[v.name].sd
    got = f"{got}.detach().double().numpy()" if about.torch else f"{got}.astype(float)"
    arrays = f"{v.name!r}, {got}, {_packed(expected)}, {_packed(np.broadcast_to(sd, expected.shape))}"
    if v.problem.startswith("the mean square"):
        usable = np.isfinite(expected) & (sd > 0) & np.isfinite(sd)
        return f"square({arrays}, {1 + 8 * math.sqrt(2 / usable.sum())!r})"
    if "along the scale" in v.problem:
        return f"along({arrays}, {_packed(_along_scale(report, trial))}, {ALONG!r})"
    return f"along({arrays}, {_packed(expected)}, {GAIN.get(v.name, GAIN_OF_GRADIENT)!r})"


def _along_scale(report, trial):
    """How `out` changes with the logarithm of the scale, by differences."""
    call = as_dot_product(find(report.like), trial.call)
    q, *others = call.args
    ahead, behind = (reference(call._replace(args=(q * (1 + h), *others)))["out"] for h in (STEP, -STEP))
    return np.nan_to_num((ahead - behind) / (2 * STEP)).reshape(trial.expected["out"].shape)

