"""Which convention an attention function follows, found by experiment.

    print(refattn.discover(my_attention, framework="torch"))

Every question is a call on which the possible answers lie far apart, and the answer that the candidate comes near is
its own. It needs no bounds and no exact arithmetic: what is asked is which formula, not how well it is rounded.
"""

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from refattn.attention.dot_product import dot_product_attention as reference
from refattn.attention.dot_product.dot_product_attention import Convention
from refattn.core import Call
from refattn.oracle import contract
from refattn.oracle.arithmetic import FORMATS, numpy_dtype
from refattn.oracle.conventions import PRESETS
from refattn.oracle.inputs import cast
from refattn.registry import find

ITEMS, HEADS, QUERIES, KEYS, FEATURES = 2, 4, 8, 16, 16
NEAR = 0.02  # of the numbers compared; the answers to one question lie further apart
EXACT, SINGLE = 1e-12, 1e-5  # how near float64 comes, and float64 whose softmax is of float32
LOWEST = float(np.finfo(np.float32).min)
MASK_VALUES = -1e4, -65504.0, -1e9, -1e30, 0.7 * LOWEST  # that people take
CLOSE = 0.02  # of a mask value, that it be one of those
LAYOUTS = {"(B, H, T, D)": (0, 1, 2, 3), "(B, T, H, D)": (0, 2, 1, 3)}


class Answer(NamedTuple):
    words: str
    fields: Mapping = MappingProxyType({})  # what it makes of a Convention
    change: Any = None  # the call that the reference should be given instead
    of_lse: Any = None  # what becomes of the reference's lse


class Found(NamedTuple):
    """The answer to one question."""

    about: str
    words: str
    fields: dict  # of a Convention, that it settles


class Discovery(NamedTuple):
    """What a candidate does where frameworks differ."""

    candidate: str
    framework: str
    version: str
    dtype: str
    found: tuple  # of Found
    convention: Convention  # with defaults where nothing was found
    settled: tuple  # which of its fields were
    presets: tuple  # names of those that agree in all of them

    def __str__(self):
        width = max(len(f.about) for f in self.found)
        lines = [f"{self.candidate}, {self.framework} {self.version} {self.dtype}".replace("  ", " ")]
        lines += [f"  {f.about:{width}}  {f.words}" for f in self.found]
        lines += [f"  as a preset: {self.as_preset()}"]
        return "\n".join([*lines, f"  agrees with {', '.join(self.presets) or 'none of the presets'}"])

    def as_preset(self):
        """A line of Python."""
        fields = {name: x for name, x in self.convention._asdict().items() if x != Convention._field_defaults[name]}
        return f"Convention({', '.join(f'{name}={x!r}' for name, x in fields.items())})"

    def as_dict(self):
        about = {name: getattr(self, name) for name in ("candidate", "framework", "version", "dtype")}
        about |= {"found": {f.about: f.words for f in self.found}, "convention": self.as_preset()}
        return about | {"settled": list(self.settled), "presets": list(self.presets)}


def discover(candidate, *, framework=None, dtype="float32", wide=True, name=None, progress=None):
    """The Discovery of a candidate, which is called like dot_product_attention: see refattn.oracle.contract.

    `wide` says that it takes float64, too: then it is asked in what its softmax is.

    A question about an option that the candidate does not take, or a call that it does not handle, stays open; so does
    one that none of the known answers explains.
    """
    if dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"discover: dtype is {dtype!r}, expected float64, float32, float16 or bfloat16")
    asked = Asked(candidate, framework, dtype)
    found = [asked.layout()]
    for about, needs, question in QUESTIONS:
        if progress is not None:
            progress(about)
        missing = [option for option in needs if not asked.takes(option)]
        if question is _precision and not wide:
            found.append(Found(about, "not offered: it takes no float64", {}))
            continue
        if missing:
            found.append(Found(about, f"not offered: it takes no {', '.join(missing)}", {}))
            continue
        try:
            found.append(question(asked))
        except contract.NotHandled as reason:
            found.append(Found(about, f"not handled: {reason}", {}))
        except Unexpected as reason:
            found.append(Found(about, str(reason), {}))
        asked.known |= found[-1].fields
    measured = f"{framework or 'numpy'} {asked.version}"
    settled = {field: x for f in found for field, x in f.fields.items()}
    presets = [name for name, convention in PRESETS.items() if settled and agrees(convention, settled)]
    return Discovery(
        *(name or getattr(candidate, "__name__", repr(candidate)), framework or "numpy", asked.version, dtype),
        *(tuple(found), Convention(**settled, measured=measured), tuple(settled), tuple(presets)),
    )


