"""What turns scores into weights: how the normalisers relate, what each of them solves, and what they never read."""

import numpy as np
import pytest
from scipy.optimize import minimize

from refattn.attention.dot_product import normalised_attention, scaled_dot_product, sigmoid_attention
from refattn.oracle.derivatives import complex_step, inner
from refattn.primitives import entmax, gumbel_softmax, softmax, softmax_plus_one, sparsemax, top_k_softmax
from tests.test_relations import run, same

NAN, INF = np.nan, np.inf


@pytest.fixture(params=range(3), ids="seed{}".format)
def rng(request):
    return np.random.default_rng(request.param)


def scores(rng, *shape):
    return rng.normal(size=shape or (3, 5)) * 1.5


# --- what all have in common ---------------------------------------------------------------------------------

NORMALISERS = [
    pytest.param(softmax, {}, id="softmax"),
    pytest.param(softmax_plus_one, {}, id="softmax_plus_one"),
    pytest.param(sparsemax, {}, id="sparsemax"),
    pytest.param(entmax, {}, id="entmax"),
    pytest.param(top_k_softmax, {"k": 2}, id="top_k_softmax"),
    pytest.param(top_k_softmax, {"k": 3, "ties": "all"}, id="top_k_softmax, ties"),
    pytest.param(gumbel_softmax, {"temperature": 0.5}, id="gumbel_softmax"),
]
ON_THE_SIMPLEX = [n for n in NORMALISERS if n.id != "softmax_plus_one"]


@pytest.mark.parametrize("module, options", NORMALISERS)
def test_what_is_masked_is_never_read(rng, module, options):
    s, mask = scores(rng), rng.random((3, 5)) < 0.6
    spoilt = np.where(mask, s, rng.choice([NAN, INF, -INF], s.shape))
    p, (ds,) = run(module, s, mask=mask, **options)
    same((p, ds), (run(module, spoilt, mask=mask, **options)[0], run(module, spoilt, mask=mask, **options)[1][0]))
    assert (p[~mask] == 0).all() and (ds[~mask] == 0).all()


@pytest.mark.parametrize("module, options", NORMALISERS)
def test_masked_is_absent(rng, module, options):
    s, mask = scores(rng), np.ones((3, 5), bool)
    mask[:, 2] = False
    dout = rng.normal(size=(3, 5))
    p, (ds,) = run(module, s, mask=mask, dout=dout, **options)
    q, (dt,) = run(module, np.delete(s, 2, 1), dout=np.delete(dout, 2, 1), **options)
    same((np.delete(p, 2, 1), np.delete(ds, 2, 1)), (q, dt), tolerance=1e-15)


@pytest.mark.parametrize("module, options", NORMALISERS)
def test_nothing_allowed(module, options):
    s = np.array([[1.0, 2.0], [-INF, -INF], [NAN, INF]])
    p, (ds,) = run(module, s, mask=np.array([[False, False], [True, True], [False, False]]), **options)
    assert (p == 0).all() and (ds == 0).all()


@pytest.mark.parametrize("module, options", NORMALISERS)
def test_a_score_of_minus_infinity_is_as_good_as_masked(rng, module, options):
    s, mask = scores(rng), rng.random((3, 5)) < 0.6
    same(run(module, np.where(mask, s, -INF), **options), run(module, s, mask=mask, **options))


@pytest.mark.parametrize("module, options", NORMALISERS)
@pytest.mark.parametrize("kind", [float, complex])
def test_nan_is_not_hidden(module, options, kind):
    with np.errstate(invalid="ignore"):
        p, _ = module.forward(np.array([[0.5, NAN, 1.0], [0.5, 0.0, 1.0]], kind), **options)
    assert np.isnan(p[0, 1]) and np.isfinite(p[1]).all()


@pytest.mark.parametrize("module, options", NORMALISERS)
def test_no_scores_at_all(module, options):
    p, (ds,) = run(module, np.zeros((2, 0)), **options)
    assert p.shape == ds.shape == (2, 0)


