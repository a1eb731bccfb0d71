"""How mechanisms reduce to one another, and to what everybody knows: outputs and gradients."""

import itertools

import numpy as np
import pytest

from refattn.attention.channel import (
    bam_channel,
    cbam_channel,
    channel_self,
    efficient_channel,
    matrix_power_pool,
    second_order_channel,
    selective_kernel,
    simam,
    split_attention,
    squeeze_excitation,
)
from refattn.attention.dot_product import (
    multi_head,
    scaled_dot_product,
    transformer_decoder_layer,
    transformer_encoder_layer,
)
from refattn.attention.mixed import bam, cbam, dual, hybrid
from refattn.attention.spatial import (
    bam_spatial,
    cbam_spatial,
    context_feature_extraction,
    non_local,
    position,
    pyramid_channel,
    pyramid_spatial,
    region_non_local,
)
from refattn.attention.temporal import additive, additive_decoder, local_attention, luong_decoder, multiplicative
from refattn.core import leaves, tree_map
from refattn.elementwise import relu
from refattn.oracle.derivatives import complex_step, inner
from refattn.primitives import (
    batch_norm,
    conv,
    conv_norm_relu,
    feed_forward,
    group_norm,
    gru_cell,
    layer_norm,
    linear,
    logsumexp,
    matrix_sqrt,
    recurrent,
    recurrent_cell,
    rms_norm,
    softmax,
)


@pytest.fixture(params=range(3), ids="seed{}".format)
def rng(request):
    return np.random.default_rng(request.param)


def like(rng, tree):
    """A tree of the same shapes, filled with normal numbers."""
    return tree_map(lambda x: rng.normal(size=x.shape), tree)


def run(mechanism, *args, dout=None, **options):
    """The output and all gradients along dout: unrelated numbers if none is given."""
    out, saved = mechanism.forward(*args, **options)
    dout = np.cos(1.0 + np.arange(out.size)).reshape(out.shape) if dout is None else dout
    return out, tuple(mechanism.backward(dout, saved))


def same(one, other, tolerance=1e-12):
    """Two trees agree, to `tolerance` of the largest entry of each leaf."""
    for (path, a), (_, b) in zip(leaves(one), leaves(other), strict=True):
        assert a.shape == b.shape, f"{path}: shapes {a.shape} and {b.shape}"
        worst = np.abs(a - b).max(initial=0)
        assert worst <= tolerance * max(1, np.abs(a).max(initial=0)), f"{path}: differs by {worst:.3g}"


# --- normalisation ------------------------------------------------------------------------------------------


def test_group_norm_of_one_group_is_layer_norm(rng):
    x, gamma, beta = rng.normal(size=(2, 3, 4)), rng.normal(size=3), rng.normal(size=3)
    y, (dx, dparams) = run(group_norm, x, group_norm.Params(gamma, beta), groups=1)
    wide = layer_norm.Params(*(np.broadcast_to(p[:, None], (3, 4)) for p in (gamma, beta)))
    z, (dz, dwide) = run(layer_norm, x, wide, axes=2)
    same((y, dx, *dparams), (z, dz, *(d.sum(axis=1) for d in dwide)))


def test_group_norm_of_single_channels_is_batch_norm_of_single_items(rng):
    x = rng.normal(size=(1, 3, 4, 2))
    same(run(group_norm, x, groups=3), run(batch_norm, x))


def test_rms_norm_of_what_has_mean_0_is_layer_norm(rng):
    x, gamma = rng.normal(size=(2, 3, 5)), rng.normal(size=5)
    x -= x.mean(axis=-1, keepdims=True)
    y, (_, dparams) = run(rms_norm, x, rms_norm.Params(gamma), eps=1e-5)
    z, (_, dwide) = run(layer_norm, x, layer_norm.Params(gamma), eps=1e-5)
    same((y, dparams.gamma), (z, dwide.gamma))


def test_layer_norm_sees_neither_shift_nor_scale(rng):
    x = rng.normal(size=(2, 3, 5))
    y, (dx, _) = run(layer_norm, x, eps=0.0)
    z, (dz, _) = run(layer_norm, 3 * x + 2, eps=0.0)
    same((y, dx), (z, 3 * dz))
    same((dx.sum(axis=-1), (dx * x).sum(axis=-1)), (np.zeros((2, 3)), np.zeros((2, 3))))


# --- softmax and log-sum-exp --------------------------------------------------------------------------------


@pytest.mark.parametrize("keepdims", [False, True])
def test_the_gradient_of_logsumexp_is_softmax(rng, keepdims):
    s, mask = rng.normal(size=(3, 4, 2)), rng.random((3, 4, 2)) < 0.7
    y, saved = logsumexp.forward(s, axis=1, keepdims=keepdims, mask=mask)
    (ds,) = logsumexp.backward(np.ones_like(y), saved)
    same(ds, softmax.forward(s, axis=1, mask=mask)[0])


def test_logsumexp_of_nothing():
    s = np.array([[-np.inf, -np.inf], [1.0, 2.0], [np.nan, np.inf], [3.0, -np.inf]])
    mask = np.array([[True, True], [False, False], [False, False], [True, True]])
    y, (ds,) = run(logsumexp, s, mask=mask)
    assert (y[:3] == -np.inf).all() and y[3] == 3
    assert (ds[:3] == 0).all() and ds[3, 0] != 0 and ds[3, 1] == 0


def test_logsumexp_moves_with_its_scores(rng):
    s = rng.normal(size=(3, 4))
    same(logsumexp.forward(s + 700.0)[0], logsumexp.forward(s)[0] + 700.0)


# --- scaled dot-product attention ---------------------------------------------------------------------------


def qkv(rng, lead=(2,), queries=3, keys=4, features=5, values=2):
    shapes = (queries, features), (keys, features), (keys, values)
    return tuple(rng.normal(size=(*lead, *shape)) for shape in shapes)


