"""Golden vectors: inputs, outputs, gradients and error bounds in files, for implementations that no Python can call.

    vectors.write("attention_vectors", like="dot_product_attention", arithmetics=("float32", "bf16_flash"))
    vectors.read("attention_vectors").cases["000_gaussian"].arrays["in/q"]
    vectors.verify("attention_vectors", "my_outputs", "bf16_flash").ok

A folder has a manifest.json and its cases, each one file (npz, safetensors) or a folder of them (raw, onnx). What is in
them: docs/reference/vector-format.md. Nothing is ever unpickled. What is read is believed only as far as the manifest
and the file agree: name, size, sha256, dtype and shape; whatever does not is a ValueError that says in which file.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

import refattn
from refattn import vectors_onnx
from refattn.core import Call, leaves, tree_map
from refattn.oracle import contract, inputs
from refattn.oracle.arithmetic import ARITHMETICS, round_to
from refattn.oracle.bounds import attention_bounds, outside_the_model, reference
from refattn.oracle.canonical import as_dot_product
from refattn.oracle.compare import BUG, OUTSIDE, Bound, Verdict, compare, worse
from refattn.oracle.noise import noise_bounds_of_call
from refattn.oracle.trial import plain
from refattn.registry import find

FORMAT, VERSION = "refattn vectors", 1
MANIFEST = "manifest.json"
OF_EACH = 2  # cases of each family, unless asked for otherwise
SEVERAL_ANSWERS = "nan_query", "poisoned_keys", "poisoned_values"  # how far NaN spreads; a file has one answer
LARGEST, LARGEST_MANIFEST = 2**31, 2**26  # bytes of a file or an array that are read
DTYPES = {"float64": "<f8", "float32": "<f4", "int64": "<i8", "bool": "|b1"}  # of arrays in vectors
PATH = re.compile(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*", re.ASCII)  # no absolute path, no .., nothing hidden


class Case(NamedTuple):
    name: str
    family: str  # of inputs
    options: dict  # those that are no arrays
    outside: dict  # arithmetic -> why it predicts nothing here
    model: bytes  # of ONNX, of a node test that is written; else empty
    arrays: dict  # "in/q", "option/attn_mask", "out/out", "grad/dq", "bound/bf16_flash/dq", "worst/bf16_flash/dq"


class Vectors(NamedTuple):
    manifest: dict
    cases: dict  # name -> Case


class Verification(NamedTuple):
    """What came of somebody's outputs."""

    mechanism: str
    arithmetic: str
    verdicts: tuple  # of Verdict, one for each array of each case; `example` is the case
    cases: int

    @property
    def ok(self):
        """True only if something was judged, and nothing differs."""
        kinds = {v.kind for v in self.verdicts}
        return "CONFORMS" in kinds and kinds <= {"CONFORMS", OUTSIDE}

    def __str__(self):
        judged = any(v.kind != OUTSIDE for v in self.verdicts)
        word = "conforms" if self.ok else "DIFFERS" if judged else "NOT JUDGED"
        lines = [f"outputs like {self.mechanism}, arithmetic {self.arithmetic}: {word} ({self.cases} examples)"]
        failures = Counter(v.name for v in self.verdicts if not v.conforms and v.kind != OUTSIDE)
        worst = {}
        for v in sorted(self.verdicts, key=lambda v: v.kind == OUTSIDE):
            if v.kind != OUTSIDE or v.name not in worst:  # where it is judged elsewhere, that counts
                worst[v.name] = max(worst.get(v.name, v), v, key=worse)
        kinds = {name: "ok" if v.conforms else v.kind for name, v in worst.items()}
        wide, width = (max(map(len, words), default=0) for words in (kinds.values(), kinds))
        for name, v in worst.items():
            lines.append(f"  {kinds[name]:{wide}}  {name:{width}}  {v}, in {v.example}")
            if failures[name]:
                lines.append(f"  {'':{wide}}  {'':{width}}  so in {failures[name]} examples")
        return "\n".join(lines)

    def as_dict(self):
        record = self._asdict() | {"verdicts": [plain(v._asdict()) for v in self.verdicts]}
        return {"ok": self.ok} | record


# --- write -----------------------------------------------------------------------------------------------------


