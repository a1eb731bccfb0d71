"""Golden vectors as ONNX's node tests: a model of one node, its inputs and outputs, in files of TensorProto.

    test_000_gaussian/model.onnx
    test_000_gaussian/test_data_set_0/input_0.pb, ...       of the node, in float32
    test_000_gaussian/test_data_set_0/output_0.pb, ...
    test_000_gaussian/arrays/grad/dq.pb, ...                what a node cannot say, and everything in float64

ONNX's own test runner reads the first three. Nothing here is imported before it is needed: onnx is an extra.
"""

import functools
import math
from collections import Counter

import numpy as np

from refattn.core import Call
from refattn.oracle import contract, inputs

DATA, ARRAYS = "test_data_set_0", "arrays"
MECHANISMS = "dot_product_attention", "layer_norm", "rms_norm", "rotary", "softmax"
SIZES = {"FLOAT": 4, "DOUBLE": 8, "FLOAT16": 2, "BFLOAT16": 2, "INT64": 8, "INT32": 4, "BOOL": 1}  # bytes of a number
FLOAT32 = np.dtype(np.float32)  # of a node, whatever the arithmetics are: it holds the numbers of all


def library():
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise ImportError(f"node tests need onnx ({error}): pip install 'refattn[onnx]'") from error
    return onnx


# --- what a node can say ----------------------------------------------------------------------------------------


def operator(mechanism):
    """A function, called as the mechanism's forward, that gives (model, {name: array}); it raises NotHandled."""
    library()
    from refattn.frameworks import _onnx_nodes as nodes

    if mechanism.name not in MECHANISMS:
        expected = f"one that has an operator of ONNX: {', '.join(MECHANISMS)}"
        raise ValueError(f"vectors: like is {mechanism.name!r}, expected {expected}")
    if mechanism.name == "dot_product_attention":
        return _attention
    return functools.partial(getattr(nodes, mechanism.name), _record)


def _record(model):
    """In the place of somebody who runs models: the only output is the model, and what it was given."""
    return lambda given: [(model, given)]


def _attention(
    q, k, v, attn_bias=None, *, attn_mask=None, is_causal=False, q_offset=None, window=None, kv_seqlens=None,
    scale=None, softcap=None,
):  # fmt: skip
    """Attention of the first opset that has what is asked for."""
    from refattn.frameworks import _onnx_nodes as nodes

    said = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "softcap": softcap}
    if kv_seqlens is None:
        if window is None:
            return nodes.attention_23(_record, q, k, v, attn_bias, q_offset=q_offset, **said)
        return nodes.attention_25(_record, q, k, v, attn_bias, q_offset=q_offset, window=window, **said)
    if window is not None:
        raise contract.NotHandled("a window, and lengths of keys")
    if is_causal and not (isinstance(q_offset, str) and q_offset == "bottom_right"):
        raise contract.NotHandled("causal with lengths of keys, where the last query is not at the last key")
    return nodes.attention_of_cache(_record, q, k, v, attn_bias, kv_seqlens=kv_seqlens, **said)


def drawn(mechanism, say, family, seed, left_out: Counter):
    """A Call that a node can say, or None; why not is counted."""
    claim = contract.claim(say, mechanism)
    call = inputs.draw(mechanism, family, claim, seed)
    try:
        call = None if call is None else contract.claimed(call, claim, mechanism)
        if call is not None:
            node_test(mechanism, say, call, None)
    except contract.NotHandled as reason:
        left_out[str(reason)] += 1
        return None
    return call