def agrees(convention, settled):
    """Whether a Convention has all these fields."""
    return all(getattr(convention, field) == x for field, x in settled.items())


class Unexpected(Exception):
    """None of the known answers."""


class Asked:
    """A candidate, and what is known of it so far."""

    def __init__(self, candidate, framework, dtype):
        self.candidate, self.mechanism = candidate, find("dot_product_attention")
        self.run, self.claim = contract.runner(framework, None), contract.claim(candidate, self.mechanism)
        self.dtype, self.axes, self.known = numpy_dtype(FORMATS[dtype]), LAYOUTS["(B, H, T, D)"], {}
        self.base, self.assumed = {}, {}  # options without which it handles nothing; fields of a Convention
        self.version, self.largest = contract.version(framework), FORMATS[dtype].largest

    def takes(self, option):
        arrays = contract.parameter_names(self.mechanism)[: self.claim.count]
        return option in self.claim.options or option in arrays

    def layout(self):
        """The order of the axes; all questions after this one are in the reference's own."""
        anything = [a._replace(fields=a.fields | causal) for causal in CAUSAL for a in SCALES]
        bases = [{}, {"is_causal": True}] if self.takes("is_causal") else [{}]
        for base, layout in itertools.product(bases, LAYOUTS):
            self.base, self.axes = base, LAYOUTS[layout]
            try:
                self.ask("", _call(keys=QUERIES), anything)
            except (Unexpected, contract.NotHandled) as reason:
                why = reason
            else:
                return Found("layout", f"q, k, v are {layout}", {})
        self.base, self.axes = {}, LAYOUTS["(B, H, T, D)"]
        return Found("layout", f"neither {' nor '.join(LAYOUTS)}: {why}", {})

    def gives(self, call, dtype=None):
        """(out, lse or None) of the candidate, in float64."""
        dtype = dtype or self.dtype
        names = contract.handed_over(self.candidate, call, contract.off_by_default(self.mechanism))
        args = [x if i > 2 else np.ascontiguousarray(x.transpose(self.axes)) for i, x in enumerate(call.args)]
        try:
            with np.errstate(all="ignore"):
                result, _ = self.run(self.candidate, list(cast(tuple(args), dtype)), cast(names, dtype), None)
        except contract.NotHandled:
            raise
        except Exception as error:
            raise Unexpected(f"it {contract.raised(error)}") from error
        out, lse = result[:2] if isinstance(result, (tuple, list)) and len(result) > 1 else (result, None)
        out = np.asarray(out[0] if isinstance(out, (tuple, list)) else out, np.float64)
        if out.ndim != 4:
            raise Unexpected(f"its answer has shape {out.shape}")
        return out.transpose(np.argsort(self.axes)), None if lse is None else np.asarray(lse, np.float64)

    def expected(self, call, answer):
        fields = self.assumed | self.known | answer.fields
        call = call if answer.change is None else answer.change(call)
        with np.errstate(all="ignore"):
            out, _ = reference.forward(*call.args, **call.options, convention=Convention(**fields))
        out, lse, _ = out if isinstance(out, reference.Out) else (out, None, None)
        return out, lse if lse is None or answer.of_lse is None else answer.of_lse(lse)

    def ask(self, about, calls, answers, bare=False):
        """Which of the answers explains what comes out, of one call or of several."""
        calls = [calls] if isinstance(calls, Call) else calls
        base = {} if bare else self.base
        calls = [Call(tuple(map(self.rounded, call.args)), base | call.options) for call in calls]
        given = [self.gives(call) for call in calls]
        right = [a for a in answers if all(_near(self.expected(c, a), g) for c, g in zip(calls, given))]
        if not right:
            raise Unexpected(f"none of {'; '.join(a.words for a in answers)}")
        open_to_it = [field for field in right[0].fields if not any(field in call.options for call in calls)]
        common = {f: right[0].fields[f] for f in open_to_it if len({a.fields.get(f, "") for a in right}) == 1}
        return Found(about, " or ".join(dict.fromkeys(a.words for a in right)), common)

    def rounded(self, x):
        with np.errstate(all="ignore"):
            return None if x is None else np.asarray(x).astype(self.dtype).astype(np.float64)


