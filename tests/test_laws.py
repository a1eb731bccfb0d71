"""Every law has a wrong mechanism that it rejects, and that the other universal laws let pass."""

import numpy as np
import pytest

from refattn.attention.channel import squeeze_excitation
from refattn.attention.dot_product import scaled_dot_product
from refattn.core import About, Array, Call, DtypeError, Shaped, shaped
from refattn.draw import RandomDraw
from refattn.elementwise import sigmoid
from refattn.oracle import laws
from refattn.oracle.derivatives import Inconclusive

EXTENDED = np.finfo(np.longdouble).bits > 64


class Gate:
    """y_nc = x_nc s_n with s_n = sigmoid(sum_k w_k x_nk): right in every respect. Wrong ones override a part."""

    ABOUT = About()

    def __str__(self):
        return type(self).__name__

    def gate(self, x, w):
        return sigmoid(x @ w)

    @property
    def forward(self):
        @shaped
        def forward(x: Shaped[Array, "N C"], w: Shaped[Array, "C"], *, scale: float = 1.0):
            return self.compute(x, w, scale)

        return forward

    def compute(self, x, w, scale):
        s = self.gate(x, w)
        return scale * x * s[:, None], (x, w, s, scale)

    def backward(self, dy, saved):
        x, w, s, scale = saved
        dlogit = scale * (dy * x).sum(axis=1) * s * (1 - s)
        return scale * dy * s[:, None] + dlogit[:, None] * w, x.T @ dlogit

    def example(self, draw):
        n, c = draw.size("N", low=2), draw.size("C")
        return Call((draw.array(n, c), draw.array(c)), {"scale": draw.choice("scale", 1.0, 0.5)})


class WrongShape(Gate):
    def backward(self, dy, saved):
        dx, dw = super().backward(dy, saved)
        return dx, dw[None]


class OffInTheNinthDigit(Gate):
    def backward(self, dy, saved):
        dx, dw = super().backward(dy, saved)
        return dx * (1 + 1e-9), dw * (1 + 1e-9)


class DropsTheImaginaryPart(Gate):
    """Forward and backward agree on forgetting a term that the complex step cannot see."""

    def compute(self, x, w, scale):
        y, saved = super().compute(x, w, scale)
        return y + 0.01 * np.real(x), saved


class Clipped(Gate):
    """Not linear in dout, where dout is large."""

    def backward(self, dy, saved):
        large = np.abs(dy) > 4
        return super().backward(np.where(large, 0.5 * dy, dy), saved)


class RealBackward(Gate):
    """Right, but backward computes with real numbers only: no second derivatives."""

    def backward(self, dy, saved):
        x, w, s, scale = saved
        return super().backward(dy, (x, w, s.real, scale))


class WritesToItsArgument(Gate):
    def compute(self, x, w, scale):
        x *= 1
        return super().compute(x, w, scale)


class DoubleConstant(Gate):
    def compute(self, x, w, scale):
        return super().compute(x, w, np.array([scale]) if x.dtype == np.float32 else scale)


class NotExtended(Gate):
    def compute(self, x, w, scale):
        y, saved = super().compute(x, w, scale)
        return y.astype(np.float64) if y.dtype == np.longdouble else y, saved


class ReadsMemoryNotNumbers(Gate):
    def compute(self, x, w, scale):
        return super().compute(x if x.flags.c_contiguous else 1.001 * x, w, scale)


class Overflows(Gate):
    def gate(self, x, w):
        return 1 / (1 + np.exp(-(x @ w)))


class NoEmptyBatch(Gate):
    def compute(self, x, w, scale):
        return super().compute(x, w, scale + 0 * x.real.max())


WRONG = {
    laws.gradients_mirror_arguments: WrongShape(),
    laws.gradient_matches_complex_step: OffInTheNinthDigit(),
    laws.gradient_matches_central_difference: DropsTheImaginaryPart(),
    laws.backward_is_linear: Clipped(),
    laws.second_derivatives_agree: RealBackward(),
    laws.arguments_are_left_alone: WritesToItsArgument(),
    laws.single_precision_stays_single: DoubleConstant(),
    laws.extended_precision_stays_extended: NotExtended(),
    laws.memory_layout_does_not_matter: ReadsMemoryNotNumbers(),
    laws.large_inputs_stay_finite: Overflows(),
    laws.empty_batch_works: NoEmptyBatch(),
}


def rejected(law, mechanism):
    """Whether the law rejects the mechanism on any of ten calls."""
    for seed in range(10):
        call = mechanism.example(RandomDraw(seed))
        try:
            law(mechanism, call, np.random.default_rng(seed))
        except Inconclusive:
            continue
        except (AssertionError, ArithmeticError, ValueError):
            return True
    return False


def test_every_law_has_a_wrong_mechanism():
    assert set(WRONG) == set(laws.UNIVERSAL)


@pytest.mark.parametrize("law", laws.UNIVERSAL, ids=lambda law: law.__name__)
def test_the_right_mechanism_passes(law):
    assert not rejected(law, Gate())


