"""Position encodings: how they reduce to plain attention, to one another, and to what frameworks compute."""

import math

import numpy as np
import pytest

from refattn.attention.dot_product import (
    alibi,
    axial_rotary,
    decomposed_2d,
    dot_product_attention,
    rotary,
    scaled_dot_product,
    shaw,
    sinusoidal,
    swin_bias,
    swin_v2,
    t5_bias,
    transformer_xl,
    xpos,
)
from refattn.draw import RandomDraw
from refattn.oracle.laws import causal
from refattn.registry import everything


@pytest.fixture(params=range(3), ids="seed{}".format)
def rng(request):
    return np.random.default_rng(request.param)


def close(a, b, tolerance=1e-12):
    assert np.shape(a) == np.shape(b)
    assert np.abs(a - b).max(initial=0) <= tolerance * (1 + np.abs(b).max(initial=0))


# --- rotary -------------------------------------------------------------------------------------------------


def rotated(x, positions, frequencies, pairing="interleaved"):
    cos, sin = rotary.tables(np.broadcast_to(positions, (len(x), x.shape[-2])), frequencies)
    return rotary.forward(x, cos, sin, pairing=pairing)[0]


RULES = {
    "plain": lambda: rotary.frequencies(8),
    "partial": lambda: rotary.frequencies(6, base=100.0),
    "linear": lambda: rotary.linear(8, 4.0),
    "ntk": lambda: rotary.ntk(8, 4.0),
    "yarn": lambda: rotary.yarn(8, 4.0, 64),
    "llama3": lambda: rotary.llama3(8, 8.0, 64),
}


@pytest.mark.parametrize("pairing", rotary.PAIRINGS)
@pytest.mark.parametrize("rule", RULES)
def test_rotary_scores_see_differences_of_positions_only(rng, pairing, rule):
    frequencies = RULES[rule]()
    q, k = rng.normal(size=(2, 3, 5, 8)), rng.normal(size=(2, 3, 4, 8))
    at_q, at_k = rng.integers(0, 100, 5), rng.integers(0, 100, 4)
    scores = [
        rotated(q, at_q + shift, frequencies, pairing) @ rotated(k, at_k + shift, frequencies, pairing).swapaxes(-1, -2)
        for shift in (0, 17)
    ]
    close(*scores)
    plain = rotated(q, at_q, frequencies) @ rotated(k, at_k, frequencies).swapaxes(-1, -2)
    if pairing == "interleaved_to_half":
        close(scores[0], plain)  # both sides in the same, other order
    close(rotated(q, 0 * at_q, frequencies, "half"), q)


