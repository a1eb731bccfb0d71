"""What `mutmut run` (version 2) asks before each mutant: see [mutmut] in setup.cfg and tests/kill.py.

    PYTHONPATH=tests mutmut run

Strings, annotations and the examples that tests draw are left as they are: a mutant there is no fault in the code.
"""

import sys
from pathlib import Path

import mutmut


def init():
    for kind in ("string", "fstring", "decorator", "annassign"):
        mutmut.mutations_by_type.pop(kind, None)


def pre_mutation(context):
    line = context.current_source_line
    context.skip = "draw." in line or "Shaped[" in line or line.startswith(("ABOUT", "__all__"))
    context.config.test_command = f"{sys.executable} -m tests.kill {Path(context.filename).stem}"