def write(
    folder, like, *, families=None, examples=None, seed=0, arithmetics=("float32",), storage="npz", gradients=True
):
    """Write a folder of vectors of a mechanism, whole or not at all, and return its path.

    Numbers are those that the formats of all `arithmetics` hold exactly. A folder that is there is replaced if it is
    one of vectors and nothing else. With storage="onnx" calls that no node can say are left out; the manifest says
    how many, and why.
    """
    mechanism = find(like)
    families, arithmetics = _settled(mechanism, families, arithmetics, storage)
    examples = OF_EACH * len(families) if examples is None else examples
    target = Path(folder).absolute()
    _refuse_to_overwrite(target)
    if storage == "safetensors":
        _safetensors()  # now, not when all is computed
    say, left_out = vectors_onnx.operator(mechanism) if storage == "onnx" else None, Counter()
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        new = temporary / "new"
        new.mkdir()
        cases = [
            _write_case(new, storage, case)
            for case in _cases(mechanism, families, examples, seed, arithmetics, gradients, say, left_out)
        ]
        manifest = {
            "format": FORMAT, "version": VERSION, "refattn": refattn.__version__, "mechanism": mechanism.name,
            "source_sha256": _sha256(Path(mechanism.module.__file__).read_bytes()), "storage": storage, "seed": seed,
            "families": list(families), "arithmetics": [a.name for a in arithmetics], "cases": cases,
        } | ({"left_out": dict(left_out)} if left_out else {})  # fmt: skip
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _put_in_place(new, target, temporary / "old")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _settled(mechanism, families, arithmetics, storage):
    if storage not in STORAGES:
        raise ValueError(f"vectors: storage is {storage!r}, expected one of {', '.join(STORAGES)}")
    known = {name: f for name, f in inputs.families(mechanism).items() if name not in SEVERAL_ANSWERS}
    for family in known if families is None else families:
        if family not in known:
            raise ValueError(f"vectors: families has {family!r}, expected some of {', '.join(known)}")
    for name in arithmetics:
        if name not in ARITHMETICS:
            raise ValueError(f"vectors: arithmetics has {name!r}, expected some of {', '.join(ARITHMETICS)}")
    if not arithmetics:
        raise ValueError(f"vectors: arithmetics is empty, expected some of {', '.join(ARITHMETICS)}")
    chosen = known if families is None else {name: known[name] for name in families}
    return chosen, [ARITHMETICS[name] for name in dict.fromkeys(arithmetics)]


def _refuse_to_overwrite(target):
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent}: no such folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target}: is there and no folder, expected a new one")
    if not target.exists() or not any(target.iterdir()):
        return
    try:
        _only_what_is_listed(target, read_manifest(target))
    except ValueError as error:
        expected = "a new folder, or one of vectors and nothing else"
        raise ValueError(f"{target}: not overwritten, expected {expected} ({error})") from None


def _put_in_place(new, target, old):
    """Rename; a folder with content cannot be renamed over, so it steps aside, and comes back if that fails."""
    aside = target.exists()
    if aside:
        os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        if aside:
            os.replace(old, target)
        raise


def _write_case(folder, storage, case):
    """Write a Case, and return what the manifest says of it."""
    files = STORAGES[storage].encode(case)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    arrays = {name: {"dtype": x.dtype.name, "shape": list(x.shape)} for name, x in case.arrays.items()}
    sums = {path: {"bytes": len(content), "sha256": _sha256(content)} for path, content in files.items()}
    record = case._asdict() | {"options": _jsonable(case.options, case.name), "arrays": arrays, "files": sums}
    del record["model"]  # is one of the files
    return record


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def _jsonable(value, name):
    """An option as JSON has it: NaN and inf are words, tuples lists, a NamedTuple is an object."""
    if isinstance(value, (bool, str, type(None))):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _jsonable(x, f"{name}, {key}") for key, x in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(x, name) for x in value]
    if isinstance(value, (type, np.dtype)):
        return np.dtype(value).name
    raise ValueError(f"vectors: {name} is a {type(value).__name__}, expected a number, a word or an array")


# --- cases -----------------------------------------------------------------------------------------------------