@pytest.mark.parametrize("module, options", ON_THE_SIMPLEX)
def test_on_the_simplex_wherever_the_scores_are(rng, module, options):
    s = scores(rng) * 10.0 ** rng.integers(-3, 4, size=(3, 1))
    p, (ds,) = run(module, s, **options)
    assert (p >= 0).all() and np.abs(p.sum(axis=-1) - 1).max() < 1e-14
    same(ds.sum(axis=-1), np.zeros(3))
    same((p, ds), (run(module, s + 1024, **options)[0], run(module, s + 1024, **options)[1][0]), tolerance=1e-11)


# --- softmax with one more term ------------------------------------------------------------------------------


def test_one_more_is_a_zero_that_is_dropped(rng):
    s, dout = scores(rng), rng.normal(size=(3, 5))
    wide, (dwide,) = run(softmax, np.pad(s, [(0, 0), (0, 1)]), dout=np.pad(dout, [(0, 0), (0, 1)]))
    same((wide[:, :5], dwide[:, :5]), (lambda p, ds: (p, *ds))(*run(softmax_plus_one, s, dout=dout)))


def test_one_more_does_not_count_beside_large_scores(rng):
    s = scores(rng)
    same(run(softmax_plus_one, s + 100.0), run(softmax, s + 100.0))
    p, _ = softmax_plus_one.forward(s - 800.0)
    assert (p == 0).all()


# --- sparsemax and entmax ------------------------------------------------------------------------------------


def test_sparsemax_is_the_projection_onto_the_simplex(rng):
    """By its variational inequality: no point of the simplex lies on the scores' side of p."""
    s = scores(rng)
    p, _ = sparsemax.forward(s)
    others = np.vstack([np.eye(5), rng.dirichlet(np.ones(5), 200)])
    towards = np.einsum("ri,roi->ro", s - p, others - p[:, None])
    assert towards.max() <= 1e-14
    same(sparsemax.forward(p)[0], p)


@pytest.mark.parametrize("module, slope", [(sparsemax, lambda p: p), (entmax, lambda p: 2 * np.sqrt(p))])
def test_kkt_conditions(rng, module, slope):
    """s - slope(p) is one number on the support, and no score outside of it is larger; `slope` is that of -H."""
    s = scores(rng, 200, 6)
    p, _ = module.forward(s)
    price = s - slope(p)
    tau = np.where(p > 0, price, -INF).max(axis=-1, keepdims=True)
    assert np.where(p > 0, tau - price, 0).max() < 1e-14
    assert np.where(p > 0, -INF, s - tau).max() <= 1e-14
    assert 200 < (p > 0).sum() < 1200  # some of them are sparse


