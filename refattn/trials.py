"""The trials of `refattn check`: mechanisms, frameworks and the example kernels, in as many processes as wanted.

Every framework has processes of its own: some cannot be in one with others. What is done is kept in a Journal.
"""

import contextlib
import multiprocessing
import os
import platform
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from itertools import groupby
from typing import NamedTuple

import numpy as np

from refattn import frameworks, report
from refattn.oracle.arithmetic import FORMATS, numpy_dtype
from refattn.oracle.check import check
from refattn.oracle.check_laws import check_laws
from refattn.oracle.conventions import PRESETS
from refattn.oracle.discover import agrees, discover
from refattn.registry import find

KERNELS = {"blocked_attention": False, "blocked_attention_with_a_bug": True}  # name -> whether it has a bug


class Laws(NamedTuple):
    """A mechanism against its laws."""

    name: str
    examples: int
    seed: int
    framework = ""

    def run(self):
        laws = check_laws(find(self.name), self.examples, self.seed)
        row = laws.name, laws.family, f"{laws.worst:.1e}", ", ".join(laws.witnesses), "ok" if laws.ok else "FAILS"
        return Outcome(self, laws.ok, row, str(laws), laws.as_dict())


class Target(NamedTuple):
    """Something of a framework against the reference."""

    framework: str
    name: str
    dtype: str
    examples: int
    seed: int

    def run(self):
        target = next(t for t in frameworks.load(self.framework).TARGETS if t.name == self.name)
        try:
            numpy_dtype(FORMATS[self.dtype])
        except ImportError as error:
            return self._not_judged(target, "no ml_dtypes", str(error))
        lacking = target.lacks and target.lacks()
        if lacking:
            return self._not_judged(target, lacking, lacking)
        many = self.examples * target.times
        result = judged(target, self.framework, self.dtype, max_examples=many, seed=self.seed)
        word = ", ".join(["ok" if result.ok else "DIFFERS", *_passed_over(result)])
        row = self.name, target.like, self.dtype, _worst(result), word
        return Outcome(self, result.ok, row, str(result), result.as_dict())

    def _not_judged(self, target, word, reason):
        """This machine lacks something."""
        record = {"candidate": self.name, "dtype": self.dtype, "ok": True, "not_judged": reason}
        return Outcome(self, True, (self.name, target.like, self.dtype, "", f"not judged: {word}"), "", record)


class Discovery(NamedTuple):
    """Which convention a target follows: found out, not asked for."""

    framework: str
    name: str

    def run(self):
        target = next(t for t in frameworks.load(self.framework).TARGETS if t.name == self.name)
        dtype = next(dtype for dtype in ("float32", *target.dtypes) if dtype in target.dtypes)
        wide = "float64" in target.dtypes
        found = discover(target.function, framework=self.framework, dtype=dtype, wide=wide, name=self.name)
        asked = PRESETS.get(target.convention, target.convention)
        ok = asked is None or agrees(asked, {field: getattr(found.convention, field) for field in found.settled})
        word = "ok" if ok else "NOT WHAT WAS SAID"
        row = self.name, found.as_preset(), ", ".join(found.presets) or "none", word
        return Outcome(self, ok, row, str(found), found.as_dict())


class Kernel(NamedTuple):
    """An example kernel against the reference: that judging somebody's function works, on this machine."""

    name: str
    examples: int
    seed: int

    framework = ""

    @property
    def has_bug(self):
        return KERNELS[self.name]

    def run(self):
        kernel = import_module(f"refattn.examples.{self.name}")
        result = check(
            kernel.forward,
            "scaled_dot_product",
            backward=kernel.backward,
            max_examples=self.examples,
            seed=self.seed,
            name=f"refattn/examples/{self.name}.py",
        )
        ok = result.ok != self.has_bug
        if self.has_bug:
            word = "found, as it should be" if ok else "NOT FOUND"
            text = f"The bug in {self.name} is {word}:\n{result}"
        else:
            word, text = "ok" if ok else "DIFFERS", str(result)
        row = self.name, result.like, result.dtype, _worst(result), word
        return Outcome(self, ok, row, text, result.as_dict() | {"has_bug": self.has_bug, "as_it_should_be": ok})