def _near(expected, given):
    for ours, theirs in zip(expected, given):
        if ours is None or theirs is None:
            continue
        theirs = np.reshape(theirs, ours.shape) if np.size(theirs) == ours.size else theirs
        if theirs.shape != ours.shape or (np.isnan(ours) != np.isnan(theirs)).any():
            return False
        finite = np.isfinite(ours)
        if (ours[~finite & ~np.isnan(ours)] != theirs[~finite & ~np.isnan(ours)]).any():
            return False
        if not (np.abs(ours - theirs)[finite] <= NEAR * np.maximum(1, np.abs(ours[finite]))).all():
            return False
    return True


# --- the questions: each takes an Asked and gives what is Found ------------------------------------------------


def _call(queries=QUERIES, keys=KEYS, groups=HEADS, bias=False, **options):
    rng = np.random.default_rng(17)
    q = 2 * rng.normal(size=(ITEMS, HEADS, queries, FEATURES))
    k = rng.normal(size=(ITEMS, groups, keys, FEATURES))
    v = rng.normal(size=(ITEMS, groups, keys, FEATURES))
    attn_bias = 2 * rng.normal(size=(ITEMS, HEADS, queries, keys)) if bias else None
    return Call((q, k, v, attn_bias) if bias else (q, k, v), options)


def _mask(*hidden):
    """(B, H, Q, K), True but for these keys, which are given as an index of it."""
    mask = np.ones((ITEMS, HEADS, QUERIES, KEYS), bool)
    for index in hidden:
        mask[index] = False
    return mask


def _scattered():
    mask = np.random.default_rng(18).random((ITEMS, HEADS, QUERIES, KEYS)) < 0.5
    mask[..., 0], mask[..., 1] = True, False
    return mask


def _with(**options):
    return lambda call: call._replace(options=call.options | options)


SCALES = [
    Answer("1 / sqrt(D)", {"scale": None}),
    Answer("1: it does not scale", {"scale": 1.0}),
    Answer("1 / D", {"scale": 1 / FEATURES}),
]
AT_INF = {"zero": "0", "nan": "NaN"}
CAUSAL = [
    {"is_causal": False},
    {"is_causal": True, "q_offset": "top_left"},
    {"is_causal": True, "q_offset": "bottom_right"},
]


def _scale(asked):
    return asked.ask("scale, if none is given", _call(), [
        answer._replace(fields=answer.fields | causal) for causal in CAUSAL for answer in SCALES
    ])  # fmt: skip


def _causal_unless_told(asked):
    words = "not causal", "causal, from the top left", "causal, up to the bottom right"
    answers = [Answer(w, fields) for w, fields in zip(words, CAUSAL)]
    return asked.ask("is_causal, if it is not given", _call(), answers, bare=True)


def _diagonal(asked):
    allowed = np.tri(QUERIES, KEYS, -1, bool)
    strictly = _with(is_causal=False, attn_mask=allowed[None, None])
    return asked.ask("is_causal", _call(is_causal=True), [
        Answer("query i sees keys up to i: the diagonal begins at the top left", {"q_offset": "top_left"}),
        Answer("the last query sees the last key: the diagonal ends at the bottom right", {"q_offset": "bottom_right"}),
        Answer("query i sees keys before i only", {}, strictly),
        Answer("it does nothing", {}, _with(is_causal=False)),
    ])  # fmt: skip