@pytest.mark.parametrize("law", laws.UNIVERSAL, ids=lambda law: law.__name__)
@pytest.mark.parametrize("about", laws.UNIVERSAL, ids=lambda law: f"fault_in_{law.__name__}")
def test_only_its_own_law_rejects_a_wrong_mechanism(law, about):
    if about is laws.extended_precision_stays_extended and not EXTENDED:
        pytest.skip("longdouble is float64 on this machine: the fault cannot exist")
    assert rejected(law, WRONG[about]) == (law is about)


def test_a_refusal_of_extended_precision_must_say_so():
    class Refuses(Gate):
        def compute(self, x, w, scale):
            if x.dtype == np.longdouble:
                raise DtypeError(self.message)
            return super().compute(x, w, scale)

    mechanism = Refuses()
    mechanism.message = f"gate: x has dtype {np.dtype(np.longdouble)}, expected float64"
    assert not rejected(laws.extended_precision_stays_extended, mechanism)
    mechanism.message = "no"
    assert rejected(laws.extended_precision_stays_extended, mechanism)


def test_an_exempt_law_is_not_asked():
    class Exempt(Gate):
        ABOUT = About(exempt=(("empty_batch_works", "a reason"),))

    assert laws.empty_batch_works not in laws.laws_of(Exempt())
    assert len(laws.laws_of(Exempt())) == len(laws.UNIVERSAL) - 1


def test_nan_never_passes():
    class NotANumber(Gate):
        def backward(self, dy, saved):
            dx, dw = super().backward(dy, saved)
            return dx, dw * np.nan

    for law in (
        laws.gradient_matches_complex_step,
        laws.gradient_matches_central_difference,
        laws.backward_is_linear,
        laws.memory_layout_does_not_matter,
        laws.large_inputs_stay_finite,
    ):
        assert rejected(law, NotANumber()), law.__name__


# --- declared laws: a wrong variation of a mechanism that obeys them ----------------------------------------


class Variation:
    """A mechanism with another forward; its hints stay."""

    def __init__(self, mechanism, forward):
        self._mechanism = mechanism

        def changed(*args, **options):
            return forward(*args, **options)

        changed.hints = mechanism.forward.hints
        self.forward = changed

    def __getattr__(self, name):
        return getattr(self._mechanism, name)


def reweighted(change):
    def forward(*args, **options):
        out, saved = scaled_dot_product.forward(*args, **options)
        return out, saved._replace(attn=change(saved.attn))

    return forward


def leaves_the_interval(attn):
    return attn + (np.eye(attn.shape[-1])[0] - np.eye(attn.shape[-1])[-1])


def mixes_the_batch(q, k, v, **options):
    out, saved = scaled_dot_product.forward(q, k, v, **options)
    return out + out.mean(axis=0, keepdims=True), saved


def likes_the_first_key(q, k, v, **options):
    out, saved = scaled_dot_product.forward(q, k, v, **options)
    return out + v[..., :1, :], saved


def ignores(option):
    def forward(q, k, v, **options):
        return scaled_dot_product.forward(q, k, v, **{name: x for name, x in options.items() if name != option})

    return forward


def knows_where_a_pixel_is(x, params):
    return squeeze_excitation.forward(x + np.arange(x.shape[2] * x.shape[3]).reshape(x.shape[2:]), params)


DECLARED_WRONG = {
    laws.batch_independent: Variation(scaled_dot_product, mixes_the_batch),
    laws.weights_in_unit_interval: Variation(scaled_dot_product, reweighted(leaves_the_interval)),
    laws.weights_sum_to_one: Variation(scaled_dot_product, reweighted(lambda attn: attn / 2)),
    laws.key_permutation_invariant: Variation(scaled_dot_product, likes_the_first_key),
    laws.mask_is_truncation: Variation(scaled_dot_product, ignores("mask")),
    laws.causal: Variation(scaled_dot_product, ignores("is_causal")),
    laws.pixel_permutation_equivariant: Variation(squeeze_excitation, knows_where_a_pixel_is),
}


# Weights outside [0, 1] that still sum to 1 take from a key and give to another, which these two may see as well.
UNAVOIDABLE = {laws.weights_in_unit_interval: {laws.mask_is_truncation, laws.causal}}


@pytest.mark.parametrize("about", DECLARED_WRONG, ids=lambda law: law.__name__)
def test_only_its_own_declared_law_rejects_a_wrong_variation(about):
    wrong = DECLARED_WRONG[about]
    asked = {law for law in DECLARED_WRONG if law.__name__ in wrong.ABOUT.laws}
    rejecting = {law for law in asked if rejected(law, wrong)}
    assert {about} == rejecting - UNAVOIDABLE.get(about, set())


def test_every_declared_law_has_a_wrong_variation():
    assert {law.__name__ for law in DECLARED_WRONG} == set(laws.DECLARED)