class Outcome(NamedTuple):
    task: object
    ok: bool
    row: tuple
    text: str
    record: dict


def judged(target, framework, dtype, function=None, **options):
    """`check` of a framework's target, as its row says; or of another function in its place."""
    known = {name: getattr(target, name) for name in ("convention", "gradients", "example", "device", "name")}
    known |= {"framework": framework, "dtype": dtype, "arithmetic": target.arithmetic.get(dtype)}
    return check(function or target.function, target.like, **known | options)


def machine():
    """What frameworks compute depends on the instructions that the CPU has: by NumPy's names of them."""
    instructions = np.show_config(mode="dicts")["SIMD Extensions"]
    known = " ".join(instructions.get("baseline", []) + instructions.get("found", []))
    return f"{platform.machine()} ({known}), {platform.system()}"


def of_framework(name, status, examples, seed):
    """A task for every target of a framework, in every dtype."""
    return [Target(name, target, dtype, examples, seed) for target, _, dtypes, _ in status.targets for dtype in dtypes]


def discoveries(name, status):
    """A task for every target of a framework that is dot-product attention."""
    return [Discovery(name, target) for target, *_, asks in status.targets if asks]


def _worst(result):
    return f"{max((v.ratio for v in result.verdicts.values()), default=0):.2g}"


def _passed_over(result):
    """What belongs beside a verdict: pages of findings, and how many calls nobody judged for other reasons."""
    known = [f"departs: {finding}" for finding in result.departures]
    others = sum(result.passed_over.values()) - sum(result.departures.values())
    return known + ([f"{others} passed over"] if others else [])


def run(tasks, jobs, journal=None):
    """The outcomes of all tasks, in their order, with a progress bar; those that the journal has are not run again."""
    outcomes = {task: journal and journal.get(task) for task in tasks}
    missing = [task for task, outcome in outcomes.items() if outcome is None]
    with report.progress(len(tasks)) as done:
        for task in tasks:
            if outcomes[task] is not None:
                done(task.name)

        def keep(outcome):
            outcomes[outcome.task] = outcome
            if journal is not None:
                journal.put(outcome)
            done(outcome.task.name)

        groups = [list(group) for _, group in groupby(missing, lambda task: task.framework)]
        for group in groups:
            if jobs == 1 and len(groups) == 1:
                for task in group:
                    keep(task.run())
            else:
                _run_apart(group, min(jobs, len(group)), keep)
    return [outcomes[task] for task in tasks]


def _begin_to_work():
    """In a worker: Ctrl-C ends it at once, and so does the end of the process that it works for, however that came."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_apart(tasks, jobs, keep):
    """In processes. Where one dies, those tasks that may have been in it are run again, each alone."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # the processes are the threads
    while tasks:
        left = _run_in_pool(tasks, jobs, keep)
        for suspect in left[:jobs]:  # tasks begin in their order
            if _run_in_pool([suspect], 1, keep):
                keep(_died(suspect))
        tasks = left[jobs:]


def _run_in_pool(tasks, jobs, keep):
    """What is left of the tasks: nothing, unless a process died."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of libraries that run threads
    executor = ProcessPoolExecutor(jobs, context, initializer=_begin_to_work)
    futures, left = {}, dict.fromkeys(tasks)
    try:
        with contextlib.suppress(BrokenProcessPool):
            for task in tasks:
                futures[executor.submit(task.run)] = task
        for future in as_completed(futures):
            with contextlib.suppress(BrokenProcessPool):
                keep(future.result())
                del left[futures[future]]
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown()
    return list(left)


def _died(task):
    """The Outcome of a task whose process did not live to tell."""
    dtype = getattr(task, "dtype", "")
    what = " ".join(filter(None, (task.framework, task.name, dtype)))
    text = f"{what}: DIED: the process that ran it ended without a word, and when run alone it did so again"
    row = (task.name, "", "", "DIED") if isinstance(task, Discovery) else (task.name, "", dtype, "", "DIED")
    return Outcome(task, False, row, text, {"candidate": task.name, "dtype": dtype, "ok": False, "died": text})
