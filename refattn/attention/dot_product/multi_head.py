r"""Multi-head attention.

Several heads attend at once, each to its own linear views of queries, keys and values; a last linear map joins them.

Paper: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), section 3.2.2.

Shapes
    B items, Q queries of E features, K keys of F features and as many values of G features (torch: embed_dim,
    kdim, vdim), H heads. All heads together have P features to compare and V to pass on; O features come out.
    Every query attends to A keys: the K of them, and after these the extra ones.

Forward, for every head h, which has the h-th P/H (or V/H) of the projected features
    qh = Wq q + bq,   kh = Wk k + bk,   vh = Wv v + bv
    kh, vh = [kh bias_kh 0], [vh bias_vh 0]   with a learned token (bias_k, bias_v), with one of zeros (add_zero_attn)
    yh = scaled_dot_product(qh, kh, vh)
    y  = Wo [y1 ... yH] + bo

Backward, with a bar for "gradient of the loss with respect to"
    [y1bar ... yHbar]  = Wo^T ybar            and Wobar, bobar: see linear
    qhbar, khbar, vhbar = the backward of scaled_dot_product
    bias_kbar, bias_vbar = the sums over the batch of what comes back to the learned token
    qbar = Wq^T [q1bar ... qHbar], and so on

Choices
    Self-attention is forward(x, x, x, ...), cross-attention forward(x, memory, memory, ...); the gradient of what is
    given twice is the sum of its gradients. Biases are optional, and so is each projection: a None in Params leaves it
    out, and Params() attends to what is projected already, as ONNX Runtime's MultiHeadAttention does.
    Three kinds of mask, which must all agree: mask[b, h, i, j] and key_mask[b, j] are True where the key takes
    part, and is_causal is as in scaled_dot_product. torch's boolean masks are True where the key is left out.
    No mask hides the extra tokens. torch (2.13) hides them as if they came after the keys, where is_causal=True is
    given with need_weights=False and without key_padding_mask.
    refattn.layouts has the layouts of others, and of their gradients: torch's in_proj_weight, packed or not; the
    kernels of Keras and flax.
    The weights are in Saved.attn, one map per head; torch returns their mean, attn.mean(axis=1).
    A query that may attend to nothing gets bo. torch: the same, but NaN if it is asked for the weights.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import scaled_dot_product
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import linear


class Params(NamedTuple):
    q: Shaped[linear.Params, "I=E O=P"] | None = None
    k: Shaped[linear.Params, "I=F O=P"] | None = None
    v: Shaped[linear.Params, "I=G O=V"] | None = None
    out: Shaped[linear.Params, "I=V O=O"] | None = None
    bias_k: Shaped[Array, "P"] | None = None
    bias_v: Shaped[Array, "V"] | None = None


class Saved(NamedTuple):
    q: linear.Saved | None
    k: linear.Saved | None
    v: linear.Saved | None
    heads: scaled_dot_product.Saved
    attn: Shaped[Array, "B H Q A"]
    out: linear.Saved | None
    own: int  # K
    learned: bool  # bias_k and bias_v


def init(rng, features, *, key_features=None, value_features=None, bias=True, bias_kv=False):
    """Each projection as linear.init starts it, all of them to `features`; bias_k and bias_v alike."""
    inputs = features, key_features or features, value_features or features, features
    extra = rng.normal(size=(2, features)) / math.sqrt(features) if bias_kv else ()
    return Params(*(linear.init(rng, size, features, bias) for size in inputs), *extra)


@shaped
def forward(
    q: Shaped[Array, "B Q E"],
    k: Shaped[Array, "B K F"],
    v: Shaped[Array, "B K G"],
    params: Params,
    *,
    heads: int,
    mask: Shaped[Bools, "B H Q K"] | None = None,
    key_mask: Shaped[Bools, "B K"] | None = None,
    is_causal: bool = False,
    add_zero_attn: bool = False,
) -> tuple[Shaped[Array, "B Q O"], Saved]:
    _check(heads, mask, q, k, v, params)
    projected_q, saved_q = _project(q, params.q)
    projected_k, saved_k = _project(k, params.k)
    projected_v, saved_v = _project(v, params.v)
    projected_k = _append(projected_k, params.bias_k, add_zero_attn)
    projected_v = _append(projected_v, params.bias_v, add_zero_attn)
    allowed = np.ones((q.shape[0], heads, q.shape[1], projected_k.shape[1]), bool)
    of_own_keys = allowed[..., : k.shape[1]]  # a view: the extra ones stay True
    if mask is not None:
        of_own_keys &= mask
    if key_mask is not None:
        of_own_keys &= key_mask[:, None, None, :]
    if is_causal:
        of_own_keys &= np.tri(q.shape[1], k.shape[1], dtype=bool)
    y, saved_heads = scaled_dot_product.forward(
        *(split_heads(x, heads) for x in (projected_q, projected_k, projected_v)), mask=allowed
    )
    out, saved_out = _project(join_heads(y), params.out)
    learned = params.bias_k is not None
    return out, Saved(saved_q, saved_k, saved_v, saved_heads, saved_heads.attn, saved_out, k.shape[1], learned)


@shaped
def backward(
    dy: Shaped[Array, "B Q O"], saved: Saved
) -> tuple[Shaped[Array, "B Q E"], Shaped[Array, "B K F"], Shaped[Array, "B K G"], Params]:
    heads, own = saved.attn.shape[1], saved.own
    djoined, dout = _unproject(dy, saved.out)
    dheads = scaled_dot_product.backward(split_heads(djoined, heads), saved.heads)
    dq, dk, dv = (join_heads(d) for d in dheads)
    dextra = (dk[:, own].sum(axis=0), dv[:, own].sum(axis=0)) if saved.learned else (None, None)
    dq, dparams_q = _unproject(dq, saved.q)
    dk, dparams_k = _unproject(dk[:, :own], saved.k)
    dv, dparams_v = _unproject(dv[:, :own], saved.v)
    return dq, dk, dv, Params(dparams_q, dparams_k, dparams_v, dout, *dextra)


def split_heads(x, heads):
    """(B, T, H D) to (B, H, T, D)."""
    b, t, features = x.shape
    return x.reshape(b, t, heads, features // heads).swapaxes(1, 2)


def join_heads(x):
    """(B, H, T, D) to (B, T, H D)."""
    b, heads, t, features = x.shape
    return x.swapaxes(1, 2).reshape(b, t, heads * features)


def _project(x, params):
    return (x, None) if params is None else linear.forward(x, params)


def _unproject(dy, saved):
    return (dy, None) if saved is None else linear.backward(dy, saved)


def _append(x, learned, add_zero_attn):
    """The tokens of x (B, K, P), after them the learned one and that of zeros: (B, A, P)."""
    b, _, features = x.shape
    extra = [] if learned is None else [np.broadcast_to(learned, (b, 1, features))]
    if add_zero_attn:
        extra.append(np.zeros((b, 1, features), x.dtype))
    return np.concatenate([x, *extra], axis=1)


def _check(heads, mask, q, k, v, params):
    where = "multi_head.forward:"
    expect(isinstance(heads, (int, np.integer)) and heads > 0, f"{where} heads", heads, "a positive int")
    widths = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        projection = getattr(params, name)
        widths[name] = x.shape[-1] if projection is None else projection.weight.shape[0]
        source = f"{name}.shape" if projection is None else f"params.{name}.weight"
        expect(widths[name] % heads == 0, f"{where} heads", heads, f"a divisor of {widths[name]}, from {source}")
    expect(widths["q"] == widths["k"], f"{where} features of q", widths["q"], f"those of k, {widths['k']}, projected")
    if params.out is not None:
        joined, wanted = params.out.weight.shape, f"(O, {widths['v']}), all heads of v joined"
        expect(joined[1] == widths["v"], f"{where} params.out.weight.shape", joined, wanted)
    both = (params.bias_k is None) == (params.bias_v is None)
    expect(both, f"{where} params.bias_v", params.bias_v, "an array where params.bias_k is one, and None where not")
    for name, bias in (("k", params.bias_k), ("v", params.bias_v)):
        fits = bias is None or len(bias) == widths[name]
        expect(fits, f"{where} params.bias_{name}.shape", bias is None or bias.shape, f"({widths[name]},)")
    if mask is not None:
        expect(mask.shape[1] == heads, f"{where} mask.shape", mask.shape, f"{heads} heads, one mask for each")


def example(draw):
    heads = draw.choice("heads", 1, 2, 3)
    compared, passed = heads * draw.size("P / heads", high=2), heads * draw.size("V / heads", high=2)
    b, queries, keys = draw.size("B", high=2), draw.size("Q", high=3), draw.size("K", high=3)
    inputs = {"q": draw.size("E", high=3), "k": draw.size("F", high=3), "v": draw.size("G", high=3), "out": passed}
    outputs = {"q": compared, "k": compared, "v": passed, "out": draw.size("O", high=3)}
    parts = {}
    for name in inputs:
        made = draw.choice(f"projection of {name}", "with bias", "without", "none")
        if made == "none":
            inputs[name] = outputs[name]
        else:
            parts[name] = linear.init(draw.rng, inputs[name], outputs[name], made == "with bias")
    if draw.choice("learned token", False, True):
        parts |= {"bias_k": np.zeros(compared), "bias_v": np.zeros(passed)}
    options = {
        "heads": heads,
        "mask": draw.mask(b, heads, queries, keys) if draw.choice("masked", False, True) else None,
        "key_mask": draw.mask(b, keys) if draw.choice("padded", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
        "add_zero_attn": draw.choice("add_zero_attn", False, True),
    }
    tokens = {"q": queries, "k": keys, "v": keys}
    arrays = (draw.array(b, count, inputs[name]) for name, count in tokens.items())
    return Call((*arrays, draw.like(Params(**parts))), options)


ABOUT = About(
    weights="attn",
    laws=(
        "batch_independent",
        "weights_in_unit_interval",
        "weights_sum_to_one",
        "key_permutation_invariant",
        "mask_is_truncation",
        "causal",
    ),
    witnesses=("framework", "definition", "relation"),
)
