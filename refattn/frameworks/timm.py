"""timm's layers, on the CPU, with torch's autograd. Modules get their weights from the call."""

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from refattn.attention.channel import cbam_channel, selective_kernel
from refattn.attention.dot_product import attention_pool, differential, latent_pool, multi_head, qk_norm
from refattn.attention.mixed import cbam
from refattn.attention.spatial import cbam_spatial, non_local
from refattn.core import Call, tree_map
from refattn.frameworks import Target
from refattn.frameworks.torch import EVERY_DTYPE, LOW, SUMS, Given, departs, refuse_convolution, run  # noqa: F401
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT32
from refattn.oracle.contract import NotHandled
from refattn.primitives import batch_norm, feed_forward, layer_norm, linear

VERSION = importlib.metadata.version("timm")


def _layers():
    """timm.layers. The whole of timm needs torchvision, but its layers need one class of it, to tell types apart.

    Where torchvision is missing, an empty package stands in for timm while its layers are imported, and an empty
    class for that one.
    """
    try:
        return importlib.import_module("timm.layers")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("torchvision"):
            raise
    names = "torchvision", "torchvision.ops", "torchvision.ops.misc"
    stand_in = {name: ModuleType(name) for name in (*names, "timm")}
    stand_in["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    spec = importlib.util.find_spec("timm")
    stand_in["timm"].__spec__, stand_in["timm"].__path__ = spec, spec.submodule_search_locations
    sys.modules.update(stand_in)
    try:
        return importlib.import_module("timm.layers")
    finally:
        for name in names:
            del sys.modules[name]


layers = _layers()


# --- gates of channels and pixels -----------------------------------------------------------------------------


def squeeze_excitation(x, params):
    module = layers.SEModule(x.shape[1], rd_channels=len(params.w1), bias=params.b1 is not None)
    return _call(module, _mlp(params), x)


def efficient_channel(x, params, *, circular):
    if circular or len(params.weight) > 1 or params.bias is not None:
        raise NotHandled("a ring, filters of their own, a bias")
    module = layers.EcaModule(kernel_size=params.weight.shape[1])
    return _call(module, {"conv.weight": params.weight[:, None]}, x)


def circular_channel(x, params, *, circular):
    """An activation layer is how to ask for a bias."""
    kernel = params.weight.shape[1]
    if not circular or len(params.weight) > 1 or kernel // 2 > x.shape[1]:
        raise NotHandled("no ring, filters of their own, or more taps than twice around")
    module = layers.CecaModule(kernel_size=kernel, act_layer=None if params.bias is None else nn.ReLU)
    return _call(module, {"conv.weight": params.weight[:, None], "conv.bias": params.bias}, x)


def channel_attention(x, params):
    _refuse_ties(x, (2, 3))
    module = layers.cbam.ChannelAttn(x.shape[1], rd_channels=len(params.w1), mlp_bias=params.b1 is not None)
    return _call(module, _mlp(params), x)


def spatial_attention(x, params, *, maps, stats):
    if maps != ("avg", "max") or params.norm is None:
        raise NotHandled("the maximum first" if params.norm else "no normalisation")
    _refuse_ties(x, 1)
    module = layers.cbam.SpatialAttn(params.weight.shape[-1])
    return _call(module, _spatial("conv", params, stats), x, training=stats is None)


def cbam_module(x, params, *, maps, stats):
    if maps != ("avg", "max") or params.spatial is None or params.spatial.norm is None:
        raise NotHandled("the maximum first, no gate of pixels, or no normalisation")
    _refuse_ties(x, (2, 3))
    channel = params.channel
    size = {"rd_channels": len(channel.w1), "spatial_kernel_size": params.spatial.weight.shape[-1]}
    module = layers.cbam.CbamModule(x.shape[1], mlp_bias=channel.b1 is not None, **size)
    weights = {f"channel.{name}": w for name, w in _mlp(channel).items()}
    return _call(module, weights | _spatial("spatial.conv", params.spatial, stats), x, training=stats is None)


def channel_example(draw):
    return cbam_channel.example(draw)._replace(options={})


def spatial_example(draw):
    """timm's order of maps."""
    call = cbam_spatial.example(draw)
    return call._replace(options=call.options | {"maps": ("avg", "max")})


def cbam_example(draw):
    call = cbam.example(draw)
    return call._replace(options={"maps": ("avg", "max"), "stats": call.options.get("stats")})


def _mlp(params):
    of_pixels = {"fc1.weight": params.w1[..., None, None], "fc2.weight": params.w2[..., None, None]}
    return of_pixels | {"fc1.bias": params.b1, "fc2.bias": params.b2}


def _spatial(name, params, stats):
    return {f"{name}.conv.weight": params.weight} | _norm(f"{name}.bn", params.norm, stats)


def _norm(name, params, stats):
    weights = {f"{name}.weight": params.gamma, f"{name}.bias": params.beta}
    return weights if stats is None else weights | _stats(name, stats)


def _stats(name, stats):
    return {f"{name}.running_mean": stats.mean, f"{name}.running_var": stats.var}


def _refuse_ties(x, axes):
    if ((x == x.amax(axes, keepdim=True)).sum(axes) > 1).any():
        raise NotHandled("several maxima: amax divides the gradient between them")


# --- kernels that are selected --------------------------------------------------------------------------------


def selective_kernels(x, params, *, stride, dilations, groups, split_input, stats, eps):
    """Kernels of 5 and more are of 3, dilated."""
    for branch, dilation in zip(params.branches, dilations):
        refuse_convolution(x, branch.conv.weight, stride, (stride - 1 + 2 * dilation) // 2, dilation)
    sizes = [2 * dilation + 1 for dilation in dilations]
    module = layers.SelectiveKernel(
        x.shape[1],
        len(params.branches[0].conv.weight),
        sizes,
        stride,
        groups=groups,
        rd_channels=len(params.squeeze.conv.weight),
        split_input=split_input,
    )
    weights = {
        "attn.fc_reduce.weight": params.squeeze.conv.weight[..., None, None],
        "attn.fc_select.weight": params.select.weight[..., None, None],
    } | _norm("attn.bn", params.squeeze.norm, stats and stats.squeeze)
    for i, branch in enumerate(params.branches):
        weights[f"paths.{i}.conv.weight"] = branch.conv.weight
        weights |= _norm(f"paths.{i}.bn", branch.norm, stats and stats.branches[i])
    return _call(module, weights, x, training=stats is None, eps=eps)


def selective_example(draw):
    """Kernels of 3, and no bias."""
    count, groups, split = draw.choice("M", 2, 3), draw.choice("groups", 1, 2), draw.choice("split", False, True)
    inputs = groups * draw.size("I / groups", high=2) * (count if split else 1)
    outputs = groups * draw.size("C / groups", high=2)
    shape = {"reduction": 1, "least": 2, "split_input": split}
    params = selective_kernel.init(draw.rng, inputs, outputs, (3,) * count, groups, **shape)
    training = draw.choice("training", True, False)
    options = {"stride": draw.choice("stride", 1, 2), "groups": groups, "split_input": split}
    options["dilations"] = tuple(draw.size(f"dilation {m}", high=3) for m in range(count))
    options["stats"] = None if training else _selective_stats(draw, params)
    options["eps"] = 0.1 if training else 1e-5
    x = draw.array(draw.size("N", low=3 if training else 1), inputs, draw.size("H", high=3), draw.size("W", high=3))
    return Call((x, _positive(draw, params)), options)


def _selective_stats(draw, params):
    branches = tuple(batch_norm.example_stats(draw, len(branch.norm.gamma)) for branch in params.branches)
    return selective_kernel.Stats(branches, batch_norm.example_stats(draw, len(params.squeeze.norm.gamma)))


def _positive(draw, params):
    """Never 0, where a ReLU has its kink."""
    return tree_map(lambda p: p / 4 + 33 / 128, draw.like(params))


def split_attention_module(x, params, *, radix, stride, padding, dilation, stats, eps):
    refuse_convolution(x, params.conv.weight, stride, padding, dilation)
    channels = len(params.conv.weight) // radix
    groups = channels // params.fc1.weight.shape[1]
    module = layers.SplitAttn(
        x.shape[1],
        channels,
        params.conv.weight.shape[-1],
        stride,
        padding,
        dilation,
        groups,
        bias=params.conv.bias is not None,
        radix=radix,
        rd_channels=groups,
        norm_layer=None if params.norm0 is None else nn.BatchNorm2d,
    )
    if params.norm1 is not None:  # of any number of hidden units
        module.bn1 = nn.BatchNorm2d(len(params.fc1.weight))
    weights = {"conv.weight": params.conv.weight, "conv.bias": params.conv.bias}
    for name, part in (("fc1", params.fc1), ("fc2", params.fc2)):
        weights |= {f"{name}.weight": part.weight[..., None, None], f"{name}.bias": part.bias}
    if params.norm0 is not None:
        weights |= _norm("bn0", params.norm0, stats and stats.norm0) | _norm("bn1", params.norm1, stats and stats.norm1)
    return _call(module, weights, x, training=stats is None, eps=eps)


# --- attention ------------------------------------------------------------------------------------------------


def non_local_module(x, params, *, pool, scale, stats, eps):
    assert pool is None
    reduced, channels = params.theta.weight.shape
    words = "scores divided by the root of the channels that come in, not of those that are compared"
    departs(scale and reduced != channels, "timm-non-local-scale", words)
    module = layers.NonLocalAttn(channels, use_scale=scale, rd_channels=reduced)
    weights = _norm("norm", params.norm, stats)
    for name, part in (("t", params.theta), ("p", params.phi), ("g", params.g), ("z", params.out)):
        weights |= {f"{name}.weight": part.weight[..., None, None], f"{name}.bias": part.bias}
    return _call(module, weights, x, training=stats is None, eps=eps)


def non_local_example(draw):
    """Images, the embedded Gaussian without pooling, and a normalisation."""
    channels, training = draw.size("C", high=3), draw.choice("training", True, False)
    reduced = draw.choice("K", channels, draw.size("fewer", high=3))
    params = non_local.init(draw.rng, channels, reduced, bias=draw.choice("bias", True, False), norm=True)
    x = draw.array(draw.size("N", low=2, high=3), channels, draw.size("H", high=3), draw.size("W", high=3))
    options = {"pool": None, "scale": draw.choice("scale", True, False), "eps": draw.choice("eps", 0.01, 0.5)}
    options["stats"] = None if training else batch_norm.example_stats(draw, channels)
    return Call((x, tree_map(lambda p: p / 4 + 1 / 128, draw.like(params))), options)


def attention_pool_2d(x, params, *, heads):
    q, k, v, out = params.attention[:4]
    departs(q.bias is None, "timm-attention-pool-bias", "a module that cannot be made without biases")
    module = layers.AttentionPool2d(
        x.shape[1],
        tuple(x.shape[2:]),
        len(out.weight),
        len(q.weight),
        num_heads=heads,
        qkv_bias=q.bias is not None,
        qkv_separate=True,
    )
    weights = {f"{name}.{part}": w for name, p in zip("qkv", (q, k, v)) for part, w in p._asdict().items()}
    position = x.new_zeros(x.shape[2] * x.shape[3] + 1, x.shape[1]) if params.position is None else params.position
    weights |= {"proj.weight": out.weight, "proj.bias": out.bias, "pos_embed": position}
    return _call(module, weights, x)


def attention_pool_example(draw):
    """As many features of values as of keys."""
    heads, bias = draw.choice("heads", 1, 2), draw.choice("bias", True, False)
    n, c, h, w = draw.size("N", high=2), draw.size("C"), draw.size("H", high=3), draw.size("W", high=3)
    width = heads * draw.size("P / heads", high=3)
    sizes = *(3 * ((c, width),)), (width, draw.size("O"))
    attention = multi_head.Params(*(linear.init(draw.rng, *size, bias) for size in sizes))
    params = attention_pool.Params(attention, torch.zeros(h * w + 1, c).numpy())
    return Call((draw.array(n, c, h, w), draw.like(params)), {"heads": heads})


def attention_pool_latent(x, params, *, heads, key_mask, activation, eps):
    (q, k, v, out), (latents, width) = params.attention[:4], params.latents.shape
    act = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": _GeluTanh}[activation]
    module = layers.AttentionPoolLatent(
        x.shape[-1],
        len(out.weight),
        num_heads=heads,
        mlp_ratio=(len(params.mlp.linear1.weight) + 0.5) / len(out.weight),
        qkv_bias=q.bias is not None,
        latent_len=latents,
        latent_dim=width,
        pool_type="",
        norm_layer=functools.partial(nn.LayerNorm, eps=eps),
        act_layer=act,
    )
    joined = {"kv.bias": None if k.bias is None else torch.cat([k.bias, v.bias])}
    weights = {"latent": params.latents[None], "kv.weight": torch.cat([k.weight, v.weight])} | joined
    parts = {"q": q, "proj": out, "mlp.fc1": params.mlp.linear1, "mlp.fc2": params.mlp.linear2}
    weights |= {f"{name}.{part}": w for name, p in parts.items() for part, w in p._asdict().items()}
    weights |= {"norm.weight": params.norm.gamma, "norm.bias": params.norm.beta}
    return _call(module, weights, x, None if key_mask is None else key_mask[:, None, None])


def latent_pool_example(draw):
    """As many features compared and passed on as come in; with the MLP, and weights in its normalisation."""
    heads, b, tokens = draw.choice("heads", 1, 2), draw.size("B", high=2), draw.size("T", high=3)
    features, width, out = heads * draw.size("C / heads", high=3), draw.size("D", high=3), draw.size("O", high=3)
    bias = draw.choice("bias", True, False)
    sizes = (width, features), (features, features), (features, features), (features, out)
    params = latent_pool.Params(
        torch.zeros(draw.size("L", high=3), width).numpy(),
        multi_head.Params(*(linear.init(draw.rng, *size, bias) for size in sizes)),
        layer_norm.init(draw.rng, out),
        feed_forward.init(draw.rng, out, draw.size("M", high=3), bias=bias),
    )
    options = {"heads": heads, "activation": draw.choice("activation", "gelu_tanh", "gelu", "relu")}
    options["key_mask"] = draw.mask(b, tokens) if draw.choice("padded", False, True) else None
    options["eps"] = draw.choice("eps", 0.01, 0.5)
    return Call((draw.array(b, tokens, features), draw.like(params)), options)


def attention(q, k, v, params, *, heads, mask, key_mask, is_causal):
    """What stands for its projection gives those of queries, keys and values apart."""
    projected = [F.linear(x, *part) for x, part in zip((q, k, v), params)]
    module = layers.Attention(q.shape[-1], heads, projected[0].shape[-1] // heads, len(params.out.weight))
    module.qkv = Given(torch.cat(projected, -1))
    allowed, masks = None, {}
    if mask is not None or key_mask is not None:
        allowed = torch.ones(1, 1, q.shape[1], q.shape[1], dtype=torch.bool)
        allowed = allowed.tril() if is_causal else allowed
        allowed = allowed if mask is None else allowed & mask
        masks["attn_mask"] = allowed if key_mask is None else allowed & key_mask[:, None, None]
    elif is_causal:
        masks["is_causal"] = True
    weights = {"proj.weight": params.out.weight, "proj.bias": params.out.bias}
    return _call(module, weights, q, **masks)


def attention_example(draw):
    """As many queries as keys."""
    heads, b, length, bias = draw.choice("heads", 1, 2, 3), draw.size("B"), draw.size("T"), draw.choice("bias", 1, 0)
    width, e, f, g, o = heads * draw.size("D", high=3), *(draw.size(name, high=3) for name in "EFGO")
    sizes = (e, width), (f, width), (g, width), (width, o)
    params = multi_head.Params(*(linear.init(draw.rng, *size, bool(bias)) for size in sizes))
    options = {
        "heads": heads,
        "mask": draw.mask(b, heads, length, length) if draw.choice("masked", False, True) else None,
        "key_mask": draw.mask(b, length) if draw.choice("padded", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
    }
    return Call((*(draw.array(b, length, size) for size in (e, f, g)), draw.like(params)), options)


def attention_qk_norm(q, k, v, params, *, norm, mask, is_causal, eps):
    kind = {"rms": layers.RmsNorm, "layer": nn.LayerNorm}[norm]
    heads, length = q.shape[1], q.shape[2]
    module = layers.Attention(heads * q.shape[-1], heads, qk_norm=True, norm_layer=functools.partial(kind, eps=eps))
    module.qkv = Given(torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1))
    module.proj = nn.Identity()
    masks = {"is_causal": is_causal}
    if mask is not None:
        masks = {"attn_mask": mask.tril() if is_causal else mask}
    weights = {"q_norm.weight": params.q.gamma, "k_norm.weight": params.k.gamma}
    if norm == "layer":
        weights |= {"q_norm.bias": params.q.beta, "k_norm.bias": params.k.beta}
    y = _call(module, weights, q.new_empty(len(q), length, heads * q.shape[-1]), **masks)
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def qk_norm_example(draw):
    """As many queries as keys and features in a value as in a key; nothing is turned or scaled."""
    norm, b, heads = draw.choice("norm", "rms", "layer"), draw.size("B", high=2), draw.size("H", high=2)
    length, features = draw.size("T"), draw.size("D", low=2)
    params = draw.like(qk_norm.init(draw.rng, features, heads, beta=norm == "layer"))
    options = {
        "norm": norm,
        "mask": draw.mask(b, heads, length, length) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
        "eps": draw.choice("eps", 0.01, 0.5),
    }
    return Call((*(draw.array(b, heads, length, features) for _ in "qkv"), params._replace(logit_scale=None)), options)


def differential_attention(q, k, v, params, *, lambda_init, mask, is_causal, eps):
    b, heads, _, length, features = q.shape
    module = layers.DiffAttention(2 * heads * features, heads)
    joined = [x.flatten(1, 2) if x.ndim == 5 else x for x in (q, k, v)]
    module.qkv = Given(torch.cat([x.transpose(1, 2).flatten(2) for x in joined], -1))
    module.proj, module.lambda_init, module.sub_norm.eps = nn.Identity(), lambda_init, eps
    masks = {"is_causal": is_causal}
    if mask is not None:
        masks = {"attn_mask": mask.tril() if is_causal else mask}
    weights = {name: w for name, w in params._asdict().items() if name != "norm"}
    weights["sub_norm.weight"] = params.norm.gamma
    y = _call(module, weights, q.new_empty(b, length, 2 * heads * features), **masks)
    return y.unflatten(-1, (heads, -1)).transpose(1, 2)


def differential_example(draw):
    """As many queries as keys, and values twice as wide."""
    b, heads, length = draw.size("B", high=2), draw.size("H", high=2), draw.size("T", high=3)
    features = draw.size("D", high=3)
    params = draw.like(differential.init(draw.rng, draw.size("L", high=3), value_features=2 * features))
    options = {
        "lambda_init": draw.choice("lambda_init", 0.2, 0.8, 0.0),
        "mask": draw.mask(b, heads, length, length) if draw.choice("masked", False, True) else None,
        "is_causal": draw.choice("is_causal", False, True),
        "eps": draw.choice("eps", 0.01, 0.5),
    }
    q, k = (draw.array(b, heads, 2, length, features) for _ in "qk")
    v = draw.array(b, heads, length, 2 * features)
    return Call((q, k, v, differential.Params(*(p / 4 for p in params[:4]), params.norm)), options)


def swin_bias(table, *, window):
    window = (window, window) if isinstance(window, int) else tuple(window)
    module = layers.RelPosBias(window, table.shape[1])
    scores = table.new_zeros(1, table.shape[1], *2 * (window[0] * window[1],))
    return _call(module, {"relative_position_bias_table": table}, scores)[0]


def rotary(x, cos, sin, *, pairing):
    if pairing == "interleaved_to_half" or x.shape[-1] != 2 * cos.shape[-1]:
        raise NotHandled("other pairs" if pairing == "interleaved_to_half" else "features that are not turned")
    half = pairing == "half"
    twice = [torch.cat([t, t], -1) if half else t.repeat_interleave(2, -1) for t in (sin, cos)]
    return layers.apply_rot_embed(x, *(t if x.ndim == 3 else t[:, None] for t in twice), half=half)


# --- smaller parts --------------------------------------------------------------------------------------------


def mlp(x, params, *, activation):
    act = {"relu": nn.ReLU, "gelu": nn.GELU, "gelu_tanh": _GeluTanh}[activation]
    (w1, b1), (w2, b2) = params
    module = layers.Mlp(x.shape[-1], len(w1), len(w2), act, bias=b1 is not None)
    return _call(module, {"fc1.weight": w1, "fc1.bias": b1, "fc2.weight": w2, "fc2.bias": b2}, x)


def rms_norm(x, params=None, *, eps):
    module = layers.RmsNorm(x.shape[-1], eps, affine=params is not None)
    return _call(module, {} if params is None else {"weight": params.gamma}, x)


def layer_norm_2d(x, params=None, *, axes, eps):
    if x.ndim != 4 or axes != 1:
        raise NotHandled("what is no image, normalised by its channels")
    module = layers.LayerNorm2d(x.shape[-1], eps, affine=params is not None)
    weights = {} if params is None else {"weight": params.gamma, "bias": params.beta}
    return _call(module, weights, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def layer_norm_example(draw):
    n, h, w, channels = (draw.size(name, high=3) for name in ("N", "H", "W", "C"))
    params = draw.like(layer_norm.init(draw.rng, channels)) if draw.choice("affine", True, False) else None
    return Call((draw.array(n, h, w, channels), params), {"axes": 1, "eps": draw.choice("eps", 0.01, 0.5)})


def group_norm(x, params=None, *, groups, eps):
    if groups > 1 or x[:1].numel() == 1:
        raise NotHandled("several groups" if groups > 1 else "groups of one number")
    module = layers.GroupNorm1(x.shape[1], eps=eps, affine=params is not None)
    return _call(module, {} if params is None else {"weight": params.gamma, "bias": params.beta}, x)


def _call(module, weights, *args, training=False, eps=None, **options):
    """With these weights, and 0 for biases that are None; `eps` is that of batch normalisations."""
    for part in list(module.modules()):
        if isinstance(getattr(part, "gate", None), nn.Module):
            part.gate = _Watched(part.gate)
    module = module.to(args[0].dtype).train(training)
    if eps is not None:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps = eps
    given = {name: torch.zeros_like(w) for name, w in module.named_parameters() if name.endswith("bias")}
    given |= {name: w for name, w in weights.items() if w is not None}
    return functional_call(module, given, args, options)


class _Watched(nn.Module):
    """A gate, and a refusal where its gradient is made of what was rounded."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        y = self.gate(x)
        words = "a gradient of the sigmoid from what was rounded to 16 bits, and is nearly 1"
        departs(y.dtype in LOW and (y > 0.95).any(), "torch-tanh-gradient", words)
        return y


class _GeluTanh(nn.GELU):
    """The same, and a refusal where its digits cancel."""

    def __init__(self):
        super().__init__(approximate="tanh")

    def forward(self, x):
        departs((x < -2).any(), "torch-gelu-tanh", "GELU by tanh below -2: in 1 + tanh the digits cancel")
        return super().forward(x)


# --- what it promises -----------------------------------------------------------------------------------------

# The gradient of a gate is a sum over pixels of products that are all stored before they are added, and that of weights
# that are used twice, for the mean and the maximum, one of two that are.
GATES = SUMS
# The vectors that make lambda are multiplied in float32.
WIDE = {"float64": ARITHMETICS["float64"]._replace(name="float64, lambda in float32", softmax=FLOAT32)}


def _target(*row, **options):
    return Target(*row, **{"dtypes": EVERY_DTYPE} | options)


TARGETS = (
    _target("SEModule", "squeeze_excitation", squeeze_excitation, arithmetic=GATES),
    _target("EcaModule", "efficient_channel", efficient_channel, arithmetic=GATES),
    _target("CecaModule", "efficient_channel", circular_channel, arithmetic=GATES),
    _target("cbam.ChannelAttn", "cbam_channel", channel_attention, channel_example, arithmetic=GATES),
    _target("cbam.SpatialAttn", "cbam_spatial", spatial_attention, spatial_example, arithmetic=GATES),
    _target("cbam.CbamModule", "cbam", cbam_module, cbam_example, arithmetic=GATES),
    _target("SelectiveKernel", "selective_kernel", selective_kernels, selective_example, arithmetic=GATES),
    _target("SplitAttn", "split_attention", split_attention_module, arithmetic=GATES),
    _target("NonLocalAttn", "non_local", non_local_module, non_local_example),
    _target("AttentionPool2d", "attention_pool", attention_pool_2d, attention_pool_example),
    _target("AttentionPoolLatent", "latent_pool", attention_pool_latent, latent_pool_example, arithmetic=SUMS),
    _target("Attention", "multi_head", attention, attention_example),
    _target("Attention, qk_norm", "qk_norm", attention_qk_norm, qk_norm_example, arithmetic=SUMS),
    _target("DiffAttention", "differential", differential_attention, differential_example, arithmetic=WIDE),
    _target("RelPosBias", "swin_bias", swin_bias, arithmetic=SUMS),
    _target("apply_rot_embed", "rotary", rotary),
    _target("Mlp", "feed_forward", mlp),
    _target("RmsNorm", "rms_norm", rms_norm),
    _target("LayerNorm2d", "layer_norm", layer_norm_2d, layer_norm_example, arithmetic=SUMS),
    _target("GroupNorm1", "group_norm", group_norm),
)
