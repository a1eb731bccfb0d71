"""What the interactive page loads: Python and NumPy as WebAssembly, fetched once, and refattn's own files.

Nothing of it is in the repository. `npm pack` fetches two packages of pinned versions, and of every file taken from
them the SHA-256 is checked. Where that is not possible the page says so, and why.
"""

import json
import shutil
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from npm import NotFetched, files

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "refattn"
FILES = "page.css", "page.js", "page.py", "worker.js"

PYODIDE = "pyodide@0.29.5"  # CPython 3.13, MPL-2.0
NUMPY = "@bentopdf/pymupdf-wasm@0.11.16"  # carries Pyodide's own wheel of NumPy, BSD-3-Clause: the only file taken
WHEEL = "assets/numpy-2.2.5-cp313-cp313-pyodide_2025_0_wasm32.whl"  # 2025_0 is the ABI of Pyodide 0.28 and 0.29
SHA256 = {
    "pyodide.js": "7f832a350240263d9946a9c3c877f7bcdab6c37d6dc65f72cd3be5905dca62dd",
    "pyodide.asm.js": "356c42f69e1695397e9d8670bd3c2e678248cde76e18bdae1731e848537b47d7",
    "pyodide.asm.wasm": "54309a5a2cfd757b1f0fdbc9093c92503f7b341500110329d932487183912718",
    "python_stdlib.zip": "831fd1e535084b972f87c6a35275de3d236efd5166f5e77ce89497710635e73c",
    "pyodide-lock.json": "14d2c2dba101277999e17135e653d8f15389ad1437f53eae213bf0c3cdff723d",
    WHEEL: "125230b4c3ecd08803e5c43f1162e017c0718d9f253146225a705a952b9c16c2",
}

# SciPy is larger than Python and NumPy together, and refattn's mechanisms need one function of it.
SCIPY = """import math

import numpy as np

erfc = np.vectorize(math.erfc, otypes=[float])
"""


def build(outdir, npm="npm"):
    """Put everything that <outdir>/interactive/index.html loads next to it; None, or why Python is missing there."""
    page = Path(outdir) / "interactive"
    engine = page / "engine"
    engine.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(HERE / name, page / name)
    _pack_refattn(engine / "refattn.zip")
    state = engine / "state.json"
    pinned = {"pyodide": PYODIDE, "numpy": Path(WHEEL).name, "sha256": SHA256}
    if state.exists() and json.loads(state.read_text()) == {**pinned, "missing": None}:
        return None
    try:
        _fetch(engine, npm)
        missing = None
    except NotFetched as error:
        missing = str(error)
    state.write_text(json.dumps({**pinned, "missing": missing}, indent=1))
    return missing


def _pack_refattn(path):
    """The mechanisms, the primitives, what they import, and the complex step."""
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("attention/**/*.py"), *PACKAGE.glob("primitives/*.py")]
    files += [PACKAGE / "oracle" / "__init__.py", PACKAGE / "oracle" / "derivatives.py"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(files):
            archive.write(file, file.relative_to(PACKAGE.parent))
        archive.writestr("scipy/__init__.py", "")
        archive.writestr("scipy/special.py", SCIPY)


def _fetch(engine, npm):
    for package, names in ((PYODIDE, [n for n in SHA256 if n != WHEEL]), (NUMPY, [WHEEL])):
        for name, content in files(package, {name: SHA256[name] for name in names}, npm).items():
            (engine / Path(name).name).write_bytes(content)
    wheel = engine / Path(WHEEL).name
    _slim(wheel, engine / "numpy.zip")
    wheel.unlink()


def _slim(wheel, path):
    """NumPy without its tests, headers and stubs, compressed: 2.7 MB of 11.7."""
    needless = "/tests/", "/include/", "/f2py/", ".pyi", ".a"
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            if not any(part in name if part.endswith("/") else name.endswith(part) for part in needless):
                archive.writestr(name, whole.read(name))
