"""BAM: the authors' class, and their two branches with other sizes."""

from refattn.attention.channel import bam_channel
from refattn.attention.mixed import bam
from refattn.attention.spatial import bam_spatial
from refattn.primitives import batch_norm, conv, conv_norm_relu, linear
from tests.golden import Case

CHANNEL, SPATIAL = "channel_att.gate_c.gate_c_", "spatial_att.gate_s.gate_s_"


def case(record):
    layers, dilated = record.ctor.get("num_layers", 1), record.ctor.get("dilation_conv_num", 2)
    channel_norms = [f"{CHANNEL}bn_{layer + 1}" for layer in range(layers)]
    spatial_norms = [f"{SPATIAL}bn_reduce0", *(f"{SPATIAL}bn_di_{block}" for block in range(dilated))]

    def args(get):
        def pair(kind, name):
            return kind(get(f"param.{name}.weight"), get(f"param.{name}.bias"))

        def block(name, norm):
            return conv_norm_relu.Params(pair(conv.Params, name), pair(batch_norm.Params, norm))

        channel = bam_channel.Params(
            hidden=tuple(block(f"{CHANNEL}fc_{layer}", norm) for layer, norm in enumerate(channel_norms)),
            final=pair(linear.Params, f"{CHANNEL}fc_final"),
        )
        spatial = bam_spatial.Params(
            reduce=block(f"{SPATIAL}conv_reduce0", spatial_norms[0]),
            dilated=tuple(block(f"{SPATIAL}conv_di_{number}", norm) for number, norm in enumerate(spatial_norms[1:])),
            final=pair(conv.Params, f"{SPATIAL}conv_final"),
        )
        return get("in.x"), bam.Params(channel, spatial)

    before = {
        norm: batch_norm.Stats(record[f"buf.{norm}.running_mean"], record[f"buf.{norm}.running_var"])
        for norm in channel_norms + spatial_norms
    }
    reduce, *blocks = (before[norm] for norm in spatial_norms)
    given = bam.Stats(
        bam_channel.Stats(tuple(before[norm] for norm in channel_norms)), bam_spatial.Stats(reduce, tuple(blocks))
    )

    def after(saved):
        buffers = {}
        spatial = saved.spatial.reduce, *saved.spatial.dilated
        for norm, block in zip(channel_norms + spatial_norms, saved.channel.hidden + spatial):
            stats = batch_norm.running(before[norm], block.norm)
            buffers |= {f"{norm}.running_mean": stats.mean, f"{norm}.running_var": stats.var}
        return buffers

    return Case(
        bam,
        args,
        lambda get: get("out.y"),
        {"dilation": record.ctor.get("dilation_val", 4), "stats": None if record.training else given},
        after if record.training else None,
        lambda out, saved: {"channel_logits": saved.c[:, :, 0, 0], "spatial_logits": saved.f},
    )