def test_every_key_twice(rng):
    q, k, v = qkv(rng)
    y, (dq, dk, dv) = run(scaled_dot_product, q, k, v)
    twice, (dq2, dk2, dv2) = run(scaled_dot_product, q, *(np.concatenate((x, x), axis=1) for x in (k, v)))
    same((y, dq, dk, dv), (twice, dq2, dk2[:, :4] + dk2[:, 4:], dv2[:, :4] + dv2[:, 4:]))


def test_one_key(rng):
    q, k, v = qkv(rng, keys=1)
    y, (dq, dk, _) = run(scaled_dot_product, q, k, v)
    same(y, np.broadcast_to(v, y.shape))
    assert (dq == 0).all() and (dk == 0).all()


def test_all_keys_equal(rng):
    q, k, v = qkv(rng)
    mask = rng.random((2, 3, 4)) < 0.7
    mask[..., 0] = True
    y, (dq, _, _) = run(scaled_dot_product, q, np.broadcast_to(k[:, :1], k.shape), v, mask=mask)
    same((y, dq), (mask @ v / mask.sum(axis=-1, keepdims=True), np.zeros_like(q)))


def test_no_scale(rng):
    q, k, v = qkv(rng)
    y, (dq, dk, _) = run(scaled_dot_product, q, k, v, scale=0.0)
    same(y, np.broadcast_to(v.mean(axis=1, keepdims=True), y.shape))
    assert (dq == 0).all() and (dk == 0).all()


def test_the_scale_may_stand_in_the_queries(rng):
    q, k, v = qkv(rng)
    y, (dq, dk, dv) = run(scaled_dot_product, q, k, v, scale=0.3)
    z, (dz, *rest) = run(scaled_dot_product, 0.3 * q, k, v, scale=1.0)
    same((y, dq, dk, dv), (z, 0.3 * dz, *rest))


def test_a_constant_added_to_all_scores_of_a_query(rng):
    """Adding one vector to every key does that; so the gradients of the keys add up to nothing."""
    q, k, v = qkv(rng)
    one, other = (run(scaled_dot_product, q, keys, v) for keys in (k, k + rng.normal(size=5)))
    same((one[0], *one[1]), (other[0], *other[1]), tolerance=1e-11)
    same(one[1][1].sum(axis=1), np.zeros((2, 5)))


def test_linear_in_the_values(rng):
    (q, k, v), w = qkv(rng), rng.normal(size=(2, 4, 2))
    a, b, both = (scaled_dot_product.forward(q, k, x)[0] for x in (v, w, 3 * v - w))
    same(both, 3 * a - b)


def test_causal_attention_never_revises(rng):
    """What T tokens said stays said when there are T + 1; the last of them sees all."""
    q, k, v = qkv(rng, queries=5, keys=5)
    dout = rng.normal(size=(2, 5, 2))
    dout[:, 4] = 0
    y, grads = run(scaled_dot_product, q, k, v, is_causal=True, dout=dout)
    before, fewer = run(scaled_dot_product, *(x[:, :4] for x in (q, k, v)), is_causal=True, dout=dout[:, :4])
    same((y[:, :4], y[:, 4:]), (before, scaled_dot_product.forward(q[:, 4:], k, v)[0]))
    same(tuple(g[:, :4] for g in grads), fewer)
    assert all((g[:, 4] == 0).all() for g in grads)


def test_a_masked_key_is_an_absent_key(rng):
    q, k, v = qkv(rng)
    mask = np.ones((2, 3, 4), bool)
    mask[:, :, 2] = False
    y, grads = run(scaled_dot_product, q, k, v, mask=mask)
    z, fewer = run(scaled_dot_product, q, *(np.delete(x, 2, axis=1) for x in (k, v)))
    same((y, grads[0], *(np.delete(g, 2, axis=1) for g in grads[1:])), (z, *fewer))
    assert all((g[:, 2] == 0).all() for g in grads[1:])


def test_a_query_that_may_attend_to_nothing(rng):
    q, k, v = qkv(rng)
    mask = np.ones((2, 3, 4), bool)
    mask[:, 1] = False
    y, (dq, dk, dv) = run(scaled_dot_product, q, k, v, mask=mask)
    assert (y[:, 1] == 0).all() and (dq[:, 1] == 0).all()
    dout = np.cos(1.0 + np.arange(12)).reshape(2, 3, 2)[:, [0, 2]]
    z, fewer = run(scaled_dot_product, q[:, [0, 2]], k, v, dout=dout)
    same((y[:, [0, 2]], dq[:, [0, 2]], dk, dv), (z, *fewer))


def test_heads_are_items(rng):
    """(B, H, T, D) is B H items of (T, D)."""
    q, k, v = qkv(rng, lead=(2, 3))
    flat = [x.reshape(6, *x.shape[2:]) for x in (q, k, v)]
    y, grads = run(scaled_dot_product, q, k, v, is_causal=True)
    z, others = run(scaled_dot_product, *flat, is_causal=True)
    same((y, *grads), (z.reshape(y.shape), *(d.reshape(g.shape) for d, g in zip(others, grads))))


# --- multi-head attention -----------------------------------------------------------------------------------


def test_one_head_without_projections_is_scaled_dot_product(rng):
    q, k, v = qkv(rng, values=6)
    mask = rng.random((2, 3, 4)) < 0.7
    params = multi_head.Params(*(linear.Params(np.eye(size)) for size in (5, 5, 6, 6)))
    y, (*grads, _) = run(multi_head, q, k, v, params, heads=1, mask=mask[:, None])
    same((y, *grads), run(scaled_dot_product, q, k, v, mask=mask)[:1] + run(scaled_dot_product, q, k, v, mask=mask)[1])