def node_test(mechanism, say, call, out):
    """(model, {"node/input_0": array, ..., "node/output_0": array}) of a call and what comes of it."""
    call = inputs.cast_call(call, FLOAT32)
    options = contract.handed_over(say, Call(call.args, call.options), contract.off_by_default(mechanism))
    model, given = say(*call.args, **options)
    model = library().ModelProto.FromString(model.SerializeToString())  # of its own: nodes of one kind share theirs
    arrays = {f"node/input_{i}": x for i, x in enumerate(given.values())}
    outputs = [out]
    if len(model.graph.output) > 1:  # what comes of a past and the new keys: all of them
        outputs += call.args[1:3]
    if out is not None:
        arrays |= {f"node/output_{i}": np.asarray(x, FLOAT32) for i, x in enumerate(outputs)}
        for info, x in zip((*model.graph.input, *model.graph.output), arrays.values(), strict=True):
            _say_shape(info, x.shape)
    return model.SerializeToString(deterministic=True), arrays


def _say_shape(info, shape):
    """In a model: the nodes know no more than the number of axes."""
    said = info.type.tensor_type.shape
    said.ClearField("dim")
    for length in shape:
        said.dim.add().dim_value = length


# --- files --------------------------------------------------------------------------------------------------------


def paths(case, names):
    return [f"{case}/model.onnx", *(_path(case, name) for name in names)]


def _path(case, name):
    folder, _, rest = name.partition("/")
    return f"{case}/{DATA}/{rest}.pb" if folder == "node" else f"{case}/{ARRAYS}/{name}.pb"


def encode(case):
    """{path: bytes} of a Case of refattn.vectors."""
    files = {f"{case.name}/model.onnx": case.model}
    from_array = library().numpy_helper.from_array
    for name, x in case.arrays.items():
        files[_path(case.name, name)] = from_array(x, name.rpartition("/")[2]).SerializeToString(deterministic=True)
    return files


def decode(file, contents, expected, entry, short):
    """{name: entry(dtype, shape, read)}. In a folder of somebody's outputs output_0.pb may lie anywhere."""
    found = {}
    for path, content in contents.items():
        path = path.removeprefix(f"{file.name}/")
        if path.endswith(".pb"):
            place, _, name = path.removesuffix(".pb").rpartition("/")
            if place.startswith(ARRAYS):
                name = f"{place.removeprefix(ARRAYS).lstrip('/')}/{name}"
            else:
                name = f"node/{name}"
                if name == "node/output_0" and name not in expected:
                    name = next((n for n in expected if n.startswith("out/")), name)
            if name in found:
                raise ValueError(f"{file}: {short(name)} is there twice")
            found[name] = _tensor(f"{file}/{path}", content, entry, short)
    return found


def _tensor(path, content, entry, short):
    """What a TensorProto says of itself is believed as far as it has the data."""
    onnx = library()
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(content)
    except Exception as error:
        raise ValueError(f"{path}: {short(error)}, expected a TensorProto") from None
    kinds = {onnx.TensorProto.DataType.Value(name): size for name, size in SIZES.items()}
    if tensor.data_type not in kinds:
        raise ValueError(f"{path}: its data_type is {tensor.data_type}, expected one of {', '.join(SIZES)}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise ValueError(f"{path}: its data is in another file, expected it here")
    shape = tuple(tensor.dims)
    if len(shape) > 32 or any(n < 0 for n in shape):
        raise ValueError(f"{path}: its dims are {short(shape)}, expected a shape")
    typed = {"FLOAT": "float_data", "DOUBLE": "double_data", "INT64": "int64_data"}  # of all others it is int32_data
    field = typed.get(onnx.TensorProto.DataType.Name(tensor.data_type), "int32_data")
    raw = tensor.HasField("raw_data")
    there = len(tensor.raw_data) if raw else len(getattr(tensor, field))
    due = math.prod(shape) * (kinds[tensor.data_type] if raw else 1)
    if there != due:
        unit = "bytes" if raw else "numbers"
        raise ValueError(f"{path}: has {there} {unit} of data, expected {due} for its dims {short(shape)}")
    half = tensor.data_type == onnx.TensorProto.BFLOAT16  # NumPy has it not
    dtype = FLOAT32 if half else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return entry(dtype, shape, lambda: np.array(onnx.numpy_helper.to_array(tensor)).astype(dtype))
