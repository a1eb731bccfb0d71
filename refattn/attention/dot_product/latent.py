r"""Multi-head latent attention (MLA).

Keys and values of all heads are made of one short vector per token, the latent, which is all that a cache has to hold,
with one rotated key that the heads share.

Paper: DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model", 2024
(arXiv:2405.04434), section 2.1 and appendix C.

Shapes
    B items, T tokens of D features, H heads. A head compares N features, and R = 2 F that are rotated, and passes on E:
    q_up makes U = H (N + R) features of the Y that it gets, kv_up makes W = H (N + E) of the latent's C. O features
    come out. cos and sin of F angles a token, see rotary.

Forward
    z = rms_norm(W_qd x + b_qd)               the latent of the queries: Y features; without q_down, x itself
    [qn_h qr_h] = W_qu,h z                    for every head h
    [c' r'] = W_kvd x + b_kvd,  c = rms_norm(c')
    qr_h, kr = rotary(qr_h), rotary(r')       kr is one key for all heads
    "expanded"                                [W_uk,h; W_uv,h] = W_kvu,h are the rows of one head
        k_h = [W_uk,h c  kr],  v_h = W_uv,h c
        y_h = scaled_dot_product([qn_h qr_h], k_h, v_h)
    "absorbed"                                the same numbers: q . (W c) = (W^T q) . c, and sum p (W c) = W sum p c
        a_h = [W_uk,h^T qn_h  qr_h]
        y_h = W_uv,h grouped_query(a_h, [c kr], c)                        one head of keys and values: the latent
    y = W_o [y_1 ... y_H] + b_o

Backward, with a bar for "gradient of the loss with respect to"
    [y_1bar ... y_Hbar] = W_o^T ybar          and W_obar, b_obar: see linear
    "expanded": [qn_hbar qr_hbar], k_hbar, v_hbar from scaled_dot_product
        cbar = sum_h W_uk,h^T kn_hbar + W_uv,h^T v_hbar,   krbar = sum_h kr_hbar,
        W_kvu,hbar = sum over tokens of [kn_hbar; v_hbar] c^T
    "absorbed": with u_h for what grouped_query gives, ubar_h = W_uv,h^T y_hbar, and from it
        a_hbar = [acbar_h qr_hbar], kbar, vbar
        qn_hbar = W_uk,h acbar_h,   cbar = the part of c in kbar, + vbar,   krbar = the rest of kbar
        W_uk,hbar = sum over tokens of qn_h acbar_h^T,   W_uv,hbar = sum over tokens of y_hbar u_h^T
    Then back through rotary (cos and sin get the sum of both), rms_norm and the linear maps; xbar is their sum.

Choices
    form: "expanded" as in training, "absorbed" as in decoding; outputs and gradients are equal.
    scale is 1 / sqrt(N + R) in both forms; with YaRN, DeepSeek multiplies it by rotary.attention_factor(...)^2.
    The authors' projections: kv_down makes [latent, rotated key], q_up and kv_up make [not rotated, rotated] and
    [key, value] head by head. Biases are those of Hugging Face's attention_bias; q_up and kv_up have none.
    Without q_down and q_norm (DeepSeek-V2-Lite) queries are made of x at once.
    pairing is rotary's: "interleaved" as the authors' code, "half" as FLA. eps of both norms: 1e-6, in FLA 1e-5.
    is_causal is True by default, as for all who use this. A query that may attend to nothing gets b_o.
"""

import math
from typing import NamedTuple

import numpy as np

from refattn.attention.dot_product import grouped_query, rotary, scaled_dot_product
from refattn.attention.dot_product.multi_head import join_heads, split_heads
from refattn.core import About, Array, Bools, Call, Shaped, expect, shaped
from refattn.primitives import linear, rms_norm


class Params(NamedTuple):
    q_down: Shaped[linear.Params, "I=D O=Y"] | None
    q_norm: Shaped[rms_norm.Params, "D=Y"] | None
    q_up: Shaped[Array, "U Y"]
    kv_down: Shaped[linear.Params, "I=D"]
    kv_norm: Shaped[rms_norm.Params, "D=C"]
    kv_up: Shaped[Array, "W C"]
    out: Shaped[linear.Params, "O=O"]


class Heads(NamedTuple):
    """What the two forms share."""

    q: np.ndarray  # (B, H, T, N + R)
    latent: np.ndarray  # c: (B, T, C)
    k_rotated: np.ndarray  # kr: (B, T, R)
    up: np.ndarray  # W_kvu: (H, N + E, C)


class Saved(NamedTuple):
    q_down: linear.Saved | None
    q_norm: rms_norm.Saved | None
    q_up: linear.Saved
    kv_down: linear.Saved
    kv_norm: rms_norm.Saved
    q_rotary: rotary.Saved
    k_rotary: rotary.Saved
    heads: Heads
    form: str
    attention: tuple  # Saved of scaled_dot_product, or of grouped_query
    mixed: Shaped[Array, "B H T C"] | None  # u_h
    attn: Shaped[Array, "B H T T"]
    out: linear.Saved


