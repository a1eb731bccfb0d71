"""SAN: the authors' region-level non-local block. Its second-order attention has recordings of its own: soca."""

from refattn.attention.spatial import non_local, region_non_local
from refattn.primitives import batch_norm, linear
from tests.golden import Case


def case(record):
    unused = [name for name in record.names("param") if name.startswith("param.soca.")]
    norm = ("param.non_local.W.1.weight", "param.non_local.W.1.bias") if record.ctor["bn_layer"] else (None, None)
    maps = ("g.0", "W.0" if record.ctor["bn_layer"] else "W", "theta", "phi.0")
    names = [(f"param.non_local.{name}.weight", f"param.non_local.{name}.bias") for name in maps]

    def args(get):
        for name in unused:
            get(name)  # parameters of a layer that the block has but never calls
        return get("in.x"), block_params(get, names, norm)

    return Case(region_non_local, args, lambda get: get("out.y"))


def block_params(get, names, norm=(None, None), concat=None):
    """Params from official names of the maps (g, out, theta, phi), each a pair (weight, bias), of norm and concat."""

    def pointwise(weight, bias):
        kernel = get(weight, optional=True)
        return None if kernel is None else linear.Params(kernel.reshape(kernel.shape[:2]), get(bias, optional=True))

    gamma, beta = (None if name is None else get(name, optional=True) for name in norm)
    concat = None if concat is None else get(concat, optional=True)
    return non_local.Params(
        *(pointwise(*pair) for pair in names),
        concat=None if concat is None else concat.reshape(2, -1),
        norm=None if gamma is None else batch_norm.Params(gamma, beta),
    )
