"""Heads: how the ways to share, mix, gate and pool them reduce to plain attention, and to what torch computes."""

import numpy as np
import pytest

from refattn import layouts
from refattn.attention.dot_product import (
    attention_pool,
    class_attention,
    differential,
    gated,
    grouped_query,
    grouped_query_layer,
    latent,
    latent_pool,
    multi_head,
    qk_norm,
    rotary,
    scaled_dot_product,
    set_attention,
    talking_heads,
)
from refattn.core import leaves, tree_map
from refattn.primitives import feed_forward, layer_norm, linear, rms_norm


@pytest.fixture(params=range(3), ids="seed{}".format)
def rng(request):
    return np.random.default_rng(request.param)


def same(one, other, tolerance=1e-12):
    """Two trees agree, to `tolerance` of the largest entry of each leaf."""
    for (path, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        assert a.shape == b.shape, f"{path}: shapes {a.shape} and {b.shape}"
        assert np.abs(a - b).max(initial=0) <= tolerance * (1 + np.abs(b).max(initial=0)), path


def like(rng, tree):
    return tree_map(lambda x: rng.normal(size=x.shape), tree)


def run(mechanism, dout, *args, **options):
    """(output, gradient, ...)."""
    out, saved = mechanism.forward(*args, **options)
    return out, *mechanism.backward(dout, saved)


# --- grouped queries ----------------------------------------------------------------------------------------


def shared(x, times, order):
    return np.repeat(x, times, axis=1) if order == "repeat_interleave" else np.concatenate([x] * times, axis=1)


def summed(x, groups, order):
    """Over the heads that share."""
    of_group = [x[:, g::groups] if order == "tile" else np.split(x, groups, axis=1)[g] for g in range(groups)]
    return np.stack([part.sum(axis=1) for part in of_group], axis=1)


@pytest.mark.parametrize("order", ["repeat_interleave", "tile"])
@pytest.mark.parametrize("groups, times", [(1, 4), (2, 3), (3, 2), (4, 1)])
def test_grouped_queries_are_repeated_keys(rng, order, groups, times):
    q, k, v = rng.normal(size=(2, groups * times, 5, 3)), *rng.normal(size=(2, 2, groups, 4, 3))
    dy, mask = rng.normal(size=q.shape), rng.random((2, groups * times, 5, 4)) < 0.7
    for options in ({}, {"mask": mask}, {"is_causal": True, "scale": 0.3}, {"is_causal": True, "mask": mask}):
        got = run(grouped_query, dy, q, k, v, order=order, **options)
        y, dq, dk, dv = run(scaled_dot_product, dy, q, shared(k, times, order), shared(v, times, order), **options)
        same(got, (y, dq, summed(dk, groups, order), summed(dv, groups, order)))


def test_tile_is_the_other_order_with_query_heads_reordered(rng):
    q, k, v, dy = rng.normal(size=(2, 6, 5, 3)), *rng.normal(size=(2, 2, 3, 4, 3)), rng.normal(size=(2, 6, 5, 3))
    dealt = [0, 3, 1, 4, 2, 5]  # heads 0 and 3 share, 1 and 4, 2 and 5
    y, dq, dk, dv = run(grouped_query, dy, q, k, v, order="tile")
    same((y[:, dealt], dq[:, dealt], dk, dv), run(grouped_query, dy[:, dealt], q[:, dealt], k, v))


def test_a_grouped_layer_with_as_many_key_heads_is_multi_head(rng):
    q, k, v, dy = (rng.normal(size=(2, n, f)) for n, f in ((3, 6), (5, 4), (5, 3), (3, 6)))
    p = like(rng, multi_head.init(rng, 6, key_features=4, value_features=3))
    mask, key_mask = rng.random((2, 3, 3, 5)) < 0.7, rng.random((2, 5)) < 0.7
    for options in ({"mask": mask, "is_causal": True}, {"key_mask": key_mask}):
        *expected, dp = run(multi_head, dy, q, k, v, p, heads=3, **options)
        same_heads = grouped_query_layer.from_multi_head(p, 3, 3)
        *got, dg = run(grouped_query_layer, dy, q, k, v, same_heads, heads=3, key_heads=3, **options)
        same((*got, *dg), (*expected, *dp[:4]))


@pytest.mark.parametrize("key_heads", [1, 2])
def test_key_heads_that_are_alike_are_one(rng, key_heads):
    """Multi-head attention whose key and value heads repeat is the grouped layer made of it, which means them."""
    q, k, v, dy = (rng.normal(size=(2, n, 8)) for n in (3, 5, 5, 3))
    grouped = like(rng, grouped_query_layer.init(rng, 8, 4, key_heads, bias=True))

    def repeated(x):
        heads = np.split(x, key_heads)
        return np.concatenate([head for head in heads for _ in range(4 // key_heads)])

    many = multi_head.Params(grouped.q, *(tree_map(repeated, p) for p in grouped[1:3]), grouped.out)
    same(grouped_query_layer.from_multi_head(many, 4, key_heads), grouped)
    *got, dg = run(grouped_query_layer, dy, q, k, v, grouped, heads=4, key_heads=key_heads)
    *expected, dm = run(multi_head, dy, q, k, v, many, heads=4)
    same(tuple(got), tuple(expected))
    means = grouped_query_layer.from_multi_head(dm, 4, key_heads)
    same((dg.q, dg.out), (dm.q, dm.out))
    same((dg.k, dg.v), tree_map(lambda mean: mean * (4 // key_heads), (means.k, means.v)))  # a sum


def test_initial_weights_of_a_grouped_layer():
    p = grouped_query_layer.init(np.random.default_rng(0), 12, 6, 2, key_features=5, value_features=7)
    assert [w.shape for _, w in leaves(p)] == [(12, 12), (4, 5), (4, 7), (12, 12)]
    p = grouped_query_layer.init(np.random.default_rng(0), 12, 4, 1, bias=True)
    assert [w.shape for _, w in leaves(p)] == [(12, 12), (12,), (3, 12), (3,), (3, 12), (3,), (12, 12), (12,)]


# --- multi-head: extra tokens, missing projections, the layouts of others -------------------------------------


def test_extra_tokens_are_more_keys_and_values(rng):
    """Without projections they may as well be given."""
    q, k, v = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 6))
    dy, learned, mask = (
        rng.normal(size=(2, 3, 6)),
        multi_head.Params(bias_k=q[0, 0], bias_v=v[0, 0]),
        rng.random((2, 5)),
    )
    mask = mask < 0.6
    y, dq, dk, dv, dparams = run(
        multi_head, dy, q, k, v, learned, heads=2, key_mask=mask, is_causal=True, add_zero_attn=True
    )
    more_k, more_v = (
        np.concatenate([x, np.broadcast_to(token, (2, 1, token.size)), np.zeros((2, 1, token.size))], axis=1)
        for x, token in ((k, learned.bias_k), (v, learned.bias_v))
    )
    seen = np.concatenate([mask[:, None, None] & np.tri(3, 5, dtype=bool), np.ones((2, 1, 3, 2), bool)], axis=-1)
    z, dq_, dk_, dv_, nothing = run(
        multi_head, dy, q, more_k, more_v, multi_head.Params(), heads=2, mask=seen.repeat(2, axis=1)
    )
    same((y, dq, dk, dv), (z, dq_, dk_[:, :5], dv_[:, :5]))
    same((dparams.bias_k, dparams.bias_v), (dk_[:, 5].sum(axis=0), dv_[:, 5].sum(axis=0)))
    assert nothing == multi_head.Params()


def test_no_projections_are_identities(rng):
    q, k, v = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 6))
    dy, identities = rng.normal(size=(2, 3, 6)), multi_head.Params(*(linear.Params(np.eye(n)) for n in (4, 4, 6, 6)))
    got, expected = (run(multi_head, dy, q, k, v, p, heads=2)[:4] for p in (multi_head.Params(), identities))
    same(got, expected)


def test_an_extra_token_takes_the_key_bias_out_of_the_shadow(rng):
    """Added to all keys, the bias is invisible; added to all but one, it counts."""
    x, dy, p = *rng.normal(size=(2, 2, 3, 4)), like(rng, multi_head.init(rng, 4))
    *_, without = run(multi_head, dy, x, x, x, p, heads=2)
    *_, with_one = run(multi_head, dy, x, x, x, p, heads=2, add_zero_attn=True)
    assert np.abs(without.k.bias).max() < 1e-14 and np.abs(with_one.k.bias).max() > 1e-3


def test_initial_extra_tokens():
    p = multi_head.init(np.random.default_rng(0), 400, bias_kv=True)
    assert all(0.9 < token.std() * 20 < 1.1 for token in (p.bias_k, p.bias_v))
    assert multi_head.init(np.random.default_rng(0), 4)[4:] == (None, None)


@pytest.mark.frameworks
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kdim, vdim", [(6, 6), (5, 3)])
def test_layout_of_torch(rng, bias, kdim, vdim):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    options = {"bias": bias, "add_bias_kv": True, "add_zero_attn": True, "kdim": kdim, "vdim": vdim}
    module = torch.nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for w in module.parameters():
            w.copy_(torch.tensor(rng.normal(size=w.shape)))
    arrays = [rng.normal(size=(2, tokens, width)) for tokens, width in ((3, 6), (4, kdim), (4, vdim))]
    dy = rng.normal(size=(2, 3, 6))
    inputs = [torch.tensor(a, requires_grad=True) for a in arrays]
    out, weights = module(*inputs)
    out.backward(torch.tensor(dy))
    state = {name: w.numpy() for name, w in module.state_dict().items()}
    params = layouts.multi_head_from_torch(state)
    y, *grads, dparams = run(multi_head, dy, *arrays, params, heads=2, add_zero_attn=True)
    same((y, *grads), (out.detach().numpy(), *(x.grad.numpy() for x in inputs)))
    _, saved = multi_head.forward(*arrays, params, heads=2, add_zero_attn=True)
    same(saved.attn.mean(axis=1), weights.detach().numpy())
    back, gradients = layouts.multi_head_to_torch(params), layouts.multi_head_to_torch(dparams)
    assert back.keys() == gradients.keys() == state.keys()
    for name, w in module.named_parameters():
        assert np.array_equal(back[name], state[name])
        same(gradients[name], w.grad.numpy())


@pytest.mark.parametrize("bias", [True, False])
def test_layout_of_kernels(rng, bias):
    """Every kernel is used as Keras and flax use it, in an einsum."""
    heads, params = 3, like(rng, multi_head.init(rng, 6, key_features=4, value_features=5, bias=bias))
    query, key, value, (out, out_bias) = pairs = layouts.multi_head_to_kernels(params, heads)
    q, k, v, dy = (rng.normal(size=(2, 3, n)) for n in (6, 4, 5, 6))

    def projected(x, kernel, b):
        y = np.einsum("btf,fhd->bthd", x, kernel)
        return y if b is None else y + b

    scores = np.einsum("bihd,bjhd->bhij", projected(q, *query), projected(k, *key)) / np.sqrt(2)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhij,bjhe->bihe", weights, projected(v, *value))
    expected = np.einsum("bihe,heo->bio", mixed, out) + (0 if out_bias is None else out_bias)
    same(run(multi_head, dy, q, k, v, params, heads=heads)[0], expected)
    same(layouts.multi_head_from_kernels(*pairs), params)
    assert query[0].shape == (6, 3, 2) and out.shape == (3, 2, 6) and (query[1] is None) == (not bias)


# --- multi-head latent attention ----------------------------------------------------------------------------


def latent_call(rng, q_rank, biased=False, *, b=2, tokens=5, pairs=2):
    sizes = {"q_rank": q_rank, "kv_rank": 4, "nope": 3, "rope": 2 * pairs, "value": 2}
    params = like(rng, latent.init(rng, 6, 3, **sizes))
    if biased:
        params = params._replace(kv_down=params.kv_down._replace(bias=rng.normal(size=4 + 2 * pairs)))
    positions = np.broadcast_to(np.arange(tokens), (b, tokens))
    tables = rotary.tables(positions, rotary.frequencies(2 * pairs))
    return rng.normal(size=(b, tokens, 6)), *tables, params


@pytest.mark.parametrize("q_rank", [None, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_absorbed_is_expanded(rng, q_rank, masked, is_causal, pairing):
    args, dy = latent_call(rng, q_rank, biased=masked), rng.normal(size=(2, 5, 6))
    mask = rng.random((2, 3, 5, 5)) < 0.7 if masked else None
    options = {"heads": 3, "mask": mask, "is_causal": is_causal, "pairing": pairing, "scale": 0.7 if masked else None}
    expanded, absorbed = (run(latent, dy, *args, form=form, **options) for form in ("expanded", "absorbed"))
    same(absorbed, expanded)


def test_latent_attention_without_angles_is_multi_head_attention_of_the_latents(rng):
    """cos = 1, sin = 0, and a shared key of zeros: what is left are projections of x and of the latent."""
    x, cos, sin, p = latent_call(rng, None)
    cos, sin = np.ones_like(cos), np.zeros_like(sin)
    weight = p.kv_down.weight.copy()
    weight[4:] = 0
    p = p._replace(kv_down=linear.Params(weight))
    y, _ = latent.forward(x, cos, sin, p, heads=3, scale=0.3**0.5, is_causal=False)
    c, _ = rms_norm.forward(x @ weight[:4].T, p.kv_norm)
    of_head = p.q_up.reshape(3, 7, 6)[:, :3], *np.split(p.kv_up.reshape(3, 5, 4), [3], axis=1)
    q, k, v = (linear.Params(w.reshape(-1, w.shape[-1])) for w in of_head)
    q = linear.Params(q.weight * 0.9**0.5)  # multi_head divides by the root of 3 features
    same(y, multi_head.forward(x, c, c, multi_head.Params(q, k, v, p.out), heads=3)[0])


def deepseek(torch, x, cos, sin, p, heads):
    """The authors' module restated with tensors: complex rotations, one einsum for the scores of either part."""

    def norm(z, gamma):
        return z * torch.rsqrt((z * z).mean(-1, keepdim=True) + 1e-6) * gamma

    def turned(z):  # (b, t, h, 2 F)
        pairs = torch.complex(z[..., 0::2], z[..., 1::2])
        return torch.view_as_real(pairs * torch.complex(cos, sin)[:, :, None]).flatten(3)

    rank, rotated = p.kv_up.shape[1], 2 * cos.shape[-1]
    z = x if p.q_down is None else norm(x @ p.q_down.weight.T, p.q_norm.gamma)
    q = (z @ p.q_up.T).unflatten(-1, (heads, -1))
    plain, rope = q[..., :-rotated], turned(q[..., -rotated:])
    kv = x @ p.kv_down.weight.T
    kv = kv if p.kv_down.bias is None else kv + p.kv_down.bias
    key = turned(kv[..., None, rank:])[:, :, 0]
    made = (norm(kv[..., :rank], p.kv_norm.gamma) @ p.kv_up.T).unflatten(-1, (heads, -1))
    k, v = made[..., : plain.shape[-1]], made[..., plain.shape[-1] :]
    scores = torch.einsum("bshd,bthd->bsht", plain, k) + torch.einsum("bshr,btr->bsht", rope, key)
    scores = scores / (plain.shape[-1] + rotated) ** 0.5
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()[:, None]
    y = torch.einsum("bsht,bthd->bshd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    return y.flatten(2) @ p.out.weight.T


@pytest.mark.frameworks
@pytest.mark.parametrize("q_rank", [None, 5])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_latent_attention_in_torch(rng, q_rank, form):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    args, dy = latent_call(rng, q_rank, biased=True), rng.normal(size=(2, 5, 6))
    tensors = tree_map(lambda a: torch.tensor(a, requires_grad=True), args)
    y = deepseek(torch, *tensors, heads=3)
    y.backward(torch.tensor(dy))
    grads = tree_map(lambda t: t.grad.numpy(), tensors)
    same(run(latent, dy, *args, heads=3, form=form), (y.detach().numpy(), *grads))


def test_initial_weights_of_latent_attention():
    p = latent.init(np.random.default_rng(0), 8, 2, q_rank=3, kv_rank=5, nope=4, rope=2, value=6)
    shapes = [x.shape for _, x in leaves(p)]
    assert shapes == [(3, 8), (3,), (12, 3), (7, 8), (5,), (20, 5), (8, 12)]
    assert latent.init(np.random.default_rng(0), 8, 2, q_rank=None).q_up.shape == (2 * 192, 8)


# --- talking heads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_that_talk_to_themselves_are_plain_heads(rng, is_causal):
    q, k, v = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 6, 5)), rng.normal(size=(2, 3, 6, 2))
    dy, mask = rng.normal(size=(2, 3, 4, 2)), rng.random((2, 4, 6)) < 0.7
    alone = talking_heads.Params(linear.Params(np.eye(3)), linear.Params(np.eye(3)))
    options = {"is_causal": is_causal, "scale": 0.3}
    *got, _ = run(talking_heads, dy, q, k, v, alone, mask=mask, **options)
    expected = run(scaled_dot_product, dy, q, k, v, mask=mask[:, None].repeat(3, axis=1), **options)
    same(tuple(got), expected)
    order = np.eye(3)[[1, 2, 0]]  # heads change places before the softmax, and change them back after it
    moved = talking_heads.Params(linear.Params(order), linear.Params(order.T))
    same(tuple(run(talking_heads, dy, q, k, v, moved, mask=mask, **options)[:4]), expected)


def test_talking_heads_in_einsums(rng):
    """As in the paper's figure, with three different numbers of heads; a masked key is as good as none."""
    q, k, v = rng.normal(size=(2, 2, 4, 5)), rng.normal(size=(2, 2, 6, 5)), rng.normal(size=(2, 4, 6, 3))
    p = like(rng, talking_heads.init(rng, 2, 3, 4, bias=True))
    scores = np.einsum("bind,bimd,hi->bhnm", q, k, p.pre.weight) / 5**0.5 + p.pre.bias[:, None, None]
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhnm,oh->bonm", weights, p.post.weight) + p.post.bias[:, None, None]
    same(talking_heads.forward(q, k, v, p)[0], np.einsum("bonm,bome->bone", mixed, v))
    dy, mask = rng.normal(size=(2, 4, 4, 3)), np.ones((2, 4, 6), bool)
    mask[:, :, 4:] = False
    y, dq, dk, dv, dp = run(talking_heads, dy, q, k, v, p, mask=mask)
    same((y, dq, dk[:, :, :4], dv[:, :, :4], dp), run(talking_heads, dy, q, k[:, :, :4], v[:, :, :4], p))
    assert not dk[:, :, 4:].any() and not dv[:, :, 4:].any()


def test_initial_weights_of_talking_heads():
    p = talking_heads.init(np.random.default_rng(0), 2, 3, 4, bias=True)
    assert [x.shape for _, x in leaves(p)] == [(3, 2), (3,), (4, 3), (4,)]
    assert [x.shape for _, x in leaves(talking_heads.init(np.random.default_rng(0), 2))] == [(2, 2), (2, 2)]


# --- differential attention ---------------------------------------------------------------------------------


def differential_call(rng):
    q, k, v = rng.normal(size=(2, 3, 2, 4, 5)), rng.normal(size=(2, 3, 2, 6, 5)), rng.normal(size=(2, 3, 6, 4))
    return q, k, v, like(rng, differential.init(rng, 5, value_features=4)), rng.normal(size=(2, 3, 4, 4))


@pytest.mark.parametrize("is_causal", [False, True])
def test_differential_attention_with_lambda_zero_is_one_softmax_normed(rng, is_causal):
    q, k, v, p, dy = differential_call(rng)
    p, mask = differential.Params(*np.zeros((4, 5)), p.norm), rng.random((2, 3, 4, 6)) < 0.7
    y, dq, dk, dv, dp = run(differential, dy, q, k, v, p, lambda_init=0.0, mask=mask, is_causal=is_causal)
    o, saved = scaled_dot_product.forward(q[:, :, 0], k[:, :, 0], v, mask=mask, is_causal=is_causal)
    z, saved_norm = rms_norm.forward(o, p.norm, eps=1e-5)
    do, dnorm = rms_norm.backward(dy, saved_norm)
    same((y, dq[:, :, 0], dk[:, :, 0], dv, dp.norm), (z, *scaled_dot_product.backward(do, saved), dnorm))
    assert not dq[:, :, 1].any() and not dk[:, :, 1].any()


def test_what_both_maps_see_alike_is_scaled_away(rng):
    """With equal maps O = (1 - lambda) P V, of which the norm leaves the sign."""
    q, k, v, p, _ = differential_call(rng)
    q[:, :, 1], k[:, :, 1] = q[:, :, 0], k[:, :, 0]
    p = p._replace(lambda_q1=0 * p.lambda_q1, lambda_q2=0 * p.lambda_q2)
    one, _ = scaled_dot_product.forward(q[:, :, 0], k[:, :, 0], v)
    for initial, sign in ((0.3, 1), (1.7, -1)):
        y, saved = differential.forward(q, k, v, p, lambda_init=initial, eps=0.0)
        same(y, sign * (1 - initial) * rms_norm.forward(one, p.norm, eps=0.0)[0])
        same(saved.attn.sum(axis=-1), np.full((2, 3, 4), 1 - initial))


def test_the_map_of_differential_attention_is_what_weighs_the_values(rng):
    q, k, v, p, _ = differential_call(rng)
    y, saved = differential.forward(q, k, v, p, lambda_init=0.5)
    same(y, rms_norm.forward(saved.attn @ v, p.norm, eps=1e-5)[0] / 2)


def test_initial_weights_of_differential_attention():
    p = differential.init(np.random.default_rng(0), 1000)
    assert all(0.09 < vector.std() < 0.11 and vector.shape == (1000,) for vector in p[:4])
    assert np.array_equal(p.norm.gamma, np.ones(2000))
    assert differential.init(np.random.default_rng(0), 3, value_features=5).norm.gamma.shape == (5,)


def test_lambda_init_of_the_first_layers():
    same(
        np.array([differential.lambda_init(layer) for layer in (0, 1, 1000)]), np.array([0.2, 0.3555090676, 0.8]), 1e-9
    )


@pytest.mark.frameworks
def test_differential_attention_in_torch(rng):
    """The authors' module after its projections, restated: 2 H heads in one axis, the pair of a head side by side."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    q, k, v, p, dy = differential_call(rng)
    tensors = tree_map(lambda a: torch.tensor(a, requires_grad=True), (q, k, v, p))
    tq, tk, tv, tp = tensors
    scores = (tq.flatten(1, 2) @ tk.flatten(1, 2).mT) / 5**0.5
    future = torch.ones(4, 6).triu(1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1).unflatten(1, (3, 2))
    lam = torch.exp(tp.lambda_q1 @ tp.lambda_k1) - torch.exp(tp.lambda_q2 @ tp.lambda_k2) + 0.6
    o = torch.nn.functional.rms_norm((weights[:, :, 0] - lam * weights[:, :, 1]) @ tv, (4,), tp.norm.gamma, 1e-5) * 0.4
    o.backward(torch.tensor(dy))
    got = run(differential, dy, q, k, v, p, lambda_init=0.6, is_causal=True)
    same(got, (o.detach().numpy(), *tree_map(lambda t: t.grad.numpy(), tensors)))


# --- normalised queries and keys ----------------------------------------------------------------------------


def qk_norm_call(rng, beta=False, logit_scale=None):
    q, k, v = rng.normal(size=(2, 3, 4, 6)), rng.normal(size=(2, 3, 5, 6)), rng.normal(size=(2, 3, 5, 2))
    p = like(rng, qk_norm.init(rng, 6, 3, beta=beta, logit_scale=logit_scale))
    at_q, at_k = (rotary.tables(np.broadcast_to(np.arange(n), (2, n)), rotary.frequencies(6)) for n in (4, 5))
    return q, k, v, p, qk_norm.Rotary(*at_q, *at_k), rng.normal(size=(2, 3, 4, 2))


@pytest.mark.parametrize("order", ["norm_first", "rotary_first"])
@pytest.mark.parametrize("norm, primitive", [("rms", rms_norm), ("layer", layer_norm)])
def test_normalised_attention_is_its_parts_in_either_order(rng, order, norm, primitive):
    q, k, v, p, tables, dy = qk_norm_call(rng, beta=norm == "layer")
    steps = [
        lambda x, part, table: primitive.forward(x, primitive.Params(*part[: 1 + (norm == "layer")]), eps=1e-6),
        lambda x, part, table: rotary.forward(x, *table, pairing="half"),
    ]
    backs = [primitive.backward, rotary.backward]
    way = (0, 1) if order == "norm_first" else (1, 0)
    (q_saved, k_saved), ready = ([], []), []
    for x, part, table, kept in ((q, p.q, tables[:2], q_saved), (k, p.k, tables[2:], k_saved)):
        for step in way:
            x, saved = steps[step](x, part, table)
            kept.append(saved)
        ready.append(x)
    z, saved = scaled_dot_product.forward(*ready, v, is_causal=True)
    dz_q, dz_k, dz_v = scaled_dot_product.backward(dy, saved)
    for step, of_q, of_k in zip(way[::-1], q_saved[::-1], k_saved[::-1]):
        dz_q, dz_k = backs[step](dz_q, of_q)[0], backs[step](dz_k, of_k)[0]
    options = {"norm": norm, "order": order, "pairing": "half", "is_causal": True}
    y, dq, dk, dv, _, _ = run(qk_norm, dy, q, k, v, p, tables, **options)
    same((y, dq, dk, dv), (z, dz_q, dz_k, dz_v))


def test_l2_is_rms_with_another_scale(rng):
    q, k, v, p, tables, dy = qk_norm_call(rng, logit_scale=1.0)
    for scale, of_rms in ((None, 1 / 6), (10.0, 10 / 6)):
        got = run(qk_norm, dy, q, k, v, p, tables, norm="l2", scale=scale, eps=0.0)
        same(got, run(qk_norm, dy, q, k, v, p, tables, norm="rms", scale=of_rms, eps=0.0))


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_only_gamma_tells_the_orders_apart(rng, norm):
    q, k, v, p, tables, dy = qk_norm_call(rng, logit_scale=1.0)
    bare = p._replace(q=None, k=None)
    same(*(run(qk_norm, dy, q, k, v, bare, tables, norm=norm, order=o)[:-1] for o in ("norm_first", "rotary_first")))
    one, other = (qk_norm.forward(q, k, v, p, tables, norm=norm, order=o)[0] for o in ("norm_first", "rotary_first"))
    assert np.abs(one - other).max() > 1e-3


def test_the_length_of_queries_and_keys_does_not_matter(rng):
    q, k, v, p, tables, _ = qk_norm_call(rng)
    y, long = (qk_norm.forward(c * q, k / c, v, p, tables, eps=0.0)[0] for c in (1, 1000))
    same(y, long)


@pytest.mark.frameworks
def test_henrys_attention_in_torch(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    q, k, v, p, _, dy = qk_norm_call(rng, logit_scale=1.0)
    p = p._replace(q=None, k=None)
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v, p.logit_scale)]
    qn, kn = (torch.nn.functional.normalize(t, dim=-1) for t in tensors[:2])
    y = ((tensors[3][:, None, None] * (qn @ kn.mT)).softmax(-1)) @ tensors[2]
    y.backward(torch.tensor(dy))
    *got, dp, _ = run(qk_norm, dy, q, k, v, p, norm="l2", eps=0.0)
    same((*got, dp.logit_scale), (y.detach().numpy(), *(t.grad.numpy() for t in tensors)))


def test_initial_weights_of_qk_norm():
    p = qk_norm.init(np.random.default_rng(0), 4, 3, beta=True, logit_scale=2)
    same(p, qk_norm.Params(*[qk_norm.Norm(np.ones(4), np.zeros(4))] * 2, np.array([2.0, 2.0, 2.0])))
    assert qk_norm.init(np.random.default_rng(0), 4, 3)[2] is None


# --- gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", [6, 3])
def test_a_gate_that_stands_half_open_halves_the_output(rng, gates):
    x, dy, attention = *rng.normal(size=(2, 2, 4, 6)), like(rng, multi_head.init(rng, 6, bias=False))
    p = gated.Params(attention, linear.Params(np.zeros((gates, 6)), np.zeros(gates)))
    mask = rng.random((2, 4)) < 0.7
    y, dq, dk, dv, dp = run(gated, dy, x, x, x, p, heads=3, key_mask=mask, is_causal=True)
    expected = run(multi_head, dy / 2, x, x, x, attention, heads=3, key_mask=mask, is_causal=True)
    same((2 * y, dq, dk, dv), (*expected[:4],))
    same(dp.attention, expected[4])


def test_a_gate_for_every_feature_of_a_head_is_one_for_the_head(rng):
    x, dy, attention = *rng.normal(size=(2, 2, 4, 6)), like(rng, multi_head.init(rng, 6))
    of_heads = linear.Params(rng.normal(size=(3, 6)), rng.normal(size=3))
    of_features = tree_map(lambda a: a.repeat(2, axis=0), of_heads)
    y, *grads, dp = run(gated, dy, x, x, x, gated.Params(attention, of_heads), heads=3)
    z, *others, dq = run(gated, dy, x, x, x, gated.Params(attention, of_features), heads=3)
    summed_gate = tree_map(lambda a: a.reshape(3, 2, *a.shape[1:]).sum(axis=1), dq.gate)
    same((y, *grads, dp), (z, *others, gated.Params(dq.attention, summed_gate)))


@pytest.mark.frameworks
@pytest.mark.parametrize("gates", [6, 3])
def test_gated_attention_in_torch(rng, gates):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    x, dy = rng.normal(size=(2, 2, 4, 6))
    p = like(rng, gated.init(rng, 6, None if gates == 6 else gates))
    tx, tp = tree_map(lambda a: torch.tensor(a, requires_grad=True), (x, p))
    q, k, v = ((tx @ w.T + b).unflatten(-1, (3, 2)).transpose(1, 2) for w, b in tp.attention[:3])
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    z = z * torch.sigmoid(tx @ tp.gate.weight.T).unflatten(-1, (3, -1))
    y = z.flatten(2) @ tp.attention.out.weight.T + tp.attention.out.bias
    y.backward(torch.tensor(dy))
    out, dq, dk, dv, dp = run(gated, dy, x, x, x, p, heads=3, is_causal=True)
    same((out, dq + dk + dv, dp), (y.detach().numpy(), tx.grad.numpy(), tree_map(lambda t: t.grad.numpy(), tp)))


# --- pools --------------------------------------------------------------------------------------------------


def test_class_attention_is_the_first_row_of_self_attention(rng):
    x, p, dy = rng.normal(size=(2, 5, 6)), like(rng, multi_head.init(rng, 6)), np.zeros((2, 5, 6))
    dy[:, :1] = rng.normal(size=(2, 1, 6))
    y, dx, dp = run(class_attention, dy[:, :1], x, p, heads=3)
    z, dq, dk, dv, dparams = run(multi_head, dy, x, x, x, p, heads=3)
    same((y, dx, dp), (z[:, :1], dq + dk + dv, dparams))
    assert not dq[:, 1:].any()


def test_an_image_without_structure_is_pooled_to_its_colour(rng):
    """All tokens are one: whatever the weights are, what is passed on is its value."""
    colour, attention = rng.normal(size=(2, 6)), like(rng, multi_head.init(rng, 6))
    x = np.broadcast_to(colour[:, :, None, None], (2, 6, 3, 4))
    value, _ = linear.forward(colour, attention.v)
    y, saved = attention_pool.forward(x, attention_pool.Params(attention), heads=2)
    same(y, linear.forward(value, attention.out)[0])
    same(saved.attn, np.full((2, 2, 1, 13), 1 / 13))


def test_initial_positions():
    p = attention_pool.init(np.random.default_rng(0), 64, (5, 4))
    assert p.position.shape == (21, 64) and 0.9 < p.position.std() * 8 < 1.1
    latents = latent_pool.init(np.random.default_rng(0), 64, 20)
    assert latents.latents.shape == (20, 64) and 0.9 < latents.latents.std() * 8 < 1.1
    assert latents.mlp.linear1.weight.shape == (256, 64)
    assert latent_pool.init(np.random.default_rng(0), 4, hidden=5).mlp.linear1.weight.shape == (5, 4)


@pytest.mark.frameworks
def test_attention_pool_of_clip(rng):
    """As CLIP calls torch: tokens first, the query is the first token, projections one by one."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    x, dy = rng.normal(size=(2, 6, 3, 4)), rng.normal(size=(2, 6))
    p = like(rng, attention_pool.init(rng, 6, (3, 4)))
    tx, tp = tree_map(lambda a: torch.tensor(a, requires_grad=True), (x, p))
    (wq, bq), (wk, bk), (wv, bv), (wo, bo), *_ = tp.attention
    tokens = tx.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + tp.position[:, None]
    y, _ = torch.nn.functional.multi_head_attention_forward(
        *(tokens[:1], tokens, tokens, 6, 3, None, torch.cat([bq, bk, bv]), None, None, False, 0.0, wo, bo),
        **{"use_separate_proj_weight": True, "q_proj_weight": wq, "k_proj_weight": wk, "v_proj_weight": wv},
    )
    y[0].backward(torch.tensor(dy))
    expected = y[0].detach().numpy(), tx.grad.numpy(), tree_map(lambda t: t.grad.numpy(), tp)
    same(run(attention_pool, dy, x, p, heads=3), expected)


def test_latents_ask_as_any_query_does(rng):
    """Without a network the pool is cross-attention; a masked token is as good as none."""
    x, dz, p = rng.normal(size=(2, 5, 6)), rng.normal(size=(2, 3, 6)), like(rng, latent_pool.init(rng, 6, 3))
    bare, queries = latent_pool.Params(*p[:2]), np.stack([p.latents] * 2)
    y, dx, dp = run(latent_pool, dz, x, bare, heads=2)
    z, dq, dk, dv, dparams = run(multi_head, dz, queries, x, x, p.attention, heads=2)
    same((y, dx, dp.latents, dp.attention), (z, dk + dv, dq.sum(axis=0), dparams))
    there = np.broadcast_to(np.arange(5) < 3, (2, 5))
    y, dx, dp = run(latent_pool, dz, x, p, heads=2, key_mask=there)
    same((y, dx[:, :3], dp), run(latent_pool, dz, x[:, :3], p, heads=2))
    assert not dx[:, 3:].any()


def test_a_pool_of_latents_does_not_see_the_order_of_tokens(rng):
    x, p, order = rng.normal(size=(2, 5, 6)), like(rng, latent_pool.init(rng, 6, 3)), rng.permutation(5)
    same(latent_pool.forward(x[:, order], p, heads=2)[0], latent_pool.forward(x, p, heads=2)[0])


def test_the_network_of_a_pool_is_added_to_what_the_latents_hear(rng):
    x, p = rng.normal(size=(2, 5, 6)), like(rng, latent_pool.init(rng, 6, 3))
    y, _ = latent_pool.forward(x, latent_pool.Params(*p[:2]), heads=2)
    change, _ = feed_forward.forward(layer_norm.forward(y, p.norm, eps=0.1)[0], p.mlp, activation="gelu")
    same(latent_pool.forward(x, p, heads=2, eps=0.1, activation="gelu")[0], y + change)


# --- sets ---------------------------------------------------------------------------------------------------


def set_call(rng, norm=True):
    p = like(rng, set_attention.init(rng, 6, query_features=4, set_features=5, norm=norm))
    return rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 7, 5)), p, rng.normal(size=(2, 3, 6))


def test_the_order_of_a_set_does_not_matter(rng):
    q, x, p, dy = set_call(rng)
    order = rng.permutation(7)
    y, dq, dx, dp = run(set_attention, dy, q, x, p, heads=2)
    same((y, dq, dx[:, order], dp), run(set_attention, dy, q, x[:, order], p, heads=2))
    rows = rng.permutation(3)
    same(run(set_attention, dy[:, rows], q[:, rows], x, p, heads=2)[0], y[:, rows])


def test_members_that_are_padding_are_not_there(rng):
    q, x, p, dy = set_call(rng)
    there = np.broadcast_to(np.arange(7) < 4, (2, 7))
    y, dq, dx, dp = run(set_attention, dy, q, x, p, heads=3, key_mask=there)
    same((y, dq, dx[:, :4], dp), run(set_attention, dy, q, x[:, :4], p, heads=3))
    assert not dx[:, 4:].any()


def test_initial_weights_of_set_attention():
    p = set_attention.init(np.random.default_rng(0), 6, query_features=4, set_features=5, norm=True)
    shapes = [(6, 4), (6,), (6, 5), (6,), (6, 5), (6,), (6, 6), (6,)]
    assert [w.shape for _, w in leaves(p)] == shapes + [(6,)] * 4
    bare = set_attention.init(np.random.default_rng(0), 6)
    assert bare[4:] == (None, None) and bare.q.weight.shape == bare.v.weight.shape == (6, 6)


@pytest.mark.frameworks
@pytest.mark.parametrize("norm", [True, False])
def test_the_set_transformers_block_in_torch(rng, norm):
    """The authors' module restated: heads are split off the features and stacked on the batch."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    q, x, p, dy = set_call(rng, norm)
    tq, tx, tp = tree_map(lambda a: torch.tensor(a, requires_grad=True), (q, x, p))
    query, key, value = (t @ w.T + b for t, (w, b) in ((tq, tp.q), (tx, tp.k), (tx, tp.v)))
    stacked = [torch.cat(t.split(3, 2), 0) for t in (query, key, value)]
    weights = torch.softmax(stacked[0].bmm(stacked[1].mT) / 6**0.5, 2)
    o = torch.cat((stacked[0] + weights.bmm(stacked[2])).split(2, 0), 2)
    o = torch.nn.functional.layer_norm(o, (6,), *tp.norm0) if norm else o
    o = o + torch.relu(o @ tp.out.weight.T + tp.out.bias)
    o = torch.nn.functional.layer_norm(o, (6,), *tp.norm1) if norm else o
    o.backward(torch.tensor(dy))
    expected = o.detach().numpy(), *tree_map(lambda t: t.grad.numpy(), (tq, tx, tp))
    same(run(set_attention, dy, q, x, p, heads=2), expected)
