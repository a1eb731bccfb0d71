"""How results reach a person or a file: tables, verdicts and progress, by rich where it is installed; files."""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

STYLES = {
    "ok": "green", "conforms": "green", "found, as it should be": "green",
    "FAILS": "bold red", "DIFFERS": "bold red", "DIED": "bold red", "NOT FOUND": "bold red",
    "BUG": "bold red", "BUG p < 1e-6": "bold red",
    "NOT JUDGED": "bold yellow", "SUSPECT": "bold yellow", "OUTSIDE THE MODEL": "bold yellow",
}  # fmt: skip
KINDS = "|".join(sorted(map(re.escape, STYLES), key=len, reverse=True))
VERDICT = re.compile(rf"^  ({KINDS})(?= )|: ({KINDS})(?= \(\d+ examples)", re.M)  # as str(report) has them
ABOUT = re.compile(rf"  ({KINDS}) +\S+ +| *")  # what stands before the story of a line


def _rich():
    """rich, or None."""
    try:
        import rich.console
        import rich.progress
        import rich.table
        import rich.text
    except ImportError:
        return None
    return rich


def table(title, columns, rows):
    """Print rows of strings under a title."""
    rich = _rich()
    if rich is None:
        print(plain_table(title, columns, rows))
        return
    shown = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(rich.text.Text(cell, STYLES.get(cell, "")) for cell in row))
    width = shutil.get_terminal_size((140, 24)).columns
    console = rich.console.Console(file=sys.stdout, width=max(width, 80))
    with console.capture() as captured:  # rich ends the program if nobody reads; print leaves that to us
        console.print(shown)
    print(captured.get(), end="")


def say(text):
    """Print lines. On a terminal the long ones are folded, and verdicts are coloured, by rich where it is installed."""
    if not sys.stdout.isatty():
        print(text)
        return
    width = max(shutil.get_terminal_size((140, 24)).columns, 40)
    text = "\n".join(folded for line in text.splitlines() for folded in _fold(line, width))
    rich = _rich()
    if rich is None:
        print(text)
        return
    shown = rich.text.Text(text)
    for found in VERDICT.finditer(text):
        word = found[1] or found[2]
        shown.stylize(STYLES[word], found.end() - len(word), found.end())
    console = rich.console.Console(file=sys.stdout, width=width)
    with console.capture() as captured:
        console.print(shown, soft_wrap=True)
    print(captured.get(), end="")


def _fold(line, width):
    before = ABOUT.match(line)
    more = " " * min(before.end() if before[1] else before.end() + 4, width // 2)
    return textwrap.wrap(line, width, subsequent_indent=more, break_on_hyphens=False) or [""]


def plain_table(title, columns, rows):
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (columns, *rows)]
    return "\n".join([title, "", lines[0], "  ".join("-" * width for width in widths), *lines[1:], ""])


@contextlib.contextmanager
def progress(total):
    """Yields done(name), to be called as each of `total` things is done. Shown on a terminal only, on stderr."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    rich = _rich()
    if rich is None:
        yield _Plain(total).done
        print("\r\033[K", end="", file=sys.stderr, flush=True)
        return
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*rich.progress.Progress.get_default_columns(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)


class _Plain:
    def __init__(self, total):
        self.total, self.count = total, 0

    def done(self, name):
        self.count += 1
        filled = 30 * self.count // self.total
        bar = f"[{'#' * filled}{'.' * (30 - filled)}] {self.count}/{self.total} {name}"
        print(f"\r\033[K{bar[:78]}", end="", file=sys.stderr, flush=True)


def write_json(path, content):
    """Write it as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path, text):
    """Write it whole or not at all: nobody finds half a file."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path, content):
    """The same of bytes."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
