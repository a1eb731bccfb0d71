"""How results reach a person or a file: tables and progress, by rich where it is installed, else plainly; JSON."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

STYLES = {"ok": "green", "FAILS": "bold red", "DIFFERS": "bold red", "NOT FOUND": "bold red", "found": "green"}


def _rich():
    """rich, or None."""
    try:
        import rich.console
        import rich.progress
        import rich.table
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
    """Write it whole or not at all: nobody finds half a file."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
