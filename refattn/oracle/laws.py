"""What must hold of every mechanism, and what some declare to hold of themselves.

A law is a plain function (mechanism, call, rng) that raises AssertionError with a readable story. A mechanism is
anything with `forward`, `backward` and `ABOUT`: laws import none.
"""

import numpy as np

from refattn.core import Call, DtypeError, leaves, tree_map
from refattn.oracle.derivatives import central, complex_step, hessian_vector, inner, largest

MANY = 12  # arguments, of which each gets a trial of its own


def generic(rng, tree):
    """A tree of short, nonzero, unrelated numbers: easy to read in a report, never special."""
    return tree_map(lambda x: _generic_array(rng, x.shape), tree)


def _generic_array(rng, shape):
    return rng.choice([-1.0, 1.0], shape) * rng.integers(1, 64, shape) / 16


def only(tree, *paths):
    """`tree` with every leaf but those at `paths` set to zero."""
    keep = iter([p in paths for p, _ in leaves(tree)])
    return tree_map(lambda x: x if next(keep) else np.zeros_like(x), tree)


def _run(mechanism, call, rng, dout=None):
    """One forward and one backward pass along a generic cotangent."""
    out, saved = mechanism.forward(*call.args, **call.options)
    dout = tree_map(lambda d, y: d.astype(y.dtype), generic(rng, out) if dout is None else dout, out)
    return out, dout, tuple(mechanism.backward(dout, saved))


def _cast(call, dtype):
    def cast(x):
        return x.astype(dtype) if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind == "f" else x

    return Call(tree_map(cast, call.args), {name: tree_map(cast, value) for name, value in call.options.items()})


def _same(mechanism, expected, got, story, tolerance=1e-12):
    """Two trees agree, to `tolerance` of the largest entry of each leaf; NaN fails."""
    for (path, a), (_, b) in zip(leaves(expected), leaves(got), strict=True):
        where = f"{mechanism}: {story}" + (f", at {path}" if path else "")
        assert np.shape(a) == np.shape(b), f"{where}: shape {np.shape(b)}, not {np.shape(a)}"
        worst, size = np.abs(a - b).max(initial=0), np.abs(a).max(initial=0)
        assert worst <= tolerance * (1 + size), f"{where}: differs by {worst:.3g} (largest entry {size:.3g})"


# --- universal: gradients -----------------------------------------------------------------------------------


def gradients_mirror_arguments(mechanism, call, rng):
    """One gradient per positional argument, of the same structure, shape and dtype."""
    _, _, grads = _run(mechanism, call, rng)
    assert len(grads) == len(call.args), (
        f"{mechanism}: backward must return one gradient per positional argument: "
        f"{len(call.args)} arguments, {len(grads)} gradients"
    )
    paths, gpaths = [p for p, _ in leaves(call.args)], [p for p, _ in leaves(grads)]
    assert paths == gpaths, f"{mechanism}: gradients of {gpaths}, but should be of {paths}"
    for (path, x), (_, g) in zip(leaves(call.args), leaves(grads), strict=True):
        assert g.shape == x.shape, f"{mechanism}: gradient of {path} has shape {g.shape}, but should have {x.shape}"
        assert g.dtype == x.dtype, f"{mechanism}: gradient of {path} is {g.dtype}, but should be {x.dtype}"


def gradient_errors(mechanism, call, rng, oracle, rtol):
    """Yield (path, <J'dout, v>, <dout, J v>, their allowed difference) for every argument, J v by `oracle`.

    One argument at a time: a small bias must not hide in a big weight. Of more than MANY arguments, all together
    first, where at 1e-12 little can hide, and then MANY of them, drawn anew for every call.
    """

    def value(*args):
        return mechanism.forward(*args, **call.options)[0]

    out, dout, grads = _run(mechanism, call, rng)
    direction = generic(rng, call.args)
    floor = rtol * inner(tree_map(np.abs, dout), tree_map(np.abs, out)) + 1e-90  # less times TINY is subnormal
    paths = [path for path, _ in leaves(call.args)]
    chosen = [(path,) for path in paths]
    if len(paths) > MANY:
        chosen = [tuple(paths), *((str(path),) for path in rng.choice(paths, MANY, replace=False))]
    for some in chosen:
        v = only(direction, *some)
        jv = oracle(value, call.args, v)
        size = inner(tree_map(np.abs, dout), tree_map(np.abs, jv)) + inner(tree_map(np.abs, grads), tree_map(np.abs, v))
        name = some[0] if len(some) == 1 else f"0 to {some[-1]}, all together"
        yield name, inner(grads, v), inner(dout, jv), rtol * size + floor


