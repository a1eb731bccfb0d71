"""The interactive page: what it computes in CPython, and the page itself in a browser, held against NumPy here."""

import contextlib
import functools
import http.server
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from refattn.core import leaves

HERE = Path(__file__).resolve().parents[1] / "docs" / "interactive"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"interactive_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page, build = loaded("page"), loaded("build")
NAMES = [row.name for row in page.ROWS]


def asked(name, **given):
    return json.loads(page.respond(json.dumps({"name": name, **given})))


def array(grid):
    return np.array([float(x) for x in grid["numbers"]]).reshape(grid["shape"])


# --- what the page computes -------------------------------------------------------------------------------------


def ran(code):
    """The names that the program of the page defines."""
    namespace = {}
    exec(code, namespace)
    return namespace


def agrees(answer):
    """Whether the program that the page shows gives the numbers that it shows, to the bit."""
    names = ran(answer["code"])
    shown = {grid["name"]: array(grid) for grid in [*answer["args"], answer["out"], *answer["grads"]]}
    shown["weights"] = array(answer["weights"])
    found = {answer["out"]["name"]: names[answer["out"]["name"]]}
    found["weights"] = getattr(names["saved"], answer["weights"]["name"])
    for name in {name.partition(".")[0] for name in shown} - found.keys():
        for path, leaf in leaves(names[name]):
            found[f"{name}.{path}" if path else name] = leaf
    return found.keys() == shown.keys() and all(np.array_equal(found[name], shown[name]) for name in shown)


@pytest.mark.parametrize("name", NAMES)
def test_the_program_shown_gives_the_numbers_shown(name):
    answer = asked(name)
    assert agrees(answer)
    left, right = answer["check"]
    assert left == pytest.approx(right, rel=1e-12) and abs(left) > 1e-3
    rng = np.random.default_rng(1)
    given = [rng.normal(size=len(grid["numbers"])).tolist() for grid in answer["args"]]
    dout = rng.normal(size=len(answer["out"]["numbers"])).tolist()
    changed = asked(name, arrays=given, cotangent=dout)
    assert agrees(changed) and changed["out"]["numbers"] != answer["out"]["numbers"]
    assert changed["cotangent"]["numbers"] == dout
    changed["grads"][0]["numbers"][0] += 1e-9
    assert not agrees(changed)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_heard(name):
    start = asked(name)
    for option in start["options"]:
        other = {"switch": lambda o: not o["value"], "slider": lambda o: o["range"][1]}.get(
            option["kind"], lambda o: [False] + o["value"]["numbers"][1:]
        )(option)
        changed = asked(name, options={option["name"]: other})
        assert agrees(changed) and changed["out"]["numbers"] != start["out"]["numbers"], option["name"]


def grads(name, **given):
    return {grid["name"]: array(grid) for grid in asked(name, **given)["grads"]}


def one_hot(size, at):
    return (np.arange(size) == at).astype(float).tolist()


def test_what_the_page_says_of_attention():
    found = grads("scaled_dot_product", cotangent=one_hot(8, 1))
    assert not found["dq"].any() and not found["dk"].any()
    assert found["dv"].ravel().tolist() == one_hot(8, 1)
    unticked = {"mask": [True] * 12 + [False] * 4}
    answer = asked("scaled_dot_product", options=unticked, cotangent=one_hot(8, 7))
    assert not array(answer["out"])[0, 3].any() and not any(array(grid).any() for grid in answer["grads"])
    assert all(grad.any() for grad in grads("scaled_dot_product", cotangent=one_hot(8, 7)).values())


def test_what_the_page_says_of_softmax():
    assert np.abs(grads("gumbel_softmax", cotangent=[3.0] * 4 + [0, 0, 0, 1.0])["ds"][0]).max() < 1e-15
    tied = [[2.0, 2.0, 0.0, -1.0, 0.5, 0.5, 3.0, 0.0]]
    cold, colder = (
        grads("gumbel_softmax", arrays=tied, cotangent=one_hot(8, at), options={"temperature": t})["ds"].ravel()[at]
        for at, t in ((0, 0.2), (0, 0.1))
    )
    assert colder / cold == pytest.approx(2, rel=1e-3) and colder == pytest.approx(0.25 / 0.1)
    won = grads("gumbel_softmax", cotangent=one_hot(8, 6), options={"temperature": 0.1})["ds"]
    assert 0 < np.abs(won).max() < 1e-9