@pytest.mark.parametrize("rotary_dim", [8, 6, 0])
def test_pairings_are_permutations_of_one_another(rng, rotary_dim):
    x, dy = rng.normal(size=(2, 2, 3, 5, 8))
    cos, sin = rng.normal(size=(2, 2, 5, rotary_dim // 2))
    order = np.array([*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, 8)])
    y, saved = rotary.forward(x, cos, sin)
    half, saved_half = rotary.forward(x[..., order], cos, sin, pairing="half")
    third, saved_third = rotary.forward(x, cos, sin, pairing="interleaved_to_half")
    close(y[..., order], half)
    close(third, half)
    dx, dcos, dsin = rotary.backward(dy, saved)
    of_half, of_third = (rotary.backward(dy[..., order], s) for s in (saved_half, saved_third))
    for got, expected in zip((*of_half, *of_third), (dx[..., order], dcos, dsin, dx, dcos, dsin)):
        close(got, expected)


def test_rotations_keep_norms_and_are_undone_by_their_gradient(rng):
    x, (cos, sin) = rng.normal(size=(1, 2, 5, 8)), rotary.tables(np.arange(5)[None], rotary.frequencies(8))
    y, saved = rotary.forward(x, cos, sin)
    close((y * y).sum(axis=-1), (x * x).sum(axis=-1))
    close(rotary.backward(y, saved)[0], x)
    close(rotary.forward(y, cos, -sin)[0], x)


def test_tables_keep_the_precision_of_frequencies():
    single = rotary.tables(np.array([[0, 100_000]]), rotary.frequencies(4).astype(np.float32), 0.5)
    assert all(t.dtype == np.float32 and t.shape == (1, 2, 2) for t in single)
    assert single[0][0, 0, 0] == 0.5 and single[0][0, 1, 0] == np.float32(math.cos(100_000) / 2)


def test_frequencies():
    close(rotary.frequencies(4), [1, 1 / 100])
    close(rotary.frequencies(6, 8.0), [1, 1 / 2, 1 / 4])
    close(rotary.linear(4, 2.0), [1 / 2, 1 / 200])
    theta, stretched = rotary.frequencies(8), rotary.ntk(8, 4.0)
    close(stretched[0], theta[0])
    close(stretched[-1], theta[-1] / 4)


def llama3_by_wavelength(theta, factor, length, low, high):
    """The published rule, one frequency at a time."""
    wave = 2 * math.pi / theta
    if wave < length / high:
        return theta
    if wave > length / low:
        return theta / factor
    smooth = (length / wave - low) / (high - low)
    return (1 - smooth) * theta / factor + smooth * theta


def test_llama3():
    got, theta = rotary.llama3(128, 8.0, 8192), rotary.frequencies(128, 500000.0)
    close(got, np.array([llama3_by_wavelength(t, 8, 8192, 1, 4) for t in theta]))
    assert got[0] == theta[0] and got[-1] == theta[-1] / 8 and len(set(np.round(theta / got, 9))) > 3


def test_yarn():
    """DeepSeek-V3's ramp runs from pair 10 to pair 23."""
    got, theta = rotary.yarn(64, 40.0, 4096), rotary.frequencies(64)
    share = (theta - got) / (theta - theta / 40)
    close(share, np.clip((np.arange(32) - 10) / 13, 0, 1))
    unrounded = rotary.yarn(64, 40.0, 4096, ramp="unrounded")
    kept = np.flatnonzero(unrounded == theta)
    assert kept[-1] == 10 and np.flatnonzero(unrounded == theta / 40)[0] == 23
    assert not np.allclose(unrounded[11:23], got[11:23], rtol=1e-3)
    turns = 4096 * theta / (2 * math.pi)
    by_turns = rotary.yarn(64, 40.0, 4096, ramp="turns")
    close((by_turns - theta / 40) / (theta - theta / 40), np.clip((turns - 1) / 31, 0, 1), 1e-11)
    close(rotary.yarn(64, 1.0, 4096), theta)


def test_the_ends_of_the_ramp_are_pairs_that_there_are():
    """Numbered up to features - 1, as in the authors' code, though there are only half as many pairs."""

    def share(features, base, length):
        theta = rotary.frequencies(features, base)
        return (theta - rotary.yarn(features, 2.0, length, base)) / (theta / 2)

    close(share(64, 1e4, 128), np.minimum(np.arange(32) / 11, 1))  # from -2 to 11
    close(share(8, 10.0, 640), [0, 0, 0, 1 / 5])  # from 2 to 9
    close(share(4, 1e30, 1), [0, 1])  # from 0 to 0: a step


def test_attention_factor():
    assert rotary.attention_factor(0.5) == rotary.attention_factor(1) == 1
    close(rotary.attention_factor(40.0), 0.1 * math.log(40) + 1)
    close(rotary.attention_factor(1.5), 0.1 * math.log(1.5) + 1)
    close(rotary.attention_factor(math.e, 0.707), 1.0707)


# --- biases -------------------------------------------------------------------------------------------------


def attention(q, k, bias, mask):
    """Scaled dot-product attention with a bias, as everybody knows it."""
    scores = np.where(mask, q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]) + bias, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_slopes():
    assert list(alibi.slopes(8)) == [2.0**-h for h in range(1, 9)]
    assert list(alibi.slopes(1)) == [2.0**-8] and list(alibi.slopes(4)) == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert list(alibi.slopes(6)) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    assert list(alibi.slopes(12)) == [2.0**-h for h in range(1, 9)] + [2.0**-h for h in (0.5, 1.5, 2.5, 3.5)]


@pytest.mark.parametrize("offset", [0, 3])
def test_the_forms_of_alibi_are_one_under_a_causal_mask(rng, offset):
    queries, keys, slopes = 4, 4 + offset, rng.random(3)
    q, k = rng.normal(size=(3, queries, 5)), rng.normal(size=(3, keys, 5))
    biases = [
        alibi.forward(slopes, queries=queries, keys=keys, offset=offset, form=form)[0]
        for form in ("distance", "relative", "key_position")
    ]
    biases.append(slopes[:, None, None] * (np.arange(keys) - (keys - 1)))  # MPT
    past = np.tri(queries, keys, offset, bool)
    weights = [attention(q, k, bias, past) for bias in biases]
    for other in weights[1:]:
        close(other, weights[0])
    close(np.where(past, biases[0], 0), np.where(past, biases[1], 0))
    assert not np.allclose(*(attention(q, k, bias, True) for bias in biases[:2]))


