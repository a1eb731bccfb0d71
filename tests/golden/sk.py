"""Selective kernels: the official Caffe graphs with two branches, and timm's layer with three."""

from refattn.attention.channel import selective_kernel
from refattn.primitives import batch_norm, conv, conv_norm_relu, linear
from tests.golden import Case


def case(record):
    timm = "paths.0.conv.weight" in {name.partition(".")[2] for name in record.names("param")}
    branches, squeeze, select, momentum = _timm(record) if timm else _caffe(record)

    def block(get, layer, norm):
        weight = get(f"param.{layer}.weight")
        weight = weight[:, :, 0, 0] if (layer, norm) == squeeze else weight
        return conv_norm_relu.Params(
            conv.Params(weight), batch_norm.Params(get(f"param.{norm}.weight"), get(f"param.{norm}.bias"))
        )

    def args(get):
        return get("in.x"), selective_kernel.Params(
            branches=tuple(block(get, *names) for names in branches),
            squeeze=block(get, *squeeze),
            select=linear.Params(get(f"param.{select}.weight")[:, :, 0, 0]),
        )

    def running(norm):
        return batch_norm.Stats(record[f"buf.{norm}.running_mean"], record[f"buf.{norm}.running_var"])

    def after(saved):
        values = {}
        for (_, norm), part in zip((*branches, squeeze), (*saved.branches, saved.squeeze), strict=True):
            mean, var = batch_norm.running(running(norm), part.norm, momentum=momentum)
            values |= {f"{norm}.running_mean": mean, f"{norm}.running_var": var}
        return values

    def mid(out, saved):
        return {
            "branch0_3x3": saved.branches[0].y,
            "branch1_3x3d2": saved.branches[1].y,
            "squeeze": saved.squeeze.conv.x[:, :, None, None],
            "z": saved.squeeze.y[:, :, None, None],
            "attn": saved.attention.swapaxes(1, 2)[..., None],
        }

    stats = selective_kernel.Stats(tuple(running(norm) for _, norm in branches), running(squeeze[1]))
    options = {
        "stride": record.ctor.get("stride", 1),
        "dilations": tuple(range(1, len(branches) + 1)),
        "groups": record.ctor["groups"],
        "stats": None if record.training else stats,
    }
    return Case(
        selective_kernel,
        args,
        lambda get: get("out.y"),
        options,
        after if record.training else None,
        mid if "mid.attn" in record else None,
    )


def _caffe(record):
    """The layers are named after their place in the network: conv2_1/3x3g32, conv2_1/3x3g32d2, conv2_1/B_fc1, ..."""
    unit = record.names("param")[0].partition(".")[2].partition("/")[0]
    branches = [(f"{unit}/3x3g32{end}", f"{unit}/3x3g32{end}/bn") for end in ("", "d2")]
    return branches, (f"{unit}/B_fc1", f"{unit}/B_fc1/bn"), f"{unit}/B_fc2", record.ctor["bn_momentum_torch"]


def _timm(record):
    branches = [(f"paths.{m}.conv", f"paths.{m}.bn") for m in range(len(record.ctor["kernel_size"]))]
    return branches, ("attn.fc_reduce", "attn.bn"), "attn.fc_select", 0.1
