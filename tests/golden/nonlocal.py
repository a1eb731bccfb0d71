"""Non-local blocks: the authors' Caffe2 graph, and the common PyTorch port."""

from refattn.attention.spatial import non_local
from refattn.primitives import batch_norm
from tests.golden import Case
from tests.golden.san import block_params


def case(record):
    return _port(record) if record.meta["case"].startswith("port_") else _official(record)


def _official(record):
    ctor = record.meta["defaults"] | record.ctor
    prefix = f"param.{ctor['prefix']}_"

    def args(get):
        names = [(f"{prefix}{name}_w", f"{prefix}{name}_b") for name in ("g", "out", "theta", "phi")]
        return get("in.x"), block_params(get, names, norm=(f"{prefix}bn_s", f"{prefix}bn_b"))

    stats, eps = None, ctor["bn_eps"]
    if ctor["USE_BN"] and not record.training:
        stats = batch_norm.Stats(record[f"buf.{ctor['prefix']}_bn_rm"], record[f"buf.{ctor['prefix']}_bn_riv"])
    if ctor.get("USE_AFFINE"):
        stats, eps = batch_norm.init_stats(ctor["dim_out"]), 0.0
    options = {
        "mode": "embedded_gaussian" if ctor["USE_SOFTMAX"] else "dot_product",
        "pool": "before" if ctor["USE_MAXPOOL"] else None,
        "scale": ctor["USE_SCALE"],
    }
    return Case(non_local, args, lambda get: get("out.y"), {**options, "stats": stats, "eps": eps})


def _port(record):
    mode = record.meta["case"].removeprefix("port_").rpartition("_2d")[0]
    ctor, layer = record.ctor, ".0" if record.ctor["sub_sample"] else ""
    out, norm = ("W.0", ("param.W.1.weight", "param.W.1.bias")) if ctor["bn_layer"] else ("W", (None, None))

    def args(get):
        maps = (f"g{layer}", out, "theta", f"phi{layer}")
        names = [(f"param.{name}.weight", f"param.{name}.bias") for name in maps]
        return get("in.x"), block_params(get, names, norm, "param.concat_project.0.weight")

    options, after = {"mode": mode, "pool": "after" if ctor["sub_sample"] else None, "scale": False}, None
    if ctor["bn_layer"]:
        before = batch_norm.Stats(record["buf.W.1.running_mean"], record["buf.W.1.running_var"])
        options["stats"] = None if record.training else before

        def after(saved):
            stats = batch_norm.running(before, saved.norm)
            return {"W.1.running_mean": stats.mean, "W.1.running_var": stats.var}

    return Case(non_local, args, lambda get: get("out.y"), options, after if record.training else None)