def init(rng, features, heads, *, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128):
    """Each projection as linear.init starts it, without bias; gamma = 1. Sizes of DeepSeek-V2; q_rank may be None."""
    down = None if q_rank is None else linear.init(rng, features, q_rank, False)
    return Params(
        down,
        None if q_rank is None else rms_norm.init(rng, q_rank),
        linear.init(rng, q_rank or features, heads * (nope + rope)).weight,
        linear.init(rng, features, kv_rank + rope, False),
        rms_norm.init(rng, kv_rank),
        linear.init(rng, kv_rank, heads * (nope + value)).weight,
        linear.init(rng, heads * value, features, False),
    )


@shaped
def forward(
    x: Shaped[Array, "B T D"],
    cos: Shaped[Array, "B T F"],
    sin: Shaped[Array, "B T F"],
    params: Params,
    *,
    heads: int,
    form: str = "expanded",
    pairing: str = "interleaved",
    scale: float | None = None,
    mask: Shaped[Bools, "B H T T"] | None = None,
    is_causal: bool = True,
    eps: float = 1e-6,
) -> tuple[Shaped[Array, "B T O"], Saved]:
    rotated = 2 * cos.shape[-1]
    nope = _check(heads, form, rotated, mask, params)
    z, saved_down, saved_norm = x, None, None
    if params.q_down is not None:
        z, saved_down = linear.forward(x, params.q_down)
        z, saved_norm = rms_norm.forward(z, params.q_norm, eps=eps)
    q, saved_up = linear.forward(z, linear.Params(params.q_up))
    q = split_heads(q, heads)
    kv, saved_kv_down = linear.forward(x, params.kv_down)
    latent, saved_kv_norm = rms_norm.forward(kv[..., :-rotated], params.kv_norm, eps=eps)
    q_rotated, saved_q_rotary = rotary.forward(q[..., nope:], cos, sin, pairing=pairing)
    k_rotated, saved_k_rotary = rotary.forward(kv[..., -rotated:], cos, sin, pairing=pairing)

    up = params.kv_up.reshape(heads, -1, params.kv_up.shape[1])
    parts = Heads(np.concatenate([q[..., :nope], q_rotated], axis=-1), latent, k_rotated, up)
    scale = 1 / math.sqrt(nope + rotated) if scale is None else scale
    attend = _expanded if form == "expanded" else _absorbed
    y, mixed, saved_attention = attend(parts, nope, scale=scale, mask=mask, is_causal=is_causal)
    out, saved_out = linear.forward(join_heads(y), params.out)
    saved_q = saved_down, saved_norm, saved_up
    saved_kv = saved_kv_down, saved_kv_norm, saved_q_rotary, saved_k_rotary
    return out, Saved(*saved_q, *saved_kv, parts, form, saved_attention, mixed, saved_attention.attn, saved_out)


@shaped
def backward(
    dy: Shaped[Array, "B T O"], saved: Saved
) -> tuple[Shaped[Array, "B T D"], Shaped[Array, "B T F"], Shaped[Array, "B T F"], Params]:
    djoined, dout = linear.backward(dy, saved.out)
    dheads = split_heads(djoined, saved.heads.q.shape[1])
    nope = saved.heads.q.shape[-1] - saved.heads.k_rotated.shape[-1]
    attend_backward = _expanded_backward if saved.form == "expanded" else _absorbed_backward
    dq, dlatent, dk_rotated, dup = attend_backward(dheads, saved, nope)

    dq_rotated, dcos_q, dsin_q = rotary.backward(dq[..., nope:], saved.q_rotary)
    dk_rotated, dcos_k, dsin_k = rotary.backward(dk_rotated, saved.k_rotary)
    dlatent, dkv_norm = rms_norm.backward(dlatent, saved.kv_norm)
    dx, dkv_down = linear.backward(np.concatenate([dlatent, dk_rotated], axis=-1), saved.kv_down)
    dq = join_heads(np.concatenate([dq[..., :nope], dq_rotated], axis=-1))
    dz, (dq_up, _) = linear.backward(dq, saved.q_up)
    dq_down = dq_norm = None
    if saved.q_down is not None:
        dz, dq_norm = rms_norm.backward(dz, saved.q_norm)
        dz, dq_down = linear.backward(dz, saved.q_down)
    dkv_up = dup.reshape(-1, dup.shape[-1])
    dparams = Params(dq_down, dq_norm, dq_up, dkv_down, dkv_norm, dkv_up, dout)
    return dx + dz, dcos_q + dcos_k, dsin_q + dsin_k, dparams


# --- the two forms: (y of every head, what is mixed, saved), and the gradients of Heads ----------------------


def _expanded(parts, nope, **options):
    q, latent, k_rotated, up = parts
    kv = latent[:, None] @ up.swapaxes(-1, -2)  # (B, H, T, N + E)
    for_every_head = np.broadcast_to(k_rotated[:, None], (*kv.shape[:3], k_rotated.shape[-1]))
    k = np.concatenate([kv[..., :nope], for_every_head], axis=-1)
    y, saved = scaled_dot_product.forward(q, k, kv[..., nope:], **options)
    return y, None, saved