def test_heads_come_in_any_order(rng):
    x, params = rng.normal(size=(2, 3, 6)), like(rng, multi_head.init(rng, 6))
    order = np.arange(6).reshape(3, 2)[[2, 0, 1]].ravel()

    def reordered(p):
        q, k, v = (linear.Params(weight[order], bias[order]) for weight, bias in p[:3])
        return multi_head.Params(q, k, v, linear.Params(p.out.weight[:, order], p.out.bias))

    y, (*grads, dparams) = run(multi_head, x, x, x, params, heads=3, is_causal=True)
    z, (*others, dreordered) = run(multi_head, x, x, x, reordered(params), heads=3, is_causal=True)
    same((y, *grads, reordered(dparams)), (z, *others, dreordered))


def test_multi_head_is_every_head_alone_then_added_up(rng):
    """Cross-attention of three heads, each with its own rows of Wq, Wk, Wv and columns of Wo."""
    x, memory = rng.normal(size=(2, 3, 6)), rng.normal(size=(2, 4, 5))
    params = like(rng, multi_head.init(rng, 6, key_features=5, value_features=5))
    y, saved = multi_head.forward(x, memory, memory, params, heads=3)
    total, maps = params.out.bias, []
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        q, k, v = (
            linear.forward(source, linear.Params(weight[rows], bias[rows]))[0]
            for source, (weight, bias) in zip((x, memory, memory), params[:3])
        )
        head, one = scaled_dot_product.forward(q, k, v)
        total, maps = total + head @ params.out.weight[:, rows].T, [*maps, one.attn]
    same((y, saved.attn), (total, np.stack(maps, axis=1)))


@pytest.mark.parametrize("keys", ["self", "cross"])
def test_what_is_given_twice_gets_the_sum_of_its_gradients(rng, keys):
    x, memory = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4))
    params, dout, direction = like(rng, multi_head.init(rng, 4)), rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4))
    if keys == "self":
        direction = direction[:, :3]
        _, (dq, dk, dv, _) = run(multi_head, x, x, x, params, heads=2, dout=dout)
        jv = complex_step(lambda x: multi_head.forward(x, x, x, params, heads=2)[0], (x,), (direction,))
        expected = dq + dk + dv
    else:
        _, (_, dk, dv, _) = run(multi_head, x, memory, memory, params, heads=2, dout=dout)
        jv = complex_step(lambda m: multi_head.forward(x, m, m, params, heads=2)[0], (memory,), (direction,))
        expected = dk + dv
    assert abs(inner(dout, jv) - inner(expected, direction)) <= 1e-12 * (1 + abs(inner(dout, jv)))


def test_padding_is_absence(rng):
    """A key mask that hides the last two tokens of the memory leaves what a shorter memory gives."""
    x, memory, params = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4)), like(rng, multi_head.init(rng, 4))
    there = np.arange(5) < 3
    y, grads = run(multi_head, x, memory, memory, params, heads=2, key_mask=np.stack((there, there)))
    z, others = run(multi_head, x, memory[:, :3], memory[:, :3], params, heads=2)
    same((y, grads[0], grads[1][:, :3], grads[2][:, :3], grads[3]), (z, *others))
    assert all((g[:, 3:] == 0).all() for g in grads[1:3])


def test_the_three_masks_of_multi_head_agree(rng):
    x, params = rng.normal(size=(2, 4, 4)), like(rng, multi_head.init(rng, 4))
    mask, key_mask = rng.random((2, 2, 4, 4)) < 0.7, rng.random((2, 4)) < 0.7
    all_in_one = mask & key_mask[:, None, None] & np.tri(4, dtype=bool)
    y, grads = run(multi_head, x, x, x, params, heads=2, mask=mask, key_mask=key_mask, is_causal=True)
    z, others = run(multi_head, x, x, x, params, heads=2, mask=all_in_one)
    same((y, *grads), (z, *others))
    nothing = np.broadcast_to(~all_in_one.any(axis=-1).any(axis=1)[..., None], y.shape)
    assert np.abs(y - params.out.bias)[nothing].max(initial=0) <= 1e-15


# --- transformer layers -------------------------------------------------------------------------------------


def test_feed_forward_is_linear_relu_linear(rng):
    x, params = rng.normal(size=(2, 3, 4)), like(rng, feed_forward.init(rng, 4, 5))
    hidden, _ = linear.forward(x, params.linear1)
    same(feed_forward.forward(x, params)[0], linear.forward(relu(hidden), params.linear2)[0])


def encoder(rng, features=4, hidden=5):
    return like(rng, transformer_encoder_layer.init(rng, features, hidden))


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_whose_parts_are_silent(rng, norm_first):
    """Norm before leaves its input alone then, gradient included; norm after normalises it twice."""
    x, params = rng.normal(size=(2, 3, 4)), encoder(rng)
    silent = params._replace(
        attention=params.attention._replace(out=tree_map(np.zeros_like, params.attention.out)),
        feed_forward=params.feed_forward._replace(linear2=tree_map(np.zeros_like, params.feed_forward.linear2)),
    )
    dout = rng.normal(size=x.shape)
    y, (dx, _) = run(transformer_encoder_layer, x, silent, heads=2, norm_first=norm_first, dout=dout)
    if norm_first:
        same((y, dx), (x, dout))
    else:
        once, saved1 = layer_norm.forward(x, params.norm1)
        twice, saved2 = layer_norm.forward(once, params.norm2)
        same((y, dx), (twice, layer_norm.backward(layer_norm.backward(dout, saved2)[0], saved1)[0]))


def test_norm_before_and_norm_after(rng):
    """On a normalised x and with one plain norm N: after = N(N(x1) + before - x1), where x1 = x + A(x)."""
    plain = layer_norm.init(rng, 4)
    params = encoder(rng)._replace(norm1=plain, norm2=plain)
    x, _ = layer_norm.forward(rng.normal(size=(2, 3, 4)), eps=0.0)
    options = {"heads": 2, "activation": "gelu", "eps": 0.0}
    before, _ = transformer_encoder_layer.forward(x, params, norm_first=True, **options)
    after, _ = transformer_encoder_layer.forward(x, params, norm_first=False, **options)
    x1 = x + multi_head.forward(x, x, x, params.attention, heads=2)[0]
    normed, _ = layer_norm.forward(x1, eps=0.0)
    same(after, layer_norm.forward(normed + before - x1, eps=0.0)[0], tolerance=1e-11)