def _gradient(mechanism, call, rng, oracle, rtol):
    for path, ours, theirs, allowed in gradient_errors(mechanism, call, rng, oracle, rtol):
        assert abs(theirs - ours) <= allowed, (
            f"{mechanism}: gradient of argument {path}: backward says {ours:.12g}, {oracle.__name__} says "
            f"{theirs:.12g} along a generic direction (ratio {ours / theirs if theirs else np.inf:.6g})"
        )


def gradient_matches_complex_step(mechanism, call, rng):
    """<dout, J v> = <J' dout, v> for every argument, J v by the complex step, to 1e-12."""
    _gradient(mechanism, call, rng, complex_step, rtol=1e-12)


def gradient_matches_central_difference(mechanism, call, rng):
    """The same, J v by five-point differences, to 1e-6: a witness that shares no weakness with the complex step."""
    _gradient(mechanism, call, rng, central, rtol=1e-6)


def backward_is_linear(mechanism, call, rng):
    """backward(2 a - b) = 2 backward(a) - backward(b), and nothing comes of nothing."""
    out, saved = mechanism.forward(*call.args, **call.options)
    a, b = generic(rng, out), generic(rng, out)
    both = tuple(mechanism.backward(tree_map(lambda s, t: 2 * s - t, a, b), saved))
    ga, gb = tuple(mechanism.backward(a, saved)), tuple(mechanism.backward(b, saved))
    scale = 1 + largest(ga) + largest(gb)
    expected = tree_map(lambda x, y: 2 * x - y, ga, gb)
    for (path, x), (_, y) in zip(leaves(expected), leaves(both), strict=True):
        worst = np.abs(x - y).max(initial=0)
        assert worst <= 1e-12 * scale, f"{mechanism}: backward is not linear in dout: {path} is off by {worst:.3g}"
    for path, g in leaves(tuple(mechanism.backward(tree_map(np.zeros_like, a), saved))):
        assert (g == 0).all(), f"{mechanism}: the gradient of {path} is not zero where dout is"


def second_derivatives_agree(mechanism, call, rng):
    """H v by the complex step through backward: symmetric, and equal to differences of the gradient."""
    out, _ = mechanism.forward(*call.args, **call.options)
    dout, u, v = generic(rng, out), generic(rng, call.args), generic(rng, call.args)

    def forward(*args):
        return mechanism.forward(*args, **call.options)

    def gradient(*args):
        return tuple(mechanism.backward(dout, forward(*args)[1]))

    if largest(gradient(*call.args)) <= 1e-12 * largest(dout):  # heads that share a value, say, may just cancel
        dout = generic(rng, out)
    hu, hv = (hessian_vector(forward, mechanism.backward, call.args, dout, t) for t in (u, v))
    size = largest(gradient(*call.args)) + largest(hu) + largest(hv)
    count = sum(x.size for _, x in leaves(call.args))
    one, other = inner(u, hv), inner(v, hu)
    assert abs(one - other) <= 1e-11 * size * max(count, 1) * 4, (
        f"{mechanism}: second derivatives are not symmetric: <u, H v> = {one:.12g}, <v, H u> = {other:.12g}"
    )
    differences = central(gradient, call.args, v)
    for (path, a), (_, b) in zip(leaves(differences), leaves(hv), strict=True):
        worst = np.abs(a - b).max(initial=0)
        assert worst <= 1e-5 * size, f"{mechanism}: H v of {path}: complex step and differences differ by {worst:.3g}"


# --- universal: manners -------------------------------------------------------------------------------------


