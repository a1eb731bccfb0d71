"""Golden vectors: what is written is read back, what is damaged is refused, and verify accepts and rejects."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import refattn
from refattn import report, vectors
from refattn.__main__ import main
from refattn.attention.dot_product import dot_product_attention, scaled_dot_product
from refattn.attention.dot_product.dot_product_attention import Convention
from refattn.core import Call
from refattn.oracle.arithmetic import BFLOAT16, FLOAT16, FLOAT32

STORAGES = "npz", "safetensors", "raw"
EXAMPLES = Path(refattn.__file__).parent / "examples"


@pytest.fixture(params=STORAGES)
def storage(request):
    if request.param == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'refattn[vectors]'")
    return request.param


@pytest.fixture(scope="module")
def cached_folders(tmp_path_factory):
    """folders(storage) -> vectors of scaled_dot_product, of gaussian and one_hot numbers, for float32 and bfloat16."""
    made = {}

    def folder(storage):
        if storage not in made:
            path = tmp_path_factory.mktemp("vectors") / storage
            made[storage] = vectors.write(
                path, "scaled_dot_product", families=["gaussian", "one_hot"], examples=2, storage=storage,
                arithmetics=("float32", "bf16_flash"),
            )  # fmt: skip
        return made[storage]

    return folder


@pytest.fixture
def folder(cached_folders, storage, tmp_path):
    """One that a test may damage."""
    return Path(shutil.copytree(cached_folders(storage), tmp_path / "vectors"))


@pytest.fixture
def npz_folder(cached_folders, tmp_path):
    return Path(shutil.copytree(cached_folders("npz"), tmp_path / "vectors"))


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def put(folder, name, content):
    """A file of another content, with the right size and sha256 in the manifest: what lies is the content."""
    (folder / name).write_bytes(content)

    def change(manifest):
        (files,) = [case["files"] for case in manifest["cases"] if name in case["files"]]
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit_manifest(folder, change)


def npz(arrays, **options):
    file = io.BytesIO()
    (np.savez_compressed if options.get("compressed") else np.savez)(file, **arrays)
    return file.getvalue()


# --- round trips -------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_the_reference_says(folder):
    """The outputs and gradients in the file are those of another run of the textbook file on the inputs in it."""
    read = vectors.read(folder)
    assert list(read.cases) == ["000_gaussian", "001_one_hot"] and read.manifest["mechanism"] == "scaled_dot_product"
    for case in read.cases.values():
        a = case.arrays
        y, saved = scaled_dot_product.forward(
            *(a["in/q"], a["in/k"], a["in/v"]), mask=a.get("option/mask"), **{
                name: case.options[name] for name in ("scale", "is_causal")
            }
        )  # fmt: skip
        grads = scaled_dot_product.backward(a["in/dout"], saved)
        for name, expected in {"out/out": y, **dict(zip(("grad/dq", "grad/dk", "grad/dv"), grads))}.items():
            np.testing.assert_allclose(a[name], expected, rtol=1e-12, atol=1e-13)
            for arithmetic in "float32", "bf16_flash":
                bound, worst = (a[f"{kind}/{arithmetic}/{name.split('/')[1]}"] for kind in ("bound", "worst"))
                assert bound.shape == worst.shape == expected.shape and (bound <= worst).all() and (bound >= 0).all()
                assert bound.max() > 0
            assert a[f"bound/float32/{name.split('/')[1]}"].max() < a[f"bound/bf16_flash/{name.split('/')[1]}"].max()
        assert case.family in case.name and case.outside == {}


def test_storages_hold_the_same(cached_folders):
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'refattn[vectors]'")
    first, *others = (vectors.read(cached_folders(storage)).cases for storage in STORAGES)
    assert {x.dtype for case in first.values() for x in case.arrays.values()} >= {np.dtype(np.float64)}
    for other in others:
        assert first.keys() == other.keys()
        for case, same in zip(first.values(), other.values()):
            assert case[:4] == same[:4] and case.arrays.keys() == same.arrays.keys()
            for name, x in case.arrays.items():
                assert x.dtype == same.arrays[name].dtype and np.array_equal(x, same.arrays[name])


def test_options_of_every_kind_come_back(tmp_path, storage):
    """All families of dot_product_attention: masks, lengths, windows, dropout; and what is written is the same."""
    arithmetics = "float32", "bf16_flash", "f16_eager"
    write = dict(examples=24, seed=3, storage=storage, arithmetics=arithmetics)
    one = vectors.write(tmp_path / "one", "dot_product_attention", **write)
    two = vectors.write(tmp_path / "two", "dot_product_attention", **write)
    same = {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()}
    assert same == {p.relative_to(two): p.read_bytes() for p in two.rglob("*") if p.is_file()}
    cases = vectors.read(one).cases.values()
    dtypes = {name: x.dtype for case in cases for name, x in case.arrays.items()}
    assert dtypes["option/attn_mask"] == np.bool_ and dtypes["option/kv_seqlens"] == np.int64
    for case in cases:
        a, names = case.arrays, ("q", "k", "v", "attn_bias", "sinks")
        options = {n.partition("/")[2]: x for n, x in a.items() if n.startswith("option/")} | case.options
        options["window"] = options["window"] and tuple(options["window"])
        if options["convention"] is not None:
            answers = {name: -np.inf if x == "-inf" else x for name, x in options["convention"].items()}
            options["convention"] = Convention(**answers | {"softmax_precision": None})
        out, _ = dot_product_attention.forward(*(a.get(f"in/{name}") for name in names), **options)
        y, lse = out[:2] if options["return_lse"] else (out, None)
        assert ("out/lse" in a) == options["return_lse"]
        np.testing.assert_allclose(a["out/out"], y, rtol=1e-10, atol=1e-12)
        if lse is not None:
            np.testing.assert_allclose(a["out/lse"], lse, rtol=1e-10, atol=1e-12)
        assert {f"grad/d{n}" for n in names if f"in/{n}" in a} == {n for n in a if n.startswith("grad/")}


@pytest.mark.parametrize("like", ["multi_head", "linear", "squeeze_excitation", "batch_norm", "additive"])
def test_other_mechanisms(tmp_path, storage, like):
    folder = vectors.write(tmp_path / "v", like, examples=3, storage=storage, arithmetics=["float32"])
    for case in vectors.read(folder).cases.values():
        outputs = [name for name in case.arrays if name.startswith(("out/", "grad/"))]
        assert any(name.startswith("grad/d") for name in outputs)
        assert {f"bound/float32/{name.partition('/')[2]}" for name in outputs} <= set(case.arrays)
        assert not any(name.startswith("worst/") for name in case.arrays)  # of noise nothing is the worst


def test_numbers_are_held_by_all_formats(tmp_path):
    folder = vectors.write(tmp_path / "v", "dot_product_attention", arithmetics=["bf16_flash", "f16_flash", "float32"])
    for case in vectors.read(folder).cases.values():
        for name, x in case.arrays.items():
            if name.startswith("in/") and x.dtype == np.float64:
                x = x[np.isfinite(x)]
                assert np.array_equal(x, x.astype(np.float16))
                assert (np.float32(x).view(np.uint32) & 0xFFFF == 0).all() and np.array_equal(x, np.float32(x))


def test_the_largest_number_that_all_formats_hold():
    x = np.array([1e6, -65504.0, 65504.0, 1 / 3, np.inf, np.nan])
    (y,) = vectors._held_by_all(Call((x,), {}), [FLOAT32, FLOAT16, BFLOAT16]).args
    np.testing.assert_array_equal(y, [65280, -65280, 65280, 171 / 512, np.inf, np.nan])


def test_forward_only(tmp_path):
    folder = vectors.write(tmp_path / "v", "scaled_dot_product", examples=2, gradients=False)
    for case in vectors.read(folder).cases.values():
        assert "in/dout" not in case.arrays and not any(name.startswith("grad/") for name in case.arrays)


# --- writing is whole or not at all ------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_nothing(tmp_path, storage, monkeypatch):
    done, decode = [], vectors._write_case

    def interrupted(*args):
        if done:
            raise KeyboardInterrupt
        done.append(decode(*args))
        return done[-1]

    monkeypatch.setattr(vectors, "_write_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vectors.write(tmp_path / "v", "linear", examples=3, storage=storage)
    assert done and list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_vectors(npz_folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in npz_folder.iterdir()}
    replace = os.replace

    def interrupted(source, target):
        if Path(target) == npz_folder and Path(source).name == "new":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(vectors.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vectors.write(npz_folder, "linear", examples=1)
    assert {p.name: p.read_bytes() for p in npz_folder.iterdir()} == before
    assert list(npz_folder.parent.iterdir()) == [npz_folder]


def test_vectors_are_replaced(npz_folder):
    vectors.write(npz_folder, "linear", examples=1, storage="raw")
    assert vectors.read(npz_folder).manifest["mechanism"] == "linear"
    assert list(npz_folder.parent.iterdir()) == [npz_folder]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "v").mkdir()
    assert len(vectors.read(vectors.write(tmp_path / "v", "linear", examples=1)).cases) == 1


def test_nothing_else_is_overwritten(npz_folder, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=r"home: not overwritten"):
        vectors.write(tmp_path / "home", "linear", examples=1)
    (npz_folder / "outputs.npz").write_text("hours")  # beside vectors
    with pytest.raises(ValueError, match=r"not overwritten.*outputs.npz: not in manifest.json"):
        vectors.write(npz_folder, "linear", examples=1)
    with pytest.raises(ValueError, match=r"thesis.txt: is there and no folder"):
        vectors.write(tmp_path / "home" / "thesis.txt", "linear", examples=1)
    (tmp_path / "link").symlink_to(npz_folder)
    with pytest.raises(ValueError, match="link: is there and no folder"):
        vectors.write(tmp_path / "link", "linear", examples=1)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        vectors.write(tmp_path / "nowhere" / "v", "linear", examples=1)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years" and (npz_folder / "outputs.npz").exists()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"families": ["gausian"]}, "families has 'gausian', expected some of gaussian"),
        ({"families": ["poisoned_keys"]}, "families has 'poisoned_keys'"),
        ({"families": ["nan_query"]}, "families has 'nan_query'"),
        ({"arithmetics": ["bf17"]}, "arithmetics has 'bf17', expected some of float64"),
        ({"arithmetics": []}, "arithmetics is empty"),
        ({"storage": "pickle"}, "storage is 'pickle', expected one of npz, safetensors, raw"),
    ],
)
def test_bad_arguments(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        vectors.write(tmp_path / "v", "dot_product_attention", **wrong)
    assert list(tmp_path.iterdir()) == []


# --- reading refuses what is damaged ------------------------------------------------------------------------------


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")


def test_a_flipped_bit(folder):
    for file in files(folder)[:5]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file.name}: its sha256 is .*, expected"):
            vectors.read(folder)
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    vectors.read(folder)


def test_a_truncated_file(folder):
    file = files(folder)[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file.name}: has \d+ bytes, expected \d+"):
        vectors.read(folder)


def test_a_truncated_file_that_the_manifest_vouches_for(folder):
    file = files(folder)[0]
    put(folder, file.relative_to(folder).as_posix(), file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{file.name}: .*expected"):
        vectors.read(folder)


def test_a_missing_file(folder):
    file = files(folder)[-1]
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name}: not there, expected a file"):
        vectors.read(folder)


def test_a_file_too_many(folder):
    for extra in folder / "notes.txt", folder / "empty" / "x.bin":
        extra.parent.mkdir(exist_ok=True)
        extra.write_text("")
        with pytest.raises(ValueError, match=rf"({extra.name}|empty): not in manifest.json"):
            vectors.read(folder)
        extra.unlink()


def test_a_link(folder, tmp_path):
    file = files(folder)[0]
    moved = file.rename(tmp_path / "elsewhere")
    file.symlink_to(moved)
    with pytest.raises(ValueError, match=f"{file.name}: not in manifest.json|{file.name}: .*expected"):
        vectors.read(folder)


ELSEWHERE = "../secret", "/etc/passwd", "in/../../secret", "a//b", ".hidden/x", "in/.x", "in\\q", ""


@pytest.mark.parametrize("name", ELSEWHERE)
def test_paths_that_lead_elsewhere(folder, name):
    def as_file(manifest):
        manifest["cases"][0]["files"][name] = {"bytes": 1, "sha256": "0" * 64}

    def as_array(manifest):
        manifest["cases"][0]["arrays"][name] = {"dtype": "bool", "shape": [1]}

    def as_case(manifest):
        manifest["cases"][0]["name"] = name

    for change in as_file, as_array, as_case:
        kept = (folder / "manifest.json").read_text()
        edit_manifest(folder, change)
        with pytest.raises(ValueError, match=r"manifest.json: .*expected (a path below|a name)"):
            vectors.read(folder)
        (folder / "manifest.json").write_text(kept)


LIES = {  # change of a case's arrays, and the words of the error
    "shape": (lambda a: a["in/q"]["shape"].reverse(), r"in/q is .*expected|has \d+ bytes, expected"),
    "size": (lambda a: a["in/q"]["shape"].append(2), r"in/q is .*expected|has \d+ bytes, expected"),
    "dtype": (lambda a: a["in/q"].update(dtype="float32"), r"in/q is .*expected|has \d+ bytes, expected"),
    "same size": (lambda a: a["in/q"].update(dtype="int64"), r"in/q is .*expected"),
    "unknown dtype": (lambda a: a["in/q"].update(dtype="object"), "in/q, dtype is 'object', expected one of float64"),
    "no dtype": (lambda a: a["in/q"].pop("dtype"), "in/q, dtype is None"),
    "a dtype that is no word": (lambda a: a["in/q"].update(dtype=["float64"]), r"in/q, dtype is \['float64'\]"),
    "absurd": (lambda a: a["in/q"].update(shape=[10**9, 10**9]), r"in/q, shape is .* expected an array of at most"),
    "negative": (lambda a: a["in/q"].update(shape=[-1, 4]), "in/q, shape is .* expected a list of sizes"),
    "fraction": (lambda a: a["in/q"].update(shape=[1.5]), "in/q, shape is .* expected a list of sizes"),
    "true": (lambda a: a["in/q"].update(shape=[True]), "in/q, shape is .* expected a list of sizes"),
    "no shape": (lambda a: a["in/q"].pop("shape"), "in/q, shape is None"),
    "deep": (lambda a: a["in/q"].update(shape=[1] * 99), "in/q, shape is .* expected a list of sizes"),
    "nothing": (lambda a: a.update({"in/q": None}), "in/q is None, expected dtype and shape"),
    "missing": (lambda a: a.pop("in/q"), "has 'in/q', expected|files is .*in/q.bin"),
    "extra": (lambda a: a.update({"in/x": a["in/q"]}), "lacks 'in/x', expected|files is .*in/x.bin"),
    "no bound": (lambda a: a.pop("bound/float32/dq"), "without bound/float32/dq|files is .*float32/dq.bin"),
    "bound": (lambda a: a["bound/float32/dq"].update(shape=[1]), "expected the same shape"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_about_arrays(folder, lie):
    change, words = LIES[lie]
    if lie in ("shape", "same size") and (folder / "000_gaussian").is_dir():
        pytest.skip("a .bin says neither dtype nor shape: only its size can contradict the manifest")
    edit_manifest(folder, lambda manifest: change(manifest["cases"][0]["arrays"]))
    with pytest.raises(ValueError, match=words) as error:
        vectors.read(folder)
    assert str(folder) in str(error.value)


MANIFESTS = {
    "no list": (lambda m: m.update(cases={}), "cases is {}, expected a list"),
    "no object": (lambda m: m["cases"].append(3), "cases is 3, expected objects"),
    "no name": (lambda m: m["cases"][0].pop("name"), "name is None"),
    "other version": (lambda m: m.update(version=2), "version is 2, expected 1"),
    "true for 1": (lambda m: m.update(version=True), "version is True, expected 1"),
    "other format": (lambda m: m.update(format="npm"), "format is 'npm', expected 'refattn vectors'"),
    "other storage": (lambda m: m.update(storage="pickle"), "storage is 'pickle', expected one of npz"),
    "no arithmetics": (lambda m: m.update(arithmetics=[]), r"arithmetics is \[\], expected names"),
    "twice": (lambda m: m["cases"].append(m["cases"][0]), r"cases is \['000_gaussian'.*expected every name"),
    "no files": (lambda m: m["cases"][0].update(files={}), "files is .*expected those of"),
    "large": (lambda m: next(iter(m["cases"][0]["files"].values())).update(bytes=10**20), "bytes is 1.*, expected at"),
    "no hash": (lambda m: next(iter(m["cases"][0]["files"].values())).update(sha256="x"), "expected 64 hexadecimal"),
    "no pair": (lambda m: m["cases"][0]["files"].update({next(iter(m["cases"][0]["files"])): 1}), "expected bytes and"),
}


@pytest.mark.parametrize("lie", MANIFESTS)
def test_a_manifest_that_is_none(folder, lie):
    change, words = MANIFESTS[lie]
    edit_manifest(folder, change)
    with pytest.raises(ValueError, match=f"manifest.json: .*{words}"):
        vectors.read(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\udcff", '{"format": NaN}'])
def test_a_manifest_that_is_no_json(npz_folder, text):
    (npz_folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest.json: .*expected"):
        vectors.read(npz_folder)


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match=r"manifest.json: not there, expected"):
        vectors.read(tmp_path / "v")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_nothing_is_unpickled(npz_folder):
    arrays = dict(np.load(npz_folder / "000_gaussian.npz"))
    file = io.BytesIO()
    np.savez(file, **arrays | {"in/q": np.array([Bomb()], object)}, allow_pickle=True)
    put(npz_folder, "000_gaussian.npz", file.getvalue())
    with pytest.raises(ValueError, match=r"000_gaussian.npz: .*in/q.npy has dtype 'object'.*expected an npz"):
        vectors.read(npz_folder)


def test_an_npz_file_that_lies(npz_folder):
    good = npz_folder / "000_gaussian.npz"
    arrays, content = dict(np.load(good)), good.read_bytes()
    q = arrays["in/q"]

    def member(name, data):
        file = io.BytesIO(npz({n: x for n, x in arrays.items() if f"{n}.npy" != name}))
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(name, data)
        return file.getvalue()

    npy = io.BytesIO()
    np.save(npy, q)
    huge = npy.getvalue().replace(str(q.shape).encode(), b"(99999999999,)".ljust(len(str(q.shape))))
    lies = {
        "extra": (npz(arrays | {"in/x": q}), "it has 'in/x'"),
        "missing": (npz({n: x for n, x in arrays.items() if n != "in/q"}), "it lacks 'in/q'"),
        "shape": (npz(arrays | {"in/q": q[..., None]}), "in/q is float64 .*expected float64"),
        "dtype": (npz(arrays | {"in/q": np.float32(q)}), "in/q is float32 .*expected float64"),
        "words": (npz(arrays | {"in/q": np.full(q.shape, "x")}), "has dtype '<U1'"),
        "no array": (member("in/q.npy", b"not an array"), "magic"),
        "huge": (member("in/q.npy", huge), "bytes, but"),
        "too short": (member("in/q.npy", npy.getvalue()[:-8]), "bytes, but"),
        "too long": (member("in/q.npy", npy.getvalue() + b"x"), "bytes, but"),
        "no zip": (b"PK" + bytes(100), "BadZipFile"),
        "empty": (b"", "BadZipFile"),
    }
    with pytest.warns(UserWarning, match="Duplicate name"):
        file = io.BytesIO(content)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("in/q.npy", npy.getvalue())
    lies["twice"] = file.getvalue(), "is there twice"
    for lie, (data, words) in lies.items():
        put(npz_folder, good.name, data)
        with pytest.raises(ValueError, match=rf"000_gaussian.npz: .*{words}"):
            vectors.read(npz_folder)
            pytest.fail(lie)
    put(npz_folder, good.name, npz(arrays, compressed=True))
    assert np.array_equal(vectors.read(npz_folder).cases["000_gaussian"].arrays["in/q"], q)


def test_what_lies_in_a_file_does_not_flood_the_terminal(npz_folder):
    """zipfile quotes the name in a header, which may be all of the file."""
    good = npz_folder / "000_gaussian.npz"
    content = bytearray(good.read_bytes())
    content[26:28] = b"\xff\xff"  # the length of the first name
    put(npz_folder, good.name, bytes(content))
    with pytest.raises(ValueError, match=r"000_gaussian.npz: BadZipFile: File name in directory") as error:
        vectors.read(npz_folder)
    assert len(str(error.value)) < 300 + len(str(npz_folder)) and str(error.value).isprintable()


def test_an_npz_member_of_another_checksum(npz_folder):
    good = npz_folder / "000_gaussian.npz"
    content = bytearray(good.read_bytes())
    q = np.load(good)["in/q"].tobytes()
    content[bytes(content).index(q)] ^= 1
    put(npz_folder, good.name, bytes(content))
    with pytest.raises(ValueError, match=r"000_gaussian.npz: BadZipFile: Bad CRC-32.*expected"):
        vectors.read(npz_folder)


def test_a_safetensors_file_that_lies(cached_folders, tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    folder = Path(shutil.copytree(cached_folders("safetensors"), tmp_path / "v"))
    name = "000_gaussian.safetensors"
    content = (folder / name).read_bytes()
    arrays = numpy.load(content)
    q = arrays["in/q"]
    lies = {
        "extra": (numpy.save(arrays | {"in/x": q}), "it has 'in/x'"),
        "missing": (numpy.save({n: x for n, x in arrays.items() if n != "in/q"}), "it lacks 'in/q'"),
        "shape": (numpy.save(arrays | {"in/q": q[..., None]}), "in/q is float64 .*expected float64"),
        "dtype": (numpy.save(arrays | {"in/q": np.float32(q)}), "in/q is float32 .*expected float64"),
        "unknown": (numpy.save(arrays | {"in/q": np.uint8(q)}), "'in/q' has dtype 'U8'"),
        "header": (b"\xff" * 8 + content[8:], "expected a safetensors file"),
        "empty": (b"", "expected a safetensors file"),
    }
    for lie, (data, words) in lies.items():
        put(folder, name, data)
        with pytest.raises(ValueError, match=rf"{name}: .*{words}"):
            vectors.read(folder)
            pytest.fail(lie)


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"need safetensors .*pip install 'refattn\[vectors\]'"):
        vectors.write(tmp_path / "v", "linear", examples=1, storage="safetensors")
    assert list(tmp_path.iterdir()) == []


# --- verify ------------------------------------------------------------------------------------------------------


def in_float32(folder):
    """{case: {name: array}}: what the textbook file makes of the inputs in float32."""
    found = {}
    for name, case in vectors.read(folder).cases.items():
        a = {n: np.float32(x) if x.dtype == np.float64 else x for n, x in case.arrays.items()}
        options = {n: case.options[n] for n in ("scale", "is_causal")}
        y, saved = scaled_dot_product.forward(a["in/q"], a["in/k"], a["in/v"], mask=a.get("option/mask"), **options)
        assert y.dtype == np.float32
        grads = scaled_dot_product.backward(a["in/dout"], saved)
        found[name] = {"out/out": y} | dict(zip(("grad/dq", "grad/dk", "grad/dv"), grads))
    return found


def put_outputs(folder, storage, outputs):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for case, arrays in outputs.items():
        if storage == "npz":
            np.savez(folder / f"{case}.npz", **arrays)
        elif storage == "safetensors":
            import safetensors.numpy

            safetensors.numpy.save_file(arrays, folder / f"{case}.safetensors")
        else:
            for name, x in arrays.items():
                (folder / case / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / case / f"{name}.bin").write_bytes(np.ascontiguousarray(x).tobytes())
    return folder


def test_float32_conforms(folder, storage, tmp_path):
    """And the same outputs in float64 do, in whatever storage the vectors are."""
    outputs = in_float32(folder)
    result = vectors.verify(folder, put_outputs(tmp_path / "o", storage, outputs), "float32")
    assert result.ok and len(result.verdicts) == 8 and all(v.size and v.ratio <= 1 for v in result.verdicts)
    assert max(v.ratio for v in result.verdicts) > 1e-4  # it is not compared with itself
    assert str(result).startswith("outputs like scaled_dot_product, arithmetic float32: conforms (2 examples)\n  ok")
    wide = {case: {n: np.float64(x) for n, x in arrays.items()} for case, arrays in outputs.items()}
    assert vectors.verify(folder, put_outputs(tmp_path / "o", "raw", wide), "float32").ok
    assert vectors.verify(folder, put_outputs(tmp_path / "o", "npz", wide), "bf16_flash").ok


@pytest.mark.parametrize("name", ["out/out", "grad/dq", "grad/dk", "grad/dv"])
def test_one_element_beyond_its_bound_is_rejected(folder, storage, tmp_path, name):
    outputs, case = in_float32(folder), "001_one_hot"
    arrays = vectors.read(folder).cases[case].arrays
    bound, index = arrays[f"bound/float32/{name.partition('/')[2]}"], tuple(n // 2 for n in arrays[name].shape)
    for times, conforms in (0.9, True), (1.1, False):
        changed = np.float64(outputs[case][name])
        changed[index] = arrays[name][index] + times * bound[index]
        result = vectors.verify(
            folder, put_outputs(tmp_path / "o", storage, outputs | {case: outputs[case] | {name: changed}}), "float32"
        )
        wrong = [v for v in result.verdicts if not v.conforms]
        assert result.ok == conforms and len(wrong) == (not conforms)
        if wrong:
            assert (wrong[0].name, wrong[0].example, wrong[0].index, wrong[0].outside) == (name, case, index, 1)
            assert "DIFFERS" in str(result) and f"in {case}" in str(result) and "so in 1 examples" in str(result)


def test_the_worst_case_decides_between_bug_and_likely(npz_folder, tmp_path):
    outputs, case = in_float32(npz_folder), "000_gaussian"
    arrays = vectors.read(npz_folder).cases[case].arrays
    assert (arrays["bound/float32/dk"] < arrays["worst/float32/dk"]).all()
    for kind, beyond in ("BUG p < 1e-6", "bound"), ("BUG", "worst"):
        changed = arrays["grad/dk"].copy()
        changed.flat[0] += 1.01 * arrays[f"{beyond}/float32/dk"].flat[0]
        put_outputs(tmp_path / "o", "npz", outputs | {case: outputs[case] | {"grad/dk": changed}})
        result = vectors.verify(npz_folder, tmp_path / "o", "float32")
        assert [v.kind for v in result.verdicts if not v.conforms] == [kind]


def test_nan_and_shapes_and_dtypes_fail(npz_folder, tmp_path):
    outputs, case = in_float32(npz_folder), "000_gaussian"
    y = outputs[case]["out/out"]
    nan, inf = y.copy(), y.copy()
    nan.flat[-1], inf.flat[0] = np.nan, np.inf
    for wrong, words in [
        (nan, "nan at"),
        (inf, "inf at"),
        (y[None], "has shape"),
        (y[..., :-1], "has shape"),
        (np.int64(y), "has dtype int64, expected floating point"),
        (None, "is missing: nothing of it in"),
    ]:
        changed = {n: x for n, x in (outputs[case] | {"out/out": wrong}).items() if x is not None}
        put_outputs(tmp_path / "o", "npz", outputs | {case: changed})
        result = vectors.verify(npz_folder, tmp_path / "o", "float32")
        (verdict,) = [v for v in result.verdicts if not v.conforms]
        assert not result.ok and verdict.name == "out/out" and words in str(verdict)


def test_an_output_of_another_shape_is_not_read(npz_folder, tmp_path, monkeypatch):
    """It may be as large as somebody likes, and compressed to nothing."""
    outputs, read = in_float32(npz_folder), []
    outputs["000_gaussian"]["out/out"] = np.zeros(10**6)
    put_outputs(tmp_path / "o", "npz", outputs)
    original = zipfile.ZipFile.read

    def noted(archive, member):
        read.append(member.file_size)
        return original(archive, member)

    monkeypatch.setattr(zipfile.ZipFile, "read", noted)
    assert not vectors.verify(npz_folder, tmp_path / "o", "float32").ok
    assert read and max(read) < 10**6


def test_nan_is_right_where_it_is_expected(tmp_path, monkeypatch):
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 8))
    q[1, 3, 2] = np.nan
    monkeypatch.setattr(vectors.inputs, "draw", lambda *_: Call((q, k, v), {"scale": None, "is_causal": False}))
    folder = vectors.write(tmp_path / "v", "scaled_dot_product", families=["gaussian"], examples=1)
    assert np.isnan(vectors.read(folder).cases["000_gaussian"].arrays["out/out"]).sum() == 8
    outputs = in_float32(folder)
    assert vectors.verify(folder, put_outputs(tmp_path / "o", "npz", outputs), "float32").ok
    filled = {case: {n: np.nan_to_num(x) for n, x in arrays.items()} for case, arrays in outputs.items()}
    assert not vectors.verify(folder, put_outputs(tmp_path / "o", "npz", filled), "float32").ok


def test_a_missing_case_is_four_failures(npz_folder, tmp_path):
    outputs = in_float32(npz_folder)
    outputs.pop("001_one_hot")
    result = vectors.verify(npz_folder, put_outputs(tmp_path / "o", "npz", outputs), "float32")
    wrong = [v for v in result.verdicts if not v.conforms]
    assert not result.ok and len(wrong) == 4 and {v.example for v in wrong} == {"001_one_hot"}
    assert not vectors.verify(npz_folder, put_outputs(tmp_path / "o", "npz", {}), "float32").ok


def test_an_output_that_was_not_asked_for(npz_folder, tmp_path):
    outputs = in_float32(npz_folder)
    outputs["000_gaussian"] |= {"grad/dQ": outputs["000_gaussian"]["grad/dq"], "in/q": np.zeros(1)}
    result = vectors.verify(npz_folder, put_outputs(tmp_path / "o", "npz", outputs), "float32")
    assert [(v.name, "not asked for" in v.problem) for v in result.verdicts if not v.conforms] == [("'grad/dQ'", True)]


def test_bfloat16_in_safetensors(cached_folders, tmp_path):
    """A file as torch writes it, here by hand: NumPy has no bfloat16."""
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'refattn[vectors]'")
    folder = cached_folders("npz")
    (tmp_path / "o").mkdir()
    for case, (*_, arrays) in vectors.read(folder).cases.items():
        header, data = {}, b""
        for name in "out/out", "grad/dq", "grad/dk", "grad/dv":
            bits = np.float32(arrays[name]).view(np.uint32)
            halves = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()  # to nearest, ties to even
            place = [len(data), len(data) + len(halves)]
            header[name] = {"dtype": "BF16", "shape": arrays[name].shape, "data_offsets": place}
            data += halves
        text = json.dumps(header).encode()
        (tmp_path / "o" / f"{case}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert vectors.verify(folder, tmp_path / "o", "bf16_flash").ok
    assert not vectors.verify(folder, tmp_path / "o", "float32").ok


def test_outside_the_model_is_no_verdict(tmp_path, monkeypatch):
    """Scores overflow float16: in it nothing is judged, in float32 all is."""
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 8))
    monkeypatch.setattr(vectors.inputs, "draw", lambda *_: Call((300 * q, 300 * k, v), {}))
    folder = vectors.write(
        tmp_path / "v", "dot_product_attention", families=["gaussian"], examples=1, arithmetics=["f16_eager", "float32"]
    )
    case = vectors.read(folder).cases["000_gaussian"]
    assert list(case.outside) == ["f16_eager"] and not any("f16_eager" in name for name in case.arrays)
    given = {name: x for name, x in case.arrays.items() if name.startswith(("out/", "grad/"))}
    put_outputs(tmp_path / "o", "npz", {"000_gaussian": given})
    assert vectors.verify(folder, tmp_path / "o", "float32").ok
    result = vectors.verify(folder, tmp_path / "o", "f16_eager")
    assert not result.ok and "NOT JUDGED" in str(result) and "may overflow float16" in str(result)


def test_verify_refuses(npz_folder, tmp_path):
    with pytest.raises(ValueError, match=r"arithmetic is 'float64', expected one that .* float32, bf16_flash"):
        vectors.verify(npz_folder, tmp_path, "float64")
    with pytest.raises(ValueError, match="is the folder of the vectors"):
        vectors.verify(npz_folder, npz_folder / ".." / npz_folder.name, "float32")
    with pytest.raises(ValueError, match="o: no such folder"):
        vectors.verify(npz_folder, tmp_path / "o", "float32")
    outputs = in_float32(npz_folder)
    put_outputs(tmp_path / "o", "raw", outputs)
    path = tmp_path / "o" / "000_gaussian" / "out" / "out.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"out.bin: has \d+ bytes, expected \d+"):
        vectors.verify(npz_folder, tmp_path / "o", "float32")
    np.savez(tmp_path / "o" / "000_gaussian.npz", **outputs["000_gaussian"])
    with pytest.raises(ValueError, match=r"has 000_gaussian.npz and 000_gaussian, expected one of them"):
        vectors.verify(npz_folder, tmp_path / "o", "float32")
    put_outputs(tmp_path / "o", "npz", outputs)
    (tmp_path / "o" / "000_gaussian.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"000_gaussian.npz: BadZipFile"):
        vectors.verify(npz_folder, tmp_path / "o", "float32")
    files(npz_folder)[0].write_bytes(b"")
    with pytest.raises(ValueError, match=r"000_gaussian.npz: has 0 bytes"):
        vectors.verify(npz_folder, tmp_path / "o", "float32")


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        try:
            status = main(["vectors", *map(str, arguments)])
        except SystemExit as end:  # argparse
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_command_line(cli, tmp_path):
    folder, outputs, record = tmp_path / "v", tmp_path / "o", tmp_path / "result.json"
    options = "--families", "gaussian,low_entropy", "--examples", 3, "--seed", 5, "--arithmetics", "float32,bf16_flash"
    status, out, err = cli("write", folder, "--like", "scaled_dot_product", *options, "--format", "raw")
    assert (status, out, err) == (0, f"3 cases of scaled_dot_product in {folder}\n", "")
    manifest = vectors.read(folder).manifest
    assert (manifest["seed"], manifest["storage"], manifest["arithmetics"]) == (5, "raw", ["float32", "bf16_flash"])
    source = Path(scaled_dot_product.__file__).read_bytes()
    assert manifest["source_sha256"] == hashlib.sha256(source).hexdigest()
    put_outputs(outputs, "npz", in_float32(folder))
    status, out, err = cli("verify", folder, outputs, "--arithmetic", "float32", "--json", record)
    assert status == 0 and err == "" and "conforms (3 examples)" in out
    assert json.loads(record.read_text())["ok"] is True
    put_outputs(outputs, "npz", {})
    status, out, _ = cli("verify", folder, outputs, "--arithmetic", "float32", "--json", record)
    found = json.loads(record.read_text())
    assert status == 1 and "DIFFERS" in out and found["ok"] is False and len(found["verdicts"]) == 12


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("write", "v"), "--like"),
        (("write", "v", "--like", "scaled_dot_produkt"), "did you mean scaled_dot_product"),
        (("write", "v", "--like", "linear", "--families", "x"), "families has 'x'"),
        (("write", "v", "--like", "linear", "--arithmetics", "x"), "arithmetics has 'x'"),
        (("write", "v", "--like", "linear", "--format", "x"), "invalid choice"),
        (("write", "v", "--like", "linear", "--examples", "0"), "0 is less than 1"),
        (("write", "no/v", "--like", "linear"), "no such folder"),
        (("verify", "v", "o", "--arithmetic", "float32"), "manifest.json: not there"),
        (("verify", "v", "o", "--arithmetic", "float32", "--json", "no/x"), "--json: cannot write to no"),
        (("verify", "v", "o"), "--arithmetic"),
        ((), "required"),
    ],
)
def test_bad_use(cli, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = cli(*arguments)
    assert status == 2 and out == "" and words in err and "Traceback" not in err and list(tmp_path.iterdir()) == []


# --- readers without Python ------------------------------------------------------------------------------------------


@pytest.fixture(params=["c", "js"])
def reader(request, tmp_path):
    """The command of a reader."""
    if request.param == "js":
        if not shutil.which("node"):
            pytest.skip("node is not installed")
        return [shutil.which("node"), EXAMPLES / "read_vectors.js"]
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler, cc")
    program = tmp_path / "read_vectors"
    flags = "-O2", "-Wall", "-Wextra", "-Werror", "-o"
    subprocess.run([shutil.which("cc"), *flags, program, EXAMPLES / "read_vectors.c", "-lm"], check=True, timeout=60)
    return [program]


def test_readers(reader, tmp_path):
    """Every family conforms; what is changed beyond the bound is noticed; NaN passes where it is expected."""
    folder = vectors.write(tmp_path / "v", "scaled_dot_product", examples=22, storage="raw")
    cases = vectors.read(folder).cases
    given = [case.options["is_causal"] for case in cases.values()] + ["option/mask" in c.arrays for c in cases.values()]
    assert True in given[:22] and True in given[22:] and any(case.options["scale"] for case in cases.values())

    def run(case):
        ended = subprocess.run([*reader, folder, case], capture_output=True, text=True, timeout=60)
        assert ended.stderr == ""
        return ended.returncode, ended.stdout

    ratios = []
    for case in cases:
        status, out = run(case)
        assert status == 0 and out.startswith(f"{case}: worst error / bound ")
        ratios.append(float(out.split()[-1]))
    assert max(ratios) <= 1 and sum(r > 0 for r in ratios) > 15
    arrays = cases["000_gaussian"].arrays
    expected, bound = arrays["out/out"], arrays["bound/float32/out"]
    path = folder / "000_gaussian" / "out" / "out.bin"
    for wrong in 2.1 * bound.flat[-1], np.nan:
        changed = expected.copy()
        changed.flat[-1] += wrong
        path.write_bytes(changed.tobytes())
        status, out = run("000_gaussian")
        assert status == 1 and (float(out.split()[-1].replace("Infinity", "inf")) > 1)
    q, changed = arrays["in/q"].copy(), expected.copy()
    q.reshape(-1, q.shape[-1])[-1] = changed.reshape(-1, changed.shape[-1])[-1] = np.nan
    (folder / "000_gaussian" / "in" / "q.bin").write_bytes(q.tobytes())
    path.write_bytes(expected.tobytes())
    assert run("000_gaussian")[0] == 1
    path.write_bytes(changed.tobytes())
    assert run("000_gaussian")[0] == 0


def test_readers_say_how_they_are_used(reader):
    ended = subprocess.run([*reader, "nowhere", "x"], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and "nowhere" in ended.stderr


def test_text_is_folded_on_a_terminal(npz_folder, tmp_path):
    result = vectors.verify(npz_folder, put_outputs(tmp_path / "o", "npz", in_float32(npz_folder)), "float32")
    assert report.VERDICT.search(str(result))


# --- node tests of ONNX ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached_node_tests(tmp_path_factory):
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'refattn[onnx]'")
    path = tmp_path_factory.mktemp("onnx") / "vectors"
    families = ["gaussian", "empty_rows", "one_query", "tile_edges"]
    return vectors.write(path, "dot_product_attention", families=families, examples=12, storage="onnx")


@pytest.fixture
def node_tests(cached_node_tests, tmp_path):
    return Path(shutil.copytree(cached_node_tests, tmp_path / "vectors"))


def first(folder):
    return min(path for path in folder.iterdir() if path.is_dir())


def tensors(folder, kind):
    from onnx import numpy_helper

    files = sorted(folder.glob(f"{kind}_*.pb"), key=lambda path: int(path.stem.rpartition("_")[2]))
    return [numpy_helper.to_array(tensor(path)) for path in files]


def tensor(path):
    import onnx

    read = onnx.TensorProto()
    read.ParseFromString(path.read_bytes())
    return read


def by_reference(model, given):
    from onnx.reference import ReferenceEvaluator

    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, given)


def by_runtime(model, given):
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, given)


def evaluated(folder, outputs, run=by_reference):
    """What somebody who runs models makes of all node tests, as files of the same names."""
    import onnx
    from onnx import numpy_helper

    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        model = onnx.load(case / "model.onnx")
        onnx.checker.check_model(model)
        given = dict(zip([x.name for x in model.graph.input], tensors(case / "test_data_set_0", "input"), strict=True))
        found = run(model, given)
        expected = tensors(case / "test_data_set_0", "output")
        for y, due in zip(found, expected, strict=True):
            assert y.dtype == due.dtype == np.float32 and y.shape == due.shape
        for y, due in zip(found[1:], expected[1:]):  # the past and the new keys and values
            np.testing.assert_array_equal(y, due)
        target = outputs / case.name / "test_data_set_0"
        target.mkdir(parents=True)
        (target / "output_0.pb").write_bytes(numpy_helper.from_array(found[0]).SerializeToString())
    return outputs


def test_node_tests_are_read_by_onnx(node_tests):
    from onnx.backend.test import loader

    cases = {case.name: case for case in loader.load_model_tests(str(node_tests.parent), node_tests.name)}
    assert list(vectors.read(node_tests).cases) == sorted(cases) and len(cases) == 12
    for name, case in cases.items():
        assert Path(case.model_dir) == node_tests / name and (node_tests / name / "model.onnx").is_file()


def test_what_is_in_a_node_test(node_tests):
    """Inputs and outputs of the node are those of the reference, in float32."""
    past = 0
    for name, case in vectors.read(node_tests).cases.items():
        y = case.arrays["out/out"]
        assert y.dtype == np.float64
        np.testing.assert_array_equal(case.arrays["node/output_0"], y.astype(np.float32))
        np.testing.assert_array_equal(case.arrays["node/input_0"], case.arrays["in/q"])
        np.testing.assert_array_equal(
            tensors(node_tests / name / "test_data_set_0", "output")[0], case.arrays["node/output_0"]
        )
        options = {option: x for option, x in case.options.items() if not isinstance(x, (dict, list))}
        options |= {path.partition("/")[2]: x for path, x in case.arrays.items() if path.startswith("option/")}
        if isinstance(case.options.get("window"), list):
            options["window"] = tuple(case.options["window"])
        args = [case.arrays.get(f"in/{argument}") for argument in ("q", "k", "v", "attn_bias")]
        again, _ = dot_product_attention.forward(*args, **options)
        np.testing.assert_array_equal(again, y)
        past += "node/output_2" in case.arrays
    assert past, "no case has a past"


def test_the_reference_evaluator_conforms(node_tests, tmp_path):
    outputs = evaluated(node_tests, tmp_path / "outputs")
    result = vectors.verify(node_tests, outputs, "float32")
    assert not result.ok and {v.name for v in result.verdicts if not v.conforms} == {
        "grad/dq",
        "grad/dk",
        "grad/dv",
    } | {v.name for v in result.verdicts if v.name == "grad/dattn_bias"}, str(result)
    assert all(v.conforms for v in result.verdicts if v.name == "out/out"), str(result)


@pytest.mark.parametrize("run", [by_reference, by_runtime])
def test_gradients_lie_beside(node_tests, tmp_path, run):
    if run is by_runtime:
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'refattn[onnx]'")
    outputs = evaluated(node_tests, tmp_path / "outputs", run)
    for case in node_tests.iterdir():
        if case.is_dir():
            shutil.copytree(case / "arrays" / "grad", outputs / case.name / "arrays" / "grad")
    result = vectors.verify(node_tests, outputs, "float32")
    assert result.ok and {v.name for v in result.verdicts} >= {"out/out", "grad/dq", "grad/dk", "grad/dv"}, str(result)


@pytest.mark.parametrize("like", ["softmax", "layer_norm", "rms_norm", "rotary"])
def test_node_tests_of_other_operators(tmp_path, like):
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'refattn[onnx]'")
    folder = vectors.write(tmp_path / "vectors", like, examples=6, storage="onnx", gradients=False)
    outputs = evaluated(folder, tmp_path / "outputs")
    result = vectors.verify(folder, outputs, "float32")
    assert result.ok and result.cases == 6, str(result)
    case = next(path for path in outputs.iterdir())
    faulty = tensors(case / "test_data_set_0", "output")[0].copy()
    faulty.flat[-1] += 1e-3
    put_tensor(case / "test_data_set_0" / "output_0.pb", faulty)
    result = vectors.verify(folder, outputs, "float32")
    assert [v.example for v in result.verdicts if not v.conforms] == [case.name], str(result)


def put_tensor(path, x):
    from onnx import numpy_helper

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(x).SerializeToString())


def test_outputs_of_16_bits(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: pip install 'refattn[lowp]'")
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'refattn[onnx]'")
    arithmetics = "bf16_upcast", "f16_upcast"
    folder = vectors.write(
        tmp_path / "vectors", "softmax", examples=4, storage="onnx", gradients=False, arithmetics=arithmetics
    )
    for arithmetic, dtype in zip(arithmetics, (ml_dtypes.bfloat16, np.float16)):
        outputs = tmp_path / arithmetic
        for name, case in vectors.read(folder).cases.items():
            put_tensor(outputs / name / "output_0.pb", case.arrays["out/out"].astype(dtype))
        result = vectors.verify(folder, outputs, arithmetic)
        assert result.ok, str(result)
    assert not vectors.verify(folder, tmp_path / "bf16_upcast", "f16_upcast").ok


def test_what_a_node_cannot_say_is_counted(tmp_path, cli):
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'refattn[onnx]'")
    status, text, _ = cli("write", tmp_path / "v", "--like", "rotary", "--format", "onnx", "--examples", 6)
    left_out = vectors.read_manifest(tmp_path / "v")["left_out"]
    assert status == 0 and f"6 cases of rotary in {tmp_path / 'v'}" in text
    assert set(left_out) == {"an odd number of features", "a pairing that writes another order than it reads"}
    assert all(f"left out {count} calls: {reason}" in text and count > 0 for reason, count in left_out.items())


def test_a_mechanism_without_an_operator(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'refattn[onnx]'")
    with pytest.raises(ValueError, match="like is 'squeeze_excitation', expected one that has an operator of ONNX"):
        vectors.write(tmp_path / "v", "squeeze_excitation", storage="onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"node tests need onnx .*pip install 'refattn\[onnx\]'"):
        vectors.write(tmp_path / "v", "softmax", storage="onnx")
    assert not list(tmp_path.iterdir())


def lies():
    """{what is wrong: (change of a TensorProto, words)}."""
    return {
        "dims": (lambda t: t.dims.append(2), "bytes of data, expected"),
        "negative dims": (lambda t: t.dims.__setitem__(0, -1), "expected a shape"),
        "no data": (lambda t: t.ClearField("raw_data"), "has 0 numbers of data, expected"),
        "another type": (lambda t: setattr(t, "data_type", 8), "data_type is 8, expected one of FLOAT"),
        "external": (lambda t: setattr(t, "data_location", 1), "its data is in another file"),
        "a dtype that was not said": (lambda t: setattr(t, "data_type", 7), "is int64"),
    }


@pytest.mark.parametrize("lie", lies())
def test_a_tensor_that_lies(node_tests, lie):
    change, words = lies()[lie]
    path = first(node_tests) / "arrays" / "in" / "q.pb"
    changed = tensor(path)
    change(changed)
    put(node_tests, path.relative_to(node_tests).as_posix(), changed.SerializeToString())
    with pytest.raises(ValueError, match=words) as error:
        vectors.read(node_tests)
    assert first(node_tests).name in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"PK\x03\x04"])
def test_a_file_that_is_no_tensor(node_tests, content):
    name = f"{first(node_tests).name}/test_data_set_0/output_0.pb"
    put(node_tests, name, content)
    with pytest.raises(ValueError, match=r"output_0\.pb: .*expected"):
        vectors.read(node_tests)


def test_a_truncated_tensor(node_tests):
    name = f"{first(node_tests).name}/arrays/in/v.pb"
    put(node_tests, name, (node_tests / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"v\.pb: .*expected"):
        vectors.read(node_tests)


def test_a_changed_model(node_tests):
    path = first(node_tests) / "model.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.onnx: its sha256 is"):
        vectors.read(node_tests)


def test_two_outputs_of_one_case(node_tests, tmp_path):
    outputs = evaluated(node_tests, tmp_path / "outputs")
    case = next(path for path in outputs.iterdir())
    shutil.copy(case / "test_data_set_0" / "output_0.pb", case / "output_0.pb")
    with pytest.raises(ValueError, match="'out/out' is there twice"):
        vectors.verify(node_tests, outputs, "float32")