def test_an_encoder_layer_never_reads_padding(rng):
    x, params = rng.normal(size=(2, 4, 4)), encoder(rng)
    key_mask = np.broadcast_to(np.arange(4) < 3, (2, 4))
    dout = rng.normal(size=x.shape) * key_mask[..., None]
    y, (dx, dparams) = run(transformer_encoder_layer, x, params, heads=2, key_mask=key_mask, dout=dout)
    z, (dz, dshorter) = run(transformer_encoder_layer, x[:, :3], params, heads=2, dout=dout[:, :3])
    same((y[:, :3], dx[:, :3], dparams), (z, dz, dshorter))
    assert (dx[:, 3] == 0).all()


def test_a_decoder_layer_that_ignores_the_memory_is_a_causal_encoder_layer(rng):
    """With norm before, a cross-attention without output adds nothing, and the memory gets no gradient."""
    x, memory = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 6))
    params = like(rng, transformer_decoder_layer.init(rng, 4, 5, memory_features=6))
    deaf = params.cross_attention._replace(out=tree_map(np.zeros_like, params.cross_attention.out))
    y, (dx, dmemory, dparams) = run(
        transformer_decoder_layer, x, memory, params._replace(cross_attention=deaf), heads=2, norm_first=True
    )
    alike = transformer_encoder_layer.Params(params.attention, params.norm1, params.feed_forward, params.norm3)
    z, (dz, dalike) = run(transformer_encoder_layer, x, alike, heads=2, norm_first=True, is_causal=True)
    same((y, dx), (z, dz))
    same((dparams.attention, dparams.norm1, dparams.feed_forward, dparams.norm3), tuple(dalike))
    assert (dmemory == 0).all()


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_decoder_layer_never_revises(rng, norm_first):
    x, memory = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 3, 4))
    params, dout = like(rng, transformer_decoder_layer.init(rng, 4, 5)), rng.normal(size=x.shape)
    dout[:, 4] = 0
    y, grads = run(transformer_decoder_layer, x, memory, params, heads=2, norm_first=norm_first, dout=dout)
    z, others = run(
        transformer_decoder_layer, x[:, :4], memory, params, heads=2, norm_first=norm_first, dout=dout[:, :4]
    )
    same((y[:, :4], grads[0][:, :4], *grads[1:]), (z, *others))
    assert (grads[0][:, 4] == 0).all()


# --- recurrent networks and their attention -----------------------------------------------------------------


def test_a_gate_that_weighs_the_new_state_is_one_minus_a_gate_that_weighs_the_old(rng):
    x, h, dh = rng.normal(size=(2, 3)), rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    params = like(rng, gru_cell.init(rng, 3, 4))
    sign = np.array([1.0, -1.0, 1.0])  # 1 - sigmoid(a) = sigmoid(-a)
    flipped = tree_map(lambda w: w * sign.reshape(3, *(1,) * (w.ndim - 1)), params)
    y, (dx, dstate, dparams) = run(gru_cell, x, h, params, z_weighs="new", dout=dh)
    z, (ex, estate, eparams) = run(gru_cell, x, h, flipped, z_weighs="old", dout=dh)
    eparams = tree_map(lambda w: w * sign.reshape(3, *(1,) * (w.ndim - 1)), eparams)
    same((y, dx, dstate, dparams), (z, ex, estate, eparams))


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_a_recurrent_layer_is_its_cell_step_by_step(rng, cell):
    x, params = rng.normal(size=(2, 3, 2)), like(rng, recurrent.init(rng, 2, 3, cell=cell))
    out, _ = recurrent.forward(x, None, params)
    state = recurrent_cell.zeros(x, params.cells[0])
    for t in range(3):
        state, _ = recurrent_cell.forward(x[:, t], state, params.cells[0])
        same(out.y[:, t], state.h)
    same(tree_map(lambda s: s[:, 0], tuple(out.state)), tuple(state))


def test_reading_backward_is_reading_the_reverse(rng):
    x, params = rng.normal(size=(2, 4, 2)), like(rng, recurrent.init(rng, 2, 3, cell="lstm"))
    dout = like(rng, recurrent.forward(x, None, params)[0])
    out, (dx, _, dparams) = run(recurrent, x, None, params, direction="backward", dout=dout)
    again, (ex, _, eparams) = run(recurrent, x[:, ::-1], None, params, dout=dout._replace(y=dout.y[:, ::-1]))
    same((out, dx, dparams), (again._replace(y=again.y[:, ::-1]), ex[:, ::-1], eparams))


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_a_recurrent_layer_never_reads_padding(rng, direction):
    x, params = rng.normal(size=(2, 4, 2)), like(rng, recurrent.init(rng, 2, 3, direction=direction))
    mask = np.broadcast_to(np.arange(4) < 3, (2, 4))
    short, _ = recurrent.forward(x[:, :3], None, params, direction=direction)
    dshort = like(rng, short)
    dout = dshort._replace(y=np.pad(dshort.y, ((0, 0), (0, 1), (0, 0)), constant_values=7.0))
    out, (dx, _, dparams) = run(recurrent, x, None, params, direction=direction, mask=mask, dout=dout)
    _, (ex, _, eparams) = run(recurrent, x[:, :3], None, params, direction=direction, dout=dshort)
    same((out.y[:, :3], out.state, dx[:, :3], dparams), (short.y, short.state, ex, eparams))
    assert (out.y[:, 3] == 0).all() and (dx[:, 3] == 0).all()


