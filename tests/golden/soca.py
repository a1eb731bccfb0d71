"""SOCA of SAN."""

from refattn.attention.channel import second_order_channel
from tests.golden import Case


def case(record):
    def args(get):
        return get("in.x"), second_order_channel.Params(
            w1=get("param.conv_du.0.weight")[:, :, 0, 0],
            w2=get("param.conv_du.2.weight")[:, :, 0, 0],
            b1=get("param.conv_du.0.bias"),
            b2=get("param.conv_du.2.bias"),
        )

    def mid(out, saved):
        trace, y = saved.root.trace, saved.root.y
        return {
            "cov": trace * saved.root.steps[0][0],
            "sqrt5": trace**0.5 * y,
            "desc": saved.v,
            "gate": saved.gate[:, :, None, None],
        }

    return Case(
        second_order_channel,
        args,
        lambda get: get("out.y"),
        {"iterations": record.meta["iterN"]},
        mid=mid if "mid.gate" in record else None,
    )
