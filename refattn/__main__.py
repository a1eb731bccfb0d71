"""The command line: refattn list | show | plot | check | discover | vectors."""

import argparse
import ast
import difflib
import functools
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path

import refattn
from refattn import frameworks, journal, matrix, plot, report, trials, vectors
from refattn.oracle import html
from refattn.oracle.arithmetic import OF_DTYPE
from refattn.oracle.check import check, usual_examples
from refattn.oracle.discover import QUESTIONS, discover
from refattn.registry import everything, find
from refattn.shapes import spelled

EXAMPLES = 8  # of each mechanism and each target, unless asked for otherwise
OF_ALL = 4  # of each target, for the matrix, which has a thousand cells


class BadUse(Exception):
    """What the user typed cannot be done; the message says why."""


class Interrupted(Exception):
    """By Ctrl-C, in the middle of many trials."""

    def __init__(self, done, total):
        super().__init__(f"; {done} of {total} are done, and --resume goes on from there" if done else "")


def main(argv=None):
    """Run a command. 0: all conforms; 1: something differs; 2: bad use; 130: Ctrl-C; 141: nobody reads the output."""
    try:
        arguments = _parser().parse_args(argv)
        status = arguments.command(arguments)
        sys.stdout.flush()
        return status
    except BadUse as error:
        print(f"refattn: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(f"refattn: interrupted{error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("refattn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit
        return 141


def _parser():
    parser = argparse.ArgumentParser("refattn", description="The numerical oracle for attention.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"refattn {refattn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="every mechanism and primitive", allow_abbrev=False)
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(command=list_command)

    showing = commands.add_parser("show", help="docstring, shapes and source of one", allow_abbrev=False)
    showing.add_argument("name")
    showing.set_defaults(command=show_command)

    plotting = commands.add_parser(
        "plot",
        help="the picture of what a mechanism attends to, or of a mask",
        description="On a photograph or a sentence, unless there is an --input. Without --out a window opens; where"
        " there is no display, NAME.png is written.",
        allow_abbrev=False,
    )
    plotting.add_argument("name", metavar="NAME", help="a mechanism, or a mask: 'causal() & window(3, 0)'")
    plotting.add_argument("--input", type=Path, metavar="FILE", help="an image, or a .npy: (H, W), (C, H, W), (T, D)")
    plotting.add_argument("--out", type=Path, metavar="FILE", help="the picture: .png, .svg, .pdf, ...")
    plotting.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="of the parameters")
    plotting.add_argument("--length", type=_at_least(1), default=16, metavar="N", help="queries and keys of a mask; 16")
    plotting.add_argument("--dark", action="store_true", help="for a dark page")
    plotting.set_defaults(command=plot_command)

    checking = commands.add_parser(
        "check",
        help="try everything, some mechanisms, a framework, or a function of your own",
        description="Without WHAT: every mechanism against its laws, every framework that is installed, and the example"
        " kernels. With `all`: the matrix of all frameworks. Exit status: 0 if all conform, 1 if something differs, 2"
        " for bad use.",
        allow_abbrev=False,
    )
    checking.add_argument("what", nargs="*", metavar="WHAT", help="mechanisms, frameworks, all, or a function")
    yours = checking.add_argument_group("with FILE.py:FUNCTION or MODULE:FUNCTION")
    yours.add_argument("--like", metavar="NAME", help="the mechanism it should be like")
    yours.add_argument("--backward", metavar="FILE.py:FUNCTION", help="its gradients")
    yours.add_argument("--framework", help="whose arrays it takes; NumPy's unless given")
    yours.add_argument("--dtype", choices=OF_DTYPE, help="of its arrays; what --arithmetic says, else float32")
    yours.add_argument("--arithmetic", metavar="NAME", help="where it rounds: bf16_flash, ...; else as frameworks do")
    yours.add_argument("--convention", metavar="NAME", help="whose answers it gives where frameworks differ")
    yours.add_argument("--families", metavar="A,B", help="of inputs; all unless given")
    yours.add_argument("--forward-only", action="store_true", help="judge no gradients")
    yours.add_argument("--html", type=Path, metavar="FILE", help="write a page with maps of the errors")
    yours.add_argument("--script", type=Path, metavar="FILE", help="write a script that reproduces what fails")
    checking.add_argument("--seed", type=_at_least(0), default=0, metavar="N")
    checking.add_argument("--examples", type=_at_least(1), metavar="N", help="how many calls each is tried on")
    checking.add_argument("--jobs", type=_at_least(1), metavar="N", help="processes; as many as there are CPUs")
    checking.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    checking.add_argument("--page", type=Path, metavar="FILE", help="with `all`: write the matrix as Markdown")
    checking.add_argument("--resume", action="store_true", help="go on after an interruption: keep what is done")
    checking.set_defaults(command=check_command)

    finding = commands.add_parser(
        "discover",
        help="which convention an attention function follows, by experiment",
        description="Of a framework, all its dot-product attention; or of a function of your own.",
        allow_abbrev=False,
    )
    finding.add_argument("what", metavar="TARGET", help="a framework, FILE.py:FUNCTION or MODULE:FUNCTION")
    finding.add_argument("--framework", help="whose arrays it takes; NumPy's unless given")
    finding.add_argument("--dtype", choices=OF_DTYPE, default="float32", help="of its arrays; float32 unless given")
    finding.add_argument("--json", type=Path, metavar="FILE", help="write what is found there as well")
    finding.set_defaults(command=discover_command)

    golden = commands.add_parser("vectors", help="inputs, outputs and bounds in files", allow_abbrev=False)
    doing = golden.add_subparsers(required=True, metavar="write|verify")
    writing = doing.add_parser("write", help="a folder of vectors of a mechanism", allow_abbrev=False)
    writing.add_argument("folder", metavar="FOLDER", help="a new one, or one of vectors, which is replaced")
    writing.add_argument("--like", metavar="NAME", required=True, help="the mechanism")
    writing.add_argument("--families", metavar="A,B", help="of inputs; all unless given")
    writing.add_argument("--examples", type=_at_least(1), metavar="N", help="how many calls, in all")
    writing.add_argument("--seed", type=_at_least(0), default=0, metavar="N")
    writing.add_argument("--arithmetics", metavar="A,B", default="float32", help="with bounds for each; float32")
    writing.add_argument("--format", choices=vectors.STORAGES, default="npz", help="of the files; npz unless given")
    writing.add_argument("--forward-only", action="store_true", help="no gradients")
    writing.set_defaults(command=write_vectors_command)
    verifying = doing.add_parser("verify", help="judge outputs that came of a folder of vectors", allow_abbrev=False)
    verifying.add_argument("folder", metavar="FOLDER", help="of vectors")
    verifying.add_argument("outputs", metavar="OUTPUTS", help="a folder: of each case a file, or a folder, of its name")
    verifying.add_argument("--arithmetic", metavar="NAME", required=True, help="whose bounds hold")
    verifying.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    verifying.set_defaults(command=verify_vectors_command)
    return parser


def _at_least(least):
    def number(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    number.__name__ = "whole number"  # argparse puts it into its message
    return number


# --- list, show ----------------------------------------------------------------------------------------------


def list_command(arguments):
    found = sorted(everything().values(), key=lambda m: (m.family == "primitives", m.family, m.name))
    if arguments.json:
        fields = "name", "family", "title", "paper"
        about = "laws", "witnesses"
        records = [
            {f: getattr(m, f) for f in fields} | {f: list(getattr(m.ABOUT, f)) for f in about} for m in found
        ]
        print(json.dumps(records, indent=1))
    else:
        rows = [(m.name, m.family, m.title) for m in found]
        report.table(f"{len(rows)} mechanisms and primitives", ("name", "family", "what it is"), rows)
    return 0


def show_command(arguments):
    m = _find(arguments.name)
    parts = [f"{m.name}, in {m.family}", inspect.cleandoc(m.module.__doc__)]
    shapes = [spelled(getattr(m, kind)) for kind in ("Params", "State", "Stats", "Out", "Saved") if hasattr(m, kind)]
    init = [f"init{inspect.signature(m.init)}"] if hasattr(m, "init") else []
    parts.append("\n".join([*shapes, "", *init, spelled(m.forward), spelled(m.backward)]))
    source = inspect.getsource(m.module)
    after_docstring = ast.parse(source).body[0].end_lineno
    parts.append("\n".join(source.splitlines()[after_docstring:]).strip())
    print("\n\n".join(parts))
    return 0


def plot_command(arguments):
    _refuse_to_write(arguments, "out")
    options = {name: getattr(arguments, name) for name in ("seed", "dark", "length")}
    try:
        done = plot.plot(arguments.name, arguments.input, arguments.out, **options)
    except (ValueError, ImportError, OSError) as error:
        raise BadUse(error) from None
    print(done, end="\n" if done else "")
    return 0


def _find(name, *, others=()):
    try:
        return find(name)
    except KeyError as error:
        near = difflib.get_close_matches(name, others, 1, 0.5)
        hint = f"; or the framework {near[0]}" if near else ""
        raise BadUse(f"{error.args[0]}{hint} (refattn list shows all)") from None


# --- check ---------------------------------------------------------------------------------------------------


OF_A_FILE = (
    "like", "backward", "framework", "dtype", "arithmetic", "convention", "families", "forward_only", "html", "script",
)  # fmt: skip
ALL = "all"  # WHAT, for the matrix


def check_command(arguments):
    _refuse_to_write(arguments, "json", "html", "script", "page")
    files = [what for what in arguments.what if ":" in what or what.endswith(".py") or os.sep in what]
    if files and (arguments.resume or arguments.page):
        raise BadUse("--resume and --page are not for one function")
    content = _check_file(arguments) if files else _check_known(arguments)
    content = {"refattn": refattn.__version__, "seed": arguments.seed} | content
    if arguments.json:
        _write("json", report.write_json, arguments.json, content)
    if arguments.page:
        _write("page", report.write_text, arguments.page, matrix.page(content))
    return 0 if content["ok"] else 1


def _refuse_to_write(arguments, *options):
    """Now, not when all is done."""
    for option in options:
        path = getattr(arguments, option)
        if path and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise BadUse(f"--{option}: cannot write to {path.parent}")
        if path and path.is_dir():
            raise BadUse(f"--{option}: {path} is a folder")


def _write(option, write, path, content):
    try:
        write(path, content)
    except OSError as error:
        raise BadUse(f"--{option}: {error}") from None


def _check_known(arguments):
    for option in OF_A_FILE:
        if getattr(arguments, option):
            raise BadUse(f"--{option.replace('_', '-')} needs FILE.py:FUNCTION")
    whole = ALL in arguments.what
    if whole and len(arguments.what) > 1:
        raise BadUse("all stands alone")
    if arguments.page and not whole:
        raise BadUse("--page needs `refattn check all`")
    known = [*frameworks.names(), *frameworks.FAMILIES]
    wanted = [what for what in arguments.what if what in known]
    mechanisms = [_find(what, others=known) for what in arguments.what if what not in [*known, ALL]]
    wanted = [name for what in wanted for name in frameworks.FAMILIES.get(what, (what,))]
    jobs = arguments.jobs or os.cpu_count() or 1
    status = _status(frameworks.names() if whole or not arguments.what else wanted, arguments, jobs)
    if not arguments.what:
        mechanisms = everything().values()
    for name in wanted:
        if not status[name].version:
            raise BadUse(status[name].reason)
    wanted = [name for name, found in status.items() if found.version]
    examples = arguments.examples or (OF_ALL if whole else EXAMPLES)
    tasks = [trials.Laws(m.name, examples, arguments.seed) for m in mechanisms]
    for name in wanted:
        tasks += trials.of_framework(name, status[name], examples, arguments.seed)
        tasks += trials.discoveries(name, status[name]) if whole else []
    if not arguments.what:
        tasks += [trials.Kernel(name, arguments.examples, arguments.seed) for name in trials.KERNELS]
    kept = _journal({name: found.version for name, found in status.items()}, arguments.resume)
    try:
        outcomes = trials.run(tasks, jobs, kept)
    except KeyboardInterrupt:
        raise Interrupted(sum(kept.get(task) is not None for task in tasks) if kept else 0, len(tasks)) from None
    return _print_outcomes(outcomes, wanted, status) | ({"matrix": matrix.table(outcomes, status)} if whole else {})


def _status(names, arguments, jobs):
    if len(arguments.what) == len(names) == jobs == 1:  # nothing that it could not be together with
        return {names[0]: frameworks.status(names[0])}
    return frameworks.available(names, jobs)


def _journal(versions, resume):
    path = journal.place()
    try:
        return journal.Journal(path, versions, resume)
    except OSError as error:
        if resume:
            raise BadUse(f"--resume: {path} cannot be used: {error}") from None
        return None  # a machine without a home is no reason not to check


def _print_outcomes(outcomes, wanted, status):
    kinds = trials.Laws, trials.Target, trials.Discovery, trials.Kernel
    laws, targets, discoveries, kernels = ([o for o in outcomes if isinstance(o.task, kind)] for kind in kinds)
    if laws:
        columns = "mechanism", "family", "worst gradient error", "witnesses", "verdict"
        report.table("Laws", columns, [o.row for o in laws])
    for name in wanted:
        rows = [o.row for o in targets if o.task.framework == name]
        columns = "target", "like", "dtype", "worst error / allowed", "verdict"
        if not rows:
            print(f"{name} {status[name].version}: no targets; its operators are checked by the tests\n")
            continue
        report.table(f"{name} {status[name].version}", columns, rows)
        rows = [o.row for o in discoveries if o.task.framework == name]
        if rows:
            columns = "target", "what it does, by experiment", "as these presets", "verdict"
            report.table(f"{name}: conventions", columns, rows)
    for name, about in status.items():
        if not about.version:
            print(f"{name} is not cross-checked: {about.reason}\n")
    if kernels:
        columns = "kernel", "like", "dtype", "worst error / allowed", "verdict"
        report.table("Example kernels", columns, [o.row for o in kernels])
    for outcome in outcomes:
        if not outcome.ok or (isinstance(outcome.task, trials.Kernel) and outcome.task.has_bug):
            report.say(f"{outcome.text}\n")
    wrong = [o for o in outcomes if not o.ok]
    print(f"{len(wrong)} of {len(outcomes)} differ." if wrong else f"All {len(outcomes)} as they should be.")
    return {
        "ok": not wrong,
        "laws": [o.record for o in laws],
        "frameworks": {
            name: {"version": about.version, "reason": about.reason}
            | {kind: [o.record for o in found if o.task.framework == name]
               for kind, found in (("targets", targets), ("conventions", discoveries))}
            for name, about in status.items()
        },
        "kernels": [o.record for o in kernels],
    }  # fmt: skip


def _check_file(arguments):
    if len(arguments.what) > 1:
        raise BadUse("one FILE.py:FUNCTION at a time, and nothing beside it")
    if arguments.like is None:
        raise BadUse(f"{arguments.what[0]} needs --like NAME")
    like = _find(arguments.like)
    candidate, spec = _load(arguments.what[0]), _spec(arguments.what[0])
    backward = None
    if arguments.backward:
        backward, spec = _load(arguments.backward), spec + _spec(arguments.backward)
    families = arguments.families and arguments.families.split(",")
    try:
        examples = arguments.examples or usual_examples(like, families)
        if arguments.html:
            html.drawing()  # now, not when all is done
        with report.progress(examples) as done:
            result = check(
                candidate,
                like,
                framework=arguments.framework,
                convention=arguments.convention,
                arithmetic=arguments.arithmetic,
                dtype=arguments.dtype,
                gradients=not arguments.forward_only,
                backward=backward,
                families=families,
                max_examples=examples,
                seed=arguments.seed,
                name=arguments.what[0],
                spec=spec,
                progress=lambda count: done("examples"),
            )
    except (ValueError, ImportError) as error:
        raise BadUse(error) from None
    report.say(str(result))
    if arguments.html:
        _write("html", report.write_text, arguments.html, result.to_html())
    if arguments.script and result.smallest is None:
        print(f"nothing fails: {arguments.script} is not written")
    elif arguments.script:
        _write("script", report.write_text, arguments.script, result.script())
    return result.as_dict()


def _spec(text):
    """(file or module, function), for a script that may run anywhere."""
    place, _, name = text.rpartition(":")
    if not name.isidentifier():
        return ()  # no script can import a method by its name
    return place if _is_module(place) else str(Path(place).resolve()), name


def _is_module(place):
    return not Path(place).exists() and all(part.isidentifier() for part in place.split(".")) and place[-3:] != ".py"


def _load(spec):
    """The function of FILE.py:FUNCTION, or of MODULE:FUNCTION; the latter may have dots in it."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise BadUse(f"{spec}: expected FILE.py:FUNCTION or MODULE:FUNCTION")
    if _is_module(place):
        sys.path.insert(0, os.getcwd())  # as `python -m` does
        module = _imported(place, lambda: importlib.import_module(place))
    elif Path(place).is_file():
        module = _module(Path(place).resolve())
    else:
        raise BadUse(f"{place}: no such file")
    function = functools.reduce(lambda x, part: getattr(x, part, None), name.split("."), module)
    if not callable(function):
        functions = [n for n, x in vars(module).items() if inspect.isfunction(x) and n[0] != "_"]
        raise BadUse(f"{place} has no function {name}; it has {', '.join(functions) or 'none'}")
    return function


def _imported(name, load):
    try:
        return load()
    except (Exception, SystemExit) as error:
        raise BadUse(f"{name} cannot be imported: {type(error).__name__}: {error}") from None


@functools.cache
def _module(path):
    """A file as a module, once: what forward leaves behind, backward finds."""
    name = f"refattn_candidate_{path.stem}"
    loading = importlib.util.spec_from_file_location(name, path)
    if loading is None:
        raise BadUse(f"{path.name}: not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(loading)
    sys.path.insert(0, str(path.parent))  # what lies beside it can be imported
    _imported(path.name, lambda: loading.loader.exec_module(module))
    return module


# --- discover ------------------------------------------------------------------------------------------------


def discover_command(arguments):
    _refuse_to_write(arguments, "json")
    known = [*frameworks.names(), *frameworks.FAMILIES]
    if arguments.what in known:
        if arguments.framework:
            raise BadUse(f"--framework needs FILE.py:FUNCTION; {arguments.what} is one")
        found = _discover_framework(frameworks.FAMILIES.get(arguments.what, (arguments.what,)))
    elif ":" in arguments.what:
        found = [_discover_function(arguments)]
    else:
        raise BadUse(f"{arguments.what}: expected FILE.py:FUNCTION, MODULE:FUNCTION or one of {', '.join(known)}")
    if arguments.json:
        _write("json", report.write_json, arguments.json, {"refattn": refattn.__version__, "found": found})
    return 0


def _discover_framework(wanted):
    status = frameworks.available(wanted, len(wanted))
    for name in wanted:
        if not status[name].version:
            raise BadUse(status[name].reason)
    tasks = [task for name in wanted for task in trials.discoveries(name, status[name])]
    if not tasks:
        print(f"{', '.join(wanted)}: no target is dot-product attention")
    outcomes = trials.run(tasks, 1)
    for outcome in outcomes:
        report.say(f"{outcome.text}\n")
    return [outcome.record for outcome in outcomes]


def _discover_function(arguments):
    candidate = _load(arguments.what)
    try:
        with report.progress(len(QUESTIONS)) as done:
            found = discover(
                candidate, framework=arguments.framework, dtype=arguments.dtype, name=arguments.what, progress=done
            )
    except (ValueError, ImportError) as error:
        raise BadUse(error) from None
    report.say(str(found))
    return found.as_dict()


# --- vectors -------------------------------------------------------------------------------------------------


def write_vectors_command(arguments):
    like = _find(arguments.like)
    try:
        folder = vectors.write(
            *(arguments.folder, like.name),
            families=arguments.families and arguments.families.split(","),
            examples=arguments.examples,
            seed=arguments.seed,
            arithmetics=arguments.arithmetics.split(","),
            storage=arguments.format,
            gradients=not arguments.forward_only,
        )
        manifest = vectors.read_manifest(folder)
    except (ValueError, ImportError, OSError) as error:
        raise BadUse(error) from None
    print(f"{len(manifest['cases'])} cases of {like.name} in {arguments.folder}")
    for reason, count in manifest.get("left_out", {}).items():
        print(f"left out {count} calls: {reason}")
    return 0


def verify_vectors_command(arguments):
    _refuse_to_write(arguments, "json")
    try:
        result = vectors.verify(arguments.folder, arguments.outputs, arguments.arithmetic)
    except (ValueError, ImportError, OSError) as error:
        raise BadUse(error) from None
    report.say(str(result))
    if arguments.json:
        _write("json", report.write_json, arguments.json, {"refattn": refattn.__version__} | result.as_dict())
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
