"""What `refattn check` has computed already, a line of JSON for each outcome, so that an interruption loses nothing."""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

import refattn
from refattn.report import write_text
from refattn.trials import Outcome, machine


class Journal:
    """Outcomes by task, in a file that grows as they come.

    An outcome counts only for what it was made with: the sources of refattn, Python, NumPy, the CPU's instructions, the
    framework's version.
    """

    def __init__(self, path, versions, resume):
        self.path, self.versions = path, versions
        self.same = f"{sources()} {sys.version.split()[0]} {np.__version__} {machine()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        still_good = self._read()
        write_text(path, "".join(json.dumps(line) + "\n" for line in still_good.values()))
        self.known = still_good if resume else {}

    def get(self, task):
        """The Outcome of a task, or None."""
        line = self.known.get(self._key(task))
        return line and Outcome(task, line["ok"], tuple(line["row"]), line["text"], line["record"])

    def put(self, outcome):
        """Keep it, and make sure of it."""
        line = {"key": self._key(outcome.task)} | outcome._asdict()
        del line["task"]
        self.known[line["key"]] = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _key(self, task):
        version = self.versions.get(task.framework, "")
        return json.dumps([type(task).__name__, *task, version, self.same])

    def _read(self):
        known = {}
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    line = json.loads(text)
                    if line["key"].endswith(f'"{self.same}"]') and set(line) > {"ok", "row", "text", "record"}:
                        known[line["key"]] = line
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue  # the end of a process that was killed while it wrote
        return known


def place():
    """Where the journal is: below REFATTN_CACHE, or else where the system has its caches."""
    cache = os.environ.get("REFATTN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "refattn")
    return Path(cache).expanduser() / "check.jsonl"


def sources():
    """A hash of every source file of refattn."""
    root = Path(refattn.__file__).parent
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()
