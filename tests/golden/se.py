"""Squeeze-and-excitation: the official Caffe graphs, and a port without biases."""

from refattn.attention.channel import squeeze_excitation
from refattn.elementwise import relu
from tests.golden import Case


class Residual:
    """The official residual block: the gated x plus the shortcut, then a ReLU."""

    @staticmethod
    def forward(x, params, shortcut):
        y, saved = squeeze_excitation.forward(x, params)
        return relu(y + shortcut), (y + shortcut, saved)

    @staticmethod
    def backward(dout, saved):
        total, inner = saved
        dtotal = dout * (total > 0)
        return *squeeze_excitation.backward(dtotal, inner), dtotal


def case(record):
    port = "param.fc.0.weight" in record
    residual = len(record.names("in")) == 2
    x, shortcut = ("in.conv2_1_1x1_increase", "in.conv2_1_1x1_proj") if residual else ("in.x", None)
    down, up = ("param.fc.0", "param.fc.2") if port else _layers(record)

    def args(get):
        params = squeeze_excitation.Params(
            w1=_matrix(get(f"{down}.weight")),
            w2=_matrix(get(f"{up}.weight")),
            b1=get(f"{down}.bias", optional=True),
            b2=get(f"{up}.bias", optional=True),
        )
        return (get(x), params, get(shortcut)) if residual else (get(x), params)

    def mid(out, saved):
        return {"squeeze": saved.z[:, :, None, None], "gate": saved.gate[:, :, None, None]}

    module = Residual if residual else squeeze_excitation
    return Case(module, args, lambda get: get("out.y"), mid=mid if "mid.gate" in record else None)


def _layers(record):
    """The layers are named after their place in the network: conv2_1_1x1_down, inception_3a_1x1_down."""
    down = next(name for name in record.names("param") if name.endswith("_down.weight")).removesuffix(".weight")
    return down, down.removesuffix("_down") + "_up"


def _matrix(weight):
    """A 1x1 convolution (O, I, 1, 1), or a linear layer (O, I)."""
    return weight.reshape(weight.shape[:2])