def arguments_are_left_alone(mechanism, call, rng):
    """Arguments, options, saved values and dout are passed read-only; a second backward gives the same bits."""
    frozen = tree_map(_readonly, call.args)
    options = {k: _readonly(v) if isinstance(v, np.ndarray) else v for k, v in call.options.items()}
    out, saved = mechanism.forward(*frozen, **options)
    for _, leaf in leaves(saved):
        if isinstance(leaf, np.ndarray):
            leaf.setflags(write=False)
    dout = tree_map(_readonly, generic(rng, out))
    first, second = mechanism.backward(dout, saved), mechanism.backward(dout, saved)
    for (path, a), (_, b) in zip(leaves(tuple(first)), leaves(tuple(second)), strict=True):
        assert np.array_equal(a, b), f"{mechanism}: a second backward changed the gradient of {path}"


def _readonly(x):
    x = np.array(x)
    x.setflags(write=False)
    return x


def single_precision_stays_single(mechanism, call, rng):
    """float32 in, float32 out, float32 gradients."""
    _dtype_stays(mechanism, call, rng, np.float32)


def extended_precision_stays_extended(mechanism, call, rng):
    """longdouble in, longdouble out; a function that cannot says so with a DtypeError."""
    try:
        _dtype_stays(mechanism, call, rng, np.longdouble)
    except DtypeError as error:
        assert "longdouble" in str(error) or str(np.dtype(np.longdouble)) in str(error), f"{mechanism}: {error}"


def _dtype_stays(mechanism, call, rng, dtype):
    out, _, grads = _run(mechanism, _cast(call, dtype), rng)
    for story, tree in (("output", out), ("gradient of", grads)):
        for path, x in leaves(tree):
            assert x.dtype == dtype, f"{mechanism}: {np.dtype(dtype)} in, but {story} {path} is {x.dtype}"


def memory_layout_does_not_matter(mechanism, call, rng):
    """Strided, reversed and Fortran-ordered arguments give what contiguous ones give, gradients too."""
    out, dout, grads = _run(mechanism, call, rng)
    for story, relaid in (
        ("strided", lambda x: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x),
        ("reversed", lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1] if x.ndim else x),
        ("Fortran-ordered", lambda x: np.array(x, order="F")),
    ):
        again, _, regrads = _run(mechanism, Call(tree_map(relaid, call.args), call.options), rng, dout)
        _same(mechanism, (out, grads), (again, regrads), f"{story} arguments change the result")


def large_inputs_stay_finite(mechanism, call, rng):
    """A thousandfold input may saturate a gate; it may not overflow."""
    large = Call(tree_map(lambda x: 1e3 * x, call.args), call.options)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        out, _, grads = _run(mechanism, large, rng)
    for path, x in leaves((out, grads)):
        assert np.isfinite(x).all(), f"{mechanism}: {path} is not finite for large inputs"


def empty_batch_works(mechanism, call, rng):
    """A batch of length 0 gives an output of length 0 and finite gradients, or a ValueError that says why not."""
    empty = batch(mechanism, call, lambda x: x[:0])
    if empty is None:
        return
    try:
        out, _, grads = _run(mechanism, empty, rng)
    except ValueError as error:
        assert "expected" in str(error), f"{mechanism}: an empty batch raises {error!r}: what is expected?"
        return
    for path, g in leaves(grads):
        assert np.isfinite(g).all(), f"{mechanism}: gradient of {path} is not finite for an empty batch"
    assert any(0 in y.shape for _, y in leaves(out)), f"{mechanism}: an empty batch has a non-empty output"


def batch(mechanism, call, pick):
    """`call` with `pick` applied to every array whose first axis is the batch; None where there is no batch axis.

    The batch is the letter that comes first in the hint of the first argument; what shares it is in the batch too.
    """
    hints = mechanism.forward.hints
    letter = next(iter(_axes(next(iter(hints.values())))), None)
    if letter is None or letter[0] in "*." or letter.isdigit():
        return None

    def change(x, axes):
        stretched = axes[:1] == [f"{letter}?"] and len(x) == 1
        return pick(x) if axes[:1] in ([letter], [f"{letter}?"]) and not stretched else x

    return _arrays(mechanism, call, change)


