"""A mechanism against all its laws, on calls that it draws itself."""

from typing import NamedTuple

import numpy as np

from refattn.draw import RandomDraw
from refattn.oracle.contract import raised
from refattn.oracle.derivatives import Inconclusive, complex_step
from refattn.oracle.laws import gradient_errors, laws_of
from refattn.oracle.trial import plain


class LawReport(NamedTuple):
    """What came of trying a mechanism against its laws."""

    name: str
    family: str
    worst: float  # gradient error: <J'dout, v> against <dout, J v>, relative to their terms
    laws: int
    examples: int
    inconclusive: int  # of all laws and examples: a kink lay within a step of the differences
    failures: tuple  # in words, one per law
    witnesses: tuple

    @property
    def ok(self):
        return not self.failures

    def __str__(self):
        lines = [f"{self.name}: {'conforms' if self.ok else 'FAILS'} ({self.laws} laws, {self.examples} examples)"]
        return "\n".join(lines + [f"  {failure}" for failure in self.failures])

    def as_dict(self):
        return {"ok": self.ok} | plain(self._asdict())


def check_laws(mechanism, examples=10, seed=0):
    """Every law of a mechanism, on calls that it draws itself."""
    laws, errors, failures, inconclusive = laws_of(mechanism), [], {}, 0

    def gradient(mechanism, call, rng):
        for _, ours, theirs, allowed in gradient_errors(mechanism, call, rng, complex_step, rtol=1e-12):
            errors.append(1e-12 * abs(ours - theirs) / allowed)

    for i in range(examples):
        for law in (*laws, gradient):
            try:
                law(mechanism, mechanism.example(RandomDraw([seed, i])), np.random.default_rng([seed, i]))
            except Inconclusive:
                inconclusive += 1
            except Exception as error:
                story = str(error) if isinstance(error, AssertionError) else f"{mechanism}: {raised(error)}"
                failures.setdefault(law.__name__, f"{law.__name__}, example {i} of seed {seed}: {story}")
    return LawReport(
        name=mechanism.name,
        family=mechanism.family,
        worst=float(np.max(errors, initial=0)),
        laws=len(laws),
        examples=examples,
        inconclusive=inconclusive,
        failures=tuple(failures.values()),
        witnesses=tuple(mechanism.ABOUT.witnesses),
    )