@pytest.mark.parametrize("form", ["distance", "relative", "key_position"])
def test_alibi_in_dot_product_attention(rng, form):
    """The bias of all items has the slopes' gradient; the log-sum-exp tells the forms apart, the output does not."""
    q, k, v, dy = rng.normal(size=(4, 2, 3, 5, 4))
    slopes, size = rng.random(3), {"queries": 5, "keys": 5}

    def attend(slopes, form):
        bias, saved_bias = alibi.forward(slopes, form=form, **size)
        options = {"is_causal": True, "return_lse": True}
        return dot_product_attention.forward(q, k, v, bias, None, **options), saved_bias

    (out, saved), saved_bias = attend(slopes, form)
    (plain, _), _ = attend(slopes, "distance")
    close(out.y, plain.y)
    shift = slopes[:, None] * np.arange(5) if form == "key_position" else np.zeros((3, 5))
    close(out.lse, plain.lse + shift)
    dbias = dot_product_attention.backward(out._replace(y=dy, lse=np.zeros_like(out.lse)), saved)[3]
    (dslopes,) = alibi.backward(dbias, saved_bias)
    for h in range(3):
        (moved, _), _ = attend(slopes + 1e-30j * np.eye(3)[h], form)
        close((moved.y.imag * dy).sum() / 1e-30, dslopes[h])


def torch_bucket(torch, relative, bidirectional, buckets, distance):
    """Restated from the formula, with the logarithms of torch."""
    result = torch.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        result = result + buckets * (relative > 0).long()
        relative = relative.abs()
    else:
        relative = (-relative).clamp(min=0)
    exact = buckets // 2
    far = torch.log(relative.double().clamp(min=1) / exact) / math.log(distance / exact) * (buckets - exact)
    far = (exact + (far + 1e-9).long()).clamp(max=buckets - 1)
    return result + torch.where(relative < exact, relative, far)


@pytest.mark.frameworks
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (32, 20), (8, 100), (6, 11)])
def test_buckets_of_t5_in_torch(bidirectional, buckets, distance):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    table = np.arange(buckets, dtype=float)[:, None]
    options = {"bidirectional": bidirectional, "max_distance": distance}
    bias, _ = t5_bias.forward(table, queries=1, keys=401, offset=200, **options)
    assert bias.shape == (1, 1, 401)
    assert list(bias[0, 0]) == torch_bucket(torch, torch.arange(-200, 201), bidirectional, buckets, distance).tolist()


def test_buckets_of_t5():
    """32 buckets to 128: the first distance of each, worked out by hand from 8 * 2^(k/2), or 16 * 8^(k/16)."""
    table = np.arange(32.0)[:, None]
    after, _ = t5_bias.forward(table, queries=1, keys=300)
    assert list(after[0, 0, :8]) == [0, *range(17, 24)]
    edges = [8, 12, 16, 23, 32, 46, 64, 91]
    assert [np.flatnonzero(after[0, 0] == 24 + k)[0] for k in range(8)] == edges and after[0, 0, -1] == 31
    before, _ = t5_bias.forward(table, queries=300, keys=1)
    assert list(before[0, :, 0][[0, *edges, 299]]) == [0, *range(8, 16), 15]
    causal, _ = t5_bias.forward(table, queries=300, keys=2, bidirectional=False)
    assert causal[0, 0, 1] == causal[0, 0, 0] == 0
    first = [np.flatnonzero(causal[0, :, 0] == b)[0] for b in range(32)]
    assert first == [*range(16), *(math.ceil(16 * 8 ** (k / 16) - 1e-9) for k in range(16))]


@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0)])
def test_there_may_be_no_queries_or_no_keys(queries, keys):
    for mechanism, parameter in ((alibi, np.ones(2)), (t5_bias, np.ones((8, 2)))):
        bias, saved = mechanism.forward(parameter, queries=queries, keys=keys)
        assert bias.shape == (2, queries, keys)
        assert not mechanism.backward(bias, saved)[0].any()


