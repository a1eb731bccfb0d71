"""PFANet: the authors' Keras 2 code; arrays are NHWC, kernels (h, w, in, out), dense kernels (in, out)."""

from refattn.attention.channel import squeeze_excitation
from refattn.attention.spatial import context_feature_extraction, pyramid_channel, pyramid_feature, pyramid_spatial
from refattn.primitives import batch_norm, conv, conv_norm_relu
from tests.golden import Case

SPATIAL = {  # chain and part -> the end of the official name of its convolution, and of its normalisation
    ("wide_tall", "first"): ("_1_conv1", "attention1_1_BN"),
    ("wide_tall", "second"): ("_1_conv2", "attention1_2_BN"),
    ("tall_wide", "first"): ("_2_conv1", "attention2_1_BN"),
    ("tall_wide", "second"): ("_2_conv2", "attention2_2_BN"),
}


def case(record):
    builders = {"CFE": _context, "ChannelWiseAttention": _channel, "SpatialAttention": _spatial}
    return builders.get(record.meta["cls"], _head)(record)  # the class of the head is "VGG16() statements after C5=x"


def _image(x):
    return x.transpose(0, 3, 1, 2)


def _out(get):
    return _image(get("out.y"))


def _conv_params(get, name):
    return conv.Params(get(f"param.{name}/kernel").transpose(3, 2, 0, 1), get(f"param.{name}/bias", optional=True))


def _norm_params(get, name):
    return batch_norm.Params(get(f"param.{name}/gamma"), get(f"param.{name}/beta"))


def _after(record, norms):
    """The moving averages after the call; `norms` finds in Saved what the normalisation of this name saved."""

    def after(saved):
        values = {}
        for name, normed in norms(saved).items():
            before = batch_norm.Stats(record[f"buf.{name}/moving_mean"], record[f"buf.{name}/moving_variance"])
            stats = batch_norm.running(before, normed, momentum=0.01, unbiased=False)
            values |= {f"{name}/moving_mean": stats.mean, f"{name}/moving_variance": stats.var}
        return values

    return after


def _context_params(get, name):
    branches = ("cfe0", "cfe1_dilation", "cfe2_dilation", "cfe3_dilation")
    return context_feature_extraction.Params(
        tuple(_conv_params(get, f"{name}_{branch}") for branch in branches), _norm_params(get, f"{name}_BN")
    )


def _context(record):
    return Case(
        context_feature_extraction,
        lambda get: (_image(get("in.x")), _context_params(get, "cfe")),
        _out,
        {"dilations": (1, *record.ctor["rates"])},
        _after(record, lambda saved: {"cfe_BN": saved.norm}),
    )


def _channel_params(get):
    w1, w2 = get("param.dense/kernel").T, get("param.dense_1/kernel").T
    return squeeze_excitation.Params(w1=w1, b1=get("param.dense/bias"), w2=w2, b2=get("param.dense_1/bias"))


def _channel(record):
    return Case(pyramid_channel, lambda get: (_image(get("in.x")), _channel_params(get)), _out)


def _spatial_params(get, name):
    def unit(chain, part):
        ending, norm = SPATIAL[chain, part]
        return conv_norm_relu.Params(_conv_params(get, name + ending), _norm_params(get, norm))

    return pyramid_spatial.Params(
        *(pyramid_spatial.Chain(unit(chain, "first"), unit(chain, "second")) for chain in ("wide_tall", "tall_wide"))
    )


def _spatial_norms(saved):
    chains = {"wide_tall": saved.wide_tall, "tall_wide": saved.tall_wide}
    return {
        norm: chains[chain].first.norm if part == "first" else chains[chain].norm
        for (chain, part), (_, norm) in SPATIAL.items()
    }


def _spatial(record):
    return Case(
        pyramid_spatial,
        lambda get: (_image(get("in.x")), _spatial_params(get, "sa")),
        _out,
        after=_after(record, _spatial_norms),
    )


BLOCKS = {  # field of Params -> the official names of its convolution and of its normalisation
    "high": ("C345_conv", "C345_BN"),
    "low1": ("C1_conv", "C1_BN_BN"),
    "low2": ("C2_conv", "C2_BN_BN"),
    "low": ("C12_conv", "C12_BN"),
}
CONTEXTS = {"context3": "C3_cfe", "context4": "C4_cfe", "context5": "C5_cfe"}


def _head(record):
    def args(get):
        blocks = {
            field: conv_norm_relu.Params(_conv_params(get, convolution), _norm_params(get, norm))
            for field, (convolution, norm) in BLOCKS.items()
        }
        params = pyramid_feature.Params(
            **{field: _context_params(get, name) for field, name in CONTEXTS.items()},
            channel=_channel_params(get),
            spatial=_spatial_params(get, "spatial_attention"),
            out=_conv_params(get, "sa"),
            **blocks,
        )
        return *(_image(get(f"in.C{i}")) for i in range(1, 6)), params

    def norms(saved):
        blocks = {norm: getattr(saved, field).norm for field, (_, norm) in BLOCKS.items()}
        contexts = {f"{name}_BN": getattr(saved, field).norm for field, name in CONTEXTS.items()}
        return blocks | contexts | _spatial_norms(saved.spatial)

    def mid(out, saved):
        values = {
            "C345_ChannelWiseAttention_withcpfe_multiply": saved.high.conv.x,
            "spatial_attention_add": saved.spatial.wide_tall.s + saved.spatial.tall_wide.s,
            "C12_atten_mutiply": saved.weights * saved.low.y,
            "fuse_concat": saved.out.x,
        }
        return {name: value.transpose(0, 2, 3, 1) for name, value in values.items() if f"mid.{name}" in record}

    return Case(pyramid_feature, args, _out, after=_after(record, norms), mid=mid)
