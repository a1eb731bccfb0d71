"""CBAM: the authors' class."""

from refattn.attention.channel import cbam_channel
from refattn.attention.mixed import cbam
from refattn.attention.spatial import cbam_spatial
from refattn.primitives import batch_norm
from tests.golden import Case

MLP, SPATIAL = "param.ChannelGate.mlp", "SpatialGate.spatial"


def case(record):
    spatial = not record.ctor.get("no_spatial", False)
    before = None
    if spatial:
        before = batch_norm.Stats(*(record[f"buf.{SPATIAL}.bn.running_{name}"] for name in ("mean", "var")))

    def args(get):
        channel = cbam_channel.Params(
            w1=get(f"{MLP}.1.weight"), w2=get(f"{MLP}.3.weight"), b1=get(f"{MLP}.1.bias"), b2=get(f"{MLP}.3.bias")
        )
        if not spatial:
            return get("in.x"), cbam.Params(channel)
        norm = batch_norm.Params(get(f"param.{SPATIAL}.bn.weight"), get(f"param.{SPATIAL}.bn.bias"))
        return get("in.x"), cbam.Params(channel, cbam_spatial.Params(get(f"param.{SPATIAL}.conv.weight"), norm))

    def after(saved):
        stats = batch_norm.running(before, saved.spatial.norm, momentum=0.01)
        return {f"{SPATIAL}.bn.running_mean": stats.mean, f"{SPATIAL}.bn.running_var": stats.var}

    def mid(out, saved):
        return {"after_channel": saved.spatial.x if spatial else out}

    return Case(
        cbam,
        args,
        lambda get: get("out.y"),
        {
            "pools": tuple(record.ctor.get("pool_types", ("avg", "max"))),
            "stats": None if record.training else before,
        },
        after if spatial and record.training else None,
        mid if "mid.after_channel" in record else None,
    )