def _arrays(mechanism, call, change):
    """`call` with `change(array, its letters in the hints of forward)` in place of every array."""
    hints = mechanism.forward.hints

    def walk(value, hint):
        hint = next((h for h in getattr(hint, "__args__", ()) if hasattr(h, "_fields")), hint)  # State of State | None
        if type(value) is tuple:  # of tuple[State, ...]
            return tuple(walk(v, hint) for v in value)
        if isinstance(value, tuple) and hasattr(hint, "_fields"):
            fields = getattr(hint, "__origin__", hint).__annotations__  # of Shaped[linear.Params, "I=C"]: linear.Params
            return type(value)(*(walk(v, fields[f]) for f, v in zip(value._fields, value, strict=True)))
        return change(value, _axes(hint, value.ndim)) if isinstance(value, np.ndarray) else value

    args = tuple(walk(value, hints.get(name)) for name, value in zip(hints, call.args, strict=False))
    return Call(args, {name: walk(value, hints.get(name)) for name, value in call.options.items()})


def _axes(hint, ndim=None):
    """["N", "C"] of Shaped[Array, "N C"], optional or not; of several the one with `ndim` axes; else []."""
    spoken = [h.__metadata__[0] for h in (hint, *getattr(hint, "__args__", ())) if hasattr(h, "__metadata__")]
    found = [axes.split() for axes in spoken if "=" not in axes]
    any_rank = [axes for axes in found if axes and axes[0][0] in "*."]
    return next(iter([axes for axes in found if len(axes) == ndim] + any_rank + found), [])


UNIVERSAL = (
    gradients_mirror_arguments,
    gradient_matches_complex_step,
    gradient_matches_central_difference,
    backward_is_linear,
    second_derivatives_agree,
    arguments_are_left_alone,
    single_precision_stays_single,
    extended_precision_stays_extended,
    memory_layout_does_not_matter,
    large_inputs_stay_finite,
    empty_batch_works,
)


# --- declared by a mechanism in ABOUT.laws ------------------------------------------------------------------


def batch_independent(mechanism, call, rng):
    """Every item of the batch gets what it gets alone."""
    i = int(rng.integers(call.args[0].shape[0]))
    alone = batch(mechanism, call, lambda x: x[i : i + 1])
    whole, alone = (mechanism.forward(*c.args, **c.options)[0] for c in (call, alone))
    _same(mechanism, alone, tree_map(lambda y: y[i : i + 1], whole), "items of a batch influence one another")


def _weights(mechanism, call):
    return getattr(mechanism.forward(*call.args, **call.options)[1], mechanism.ABOUT.weights)


def weights_in_unit_interval(mechanism, call, rng):
    """Every entry of the attention map lies in [0, 1]."""
    weights = _weights(mechanism, call)
    assert np.all((weights >= 0) & (weights <= 1 + 1e-12)), f"{mechanism}: {mechanism.ABOUT.weights} leaves [0, 1]"


def weights_sum_to_one(mechanism, call, rng):
    """The attention map sums to 1 over its last axis, or to 0 where nothing may be attended to."""
    total = _weights(mechanism, call).sum(axis=-1)
    off = np.minimum(np.abs(total - 1), np.abs(total)).max(initial=0)
    assert off <= 1e-12, f"{mechanism}: {mechanism.ABOUT.weights} sums to neither 1 nor 0, off by {off:.3g}"


def pixel_permutation_equivariant(mechanism, call, rng):
    """Reordering the pixels of every image argument (N, C, H, W) reorders the output alike."""
    n, _, h, w = call.args[0].shape
    order = rng.permutation(h * w)

    def shuffle(t):
        return t.reshape(n, t.shape[1], h * w)[:, :, order].reshape(t.shape)

    shuffled = [shuffle(t) if isinstance(t, np.ndarray) and t.ndim == 4 else t for t in call.args]
    a = shuffle(mechanism.forward(*call.args, **call.options)[0])
    b = mechanism.forward(*shuffled, **call.options)[0]
    _same(mechanism, a, b, "depends on the order of pixels")