def _polarity(asked):
    call = _call(attn_mask=_scattered())
    return asked.ask("attn_mask", call, [
        Answer("True: the key takes part"),
        Answer("True: the key is hidden", {}, _with(attn_mask=~_scattered())),
        Answer("it does nothing", {}, _with(attn_mask=None)),
    ])  # fmt: skip


def _mask_op(asked):
    call = _call(attn_mask=_mask((..., 3)))
    call.args[1][:1, :, 3] = np.nan
    return asked.ask("a masked logit", call, [
        Answer("is replaced: NaN in a masked key does no harm", {"mask_op": "replace"}),
        Answer("is added to: NaN in a masked key comes through", {"mask_op": "add"}),
    ])  # fmt: skip


def _masked_values(asked):
    call = _call(attn_mask=_mask((..., 3)))
    call.args[2][:1, :, 3] = np.nan
    return asked.ask("a masked value", call, [
        Answer("is multiplied by 0: NaN in it comes through", {"masked_values": "multiply"}),
        Answer("is skipped: NaN in it does no harm", {"masked_values": "skip"}),
    ])  # fmt: skip


def _mask_value(asked):
    if not asked.takes("attn_bias"):
        return _mask_value_by(asked, False)
    try:
        return _mask_value_by(asked, True)
    except contract.NotHandled:  # it takes a mask or a bias, not both
        return _mask_value_by(asked, False)


def _mask_value_by(asked, by_bias):
    """The logit at which the only key that takes part, whose value is 1, no longer decides; the others have 2."""
    about, options = "the logit of a masked key", {"scale": 1.0} if asked.takes("scale") else {}
    scale = 1.0 if options else asked.known.get("scale") or FEATURES**-0.5
    q, k, v = (np.zeros((ITEMS, HEADS, n, FEATURES)) for n in (QUERIES, KEYS, KEYS))
    bias = np.zeros((ITEMS, HEADS, QUERIES, KEYS))
    v[:, :, :1], v[:, :, 1:] = 1, 2

    def answer(logit, *taking_part):
        bias[..., 0] = logit
        q[..., 0] = (-logit / scale) ** 0.5
        k[:, :, 0, 0] = -q[0, 0, 0, 0]
        mask = np.zeros((ITEMS, HEADS, QUERIES, KEYS), bool)
        mask[..., taking_part] = True
        args = (0 * q, k, v, bias) if by_bias else (q, k, v)
        return asked.gives(Call(args, asked.base | options | {"attn_mask": mask}))[0][0, 0, -1, 0]

    def overruled(logit):
        return not abs(answer(logit, 0) - 1) < 0.5

    lowest = max(LOWEST, -asked.largest)
    low, high = 0.99 * lowest * (1 if by_bias else min(scale, 1)), -1.0
    if overruled(high):
        return Found(about, "is hardly lower than any other", {})
    if overruled(low):
        while low < high * 1.001:
            middle = -((low * high) ** 0.5)
            low, high = (middle, high) if overruled(middle) else (low, middle)
        value = next((value for value in MASK_VALUES if abs(low / value - 1) <= CLOSE), float(f"{low:.2g}"))
        return Found(about, f"is {value:.3g}", {"mask_value": value})
    if not answer(high) > 1.5:
        return Found(about, "is -inf, or nothing shows that it is not", {"mask_value": -np.inf})
    if low > 0.9 * lowest:
        asked.assumed = {"mask_value": "lowest"}
        return Found(about, f"is below {low:.2g}, and not -inf: more cannot be said without scale or attn_bias", {})
    return Found(about, "is the lowest number", {"mask_value": "lowest"})