def test_additive_attention_is_the_concat_score(rng):
    query, memory = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 2))
    params = like(rng, additive.init(rng, 4, 2, 3))
    joined = multiplicative.Params(np.concatenate([params.w.weight, params.u.weight], axis=1), v=params.v)
    mask = np.arange(5) < np.array([[5], [2]])
    dout = like(rng, additive.Out(np.zeros((2, 3, 2)), np.zeros((2, 3, 5))))
    out, (dquery, dmemory, dparams) = run(additive, query, memory, params, mask=mask, dout=dout)
    dout = multiplicative.Out(*dout)
    again, (equery, ememory, eparams) = run(
        multiplicative, query, memory, joined, score="concat", mask=mask, dout=dout
    )
    same((*out, dquery, dmemory, dparams.v), (*again, equery, ememory, eparams.v))
    same(np.concatenate([dparams.w.weight, dparams.u.weight], axis=1), eparams.weight)


def test_a_decoder_deaf_to_its_context_is_a_gru(rng):
    params = like(rng, additive_decoder.init(rng, 2, 3, 2))._replace(w_c=np.zeros((3, 3, 2)))
    inputs, memory, state = rng.normal(size=(2, 4, 3, 3)), rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 3))
    out, _ = additive_decoder.forward(inputs, memory, state, params)
    cells = recurrent.Params((gru_cell.Params(None, params.w_h),))
    options = {"reset_after": False, "z_weighs": "new"}
    start = recurrent.State(state[:, None])
    same(out.states, recurrent.forward(inputs.reshape(2, 4, 9), start, cells, **options)[0].y)


def test_the_dot_score_is_attention_without_a_scale(rng):
    query, memory = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4))
    dcontext, mask = rng.normal(size=(2, 3, 4)), np.arange(5) < np.array([[5], [2]])
    dout = multiplicative.Out(dcontext, np.zeros((2, 3, 5)))
    params = multiplicative.Params()
    out, (dquery, dmemory, _) = run(multiplicative, query, memory, params, score="dot", mask=mask, dout=dout)
    options = {"scale": 1.0, "mask": np.broadcast_to(mask[:, None], (2, 3, 5))}
    context, (dq, dk, dv) = run(scaled_dot_product, query, memory, memory, dout=dcontext, **options)
    same((out.context, dquery, dmemory), (context, dq, dk + dv))


@pytest.mark.parametrize("score", ["general", "concat", "concat_matlab"])
def test_local_attention_with_a_wide_window_is_global(rng, score):
    query, memory, lengths = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 2)), np.array([5, 2])
    params = like(rng, multiplicative.init(rng, 4, 2, score=score, scale=True))
    dout = like(rng, multiplicative.Out(np.zeros((2, 3, 2)), np.zeros((2, 3, 5))))
    mask = np.arange(5) < lengths[:, None]
    out, grads = run(multiplicative, query, memory, params, score=score, mask=mask, dout=dout)
    given = {"score": score, "window": 5, "lengths": lengths, "dout": local_attention.Out(*dout)}
    again, (*egrads, eparams) = run(local_attention, query, memory, local_attention.Params(params), **given)
    same((*out, *grads), (*again, *egrads, eparams.score))


def test_local_attention_sees_nothing_outside_its_window(rng):
    query, memory = rng.normal(size=(1, 1, 3)), rng.normal(size=(1, 6, 3))
    params = local_attention.Params(multiplicative.Params())
    out, saved = local_attention.forward(query, memory, params, score="dot", window=1, start=3)
    near, _ = multiplicative.forward(query, memory[:, 2:5], params.score, score="dot")
    same((out.context, out.weights[:, :, 2:5]), (near.context, near.weights))
    dmemory = local_attention.backward(out, saved)[1]
    assert (dmemory[:, [0, 1, 5]] == 0).all() and (dmemory[:, 2:5] != 0).all()


def test_a_luong_decoder_that_is_not_fed_attends_once_for_all_steps(rng):
    inputs, memory = rng.normal(size=(2, 4, 2)), rng.normal(size=(2, 5, 3))
    attention = multiplicative.init(rng, 3, 3)
    params = like(rng, luong_decoder.init(rng, 2, 3, 3, 2, attention, feed=False, bias=True))
    state = recurrent.State(rng.normal(size=(2, 1, 3)), rng.normal(size=(2, 1, 3)))
    (h, last), moved = recurrent.forward(inputs, state, params.cells)
    (c, w), attended = multiplicative.forward(h, memory, params.attention)
    u, combined = linear.forward(np.concatenate([c, h], axis=2), params.combine)
    a = np.tanh(u)

    dout = like(rng, luong_decoder.Out(a, last))
    dboth, dcombine = linear.backward(dout.attentional * (1 - a * a), combined)
    dc, dh = np.split(dboth, 2, axis=2)
    dquery, dmemory, dattention = multiplicative.backward(multiplicative.Out(dc, np.zeros_like(w)), attended)
    dinputs, dstate, dcells = recurrent.backward(recurrent.Out(dh + dquery, dout.state), moved)
    expected = (a, last), (dinputs, dmemory, dstate, luong_decoder.Params(dcells, dattention, dcombine))
    out, grads = run(luong_decoder, inputs, memory, state, params, feed=False, dout=dout)
    same(expected, (tuple(out), grads))


# --- channel gates, spatial gates and self-attention, mixed -------------------------------------------------


def test_a_block_is_convolution_norm_and_relu(rng):
    x, params = rng.normal(size=(2, 3, 4, 4)), like(rng, conv_norm_relu.init(rng, 3, 2, (3, 3)))
    a, convolved = conv.forward(x, params.conv, padding=1)
    u, normed = batch_norm.forward(a, params.norm)
    dout = rng.normal(size=u.shape)
    da, dnorm = batch_norm.backward(dout * (u > 0), normed)
    dx, dconv = conv.backward(da, convolved)
    expected = relu(u), (dx, conv_norm_relu.Params(dconv, dnorm))
    same(expected, run(conv_norm_relu, x, params, dout=dout, padding=1))