def test_what_the_page_says_of_squeeze_excitation():
    for at in range(12):
        dx = np.abs(grads("squeeze_excitation", cotangent=one_hot(12, at))["dx"]).ravel()
        assert dx.argmax() == at and dx.all()
    arrays = [grid["numbers"] for grid in asked("squeeze_excitation")["args"]]
    arrays[3] = [-9.0, -9.0]
    found = grads("squeeze_excitation", arrays=arrays, cotangent=one_hot(12, 11))
    assert np.count_nonzero(found["dx"]) == 1 and np.count_nonzero(found.pop("dparams.b2")) == 1
    assert not any(grad.any() for name, grad in found.items() if name != "dx")


def test_what_json_has_no_number_for():
    answer = asked("scaled_dot_product", arrays=[[1e200] * 8, [1e200] * 8, [1.0] * 8])
    assert "nan" in answer["out"]["numbers"]


def test_captions_have_the_letters_of_the_signature():
    axes = {grid["name"]: grid["axes"] for grid in asked("squeeze_excitation")["args"]}
    assert axes["x"] == ["N", "C", "H", "W"] and axes["params.b1"] == ["R"]
    answer = asked("scaled_dot_product")
    assert answer["weights"]["axes"] == ["B", "Q", "K"] and asked("gumbel_softmax")["args"][0]["axes"] == []


def test_the_links_of_the_page_lead_to_mechanisms():
    generated = {"mechanisms": "attention/*", "primitives": "primitives"}
    for name in NAMES:
        folder, file = asked(name)["page"].split("/")
        assert list((build.PACKAGE).glob(f"{generated[folder]}/{file}.py"))


# --- what the page loads ----------------------------------------------------------------------------------------


def test_without_npm_the_page_says_so(tmp_path):
    missing = build.build(tmp_path, npm="no-such-npm")
    assert missing == "no-such-npm is not installed, which fetches pyodide@0.29.5"
    state = json.loads((tmp_path / "interactive" / "engine" / "state.json").read_text())
    assert state["missing"] == missing
    assert {file.name for file in (tmp_path / "interactive").iterdir()} == {*build.FILES, "engine"}


def test_a_file_with_another_hash_is_refused(tmp_path):
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\ncd "$5" && mkdir package && cd package && touch pyodide.js && cd .. &&\n'
                   "tar czf false.tgz package && echo false.tgz\n")  # fmt: skip
    npm.chmod(0o755)
    missing = build.build(tmp_path, npm=str(npm))
    assert missing.startswith("pyodide.js of pyodide@0.29.5 has the SHA-256 e3b0c442")
    assert not (tmp_path / "interactive" / "engine" / "pyodide.js").exists()


def test_the_files_of_refattn_suffice(tmp_path):
    """Only what is packed, and the stand-in for SciPy: no other module of refattn is needed."""
    build.build(tmp_path, npm="no-such-npm")
    with zipfile.ZipFile(tmp_path / "interactive" / "engine" / "refattn.zip") as archive:
        archive.extractall(tmp_path / "site")
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); sys.path.insert(0, {str(HERE)!r})\n"
    program += "import json, page, scipy, refattn\nassert 'site' in scipy.__file__ and 'site' in refattn.__file__\n"
    program += "print(*(page.respond(json.dumps({'name': row.name})) for row in page.ROWS), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [asked(name) for name in NAMES]


# --- the page in a browser --------------------------------------------------------------------------------------

BROWSERS = "chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome"
PATIENCE = 120  # seconds until Python is there; on an idle machine it takes 5