def _cases(mechanism, families, examples, seed, arithmetics, gradients, say, left_out):
    """Yield so many Cases, each family in its turn; where there is `say`, only what it can say."""
    claim, count, before = contract.claim(mechanism.forward, mechanism), 0, "test_" if say else ""
    for i in range(20 * examples):
        if count == examples:
            return
        name = list(families)[i % len(families)]
        if say is None:
            call = inputs.draw(mechanism, name, claim, [seed, i])
        else:
            call = vectors_onnx.drawn(mechanism, say, name, [seed, i], left_out)
        if call is None:
            continue
        case = f"{before}{count:03}_{name}"
        yield _case(mechanism, case, families[name], call, [seed, i], arithmetics, gradients, say)
        count += 1
    raise ValueError(f"vectors: only {count} calls of {', '.join(families)} could be drawn, expected {examples}")


def _case(mechanism, name, family, call, seed, arithmetics, gradients, say):
    call = _held_by_all(inputs.cast_call(call, np.float64), [a.inputs for a in arithmetics])
    out, _ = mechanism.forward(*call.args, **call.options)
    if as_dot_product(mechanism, call) is not None and isinstance(out, tuple):
        out = out[0]  # the gradient of lse is left out, as in a trial
    dout = None
    if gradients:
        dout = inputs.draw_dout(mechanism, family.name, out, np.random.default_rng([*seed, 1]))
        dout = _held_by_all(Call((dout,), {}), [a.out for a in arithmetics]).args[0]
    names = contract.parameter_names(mechanism)
    arrays = {f"in/{path}": x for arg, value in zip(names, call.args) for path, x in leaves(value, arg)}
    arrays |= {f"in/{path}": x for path, x in leaves(dout, "dout")}
    options = dict(sorted(call.options.items()))
    for option, value in call.options.items():
        if any(isinstance(x, np.ndarray) for _, x in leaves(value)):
            arrays |= {f"option/{path}": x for path, x in leaves(options.pop(option), option)}
    expected, bounds, outside = _judged(mechanism, call, dout, family, seed, arithmetics)
    arrays |= expected
    for arithmetic, of_arrays in bounds.items():
        for path, bound in of_arrays.items():
            _, _, array = path.partition("/")
            arrays[f"bound/{arithmetic}/{array}"] = bound.least
            if bound.worst is not None:
                arrays[f"worst/{arithmetic}/{array}"] = bound.worst
    arrays, model = {path: _stored(x) for path, x in arrays.items()}, b""
    if say is not None:
        model, of_node = vectors_onnx.node_test(mechanism, say, call, arrays["out/out"])
        arrays = of_node | arrays
    return Case(name, family.name, options, outside, model, arrays)


def _held_by_all(call, formats):
    """The call with numbers that every format holds exactly; the largest that they all hold where one overflows."""
    formats = sorted(set(formats), key=lambda form: -form.precision)
    most = min(form.largest for form in formats)
    for form in formats:
        most = round_to(np.float64(most), form, truncate=True)

    def leaf(x):
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return x
        x = np.where(np.isfinite(x), np.clip(x, -most, most), x)
        for form in formats:
            x = round_to(x, form)
        return x

    return Call(tree_map(leaf, call.args), {name: tree_map(leaf, value) for name, value in call.options.items()})


def _stored(x):
    x = np.asarray(x)
    return np.asarray(x, {"f": np.float64, "b": np.bool_}.get(x.dtype.kind, np.int64), order="C")


def _judged(mechanism, call, dout, family, seed, arithmetics):
    """{"out/out": array}, {arithmetic: {"out/out": Bound}}, {arithmetic: why nothing is predicted}."""
    canonical = as_dot_product(mechanism, call)
    judge = _by_noise if canonical is None else _attention
    return judge(mechanism, canonical or call, call, dout, family, seed, arithmetics)