def test_a_cbam_channel_gate_that_only_averages_is_squeeze_and_excitation(rng):
    x, params = rng.normal(size=(2, 6, 3, 4)), like(rng, cbam_channel.init(rng, 6, 2))
    expected = run(squeeze_excitation, x, squeeze_excitation.Params(*params))
    same(tuple(expected), run(cbam_channel, x, params, pools=("avg",)))


def test_the_average_of_equal_pixels_is_their_maximum(rng):
    x, params = np.tile(rng.normal(size=(2, 6, 1, 1)), (3, 4)), like(rng, cbam_channel.init(rng, 6, 2))
    one, other = (cbam_channel.forward(x, params, pools=(kind, kind))[0] for kind in ("avg", "max"))
    same(one, other)


def test_the_maps_of_a_spatial_gate_may_change_places_with_their_kernels(rng):
    x, params = rng.normal(size=(2, 3, 4, 5)), like(rng, cbam_spatial.init(rng, kernel=3))
    swapped = params._replace(weight=params.weight[:, ::-1])
    out, (dx, dparams) = run(cbam_spatial, x, params, maps=("max", "avg"))
    again, (redx, redparams) = run(cbam_spatial, x, swapped, maps=("avg", "max"))
    same((out, dx, dparams), (again, redx, redparams._replace(weight=redparams.weight[:, ::-1])))


@pytest.mark.parametrize("norm", [True, False])
def test_cbam_is_its_channel_gate_then_its_spatial_gate(rng, norm):
    x = rng.normal(size=(2, 4, 3, 5))
    params = like(rng, cbam.Params(cbam_channel.init(rng, 4, 2), cbam_spatial.init(rng, 3, norm)))
    names = {"channel": "cbam_channel", "spatial": "cbam_spatial", "self_attention": None}
    out, (dx, dparams) = run(hybrid, x, hybrid.Params(*params), **names)
    same((out, (dx, cbam.Params(*dparams[:2]))), run(cbam, x, params))
    same(run(cbam_channel, x, params.channel)[0], run(cbam, x, params._replace(spatial=None))[0])


def test_a_branch_of_bam_that_has_no_say(rng):
    """A spatial logit of 1 everywhere, multiplied, or of 0, added, leaves the channel branch alone: and vice versa."""
    x, params = rng.normal(size=(3, 4, 3, 3)), like(rng, bam.init(rng, 4, 2))

    def silent(final, logit):
        return final._replace(weight=np.zeros_like(final.weight), bias=np.full_like(final.bias, logit))

    for combine, logit in (("mul", 1.0), ("add", 0.0)):
        where = params._replace(spatial=params.spatial._replace(final=silent(params.spatial.final, logit)))
        out, (dx, dparams) = run(bam, x, where, combine=combine)
        same(run(bam_channel, x, params.channel), (out, (dx, dparams.channel)))
        what = params._replace(channel=params.channel._replace(final=silent(params.channel.final, logit)))
        out, (dx, dparams) = run(bam, x, what, combine=combine)
        same(run(bam_spatial, x, params.spatial), (out, (dx, dparams.spatial)))


def test_the_square_window_of_bam_is_all_of_a_square_image(rng):
    x, params = rng.normal(size=(3, 4, 3, 3)), like(rng, bam_channel.init(rng, 4, 2, layers=2))
    same(run(bam_channel, x, params, pool="square"), run(bam_channel, x, params, pool="global"))
    wide = np.concatenate([x, rng.normal(size=(3, 4, 3, 2))], axis=3)  # columns that the square does not see
    gate = bam_channel.forward(wide, params, pool="square")[1].gate
    same(bam_channel.forward(x, params)[1].gate, gate)


@pytest.mark.parametrize("sign", [-1, 1])
def test_channel_attention_is_scaled_dot_product_among_channels(rng, sign):
    x, gamma = rng.normal(size=(2, 3, 2, 4)), rng.normal(size=1)
    rows = x.reshape(2, 3, 8)
    dout = rng.normal(size=x.shape)
    attended, saved = scaled_dot_product.forward(sign * rows, rows, rows, scale=1.0)
    dq, dk, dv = scaled_dot_product.backward(gamma * dout.reshape(2, 3, 8), saved)
    dx = dout + (sign * dq + dk + dv).reshape(x.shape)
    dgamma = (dout.reshape(2, 3, 8) * attended).sum().reshape(1)
    expected = x + gamma * attended.reshape(x.shape), (dx, channel_self.Params(dgamma))
    same(expected, run(channel_self, x, channel_self.Params(gamma), sign=sign, dout=dout))


def test_the_dual_head_begins_as_two_pairs_of_blocks(rng):
    x, start = rng.normal(size=(2, 8, 3, 4)), dual.init(rng, 8, 3)
    params = start._replace(channel_in=start.position_in, channel_out=start.position_out)
    out, _ = dual.forward(x, params)  # both gammas are 0
    h, _ = conv_norm_relu.forward(x, params.position_in, padding=1)
    h, _ = conv_norm_relu.forward(h, params.position_out, padding=1)
    heads = params.classify_both, params.classify_position, params.classify_channel
    expected = (conv.forward(seen, head)[0] for seen, head in zip((2 * h, h, h), heads))
    same(tuple(expected), tuple(out))


MEMBERS = [(place, name) for place, names in hybrid.MEMBERS.items() for name in names]
ALONE = dict.fromkeys(hybrid.PLACES)
MEMBER_OPTIONS = {
    "cbam_spatial": {"maps": ("avg", "max")},
    "channel_self": {"sign": 1},
    "non_local": {"pool": None},
    "region_non_local": {"pool": None},
}


@pytest.mark.parametrize("arrangement", hybrid.ARRANGEMENTS)
@pytest.mark.parametrize("place, name", MEMBERS, ids=lambda value: value)
def test_one_member_is_itself_in_every_arrangement(rng, place, name, arrangement):
    x, options = rng.normal(size=(3, 4, 3, 3)), MEMBER_OPTIONS.get(name, {})
    params = like(rng, hybrid.init(rng, 4, **{**ALONE, place: name}))
    theirs = getattr(params, place)
    out, grads = run(hybrid.MEMBERS[place][name], x, *([] if theirs is None else [theirs]), **options)
    names = {**ALONE, place: name}
    got, (dx, dparams) = run(hybrid, x, params, arrangement=arrangement, options={place: options}, **names)
    same((out, grads), (got, (dx, *([] if theirs is None else [getattr(dparams, place)]))))