class Browser:
    """Chromium without a window, spoken to over a pair of pipes in its own protocol."""

    def __init__(self, path, profile):
        import fcntl  # not on Windows

        listen, self.send = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())
        self.receive, answer = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        self.pid = os.posix_spawn(
            path,
            [path, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
            os.environ,
            file_actions=[*null, (os.POSIX_SPAWN_DUP2, listen, 3), (os.POSIX_SPAWN_DUP2, answer, 4)],
        )  # fmt: skip
        os.close(listen)
        os.close(answer)
        self.count, self.buffer, self.thrown = 0, b"", []
        target = self("Target.createTarget", session=None, url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", session=None, targetId=target, flatten=True)["sessionId"]
        self("Page.enable")
        self("Runtime.enable")

    def __call__(self, method, session="", **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            while b"\0" not in self.buffer:
                ready, _, _ = select.select([self.receive], [], [], max(deadline - time.monotonic(), 0))
                read = os.read(self.receive, 1 << 16) if ready else b""
                assert read, f"the browser does not answer {method}"
                self.buffer += read
            line, _, self.buffer = self.buffer.partition(b"\0")
            heard = json.loads(line)
            if heard.get("method") == "Runtime.exceptionThrown":
                self.thrown.append(heard["params"]["exceptionDetails"])
            if heard.get("id") == self.count:
                assert "error" not in heard, heard["error"]
                return heard["result"]

    def open(self, url):
        self("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script):
        result = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < deadline, f"never came true: {condition}"
            time.sleep(0.02)

    def close(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.send)
        os.close(self.receive)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None or not hasattr(os, "posix_spawn"):
        pytest.skip("no headless browser is installed: apt-get install chromium-headless-shell")
    with contextlib.closing(Browser(path, tmp_path_factory.mktemp("profile"))) as opened:
        yield opened


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/interactive/"
        finally:
            server.shutdown()
            thread.join()


def html(folder):
    """The page as Sphinx would lay it out, as far as its own part goes."""
    (part,) = re.findall(r"^```{raw} html\n(.*?)^```", (HERE / "index.md").read_text(), re.M | re.S)
    (folder / "interactive" / "index.html").write_text(f'<!doctype html><meta charset="utf-8"><body>{part}</body>')


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """The page with Python in it."""
    folder = tmp_path_factory.mktemp("site")
    missing = build.build(folder)
    if missing is not None:
        pytest.skip(f"Python for the browser cannot be had: {missing}")
    html(folder)
    with served(folder) as url:
        browser.open(url)
        settle(browser)
        yield browser
        assert not browser.thrown


def settle(browser):
    """Wait until what is shown belongs to what was asked last."""
    browser.until("document.querySelector('#interactive [aria-busy=false]:not([hidden])') !== null")


SHOWN = """Object.fromEntries([...document.querySelectorAll("#interactive figure")].map((figure) =>
    [figure.dataset.name,
     [...figure.querySelectorAll("td")].map((cell) => cell.dataset.number ?? cell.querySelector("input").value)]))"""


def shown(browser):
    settle(browser)
    return {name: np.array(numbers, float) for name, numbers in browser.run(SHOWN).items() if name != "mask"}


def choose(browser, name):
    browser.run(f"""{{ const chooser = document.querySelector("#interactive select");
        chooser.value = "{name}"; chooser.dispatchEvent(new Event("change")); }}""")
    first = asked(name)["args"][0]["name"]
    browser.until(f"document.querySelector('#interactive .args figure')?.dataset.name === '{first}'")
    settle(browser)


def type_into(browser, label, text):
    browser.run(f"""{{ const cell = document.querySelector('[aria-label="{label}"]');
        cell.focus(); cell.select(); }}""")
    browser("Input.insertText", text=text)


def expected(answer):
    """What the page shows for an answer, as `shown` reads it."""
    grids = [*answer["args"], answer["cotangent"], answer["weights"], answer["out"], *answer["grads"]]
    return {grid["name"]: array(grid).ravel() for grid in grids}


def close(found, wanted):
    """WebAssembly has an exp of its own: not the same bits."""
    return found.keys() == wanted.keys() and all(
        np.allclose(found[name], wanted[name], rtol=1e-13, atol=1e-15) for name in wanted
    )


def attention(q, k, v, dy, scale):
    """Causal attention and its gradients, written out anew."""
    scores = np.where(np.tri(4, dtype=bool), scale * q @ k.T, -np.inf)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    ds = p * (dy @ v.T - ((dy @ v.T) * p).sum(axis=1, keepdims=True))
    grads = {"dq": scale * ds @ k, "dk": scale * ds.T @ q, "dv": p.T @ dy}
    return {"attn": p, "y": p @ v} | grads


def test_a_number_typed_in_a_browser_changes_all_that_follows(opened):
    choose(opened, "scaled_dot_product")
    type_into(opened, "q[0, 2, 1]", "-1.75")
    type_into(opened, "dy[0, 1, 0]", "2.5")
    found = shown(opened)
    assert found["q"][5] == -1.75 and found["dy"][2] == 2.5
    q, k, v, dy = (found[name].reshape(4, 2) for name in ("q", "k", "v", "dy"))
    wanted = {name: x.ravel() for name, x in attention(q, k, v, dy, 0.7).items()}
    assert close({name: found[name] for name in wanted}, wanted)
    without = {name: x.ravel() for name, x in attention(q + 1e-6, k, v, dy, 0.7).items()}
    assert not close({name: found[name] for name in wanted}, without)


def test_an_entry_chosen_in_a_browser_gets_its_gradient(opened):
    choose(opened, "scaled_dot_product")
    opened.run("""document.querySelector('[aria-label^="gradient of y[0, 1, 0]"]').click()""")
    found = shown(opened)
    dout = (np.arange(8) == 2) * 1.0
    assert close(found, expected(asked("scaled_dot_product", cotangent=dout.tolist())))
    assert np.array_equal(found["dy"], dout) and not found["dq"][4:].any()


def test_options_changed_in_a_browser(opened):
    choose(opened, "scaled_dot_product")
    opened.run("""document.querySelector('#interactive [name="is_causal"]').click()""")
    opened.run("""document.querySelector('[aria-label="mask[0, 0, 3]"]').click()""")
    mask = [i != 3 for i in range(16)]
    assert close(shown(opened), expected(asked("scaled_dot_product", options={"is_causal": False, "mask": mask})))
    choose(opened, "gumbel_softmax")
    opened.run("""{ const slide = document.querySelector('#interactive [name="temperature"]');
        slide.value = 0.4; slide.dispatchEvent(new Event("input")); }""")
    assert close(shown(opened), expected(asked("gumbel_softmax", options={"temperature": 0.4})))


@pytest.mark.parametrize("name", NAMES)
def test_every_mechanism_starts_in_a_browser(opened, name):
    choose(opened, name)
    assert close(shown(opened), expected(asked(name)))
    left, right = map(float, re.findall(r"= (-?\d\S+?),", opened.run("document.querySelector('.check').textContent")))
    assert left == pytest.approx(right, rel=1e-12)


def test_a_cell_without_a_number_changes_nothing(opened):
    choose(opened, "scaled_dot_product")
    before = shown(opened)
    type_into(opened, "q[0, 0, 0]", "e")
    assert opened.run("""document.querySelector('[aria-label="q[0, 0, 0]"]').getAttribute("aria-invalid")""") == "true"
    after = opened.run(SHOWN)
    assert np.array_equal(np.array(after["y"], float), before["y"])


def test_what_refattn_refuses_is_said_on_the_page(opened):
    choose(opened, "gumbel_softmax")
    move = """{ const slide = document.querySelector('#interactive [name="temperature"]');
        slide.min = 0; slide.value = %s; slide.dispatchEvent(new Event("input")); }"""
    opened.run(move % 0)
    settle(opened)
    said = opened.run("document.querySelector('#interactive .failed').textContent")
    assert said == "ValueError: gumbel_softmax.forward: temperature is 0.0, expected a positive number"
    opened.run(move % 2)
    assert close(shown(opened), expected(asked("gumbel_softmax", options={"temperature": 2.0})))
    assert opened.run("document.querySelector('#interactive .failed, #interactive .stale') === null")


def test_a_page_without_python_says_why(browser, tmp_path):
    build.build(tmp_path, npm="no-such-npm")
    html(tmp_path)
    with served(tmp_path) as url:
        browser.open(url)
        browser.until("document.querySelector('#interactive .failed') !== null")
        said = browser.run("document.querySelector('#interactive [role=status]').textContent")
    assert said.endswith("no-such-npm is not installed, which fetches pyodide@0.29.5")


def test_a_page_opened_as_a_file_says_what_to_do(browser, tmp_path):
    build.build(tmp_path, npm="no-such-npm")
    html(tmp_path)
    browser.open((tmp_path / "interactive" / "index.html").as_uri())
    said = browser.run("document.querySelector('#interactive').textContent")
    assert "python -m http.server" in said and browser.run("document.querySelector('#interactive select') === null")


# --- colours ----------------------------------------------------------------------------------------------------


def luminance(colour):
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_every_number_can_be_read_on_its_colour():
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#888888") < 2
    themes = re.findall(r"(--zero: .*)", (HERE / "page.css").read_text())
    assert len(themes) == 3 and themes[1] == themes[2]
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        assert all(contrast(colours["ink"], colours[name]) > 5 for name in ("zero", "positive", "negative", "weight"))