def _attention(mechanism, canonical, call, dout, family, seed, arithmetics):
    wide = None if dout is None else dout.reshape(*canonical.args[0].shape[:3], dout.shape[-1])
    values = reference(canonical, wide)
    shapes = {"out": (*call.args[0].shape[:-1], call.args[2].shape[-1])}
    if call.options.get("return_lse"):
        shapes["lse"] = call.args[0].shape[:-1]
    names = {name: f"out/{name}" for name in shapes}
    if dout is not None:
        given = {f"d{name}": x for name, x in zip(contract.parameter_names(mechanism), call.args) if x is not None}
        shapes |= {name: x.shape for name, x in given.items()}
        names |= {name: f"grad/{name}" for name in given}
    bounds, outside = {}, {}
    for a in arithmetics:
        reason = outside_the_model(canonical, values, a)
        if reason:
            outside[a.name] = reason
            continue
        found = attention_bounds(canonical, wide, a, ("worst", "stat") if family.generic else ("worst",), values)

        def shaped(x, name):
            return None if x is None else x.reshape(shapes[name])

        bounds[a.name] = {
            path: Bound(shaped(found[name].worst, name), shaped(found[name].stat, name)) for name, path in names.items()
        }
    return {path: values[name].reshape(shapes[name]) for name, path in names.items()}, bounds, outside


def _by_noise(mechanism, _, call, dout, family, seed, arithmetics):
    out, saved = mechanism.forward(*call.args, **call.options)
    grads = None if dout is None else tuple(mechanism.backward(dout, saved))
    heads, several = [f"d{name}" for name in contract.parameter_names(mechanism)], isinstance(out, tuple)

    def named(out, grads):
        found = {f"out/{path}": x for path, x in _leaves_of(out, "" if several else "out")}
        below = zip(heads, grads or ())
        return found | {f"grad/{path}": x for head, grad in below for path, x in _leaves_of(grad, head)}

    bounds = {a.name: named(*noise_bounds_of_call(mechanism, call, dout, (out, grads), a, seed)) for a in arithmetics}
    return named(out, grads), bounds, {}


def _leaves_of(tree, path):
    """As `leaves`, but a Bound is a leaf."""
    if isinstance(tree, tuple) and not isinstance(tree, Bound):
        for name, child in zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True):
            yield from _leaves_of(child, f"{path}.{name}" if path else str(name))
    elif tree is not None:
        yield path, tree


# --- read ------------------------------------------------------------------------------------------------------


def read(folder):
    """The Vectors of a folder, all of it checked."""
    manifest = read_manifest(folder)
    _only_what_is_listed(Path(folder), manifest)
    return Vectors(manifest, {c["name"]: _read_case(Path(folder), manifest, c) for c in manifest["cases"]})


def read_manifest(folder):
    """The manifest of a folder, after every word in it that reading relies on was checked."""
    path = Path(folder) / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{path}: not there, expected the {MANIFEST} of a folder of vectors")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise ValueError(f"{path}: has {path.stat().st_size} bytes, expected at most {LARGEST_MANIFEST}")
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_short(error)}, expected JSON") from None
    _must(path, "it", manifest, isinstance(manifest, dict), "an object")
    _field(path, manifest, "format", str, lambda x: x == FORMAT, repr(FORMAT))
    _field(path, manifest, "version", int, lambda x: x == VERSION, f"{VERSION}, the one that is known")
    _field(path, manifest, "mechanism", str, None, "a name")
    _field(path, manifest, "storage", str, lambda x: x in STORAGES, f"one of {', '.join(STORAGES)}")
    _field(path, manifest, "arithmetics", list, lambda x: x and all(isinstance(a, str) for a in x), "names")
    _field(path, manifest, "cases", list, None, "a list")
    for case in manifest["cases"]:
        _check_case(path, manifest, case)
    for what in ([c["name"] for c in manifest["cases"]], [f for c in manifest["cases"] for f in c["files"]]):
        twice = [name for name, count in Counter(what).items() if count > 1]
        _must(path, "cases", twice, not twice, "every name and file once")
    return manifest