@pytest.mark.parametrize("order", list(itertools.permutations(hybrid.PLACES)), ids=" ".join)
def test_members_in_sequence(rng, order):
    x, params = rng.normal(size=(2, 4, 3, 3)), like(rng, hybrid.init(rng, 4))
    modules = {"channel": squeeze_excitation, "spatial": cbam_spatial, "self_attention": position}
    y, saved, grads, dout = x, {}, {}, rng.normal(size=x.shape)
    for place in order:
        y, saved[place] = modules[place].forward(y, getattr(params, place))
    dx = dout
    for place in reversed(order):
        dx, grads[place] = modules[place].backward(dx, saved[place])
    same((y, (dx, hybrid.Params(**grads))), run(hybrid, x, params, order=order, dout=dout))


def test_members_in_parallel(rng):
    x, params = rng.normal(size=(2, 4, 3, 3)), like(rng, hybrid.init(rng, 4))
    modules = squeeze_excitation, cbam_spatial, position
    outs, grads = zip(*(run(module, x, theirs) for module, theirs in zip(modules, params)))
    expected = sum(outs), (sum(dx for dx, _ in grads), hybrid.Params(*(dparams for _, dparams in grads)))
    same(expected, run(hybrid, x, params, arrangement="parallel sum"))
    same(tree_map(lambda t: t / 3, expected), run(hybrid, x, params, arrangement="parallel mean"))


# --- gates of channels --------------------------------------------------------------------------------------


def test_channels_on_a_ring_may_be_turned(rng):
    x, dy = rng.normal(size=(2, 2, 6, 3, 4))
    params = like(rng, efficient_channel.init(rng, 6, kernel=5))
    y, (dx, dparams) = run(efficient_channel, x, params, circular=True, dout=dy)
    z, (dz, dturned) = run(efficient_channel, np.roll(x, 2, 1), params, circular=True, dout=np.roll(dy, 2, 1))
    same((np.roll(y, 2, 1), np.roll(dx, 2, 1), dparams), (z, dz, dturned))


def test_a_filter_for_every_channel_that_is_the_same_for_all(rng):
    x, shared = rng.normal(size=(2, 5, 3, 4)), like(rng, efficient_channel.init(rng, 5, kernel=3, bias=True))
    y, (dx, dshared) = run(efficient_channel, x, shared)
    z, (dz, down) = run(efficient_channel, x, tree_map(lambda p: np.repeat(p, 5, axis=0), shared))
    same((y, dx, dshared), (z, dz, tree_map(lambda d: d.sum(axis=0, keepdims=True), down)))


def test_the_kernel_grows_with_the_logarithm_of_the_channels():
    """The values that the rule of ECA gives in the issues of its authors' repository."""
    channels = 16, 64, 128, 256, 512, 1024, 2048
    assert [efficient_channel.adaptive_kernel(c) for c in channels] == [3, 3, 5, 5, 5, 5, 7]


def test_a_gate_of_variation_does_not_see_a_shift(rng):
    x, params = rng.normal(size=(2, 4, 3, 5)), like(rng, second_order_channel.init(rng, 4, 2))
    same(simam.forward(x)[1].gate, simam.forward(x + 3)[1].gate)
    near, far = (second_order_channel.forward(images, params)[1] for images in (x, x + 3))
    same(near.gate, far.gate)


def test_many_steps_reach_the_root(rng):
    factor = rng.normal(size=(2, 3, 5))
    s = factor @ factor.swapaxes(1, 2)
    root, _ = matrix_sqrt.forward(s, iterations=30)
    same(s, root @ root)


def test_a_selection_without_weights_is_the_mean_of_the_branches(rng):
    x, params = rng.normal(size=(3, 4, 5, 6)), like(rng, selective_kernel.init(rng, 4, 4, (3, 1, 3), groups=2))
    params = params._replace(select=tree_map(np.zeros_like, params.select))
    geometry = [{"dilation": d, "padding": p} for d, p in ((1, 1), (2, 0), (3, 3))]
    maps = [conv_norm_relu.forward(x, b, groups=2, **g)[0] for b, g in zip(params.branches, geometry)]
    same(sum(maps) / 3, selective_kernel.forward(x, params, dilations=(1, 2, 3), groups=2)[0])


def test_a_split_input_is_a_kernel_that_is_zero_elsewhere(rng):
    x, split = rng.normal(size=(3, 4, 5, 6)), selective_kernel.init(rng, 4, 3, groups=1, split_input=True)
    first, second = (branch.conv.weight for branch in split.branches)
    wide = [np.concatenate(pair, axis=1) for pair in ((first, 0 * first), (0 * second, second))]
    branches = (b._replace(conv=conv.Params(weight)) for b, weight in zip(split.branches, wide))
    y, (dx, dsplit) = run(selective_kernel, x, split, groups=1, split_input=True)
    z, (dz, dwide) = run(selective_kernel, x, split._replace(branches=tuple(branches)), groups=1)
    same((y, dx, dsplit.squeeze, dsplit.select), (z, dz, dwide.squeeze, dwide.select))


def test_split_attention_without_splits_is_a_convolution_then_squeeze_and_excitation(rng):
    x, params = rng.normal(size=(2, 3, 4, 5)), like(rng, split_attention.init(rng, 3, 4, radix=1, least=2, norm=False))
    y, (dx, dparams) = run(split_attention, x, params, radix=1, padding=1)
    u, convolved = conv.forward(x, params.conv, padding=1)
    inner_params = squeeze_excitation.Params(params.fc1.weight, params.fc2.weight, params.fc1.bias, params.fc2.bias)
    z, (du, dinner) = run(squeeze_excitation, relu(u), inner_params)
    dz, dconv = conv.backward(du * (u > 0), convolved)
    same((y, dx, dparams.conv, dparams.fc1), (z, dz, dconv, conv.Params(dinner.w1, dinner.b1)))


