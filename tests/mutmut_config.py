"""What `mutmut run` (version 2) asks before each mutant: see [mutmut] in setup.cfg and tests/kill.py.

    PYTHONPATH=tests mutmut run

Strings, annotations and the examples that tests draw are left as they are: a mutant there is no fault in the code.
"""

import ast
import functools
import sys
from pathlib import Path

import mutmut


def init():
    for kind in ("string", "fstring", "decorator", "annassign"):
        mutmut.mutations_by_type.pop(kind, None)


@functools.cache
def lines_of_examples(source):
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return {
        line
        for f in functions
        if f.name.startswith(("example", "_example"))
        for line in range(f.lineno, f.end_lineno + 1)
    }


def pre_mutation(context):
    line = context.current_source_line
    context.skip = (
        context.current_line_index + 1 in lines_of_examples(context.source)
        or "Shaped[" in line
        or line.startswith(("ABOUT", "__all__"))
    )
    context.config.test_command = f"{sys.executable} -m tests.kill {Path(context.filename).stem}"