@pytest.mark.parametrize(
    "module, entropy",
    [(sparsemax, lambda p: (1 - p @ p) / 2), (entmax, lambda p: 4 / 3 * (p - np.maximum(p, 0) ** 1.5).sum())],
)
def test_against_a_general_optimiser(rng, module, entropy):
    s = scores(rng, 4)
    found = minimize(
        lambda p: -(p @ s + entropy(p)),
        np.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    same(found.x, module.forward(s)[0], tolerance=1e-5)


def test_two_scores(rng):
    """Sparsemax is then a straight line cut off at 0 and 1."""
    t = np.linspace(-2, 2, 33)
    p, (ds,) = run(sparsemax, np.stack([t, np.zeros(33)], 1), dout=np.stack([np.ones(33), np.zeros(33)], 1))
    same((p[:, 0], ds[:, 0]), (np.clip((t + 1) / 2, 0, 1), np.where(np.abs(t) < 1, 0.5, 0)))


def test_two_scores_of_entmax():
    """The roots of the weights are d / 2 apart, and their squares sum to 1."""
    d = np.linspace(-1.9, 1.9, 33)
    p, _ = entmax.forward(np.stack([d, np.zeros(33)], 1))
    larger = (d / 2 + np.sqrt(2 - d * d / 4)) / 2
    same(p, np.stack([larger**2, (larger - d / 2) ** 2], 1))


@pytest.mark.parametrize("module, apart", [(sparsemax, 1.0), (entmax, 2.0)])
def test_how_far_apart_scores_must_be(module, apart):
    """One weight alone from there on, exactly; and at the kink the support is the smaller one."""
    p, (ds,) = run(module, np.array([[apart, 0.0], [apart - 2.0**-10, 0.0]]))
    assert (p[0] == [1, 0]).all() and (ds[0] == 0).all()
    assert p[1, 1] > 0 and ds[1, 1] != 0


@pytest.mark.parametrize("module", [sparsemax, entmax])
def test_equal_scores_share(module):
    p, (ds,) = run(module, np.full((1, 7), 3.25))
    same(p, np.full((1, 7), 1 / 7))
    same(ds.sum(), np.zeros(()))


def test_sparser_and_sparser(rng):
    s = scores(rng, 100, 8)
    counts = [(m.forward(s)[0] > 0).sum() for m in (softmax, entmax, sparsemax)]
    assert counts[0] > counts[1] > counts[2]


def bisected(torch, s, alpha):
    """The weights of alpha-entmax by bisection, then made differentiable by one Newton step from there."""
    z = (alpha - 1) * s
    low, high = z.detach().max(-1, keepdim=True).values - 1, z.detach().max(-1, keepdim=True).values
    for _ in range(80):
        tau = (low + high) / 2
        enough = ((z.detach() - tau).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, tau, low), torch.where(enough, high, tau)
    at = (z - low).clamp(min=0)
    slope = ((at > 0) * at.detach() ** (1 / (alpha - 1) - 1)).sum(-1, keepdim=True) / (alpha - 1)
    tau = low + ((at ** (1 / (alpha - 1))).sum(-1, keepdim=True) - 1) / slope
    return (z - tau).clamp(min=0) ** (1 / (alpha - 1))


@pytest.mark.frameworks
@pytest.mark.parametrize("module, alpha", [(sparsemax, 2.0), (entmax, 1.5)])
def test_against_bisection_in_torch(rng, module, alpha):
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'refattn[torch]'")
    s, dout = scores(rng, 40, 7), rng.normal(size=(40, 7))
    p, (ds,) = run(module, s, dout=dout)
    t = torch.tensor(s, requires_grad=True)
    theirs = bisected(torch, t, alpha)
    theirs.backward(torch.tensor(dout))
    same((p, ds), (theirs.detach().numpy(), t.grad.numpy()))


# --- the k largest -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["first", "all"])
@pytest.mark.parametrize("k", [5, 6, 100])
def test_as_many_as_there_are_is_softmax(rng, ties, k):
    s, mask = scores(rng), rng.random((3, 5)) < 0.6
    same(run(top_k_softmax, s, k=k, mask=mask, ties=ties), run(softmax, s, mask=mask))


@pytest.mark.parametrize("ties", ["first", "all"])
def test_the_k_largest_are_a_mask(rng, ties):
    s, mask = scores(rng), rng.random((3, 5)) < 0.8
    kept = mask & (s >= np.sort(np.where(mask, s, -INF))[:, 2:3])
    same(run(top_k_softmax, s, k=3, mask=mask, ties=ties), run(softmax, s, mask=kept))


def test_one_of_one(rng):
    s = scores(rng)
    p, (ds,) = run(top_k_softmax, s, k=1)
    assert (p == np.eye(5)[s.argmax(axis=-1)]).all() and (ds == 0).all()


def test_ties_for_the_last_place():
    s = np.array([[1.0, 0.0, 1.0, 2.0, 1.0]])
    first, all_of_them = (top_k_softmax.forward(s, k=2, ties=ties)[0] for ties in ("first", "all"))
    assert (first > 0).tolist() == [[True, False, False, True, False]]
    assert (all_of_them > 0).tolist() == [[True, False, True, True, True]]


@pytest.mark.parametrize("ties", ["first", "all"])
def test_fewer_allowed_than_k(ties):
    """What is masked is not kept to make up the number."""
    p, _ = top_k_softmax.forward(np.zeros((1, 3)), k=2, mask=np.array([[False, False, True]]), ties=ties)
    assert (p == [[0, 0, 1]]).all()


# --- noise, and temperature ----------------------------------------------------------------------------------


def test_without_noise_and_temperature_it_is_softmax(rng):
    s, mask = scores(rng), rng.random((3, 5)) < 0.6
    same(run(gumbel_softmax, s, mask=mask), run(softmax, s, mask=mask))


def test_noise_is_added_and_temperature_divides(rng):
    s, noise, mask = scores(rng), rng.gumbel(size=(3, 5)), rng.random((3, 5)) < 0.6
    p, (ds,) = run(gumbel_softmax, s, noise=noise, temperature=0.7, mask=mask)
    q, (dt,) = run(softmax, (s + noise) / 0.7, mask=mask)
    same((p, 0.7 * ds), (q, dt))


def test_cold_is_the_largest_and_hot_is_the_mean(rng):
    s = scores(rng)
    same(gumbel_softmax.forward(s, temperature=1e-4)[0], np.eye(5)[s.argmax(axis=-1)])
    same(gumbel_softmax.forward(s, temperature=1e6)[0], np.full((3, 5), 0.2), tolerance=1e-5)


def test_the_largest_is_drawn_with_the_probabilities_of_softmax(rng):
    s = scores(rng, 4)
    p, _ = gumbel_softmax.forward(np.tile(s, (40000, 1)), noise=rng.gumbel(size=(40000, 4)), temperature=0.1)
    drawn = np.bincount(p.argmax(axis=-1), minlength=4) / 40000
    same(drawn, softmax.forward(s)[0], tolerance=0.015)  # 6 standard deviations


@pytest.mark.frameworks
def test_gumbel_softmax_in_torch(rng):
    """torch draws its own noise: the same as ours, once it is asked for before."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'refattn[torch]'")
    s, dout = scores(rng), rng.normal(size=(3, 5))
    t = torch.tensor(s, requires_grad=True)
    torch.manual_seed(0)
    noise = -torch.empty_like(t, memory_format=torch.legacy_contiguous_format).exponential_().log()
    torch.manual_seed(0)
    theirs = torch.nn.functional.gumbel_softmax(t, tau=0.7)
    theirs.backward(torch.tensor(dout))
    p, (ds,) = run(gumbel_softmax, s, noise=noise.detach().numpy(), temperature=0.7, dout=dout)
    same((p, ds), (theirs.detach().numpy(), t.grad.numpy()))


# --- sigmoid attention ---------------------------------------------------------------------------------------


def qkv(rng, lead=(2, 3), queries=3, keys=4, features=5, values=2):
    shapes = (queries, features), (keys, features), (keys, values)
    return tuple(rng.normal(size=(*lead, *shape)) for shape in shapes)


def test_the_bias_is_minus_the_logarithm_of_the_number_of_keys(rng):
    q, k, v = qkv(rng)
    y, (dq, dk, dv, none) = run(sigmoid_attention, q, k, v)
    z, (*others, dbias) = run(sigmoid_attention, q, k, v, np.full(3, -np.log(4)))
    same((y, dq, dk, dv), (z, *others))
    assert none is None and dbias.shape == (3,)


def test_equal_scores_average(rng):
    """Without scores every weight is sigmoid(-log K) = 1 / (K + 1)."""
    q, k, v = qkv(rng)
    y, _ = sigmoid_attention.forward(q, k, v, scale=0.0)
    same(y, np.broadcast_to(v.sum(axis=-2, keepdims=True) / 5, y.shape))


def test_one_key_is_softmax_plus_one(rng):
    """1 / (1 + e^-s) = e^s / (1 + e^s)."""
    q, k, v = qkv(rng, keys=1)
    y, saved = sigmoid_attention.forward(q, k, v)
    same(saved.attn, softmax_plus_one.forward(q @ k.swapaxes(-1, -2) / np.sqrt(5.0))[0])
    same(y, saved.attn * v)


def test_keys_do_not_compete(rng):
    """What two keys give together is the sum of what they give alone, gradients too."""
    (q, k, v), bias = qkv(rng), rng.normal(size=3)
    y, (dq, dk, dv, dbias) = run(sigmoid_attention, q, k, v, bias)
    parts = [run(sigmoid_attention, q, k[..., some, :], v[..., some, :], bias) for some in ([0, 2], [1, 3])]
    same((y, dq, dbias), tuple(a + b for a, b in zip(*((z, g[0], g[3]) for z, g in parts))))
    for n, g in ((1, dk), (2, dv)):
        same(g[..., [0, 2, 1, 3], :], np.concatenate([grads[n] for _, grads in parts], axis=-2))


def test_a_very_negative_bias_is_an_unnormalised_softmax(rng):
    (q, k, v), far = qkv(rng), -40.0
    y, _ = sigmoid_attention.forward(q, k, v, np.full(3, far))
    total = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(5.0)).sum(axis=-1, keepdims=True)
    same(y * np.exp(-far) / total, scaled_dot_product.forward(q, k, v)[0])


def test_sigmoid_attention_masks(rng):
    (q, k, v), bias, mask = qkv(rng), rng.normal(size=3), rng.random((2, 3, 3, 4)) < 0.6
    mask[:, :, 1], mask[..., 2] = False, False
    y, (dq, dk, dv, dbias) = run(sigmoid_attention, q, k, v, bias, mask=mask)
    assert (y[..., 1, :] == 0).all() and (dq[..., 1, :] == 0).all()
    assert (dk[..., 2, :] == 0).all() and (dv[..., 2, :] == 0).all()
    fewer = [np.delete(x, 2, axis=-2) for x in (k, v)]
    z, others = run(sigmoid_attention, q, *fewer, bias, mask=np.delete(mask, 2, axis=-1))
    same((y, dq, np.delete(dk, 2, -2), np.delete(dv, 2, -2), dbias), (z, *others))
    k[..., 2, :] = NAN
    same(sigmoid_attention.forward(q, k, v, bias, mask=mask)[0], y)


def test_causal_sigmoid_attention_is_masked(rng):
    q, k, v = qkv(rng, queries=5, keys=4)
    lower = np.broadcast_to(np.tri(5, 4, dtype=bool), (2, 3, 5, 4))
    one, other = run(sigmoid_attention, q, k, v, is_causal=True), run(sigmoid_attention, q, k, v, mask=lower)
    same((one[0], *one[1][:3]), (other[0], *other[1][:3]))


@pytest.mark.frameworks
def test_sigmoid_attention_in_torch(rng):
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'refattn[torch]'")
    args, mask = (*qkv(rng), rng.normal(size=3)), rng.random((2, 3, 3, 4)) < 0.6
    dout = rng.normal(size=(2, 3, 3, 2))
    y, grads = run(sigmoid_attention, *args, mask=mask, scale=0.7, dout=dout)
    q, k, v, bias = tensors = [torch.tensor(x, requires_grad=True) for x in args]
    scores = 0.7 * torch.einsum("bhid,bhjd->bhij", q, k) + bias[:, None, None]
    theirs = torch.sigmoid(scores.masked_fill(~torch.tensor(mask), -INF)) @ v
    theirs.backward(torch.tensor(dout))
    same((y, *grads), (theirs.detach().numpy(), *(t.grad.numpy() for t in tensors)))


# --- attention with any of them ------------------------------------------------------------------------------


def test_with_softmax_it_is_scaled_dot_product_attention(rng):
    (q, k, v), mask = qkv(rng), rng.random((2, 3, 3, 4)) < 0.6
    for options in ({}, {"mask": mask}, {"is_causal": True, "scale": 0.3}):
        same(run(normalised_attention, q, k, v, **options), run(scaled_dot_product, q, k, v, **options))


@pytest.mark.parametrize("module, options", NORMALISERS)
def test_it_is_scores_then_normaliser_then_sum(rng, module, options):
    (q, k, v), mask = qkv(rng), rng.random((2, 3, 3, 4)) < 0.6
    name, dout = module.__name__.rpartition(".")[2], rng.normal(size=(2, 3, 3, 2))
    y, (dq, dk, dv) = run(normalised_attention, q, k, v, normaliser=name, options=options, mask=mask, dout=dout)
    p, (ds,) = run(module, q @ k.swapaxes(-1, -2) / np.sqrt(5.0), dout=dout @ v.swapaxes(-1, -2), mask=mask, **options)
    same(y, p @ v)
    same((np.sqrt(5.0) * dq, np.sqrt(5.0) * dk), (ds @ k, ds.swapaxes(-1, -2) @ q))
    same(dv, p.swapaxes(-1, -2) @ dout)


@pytest.mark.parametrize("module, options", NORMALISERS)
def test_the_order_of_keys_does_not_matter(rng, module, options):
    (q, k, v), order = qkv(rng, keys=5), rng.permutation(5)
    chosen = {"normaliser": module.__name__.rpartition(".")[2], "options": options}
    y, (dq, dk, dv) = run(normalised_attention, q, k, v, **chosen)
    z, (eq, ek, ev) = run(normalised_attention, q, k[..., order, :], v[..., order, :], **chosen)
    same((y, dq, dk[..., order, :], dv[..., order, :]), (z, eq, ek, ev))


def test_a_sink_is_a_key_of_zeros_with_a_value_of_zeros(rng):
    q, k, v = qkv(rng)
    y, (dq, dk, dv) = run(normalised_attention, q, k, v, normaliser="softmax_plus_one")
    wide = [np.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)]) for x in (k, v)]
    z, (eq, ek, ev) = run(scaled_dot_product, q, *wide)
    same((y, dq, dk, dv), (z, eq, ek[..., :4, :], ev[..., :4, :]))


@pytest.mark.parametrize("name", normalised_attention.NORMALISERS)
def test_a_temperature_divides_the_scale(rng, name):
    q, k, v = qkv(rng)
    chosen = {"normaliser": name, "options": {"k": 2} if name == "top_k_softmax" else None}
    y, (dq, *rest) = run(normalised_attention, q, k, v, scale=0.5 / 0.7, **chosen)
    z, (eq, ek, ev) = run(normalised_attention, q / 0.7, k, v, scale=0.5, **chosen)
    same((y, dq, *rest), (z, eq / 0.7, ek, ev))


def test_noise_is_added_to_the_scores(rng):
    (q, k, v), noise = qkv(rng), rng.gumbel(size=(2, 3, 3, 4))
    chosen = {"normaliser": "gumbel_softmax", "options": {"noise": noise, "temperature": 0.7}}
    y, (dq, *_) = run(normalised_attention, q, k, v, **chosen)
    p, _ = softmax.forward((q @ k.swapaxes(-1, -2) / np.sqrt(5.0) + noise) / 0.7)
    same(y, p @ v)
    v_of_q = complex_step(lambda x: normalised_attention.forward(x, k, v, **chosen)[0], (q,), (np.ones_like(q),))
    assert abs(inner(dq, np.ones_like(q)) - inner(np.cos(1.0 + np.arange(36)).reshape(y.shape), v_of_q)) < 1e-12


@pytest.mark.frameworks
@pytest.mark.parametrize("name, alpha", [("sparsemax", 2.0), ("entmax", 1.5)])
def test_sparse_attention_in_torch(rng, name, alpha):
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'refattn[torch]'")
    args, dout = qkv(rng, keys=6), rng.normal(size=(2, 3, 3, 2))
    y, grads = run(normalised_attention, *args, normaliser=name, dout=dout)
    q, k, v = tensors = [torch.tensor(x, requires_grad=True) for x in args]
    theirs = bisected(torch, q @ k.transpose(-1, -2) / 5**0.5, alpha) @ v
    theirs.backward(torch.tensor(dout))
    same((y, *grads), (theirs.detach().numpy(), *(t.grad.numpy() for t in tensors)))


@pytest.mark.frameworks
def test_top_k_attention_in_torch(rng):
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'refattn[torch]'")
    args, dout = qkv(rng, keys=6), rng.normal(size=(2, 3, 3, 2))
    y, grads = run(normalised_attention, *args, normaliser="top_k_softmax", options={"k": 2}, dout=dout)
    q, k, v = tensors = [torch.tensor(x, requires_grad=True) for x in args]
    best = (q @ k.transpose(-1, -2) / 5**0.5).topk(2)
    chosen = v[..., None, :, :].expand(2, 3, 3, 6, 2).take_along_dim(best.indices[..., None], -2)
    theirs = (best.values.softmax(-1)[..., None] * chosen).sum(-2)
    theirs.backward(torch.tensor(dout))
    same((y, *grads), (theirs.detach().numpy(), *(t.grad.numpy() for t in tensors)))