def _check_case(path, manifest, case):
    _must(path, "cases", case, isinstance(case, dict), "objects")
    _field(path, case, "name", str, lambda x: PATH.fullmatch(x) and "/" not in x, "a name of letters, digits, _ and -")
    _field(path, case, "family", str, None, "a name")
    for name in ("options", "outside", "arrays", "files"):
        _field(path, case, name, dict, None, "an object")
    for name, about in case["arrays"].items():
        what = f"{case['name']}, {name}"
        _must(path, what, name, PATH.fullmatch(name) and "/" in name, "a name like in/q")
        _must(path, what, about, isinstance(about, dict), "dtype and shape")
        dtype, shape = about.get("dtype"), about.get("shape")
        _must(path, f"{what}, dtype", dtype, isinstance(dtype, str) and dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        _must(path, f"{what}, shape", shape, whole and len(shape) <= 32, "a list of sizes")
        size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        _must(path, f"{what}, shape", shape, size <= LARGEST, f"an array of at most {LARGEST} bytes")
    for name, about in case["files"].items():
        what = f"{case['name']}, file {name}"
        _must(path, what, name, PATH.fullmatch(name) and name != MANIFEST, "a path below the folder")
        _must(path, what, about, isinstance(about, dict), "bytes and sha256")
        size, digest = about.get("bytes"), about.get("sha256")
        _must(path, f"{what}, bytes", size, type(size) is int and 0 <= size <= LARGEST, f"at most {LARGEST}")
        hexadecimal = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
        _must(path, f"{what}, sha256", digest, hexadecimal, "64 hexadecimal digits")
    listed, due = set(case["files"]), set(STORAGES[manifest["storage"]].paths(case["name"], case["arrays"]))
    _must(path, f"{case['name']}, files", sorted(listed ^ due)[:3], listed == due, f"those of {manifest['storage']}")
    for array in case["arrays"]:
        if array.startswith(("out/", "grad/")):
            for name in manifest["arithmetics"]:
                bound = f"bound/{name}/{array.partition('/')[2]}"
                there = name in case["outside"] or bound in case["arrays"]
                _must(path, f"{case['name']}, arrays", f"without {bound}", there, "a bound of every output")
                for kind in ("bound", "worst"):
                    about = case["arrays"].get(f"{kind}/{name}/{array.partition('/')[2]}", case["arrays"][array])
                    same = about["shape"] == case["arrays"][array]["shape"]
                    _must(path, f"{case['name']}, {kind}/{name} of {array}", about["shape"], same, "the same shape")


def _field(path, record, name, kind, fits, expected):
    value = record.get(name)
    _must(path, name, value, type(value) is kind and (fits is None or fits(value)), expected)


def _must(path, what, found, holds, expected):
    if not holds:
        raise ValueError(f"{path}: {what} is {_short(found)}, expected {expected}")


def _short(found):
    """A value, or the text of another library's error, that may hold anything: printable, and not a whole file."""
    text = f"{type(found).__name__}: {found}" if isinstance(found, Exception) else repr(found)
    text = "".join(c if c.isprintable() else "?" for c in text[:101])
    return text if len(text) <= 100 else f"{text[:100]}..."


def _only_what_is_listed(folder, manifest):
    """A ValueError for the first file, link or folder of nothing that the manifest does not know."""
    known = {MANIFEST} | {path for case in manifest["cases"] for path in case["files"]}
    above = {str(parent) for path in known for parent in PurePosixPath(path).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or name not in (above if path.is_dir() else known):
            raise ValueError(f"{path}: not in {MANIFEST}, expected only what is")


def _read_case(folder, manifest, case):
    contents = {}
    for name, about in case["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: not there, expected a file")
        size = path.stat().st_size
        if size != about["bytes"]:
            raise ValueError(f"{path}: has {size} bytes, expected {about['bytes']}")
        contents[name] = path.read_bytes()
        found = _sha256(contents[name])
        if found != about["sha256"]:
            raise ValueError(f"{path}: its sha256 is {found[:12]}..., expected {about['sha256'][:12]}...")
    storage, arrays = STORAGES[manifest["storage"]], case["arrays"]
    file = folder / (case["name"] + storage.suffix)
    found = storage.decode(file, contents, {name: (a["dtype"], tuple(a["shape"])) for name, a in arrays.items()})
    for name in [*(n for n in arrays if n not in found), *(n for n in found if n not in arrays)]:
        there = "it has" if name in found else "it lacks"
        raise ValueError(f"{file}: {there} {_short(name)}, expected the arrays in {MANIFEST}")
    read = {}
    for name, about in arrays.items():
        entry, dtype, shape = found[name], np.dtype(DTYPES[about["dtype"]]), tuple(about["shape"])
        if entry.dtype != dtype or entry.shape != shape:
            raise ValueError(f"{file}: {name} is {entry.dtype} {entry.shape}, expected {dtype} {shape}")
        read[name] = entry.read()
    return Case(case["name"], case["family"], case["options"], case["outside"], b"", read)


# --- verify ----------------------------------------------------------------------------------------------------


def verify(folder, outputs, arithmetic):
    """Judge somebody's outputs of all cases: a folder with, for each, CASE.npz, CASE.safetensors, CASE/out/out.bin, or
    CASE/output_0.pb.

    The names are those of the vectors, "out/out" and "grad/dq"; what is missing is a failure of its own, and so is an
    output or gradient that was not asked for.
    """
    folder, outputs = Path(folder), Path(outputs)
    manifest = read_manifest(folder)
    if arithmetic not in manifest["arithmetics"]:
        names = ", ".join(manifest["arithmetics"])
        raise ValueError(f"verify: arithmetic is {arithmetic!r}, expected one that {folder} has bounds for: {names}")
    if not outputs.is_dir():
        raise ValueError(f"{outputs}: no such folder, expected one of outputs")
    if outputs.resolve() == folder.resolve():
        raise ValueError(f"{outputs}: is the folder of the vectors, expected one of outputs")
    _only_what_is_listed(folder, manifest)
    verdicts = []
    for record in manifest["cases"]:
        verdicts += _verdicts(_read_case(folder, manifest, record), outputs, arithmetic)
    return Verification(manifest["mechanism"], arithmetic, tuple(verdicts), len(manifest["cases"]))


def _verdicts(case, outputs, arithmetic):
    expected = {name: x for name, x in case.arrays.items() if name.startswith(("out/", "grad/"))}
    got, file = _outputs(case.name, outputs, {name: ("", x.shape) for name, x in expected.items()})
    for name, value in expected.items():
        array, about = name.partition("/")[2], {"name": name, "example": case.name}
        entry = got.get(name)
        if entry is None:
            yield Verdict(name, BUG, f"is missing: nothing of it in {file}", example=case.name)
        elif arithmetic in case.outside:
            yield Verdict(name, OUTSIDE, case.outside[arithmetic], example=case.name)
        elif entry.shape != value.shape:  # and may be too large to be read
            yield Verdict(name, BUG, f"has shape {entry.shape}, expected {value.shape}", example=case.name)
        else:
            worst = case.arrays.get(f"worst/{arithmetic}/{array}")
            yield compare(value, entry.read(), Bound(worst, case.arrays[f"bound/{arithmetic}/{array}"]), **about)
    for name in got:
        if name.startswith(("out/", "grad/")) and name not in expected:
            yield Verdict(_short(name), BUG, f"is not asked for, expected {', '.join(expected)}", example=case.name)


def _outputs(case, outputs, expected):
    """{name: Entry} of a case, and where it was looked for."""
    files = {name: outputs / (case + storage.suffix) for name, storage in STORAGES.items()}
    found = {name: file for name, file in files.items() if file.exists()}
    if "raw" in found:  # a folder, as onnx is
        del found["raw" if any(found["raw"].rglob("*.pb")) else "onnx"]
    if len(found) > 1:
        raise ValueError(f"{outputs}: has {' and '.join(p.name for p in found.values())}, expected one of them")
    for storage, file in found.items():
        paths = sorted(p for p in file.rglob("*") if p.is_file()) if storage in ("raw", "onnx") else [file]
        for path in paths:
            if not path.is_file() or path.stat().st_size > LARGEST:
                raise ValueError(f"{path}: expected a file of at most {LARGEST} bytes")
        contents = {path.relative_to(outputs).as_posix(): path.read_bytes() for path in paths}
        return STORAGES[storage].decode(file, contents, expected), file
    return {}, outputs


# --- storages: encode(Case) -> {path: bytes};  decode(file, {path: bytes}, expected) -> {name: Entry} ---------------
#     expected is {name: (dtype or "", shape)}, for raw, which says neither


class Entry(NamedTuple):
    """An array in a file, before it is read."""

    dtype: Any
    shape: tuple
    read: Any  # read() -> array


class Storage(NamedTuple):
    suffix: str  # of a case
    paths: Any  # paths(case, names) -> of its files
    encode: Any
    decode: Any


def _encode_npz(case):
    """As np.savez, but the same arrays give the same bytes at any time."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, x in case.arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, x, version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue())
    return {f"{case.name}.npz": file.getvalue()}


def _decode_npz(file, contents, expected):
    (content,) = contents.values()
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        members = {m.filename: m for m in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("an array is there twice")
        return {name.removesuffix(".npy"): _npy(file, archive, member) for name, member in members.items()}
    except Exception as error:  # zipfile, zlib and the parser of headers each have their own
        raise ValueError(f"{file}: {_short(error)}, expected an npz file without pickles") from None


def _npy(file, archive, member):
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = header(stream)
        start, size = stream.tell(), math.prod(shape) * dtype.itemsize
    if dtype.kind not in "fiub":
        about = f"{member.filename} has dtype {_short(str(dtype))}"
        raise ValueError(f"{about}; bfloat16 can be stored as float32")
    if start + size != member.file_size or size > LARGEST:
        raise ValueError(f"{member.filename} has {member.file_size} bytes, but {start + size} by its header")

    def read():
        try:
            content = archive.read(member)  # as long as it said, or an error
        except Exception as error:
            raise ValueError(f"{file}: {_short(error)}, expected {member.filename} whole") from None
        x = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
        return x.astype(dtype.newbyteorder("="))

    return Entry(dtype, tuple(shape), read)


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f"safetensors files need safetensors ({error}): pip install 'refattn[vectors]'") from error
    return safetensors


OF_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BOOL": "|b1"}


def _encode_safetensors(case):
    return {f"{case.name}.safetensors": _safetensors().numpy.save(case.arrays)}


def _decode_safetensors(file, contents, expected):
    (content,) = contents.values()
    library = _safetensors()
    try:
        found = dict(library.deserialize(content))
    except Exception as error:
        raise ValueError(f"{file}: {_short(error)}, expected a safetensors file") from None
    return {name: _tensor(file, name, about) for name, about in found.items()}


def _tensor(file, name, about):
    if about["dtype"] == "BF16":  # the upper half of a float32
        halves = np.frombuffer(about["data"], "<u2")
        read = (halves.astype(np.uint32) << 16).view(np.float32).reshape(about["shape"])
        return Entry(read.dtype, read.shape, lambda: read)
    if about["dtype"] not in OF_SAFETENSORS:
        expected = f"BF16, {', '.join(OF_SAFETENSORS)}"
        raise ValueError(f"{file}: {_short(name)} has dtype {_short(about['dtype'])}, expected {expected}")
    dtype = np.dtype(OF_SAFETENSORS[about["dtype"]])
    read = np.frombuffer(about["data"], dtype).reshape(about["shape"]).astype(dtype.newbyteorder("="))
    return Entry(dtype, read.shape, lambda: read)


def _encode_raw(case):
    return {f"{case.name}/{name}.bin": x.astype(DTYPES[x.dtype.name]).tobytes() for name, x in case.arrays.items()}


def _decode_raw(file, contents, expected):
    """A .bin says neither dtype nor shape: it has those expected; or, without a dtype, the float that fits its size."""
    found = {}
    for path, content in contents.items():
        name = path.removeprefix(f"{file.name}/").removesuffix(".bin")
        dtype, shape = expected.get(name, ("", (len(content),)))
        dtype = np.dtype(DTYPES[dtype] if dtype else "<f8" if len(content) == 8 * math.prod(shape) else "<f4")
        if name in expected and len(content) != dtype.itemsize * math.prod(shape):
            sizes = f"{dtype.itemsize * math.prod(shape)}, {shape} of {dtype.name}"
            raise ValueError(f"{file / name}.bin: has {len(content)} bytes, expected {sizes}")

        def read(content=content, dtype=dtype, shape=shape):
            return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))

        found[name] = Entry(dtype, tuple(shape), read)
    return found


def _decode_onnx(file, contents, expected):
    return vectors_onnx.decode(file, contents, expected, Entry, _short)


STORAGES = {
    "npz": Storage(".npz", lambda case, names: [f"{case}.npz"], _encode_npz, _decode_npz),
    "safetensors": Storage(
        ".safetensors", lambda case, names: [f"{case}.safetensors"], _encode_safetensors, _decode_safetensors
    ),
    "raw": Storage("", lambda case, names: [f"{case}/{name}.bin" for name in names], _encode_raw, _decode_raw),
    "onnx": Storage("", vectors_onnx.paths, vectors_onnx.encode, _decode_onnx),
}