def along(mechanism, call, letters, pick):
    """`call` with `pick(array, axis)` applied along every axis that one of `letters` names in forward's hints."""

    def change(x, axes):
        for i, letter in enumerate(axes):
            starred = any(axis[0] in "*." for axis in axes[:i])  # then the axis is counted from the end
            x = pick(x, i - len(axes) if starred else i) if letter in letters else x
        return x

    return _arrays(mechanism, call, change)


def _tokens(mechanism):
    """The letters of the axes on which tokens lie: the last but one of q (or x), and of k."""
    first_two = [_axes(hint) for hint in mechanism.forward.hints.values()][:2]
    return [axes[-2] for axes in first_two if len(axes) > 1]


def key_permutation_invariant(mechanism, call, rng):
    """Reordering keys, values and masks together changes nothing (but what is causal)."""
    call = Call(call.args, {name: value for name, value in call.options.items() if name != "is_causal"})
    order = rng.permutation(call.args[1].shape[-2])
    shuffled = along(mechanism, call, _tokens(mechanism)[1:], lambda x, axis: x.take(order, axis))
    a, b = (mechanism.forward(*c.args, **c.options)[0] for c in (call, shuffled))
    _same(mechanism, a, b, "depends on the order of keys")


def mask_is_truncation(mechanism, call, rng):
    """Forbidding the last key to everyone is the same as not having it; the gradient of what it is made of is 0."""
    keys, count = _tokens(mechanism)[1:], call.args[1].shape[-2]
    if count == 1:
        return
    mask = call.options["mask"]
    shape = (*_weights(mechanism, call).shape[:-1], count)  # the map may have more columns: of keys that are learned
    mask = np.ones(shape, bool) if mask is None else mask.copy()
    mask[..., -1] = False
    masked = Call(call.args, call.options | {"mask": mask})

    def without_last(c):
        return along(mechanism, c, keys, lambda x, axis: x.take(range(count - 1), axis))

    def nothing_for_last(gradient, axis):
        assert (gradient.take(-1, axis) == 0).all(), f"{mechanism}: a masked key gets a gradient"
        return gradient

    out, dout, grads = _run(mechanism, masked, rng)
    shorter, _, fewer = _run(mechanism, without_last(masked), rng, dout)
    along(mechanism, Call(grads, {}), keys, nothing_for_last)
    _same(mechanism, (shorter, fewer), (out, without_last(Call(grads, {})).args), "a masked key still counts")


def causal(mechanism, call, rng):
    """Later tokens change no earlier output, and get exactly no gradient from it."""
    tokens, count = _tokens(mechanism), call.args[0].shape[-2]
    now = rng.integers(1, count + 1)
    if "is_causal" in mechanism.forward.hints:
        call = Call(call.args, call.options | {"is_causal": True})

    def nothing_for_later(gradient, axis):
        later = gradient.take(range(now, max(now, gradient.shape[axis])), axis)
        assert (later == 0).all(), f"{mechanism}: the past gives the future a gradient"
        return gradient

    out, saved = mechanism.forward(*call.args, **call.options)
    past = along(mechanism, call, tokens, lambda x, axis: x.take(range(min(now, x.shape[axis])), axis))
    _same(mechanism, mechanism.forward(*past.args, **past.options)[0], out[..., :now, :], "the future changes the past")
    dout = np.where(np.arange(count)[:, None] < now, generic(rng, out), 0)
    along(mechanism, Call(tuple(mechanism.backward(dout, saved)), {}), tokens, nothing_for_later)


DECLARED = {
    law.__name__: law
    for law in (
        batch_independent,
        weights_in_unit_interval,
        weights_sum_to_one,
        pixel_permutation_equivariant,
        key_permutation_invariant,
        mask_is_truncation,
        causal,
    )
}


def laws_of(mechanism):
    """The laws that hold of a mechanism: all universal ones it is not exempt from, and those it declares."""
    exempt = dict(mechanism.ABOUT.exempt)
    universal = tuple(law for law in UNIVERSAL if law.__name__ not in exempt)
    return universal + tuple(DECLARED[name] for name in mechanism.ABOUT.laws)