def _expanded_backward(dy, saved, nope):
    _, latent, _, up = saved.heads
    dq, dk, dv = scaled_dot_product.backward(dy, saved.attention)
    dkv = np.concatenate([dk[..., :nope], dv], axis=-1)
    dup = (dkv.swapaxes(-1, -2) @ latent[:, None]).sum(axis=0)
    return dq, (dkv @ up).sum(axis=1), dk[..., nope:].sum(axis=1), dup


def _absorbed(parts, nope, **options):
    q, latent, k_rotated, up = parts
    absorbed = np.concatenate([q[..., :nope] @ up[:, :nope], q[..., nope:]], axis=-1)
    keys, values = np.concatenate([latent, k_rotated], axis=-1)[:, None], latent[:, None]
    mixed, saved = grouped_query.forward(absorbed, keys, values, **options)
    return mixed @ up[:, nope:].swapaxes(-1, -2), mixed, saved


def _absorbed_backward(dy, saved, nope):
    q, latent, _, up = saved.heads
    rank = latent.shape[-1]
    dabsorbed, dkeys, dvalues = grouped_query.backward(dy @ up[:, nope:], saved.attention)
    dq_nope = dabsorbed[..., :rank] @ up[:, :nope].swapaxes(-1, -2)
    dq = np.concatenate([dq_nope, dabsorbed[..., rank:]], axis=-1)
    dup_k = (q[..., :nope].swapaxes(-1, -2) @ dabsorbed[..., :rank]).sum(axis=0)
    dup_v = (dy.swapaxes(-1, -2) @ saved.mixed).sum(axis=0)
    dlatent = dkeys[:, 0, :, :rank] + dvalues[:, 0]
    return dq, dlatent, dkeys[:, 0, :, rank:], np.concatenate([dup_k, dup_v], axis=1)


def _check(heads, form, rotated, mask, params):
    """N, the features of a head that are not rotated."""
    where = "latent.forward:"
    expect(form in ("expanded", "absorbed"), f"{where} form", form, "'expanded' or 'absorbed'")
    expect(isinstance(heads, (int, np.integer)) and heads > 0, f"{where} heads", heads, "a positive int")
    expect(rotated > 0, f"{where} 2 F", rotated, "at least one angle in cos and sin")
    both = (params.q_down is None) == (params.q_norm is None)
    expect(both, f"{where} params.q_norm", params.q_norm, "parameters where params.q_down has some, None where not")
    compared, made, latent = params.q_up.shape[0], params.kv_up.shape[0], params.kv_up.shape[1]
    words = f"{heads} heads of more than the {rotated} features that are rotated"
    fits = compared % heads == 0 and compared > heads * rotated
    expect(fits, f"{where} params.q_up.shape", params.q_up.shape, f"(U, Y), U = {words}")
    nope = compared // heads - rotated
    words = f"{heads} heads of {nope} features of a key and at least one of a value"
    fits = made % heads == 0 and made > heads * nope
    expect(fits, f"{where} params.kv_up.shape", params.kv_up.shape, f"(W, C), W = {words}")
    down, joined = params.kv_down.weight.shape, made - heads * nope
    expect(down[0] == latent + rotated, f"{where} params.kv_down.weight.shape", down, f"({latent} + {rotated}, D)")
    out = params.out.weight.shape
    expect(out[1] == joined, f"{where} params.out.weight.shape", out, f"(O, {joined}), the values of all heads")
    if mask is not None:
        expect(mask.shape[1] == heads, f"{where} mask.shape", mask.shape, f"{heads} heads, one mask for each")
    return nope


def example(draw):
    """Latents of two features or more and a large eps: one large number, normalised, is its sign, with no gradient."""
    b, tokens, features, heads = (
        draw.size("B", high=2),
        draw.size("T", high=3),
        draw.size("D", high=3),
        draw.size("H", high=3),
    )
    nope, pairs, value = draw.size("N", high=2), draw.size("F", high=2), draw.size("E", high=2)
    params = init(
        draw.rng,
        features,
        heads,
        q_rank=draw.choice("q_rank", None, 2, 3),
        kv_rank=draw.size("C", low=2, high=3),
        nope=nope,
        rope=2 * pairs,
        value=value,
    )
    if draw.choice("biases", False, True):
        with_bias = {
            name: p._replace(bias=np.zeros(len(p.weight)))
            for name, p in params._asdict().items()
            if isinstance(p, linear.Params)
        }
        params = params._replace(**with_bias)
    options = {
        "heads": heads,
        "form": draw.choice("form", "expanded", "absorbed"),
        "pairing": draw.choice("pairing", *rotary.PAIRINGS),
        "scale": draw.choice("scale", None, 0.5),
        "mask": draw.mask(b, heads, tokens, tokens) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", True, False),
        "eps": draw.choice("eps", 0.5, 8.0),
    }
    tables = draw.array(b, tokens, pairs), draw.array(b, tokens, pairs)
    return Call((draw.array(b, tokens, features), *tables, draw.like(params)), options)


ABOUT = About(
    weights="attn",
    laws=("batch_independent", "weights_in_unit_interval", "weights_sum_to_one", "causal"),
    witnesses=("framework", "definition", "relation"),
)