@pytest.mark.parametrize("buckets, bidirectional", [(8, True), (10, True), (5, False)])
def test_the_shortest_max_distance_of_t5(buckets, bidirectional):
    """Of 2 exact buckets, one distance more has a bucket; what lies further shares the last one."""
    table = np.arange(float(buckets))[:, None]
    options = {"queries": 6, "keys": 1, "bidirectional": bidirectional, "max_distance": 3}
    last = (buckets // 2 if bidirectional else buckets) - 1
    assert t5_bias.forward(table, **options)[0][0, :, 0].tolist() == [0, 1, 2, last, last, last]


def test_swin_bias_is_the_table_turned_around_the_query():
    """Seen from the last pixel of a window, the table's beginning runs backwards; from the first, its end does."""
    m, w = 2, 3
    table = np.random.default_rng(0).normal(size=((2 * m - 1) * (2 * w - 1), 2))
    bias, _ = swin_bias.forward(table, window=(m, w))
    grid = table.reshape(2 * m - 1, 2 * w - 1, 2)
    close(bias[:, -1].T.reshape(m, w, 2), grid[m - 1 :, w - 1 :][::-1, ::-1])
    close(bias[:, 0].T.reshape(m, w, 2), grid[:m, :w][::-1, ::-1])
    close(bias[:, range(m * w), range(m * w)], np.repeat(grid[m - 1, w - 1][:, None], m * w, axis=1))
    one_row, _ = swin_bias.forward(table[5:10], window=(1, 3))
    close(one_row, bias[:, :3, :3])


def test_waves_turn_with_the_position():
    """The wave at p + 1 is a rotation of the wave at p, whatever p; layouts are permutations of one another."""
    positions = np.arange(6)[None]
    wave = sinusoidal.waves(positions, 8)
    cos, sin = rotary.tables(np.ones((1, 6), int), rotary.frequencies(8))
    turned, _ = rotary.forward(wave[..., ::-1], cos[..., ::-1], sin[..., ::-1])  # (cos, sin) is the point
    close(turned[:, :-1, ::-1], wave[:, 1:])
    close(sinusoidal.waves(positions, 8, layout="concatenated"), wave[..., [0, 2, 4, 6, 1, 3, 5, 7]])
    close(sinusoidal.waves(positions, 2, frequencies="inclusive"), sinusoidal.waves(positions, 2))
    for features in (4, 8):
        slowest = sinusoidal.waves(np.array([1]), features, frequencies="inclusive")[0, features - 2]
        close(slowest, math.sin(1e-4))
    out, _ = sinusoidal.forward(np.ones((2, 6, 8)))
    close(out, 1 + np.repeat(wave, 2, axis=0))


# --- attentions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing, scale_base", [(p, base) for p in rotary.PAIRINGS for base in (512.0, 1.0)])
def test_xpos_scores_are_those_of_rotary_with_decay(rng, pairing, scale_base):
    options = {"pairing": pairing, "scale_base": scale_base}
    q, k = rng.normal(size=(2, 1, 3, 5, 8))
    positions = np.arange(5)[None]
    scores = [
        xpos.forward(q, positions=positions + shift, is_key=False, **options)[0]
        @ xpos.forward(k, positions=positions + shift, is_key=True, **options)[0].swapaxes(-1, -2)
        for shift in (0, -7)
    ]
    close(*scores)
    zeta = (np.arange(4) / 4 + 0.4) / 1.4
    theta = rotary.frequencies(8)
    expected = 0
    for pair in range(4):  # the scores of one pair only, and its decay
        features = [pair, pair + 4] if pairing == "half" else [2 * pair, 2 * pair + 1]
        one = [rotated(x[..., features], positions, theta[[pair]]) for x in (q, k)]
        expected = expected + zeta[pair] ** ((positions.T - positions) / scale_base) * (
            one[0] @ one[1].swapaxes(-1, -2)
        )
    close(scores[0], expected)


def both_ways(mechanism, dy, *args, **options):
    y, saved = mechanism.forward(*args, **options)
    return y, *mechanism.backward(dy, saved)


def causal_where_nothing_came_before(name, **options):
    """The law `causal`, with as many queries as keys and no offset: its cut moves both."""
    mechanism, reached = everything()[name], 0
    for seed in range(60):
        call = mechanism.example(RandomDraw(seed))
        if call.args[0].shape[-2] == call.args[1].shape[-2]:
            causal(mechanism, call._replace(options=call.options | options), np.random.default_rng(seed))
            reached += call.args[0].shape[-2] > 1
    assert reached > 5


def test_shaw_without_tables_is_scaled_dot_product_attention(rng):
    q, k, v, dy = rng.normal(size=(4, 2, 3, 5, 4))
    mask = rng.random((2, 3, 5, 5)) < 0.7
    zero = shaw.Params(np.zeros((7, 4)), np.zeros((7, 4)))
    for options in ({}, {"mask": mask}, {"is_causal": True}, {"scale": 0.3, "is_causal": True, "mask": mask}):
        expected = both_ways(scaled_dot_product, dy, q, k, v, **options)
        got = both_ways(shaw, dy, q, k, v, zero, **options)
        for a, b in zip(got, expected):
            close(a, b)


def test_shaw_with_one_row_moves_all_keys_and_values(rng):
    """Clipped to nothing, every distance is the same: softmax does not see it, and the value is added to all."""
    q, k, v = rng.normal(size=(3, 2, 5, 4))
    row = shaw.Params(*rng.normal(size=(2, 1, 4)))
    expected, _ = scaled_dot_product.forward(q, k, v)
    close(shaw.forward(q, k, v, row)[0], expected + row.values)


@pytest.mark.parametrize("clip", [1, 2, 5])
def test_shaw_backwards_with_tables_turned_around_is_shaw(rng, clip):
    q, k, v, dy = rng.normal(size=(4, 2, 5, 4))
    tables = shaw.Params(*rng.normal(size=(2, 2 * clip + 1, 4)))
    turned = shaw.Params(tables.keys[::-1], tables.values[::-1])
    *straight, dtables = both_ways(shaw, dy, q, k, v, tables)
    *back, dturned = both_ways(shaw, *(x[:, ::-1] for x in (dy, q, k, v)), turned)
    for a, b in zip(back, straight):
        close(a[:, ::-1], b)
    for a, b in zip(dturned, dtables):
        close(a[::-1], b)


def test_shaw_decodes_with_an_offset(rng):
    q, k, v = rng.normal(size=(3, 2, 6, 4))
    tables = shaw.Params(*rng.normal(size=(2, 5, 4)))
    whole, _ = shaw.forward(q, k, v, tables, is_causal=True)
    last, _ = shaw.forward(q[:, 4:], k, v, tables, is_causal=True, offset=4)
    close(last, whole[:, 4:])
    causal_where_nothing_came_before("shaw", offset=0)


def relative_shift(x):
    """Pad on the left, and read rows of another length, as Transformer-XL's code does."""
    *lead, queries, keys = x.shape
    padded = np.concatenate([np.zeros((*lead, queries, 1)), x], axis=-1)
    return padded.reshape(*lead, keys + 1, queries)[..., 1:, :].reshape(*lead, queries, keys)


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("clamp", [None, 2])
def test_transformer_xl_by_padding_and_reshaping(rng, memory, clamp):
    queries, keys = 4, 4 + memory
    q, k, v = rng.normal(size=(2, 3, queries, 5)), rng.normal(size=(2, 3, keys, 5)), rng.normal(size=(2, 3, keys, 2))
    p = transformer_xl.Params(*(rng.normal(size=s) for s in ((3, 5), (3, 5), (3, 5, 6))))
    position = np.minimum(np.arange(keys - 1, -1, -1), np.inf if clamp is None else clamp)
    angle = position[:, None] / 10000 ** (np.arange(0, 6, 2) / 6)
    r = np.concatenate([np.sin(angle), np.cos(angle)], axis=1) @ p.w_r.swapaxes(1, 2)  # (H, K, D)
    content = (q + p.u[:, None]) @ k.swapaxes(2, 3)
    positional = relative_shift((q + p.v[:, None]) @ r.swapaxes(1, 2))
    past = np.tri(queries, keys, memory, bool)
    scores = np.where(past, (content + positional) / math.sqrt(5), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    close(transformer_xl.forward(q, k, v, p, clamp=clamp)[0], weights @ v)


@pytest.mark.parametrize("memory", [0, 2])
def test_transformer_xl_without_biases_is_causal_attention(rng, memory):
    q, dy = rng.normal(size=(2, 2, 3, 4, 5))
    k, v = rng.normal(size=(2, 2, 3, 4 + memory, 5))
    zero = transformer_xl.Params(np.zeros((3, 5)), np.zeros((3, 5)), np.zeros((3, 5, 2)))
    past = np.broadcast_to(np.tri(4, 4 + memory, memory, bool), (2, 3, 4, 4 + memory))
    expected = both_ways(scaled_dot_product, dy, q, k, v, mask=past)
    for a, b in zip(both_ways(transformer_xl, dy, q, k, v, zero), expected):
        close(a, b)


def test_transformer_xl_sees_memory_as_if_it_were_there(rng):
    """Half a sequence, with the keys and values of the other half as memory, is the end of the whole."""
    q, k, v = rng.normal(size=(3, 2, 3, 6, 4))
    p = transformer_xl.Params(*(rng.normal(size=s) for s in ((3, 4), (3, 4), (3, 4, 4))))
    whole, _ = transformer_xl.forward(q, k, v, p)
    close(transformer_xl.forward(q[:, :, 3:], k, v, p)[0], whole[:, :, 3:])
    close(transformer_xl.forward(q, k, v, p, clamp=6)[0], whole)
    causal_where_nothing_came_before("transformer_xl")


def test_transformer_xl_with_all_keys_at_one_distance_is_attention_with_a_bias_of_the_queries(rng):
    """What r_0 adds is the same for all keys of a query: softmax does not see it."""
    q, k, v = rng.normal(size=(3, 2, 3, 5, 4))
    p = transformer_xl.Params(*(rng.normal(size=s) for s in ((3, 4), (3, 4), (3, 4, 2))))
    expected, _ = scaled_dot_product.forward(q + p.u[:, None], k, v, is_causal=True)
    close(transformer_xl.forward(q, k, v, p, clamp=0)[0], expected)


def test_initial_weights_of_transformer_xl():
    drawn = transformer_xl.init(np.random.default_rng(0), 8, 32, 64)
    assert [0.018 < x.std() < 0.022 for x in drawn] == [True] * 3
    assert [x.shape for x in drawn] == [(8, 32), (8, 32), (8, 32, 64)]


def test_decomposed_attention_without_tables_is_scaled_dot_product_attention(rng):
    q, dy = rng.normal(size=(2, 2, 3, 6, 4))
    k, v = rng.normal(size=(2, 2, 3, 4, 4))
    tables = decomposed_2d.init(rng, 4, (3, 2))
    assert [t.shape for t in tables] == [(5, 4), (3, 4)]
    got = both_ways(decomposed_2d, dy, q, k, v, tables, size=(2, 3), key_size=(2, 2))
    for a, b in zip(got, both_ways(scaled_dot_product, dy, q, k, v)):
        close(a, b)


def in_torch(torch, q, k, v, rows, columns, size, key_size):
    """SAM's attention restated: indices by division of floating-point numbers, tables resized by torch."""

    def look_up(table, n, m):
        table = torch.nn.functional.interpolate(table.T[None], size=2 * max(n, m) - 1, mode="linear")[0].T
        at_q = torch.arange(n, dtype=torch.float64)[:, None] * max(m / n, 1.0)
        at_k = torch.arange(m, dtype=torch.float64)[None] * max(n / m, 1.0)
        return table[(at_q - at_k + (m - 1) * max(n / m, 1.0) + 1e-9).long()]

    (h, w), (m, n) = size, key_size
    pixels = q.reshape(len(q), h, w, -1)
    by_row = torch.einsum("bhwd,hmd->bhwm", pixels, look_up(rows, h, m))
    by_column = torch.einsum("bhwd,wnd->bhwn", pixels, look_up(columns, w, n))
    bias = (by_row[..., None] + by_column[..., None, :]).reshape(len(q), h * w, m * n)
    return ((q / math.sqrt(q.shape[-1])) @ k.mT + bias).softmax(-1) @ v


@pytest.mark.frameworks
@pytest.mark.parametrize("size, key_size", [((3, 4), (3, 4)), ((4, 6), (2, 3)), ((2, 3), (5, 3)), ((7, 2), (3, 5))])
@pytest.mark.parametrize("lengths", [None, (4, 9)])
def test_decomposed_attention_in_torch(rng, size, key_size, lengths):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    lengths = lengths or [2 * max(a, b) - 1 for a, b in zip(size, key_size)]
    queries, keys = math.prod(size), math.prod(key_size)
    arrays = [rng.normal(size=s) for s in ((2, queries, 4), (2, keys, 4), (2, keys, 3), *((n, 4) for n in lengths))]
    dy = rng.normal(size=(2, queries, 3))
    q, k, v, *tables = arrays
    y, *grads, dtables = both_ways(
        decomposed_2d, dy, q, k, v, decomposed_2d.Params(*tables), size=size, key_size=key_size
    )
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = in_torch(torch, *tensors, size, key_size)
    expected.backward(torch.tensor(dy))
    for a, b in zip((y, *grads, *dtables), (expected.detach(), *(t.grad for t in tensors))):
        close(a, b.numpy())


def test_axial_scores_see_differences_of_points_only(rng):
    q, k = rng.normal(size=(2, 1, 3, 6, 8))
    points = axial_rotary.grid(2, 3)[None]
    for frequencies in (axial_rotary.axial(3, 8), axial_rotary.mixed(rng, 3, 8)):
        scores = [
            axial_rotary.forward(q, frequencies, coordinates=points + shift)[0]
            @ axial_rotary.forward(k, frequencies, coordinates=points + shift)[0].swapaxes(-1, -2)
            for shift in (0.0, np.array([2.5, -7.0]))
        ]
        close(*scores)


def test_one_axis_is_rotary(rng):
    x, dy = rng.normal(size=(2, 2, 3, 5, 9))
    theta, positions = rotary.frequencies(6), rng.integers(0, 50, (2, 5))
    for pairing in rotary.PAIRINGS:
        got = both_ways(
            *(axial_rotary, dy, x, np.repeat(theta[None, None], 3, axis=1)),
            coordinates=positions[..., None].astype(float),
            pairing=pairing,
        )
        expected = both_ways(rotary, dy, x, *rotary.tables(positions, theta), pairing=pairing)
        close(got[0], expected[0])
        close(got[1], expected[1])


def test_axial_is_rotary_by_rows_for_half_the_features_and_by_columns_for_the_others(rng):
    x = rng.normal(size=(2, 3, 6, 8))
    y, _ = axial_rotary.forward(
        *(x, axial_rotary.axial(3, 8)), coordinates=np.repeat(axial_rotary.grid(2, 3)[None], 2, axis=0)
    )
    rows, columns = np.divmod(np.arange(6), 3)
    theta = rotary.frequencies(4, 100.0)
    close(y[..., :4], rotated(x[..., :4], rows, theta))
    close(y[..., 4:], rotated(x[..., 4:], columns, theta))


def test_frequencies_of_several_axes():
    assert axial_rotary.grid(2, 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert axial_rotary.grid(2, 1, 2).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    parts = axial_rotary.sections(2, np.array([4.0, 3.0, 2.0, 1.0]), (1, 2, 1))
    assert parts.shape == (3, 2, 4)
    assert parts[:, 0].tolist() == parts[:, 1].tolist() == [[4, 0, 0, 0], [0, 3, 2, 0], [0, 0, 0, 1]]
    close(axial_rotary.axial(1, 12, 3, base=9.0)[:, 0], np.kron(np.eye(3), [1, 1 / 3]))
    drawn = axial_rotary.mixed(np.random.default_rng(0), 50, 8, base=9.0)
    assert drawn.shape == (2, 50, 4)
    close((drawn**2).sum(axis=0), np.tile([1, 1 / 9, 1, 1 / 9], (50, 1)))
    close((drawn[..., :2] * drawn[..., 2:]).sum(axis=0), np.zeros((50, 2)))
    close(drawn[0, :, 2:], -drawn[1, :, :2])  # the second direction is the first, a quarter turn further
    directions = axial_rotary.mixed(np.random.default_rng(0), 4000, 8)
    close(directions[..., 0], 10**0.5 * directions[..., 1])
    quadrants = 2 * (directions[0, :, 0] > 0) + (directions[1, :, 0] > 0)
    assert np.abs(np.bincount(quadrants) / 1000 - 1).max() < 0.1  # of any direction as many
    assert axial_rotary.mixed(np.random.default_rng(0), 1, 4).shape == (2, 1, 2)


def swin_v2_in_torch(torch, q, k, v, logit_scale, w1, b1, w2, window, pretrained):
    """Restated with a meshgrid of offsets, an index of pairs, and torch's own normalize and clamp."""
    (m, w), functional = window, torch.nn.functional
    offsets = torch.meshgrid(
        torch.arange(1 - m, m, dtype=torch.float64), torch.arange(1 - w, w, dtype=torch.float64), indexing="ij"
    )
    table = torch.stack(offsets, dim=-1) / (torch.tensor(pretrained) - 1) * 8
    table = torch.sign(table) * torch.log2(table.abs() + 1) / math.log2(8)
    table = functional.linear(functional.relu(functional.linear(table, w1, b1)), w2)
    pixels = torch.cartesian_prod(torch.arange(m), torch.arange(w))
    between = pixels[:, None] - pixels[None] + torch.tensor([m - 1, w - 1])
    bias = 16 * torch.sigmoid(table[between[..., 0], between[..., 1]]).permute(2, 0, 1)
    scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT
    scale = torch.clamp(logit_scale, max=math.log(100)).exp()
    return (scores * scale[:, None, None] + bias).softmax(-1) @ v


@pytest.mark.frameworks
@pytest.mark.parametrize("pretrained", [None, (5, 4)])
def test_swin_v2_in_torch(rng, pretrained):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'refattn[torch]'")
    q, k, v, dy = rng.normal(size=(4, 2, 3, 6, 4))
    params = swin_v2.init(rng, 3, 7)._replace(logit_scale=np.array([math.log(10), math.log(100), 5.0]))
    options = {"window": (2, 3), "pretrained": pretrained}
    y, *grads, dparams = both_ways(swin_v2, dy, q, k, v, params, **options)
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v, *params)]
    expected = swin_v2_in_torch(torch, *tensors, (2, 3), pretrained or (2, 3))
    expected.backward(torch.tensor(dy))
    for a, b in zip((y, *grads, *dparams), (expected.detach(), *(t.grad for t in tensors))):
        close(a, b.numpy())
    assert dparams.logit_scale[1] != 0 == dparams.logit_scale[2]


def test_swin_v2_sees_directions_only(rng):
    q, k, v, dy = rng.normal(size=(4, 2, 3, 6, 4))
    params = swin_v2.init(rng, 3, 7)
    y, dq, dk, *_ = both_ways(swin_v2, dy, q, k, v, params, window=(2, 3))
    again, dq_long, dk_long, *_ = both_ways(swin_v2, dy, 3 * q, 5 * k, v, params, window=(2, 3))
    close(again, y)
    close(3 * dq_long, dq)
    close(5 * dk_long, dk)
    close((q * dq).sum(axis=-1), np.zeros((2, 3, 6)))


def test_a_query_of_zeros_is_divided_by_a_small_number(rng):
    q, k, v, dy = rng.normal(size=(4, 1, 1, 2, 3))
    q[0, 0, 0] = 0
    params = swin_v2.init(rng, 1, 2)._replace(logit_scale=np.zeros(1))
    _, dq, *_ = both_ways(swin_v2, dy, q, k, v, params, window=(1, 2))
    small, dsmall = q.copy(), dq
    small[0, 0, 0, 0] = 1e-13
    moved = swin_v2.forward(small, k, v, params, window=(1, 2))[0] - swin_v2.forward(q, k, v, params, window=(1, 2))[0]
    close((moved * dy).sum() / 1e-13 / dsmall[0, 0, 0, 0], 1.0, 0.2)
    assert np.isfinite(dq).all()
    for length, expected in ((1e-13, 0.1), (1e-7, 1.0)):
        small[0, 0, 0, 0] = length
        close(swin_v2.forward(small, k, v, params, window=(1, 2))[1].q[0, 0, 0], [expected, 0, 0])


def test_hidden_units_of_swin_v2_at_0_have_no_slope(rng):
    q, k, v, dy = rng.normal(size=(4, 1, 2, 2, 3))
    params = swin_v2.init(rng, 2, 4)
    params = params._replace(w1=0 * params.w1, b1=0 * params.b1)
    *_, dparams = both_ways(swin_v2, dy, q, k, v, params, window=(1, 2))
    assert not dparams.w1.any() and not dparams.b1.any() and not dparams.w2.any() and dparams.logit_scale.all()


def test_initial_weights_of_swin_v2():
    drawn = swin_v2.init(np.random.default_rng(0), 4)
    assert [x.shape for x in drawn] == [(4,), (512, 2), (512,), (4, 512)]
    close(np.exp(drawn.logit_scale), np.full(4, 10.0))
    for x, inputs in ((drawn.w1, 2), (drawn.b1, 2), (drawn.w2, 512)):
        assert all(0.98 < end * math.sqrt(inputs) <= 1 for end in (x.max(), -x.min()))


def test_initial_weights_of_shaw():
    drawn = shaw.init(np.random.default_rng(0), 64)
    assert [x.shape for x in drawn] == [(33, 64), (33, 64)]
    assert all(0.98 < end / math.sqrt(6 / 97) <= 1 for x in drawn for end in (x.max(), -x.min()))
    assert shaw.init(np.random.default_rng(0), 4, 2, values=False).values is None