# --- regions ------------------------------------------------------------------------------------------------


def test_one_region_is_the_whole_image(rng):
    x, params = rng.normal(size=(2, 3, 5, 4)), like(rng, non_local.init(rng, 3, 2, norm=False))
    y, (dx, dparams) = run(region_non_local, x, params, grid=1)
    z, (dz, dwhole) = run(non_local, x, params, pool="after", scale=False)
    same((y, dx, dparams), (z, dz, dwhole))


def test_a_region_does_not_see_the_others(rng):
    x, params = rng.normal(size=(2, 3, 5, 7)), like(rng, non_local.init(rng, 3, 2, norm=False))
    y, _ = region_non_local.forward(x, params)
    corner, _ = non_local.forward(x[:, :, :2, :3], params, pool="after", scale=False)
    same(corner, y[:, :, :2, :3])


# --- pixels and pyramids ------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(5,), (3, 4), (2, 2, 3)])
def test_a_non_local_block_is_attention_of_all_positions_to_all(rng, space):
    x, params = rng.normal(size=(2, 4, *space)), like(rng, non_local.init(rng, 4, 3, norm=False))
    rows = x.reshape(2, 4, -1).swapaxes(1, 2)
    q, k, v = (linear.forward(rows, p)[0] for p in (params.theta, params.phi, params.g))
    attended, _ = linear.forward(scaled_dot_product.forward(q, k, v)[0], params.out)
    same(x + attended.swapaxes(1, 2).reshape(x.shape), non_local.forward(x, params, pool=None)[0])


def test_position_attention_is_a_non_local_block_that_maps_back_by_gamma(rng):
    x, params = rng.normal(size=(2, 4, 3, 2)), like(rng, position.init(rng, 4, 2))
    block = non_local.Params(
        g=params.value, out=linear.Params(params.gamma * np.eye(4)), theta=params.query, phi=params.key
    )
    y, (dx, dparams) = run(position, x, params)
    z, (dz, dblock) = run(non_local, x, block, pool=None, scale=False)
    same((y, dx, dparams.query, dparams.key, dparams.value), (z, dz, dblock.theta, dblock.phi, dblock.g))
    same(dparams.gamma, np.trace(dblock.out.weight)[None])


def test_the_concatenation_of_a_silent_half_sees_one_side(rng):
    """With wt = 0 all positions attend alike."""
    x, params = rng.normal(size=(2, 3, 4, 2)), like(rng, non_local.init(rng, 3, 2, mode="concatenation", norm=False))
    params = params._replace(concat=params.concat * np.array([[0], [1]]))
    weights = non_local.forward(x, params, mode="concatenation", pool=None)[1].weights
    same(weights, np.broadcast_to(weights[:, :1], weights.shape))


def test_context_features_are_blocks_side_by_side(rng):
    x, params = rng.normal(size=(2, 3, 4, 5)), like(rng, context_feature_extraction.init(rng, 3, 2, (1, 3)))
    y, (dx, dparams) = run(context_feature_extraction, x, params, dilations=(1, 2))
    dout = np.cos(1.0 + np.arange(y.size)).reshape(y.shape)
    total = 0
    for i, dilation in enumerate((1, 2)):
        part = slice(2 * i, 2 * i + 2)
        block = conv_norm_relu.Params(params.branches[i], batch_norm.Params(*(p[part] for p in params.norm)))
        options = {"dilation": dilation, "padding": i * dilation, "eps": 1e-3}
        z, (dz, dblock) = run(conv_norm_relu, x, block, dout=dout[:, part], **options)
        total = total + dz
        same((z, dblock.conv), (y[:, part], dparams.branches[i]))
        same(tuple(dblock.norm), tuple(p[part] for p in dparams.norm))
    same(dx, total)


def test_the_two_chains_of_spatial_attention_change_places_when_the_image_lies_on_its_side(rng):
    def turn(image):
        return image.swapaxes(2, 3)

    def turned(params):
        chains = (tree_map(lambda p: turn(p) if p.ndim == 4 else p, chain) for chain in params[::-1])
        return pyramid_spatial.Params(*chains)

    x, params = rng.normal(size=(2, 4, 3, 5)), like(rng, pyramid_spatial.init(rng, 4, 3))
    dout = rng.normal(size=x.shape)
    y, (dx, dparams) = run(pyramid_spatial, x, params, dout=dout)
    z, (dz, dturned) = run(pyramid_spatial, turn(x), turned(params), dout=turn(dout))
    same((y, dx, dparams), (turn(z), turn(dz), turned(dturned)))


def test_the_channel_attention_of_the_pyramid_is_squeeze_and_excitation(rng):
    x, params = rng.normal(size=(2, 8, 3, 5)), like(rng, squeeze_excitation.init(rng, 8, reduction=4))
    same(run(pyramid_channel, x, params), run(squeeze_excitation, x, params))
    same(pyramid_channel.forward(x, params)[1].gate, squeeze_excitation.forward(x, params)[1].gate)


# --- pooling ------------------------------------------------------------------------------------------------


def test_the_pooled_root_does_not_see_a_shift_and_scales_with_the_image(rng):
    x = rng.normal(size=(2, 3, 4, 5))
    y, _ = matrix_power_pool.forward(x)
    same(y, matrix_power_pool.forward(x + rng.normal(size=(2, 3, 1, 1)))[0])
    same(3 * y, matrix_power_pool.forward(3 * x)[0])


def test_one_channel_is_pooled_to_its_standard_deviation(rng):
    x = rng.normal(size=(2, 1, 4, 5))
    same(x.std(axis=(2, 3)), matrix_power_pool.forward(x)[0])
