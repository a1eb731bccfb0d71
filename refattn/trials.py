"""The trials of `refattn check`: mechanisms, frameworks and the example kernels, in as many processes as wanted."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from typing import NamedTuple

from refattn import frameworks, report
from refattn.oracle.arithmetic import FORMATS, numpy_dtype
from refattn.oracle.check import check
from refattn.oracle.check_laws import check_laws
from refattn.registry import find

KERNELS = {"blocked_attention": False, "blocked_attention_with_a_bug": True}  # name -> whether it has a bug


class Laws(NamedTuple):
    """A mechanism against its laws."""

    name: str
    examples: int
    seed: int

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
        except ImportError as error:  # no ml_dtypes
            record = {"candidate": self.name, "dtype": self.dtype, "ok": True, "not_judged": str(error)}
            return Outcome(self, True, (self.name, target.like, self.dtype, "", "not judged: no ml_dtypes"), "", record)
        result = check(
            target.function,
            target.like,
            framework=self.framework,
            dtype=self.dtype,
            arithmetic=target.arithmetic.get(self.dtype),
            convention=target.convention,
            gradients=target.gradients,
            example=target.example,
            max_examples=self.examples * target.times,
            seed=self.seed,
            name=self.name,
        )
        passed_over = sum(result.passed_over.values())
        word = ("ok" if result.ok else "DIFFERS") + (f", {passed_over} passed over" if passed_over else "")
        row = self.name, target.like, self.dtype, _worst(result), word
        return Outcome(self, result.ok, row, str(result), result.as_dict())


class Kernel(NamedTuple):
    """An example kernel against the reference: that judging somebody's function works, on this machine."""

    name: str
    examples: int
    seed: int

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


def of_framework(name, examples, seed):
    """A task for every target of a framework, in every dtype."""
    targets = frameworks.load(name).TARGETS
    return [Target(name, t.name, dtype, examples, seed) for t in targets for dtype in t.dtypes]


def _worst(result):
    return f"{max((v.ratio for v in result.verdicts.values()), default=0):.2g}"


def run(tasks, jobs):
    """The outcomes of all tasks, in their order, with a progress bar."""
    with report.progress(len(tasks)) as done:
        if jobs == 1 or len(tasks) <= 1:
            return [_run_here(task, done) for task in tasks]
        return _run_apart(tasks, min(jobs, len(tasks)), done)


def _run_here(task, done):
    outcome = task.run()
    done(task.name)
    return outcome


def _run_apart(tasks, jobs, done):
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # the processes are the threads
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of libraries that run threads
    executor = ProcessPoolExecutor(jobs, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL))
    try:
        futures = {executor.submit(task.run): i for i, task in enumerate(tasks)}
        outcomes = [None] * len(tasks)
        for future in as_completed(futures):
            outcomes[futures[future]] = future.result()
            done(tasks[futures[future]].name)
        return outcomes
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        executor.shutdown()