def _no_key(asked):
    calls = [_call(attn_mask=_mask((..., 5, slice(None)))), _call()]
    calls[1].args[0][..., 0], calls[1].args[1][..., 0] = 1, -np.inf
    average = (asked.assumed | asked.known).get("mask_value", -np.inf) != -np.inf
    words = {"zero": "gives 0", "nan": "gives NaN", "zero_masked_only": "gives 0; where all logits are -inf, NaN"}
    if average:
        words = {f: f"gives an average of values; where all logits are -inf, {x}" for f, x in AT_INF.items()}
        words["zero_probs"] = "gives 0"
    return asked.ask("a query without keys", calls, [Answer(w, {"fully_masked": f}) for f, w in words.items()])


def _softcap(asked):
    masked = {"attn_mask": _mask((..., 3))} if asked.takes("attn_mask") else {}
    calls = [_call(softcap=1.5, **masked)]
    if asked.takes("attn_bias"):
        calls.append(_call(bias=True, softcap=1.5))
    return asked.ask("softcap", calls, [
        Answer("bends the scaled products; bias and mask come after it", {"softcap_after": "scale"}),
        Answer("bends the sum with the bias; the mask comes after it", {"softcap_after": "bias"}),
        Answer("bends everything, so that masked keys take part again", {"softcap_after": "mask"}),
        Answer("does nothing", {}, _with(softcap=None)),
    ])  # fmt: skip


def _bias(asked):
    scale = asked.known.get("scale") or FEATURES**-0.5
    scaled = Answer("is scaled too", {}, lambda call: call._replace(args=(*call.args[:3], scale * call.args[3])))
    return asked.ask("attn_bias", _call(bias=True), [
        Answer("is added to the scaled products"),
        *([scaled] if scale != 1 else []),
        Answer("does nothing", {}, lambda call: call._replace(args=call.args[:3])),
    ])  # fmt: skip


def _heads(asked):
    return asked.ask("more heads of queries than of keys", _call(groups=2), [
        Answer("neighbours share a key: head h uses h // (H / G)", {"gqa_order": "repeat_interleave"}),
        Answer("in turns: head h uses h % G", {"gqa_order": "tile"}),
    ])  # fmt: skip


def _window(asked):
    sides = {
        "both sides inclusive": (3, 1), "left without its end": (2, 1), "right without its end": (3, 0),
        "both sides without their ends": (2, 0),
    }  # fmt: skip
    return asked.ask("window (3, 1)", _call(window=(3, 1)), [
        Answer(f"{words}, from the {place.replace('_', ' ')}", {"q_offset": place}, _with(window=w))
        for place in ("top_left", "bottom_right") for words, w in sides.items()
    ])  # fmt: skip


def _lse(asked):
    return asked.ask("lse", _call(return_lse=True), [
        Answer("has base e"),
        Answer("has base 2", {}, None, lambda lse: lse / np.log(2)),
        Answer("is negated", {}, None, lambda lse: -lse),
    ])  # fmt: skip


def _precision(asked):
    about, call = "the softmax of float64", _call(**asked.base)
    ours = asked.expected(call, Answer(""))[0]
    error = np.abs(asked.gives(call, np.dtype(np.float64))[0] - ours).max()
    if error <= EXACT:
        return Found(about, "is of float64", {"softmax_precision": None})
    if error <= SINGLE:
        return Found(about, "is of float32", {"softmax_precision": "float32"})
    raise Unexpected(f"it is off by {error:.1e}")


QUESTIONS = (
    ("scale", (), _scale),
    ("is_causal, if it is not given", (), _causal_unless_told),
    ("is_causal", ("is_causal",), _diagonal),
    ("attn_mask", ("attn_mask",), _polarity),
    ("a masked logit", ("attn_mask",), _mask_op),
    ("a masked value", ("attn_mask",), _masked_values),
    ("the logit of a masked key", ("attn_mask",), _mask_value),
    ("a query without keys", ("attn_mask",), _no_key),
    ("attn_bias", ("attn_bias",), _bias),
    ("softcap", ("softcap",), _softcap),
    ("more heads of queries than of keys", (), _heads),
    ("window", ("window",), _window),
    ("lse", ("return_lse",), _lse),
    ("the softmax of float64", (), _precision),
)
