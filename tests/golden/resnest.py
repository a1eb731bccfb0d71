"""ResNeSt's SplAtConv2d."""

from refattn.attention.channel import split_attention
from refattn.primitives import batch_norm, conv
from tests.golden import Case


def case(record):
    normed = record.ctor["norm_layer"] is not None

    def norm(get, name):
        return batch_norm.Params(get(f"param.{name}.weight"), get(f"param.{name}.bias")) if normed else None

    def fully_connected(get, name):
        return conv.Params(get(f"param.{name}.weight")[:, :, 0, 0], get(f"param.{name}.bias"))

    def args(get):
        return get("in.x"), split_attention.Params(
            conv=conv.Params(get("param.conv.weight"), get("param.conv.bias", optional=True)),
            fc1=fully_connected(get, "fc1"),
            fc2=fully_connected(get, "fc2"),
            norm0=norm(get, "bn0"),
            norm1=norm(get, "bn1"),
        )

    def running(name):
        return batch_norm.Stats(record[f"buf.{name}.running_mean"], record[f"buf.{name}.running_var"])

    def after(saved):
        bn0, bn1 = (batch_norm.running(running(f"bn{i}"), norm) for i, norm in enumerate((saved.norm0, saved.norm1)))
        return {
            "bn0.running_mean": bn0.mean,
            "bn0.running_var": bn0.var,
            "bn1.running_mean": bn1.mean,
            "bn1.running_var": bn1.var,
        }

    def mid(out, saved):
        n, radix, channels, *space = saved.splits.shape
        logits, _ = conv.forward(saved.fc2.x, saved.fc2.params, groups=record.ctor["groups"])
        return {
            "x_splits": saved.splits.reshape(n, radix * channels, *space),
            "gap": saved.fc1.x[:, :, None, None],
            "z": saved.fc2.x[:, :, None, None],
            "logits": logits[:, :, None, None],
            "attn_radix_major": saved.attention.swapaxes(1, 2).reshape(n, radix * channels, 1, 1),
        }

    inference = normed and not record.training
    options = {name: record.ctor[name] for name in ("radix", "stride", "padding")} | {
        "stats": split_attention.Stats(running("bn0"), running("bn1")) if inference else None,
    }
    return Case(split_attention, args, lambda get: get("out.y"), options, after if record.training else None, mid)
