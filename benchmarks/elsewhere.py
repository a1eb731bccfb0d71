"""The attention functions of frameworks in float32, bfloat16 and float16, called alike: what the judge must accept.

    {name: array} = IMPLEMENTATIONS["torch flash, bfloat16"].run(q, k, v, dout, is_causal=True)

Arrays are float32, heads first, and hold numbers of the format; what comes back is "out" and, where
there are gradients, "dq", "dk", "dv". Options: is_causal, scale, attn_mask (True where a key takes part), no two masks
at once. Frameworks are imported inside.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from refattn.oracle.arithmetic import ARITHMETICS, BFLOAT16, Arithmetic

NAMES = "out", "dq", "dk", "dv"
# Softmax as well is one operation after the other, each stored; but jnp.sum adds in float32, so no chain is long.
JNP_BFLOAT16 = ARITHMETICS["bf16_eager"]._replace(
    name="bf16_eager, softmax in bfloat16", softmax=BFLOAT16, exp_error=2.0**-8, chain=8, tile=2**20
)


class Implementation(NamedTuple):
    needs: tuple  # modules
    form: str
    arithmetic: Arithmetic
    call: Callable

    @property
    def missing(self):
        return [module for module in self.needs if importlib.util.find_spec(module) is None]

    def run(self, q, k, v, dout, **options):
        return dict(zip(NAMES, self.call(self.form, q, k, v, dout, **options)))


def _causal(q, k):
    return np.tri(q.shape[2], k.shape[2], dtype=bool)


# --- PyTorch ----------------------------------------------------------------------------------------------------


def _torch(function, form, q, k, v, dout):
    import torch

    dtype = getattr(torch, form)
    tensors = [torch.from_numpy(x).to(dtype).requires_grad_() for x in (q, k, v)]
    y = function(*tensors)
    grads = torch.autograd.grad(y, tensors, torch.from_numpy(dout).to(dtype))
    return [x.float().numpy() for x in (y.detach(), *grads)]


def torch_sdpa(backend, form, q, k, v, dout, is_causal=False, scale=None, attn_mask=None):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask, grouped = None if attn_mask is None else torch.from_numpy(attn_mask), q.shape[1] != k.shape[1]

    def attention(*tensors):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                *tensors, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
            )

    return _torch(attention, form, q, k, v, dout)


def torch_written_out(form, q, k, v, dout, is_causal=False, scale=None, attn_mask=None):
    import torch

    mask = _causal(q, k) if is_causal else attn_mask
    times, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[3]) if scale is None else scale

    def attention(q, k, v):
        k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))
        scores = (q * scale) @ k.mT
        if mask is not None:
            scores = scores.masked_fill(~torch.from_numpy(mask), -math.inf)
        return scores.softmax(-1) @ v

    return _torch(attention, form, q, k, v, dout)


# --- JAX --------------------------------------------------------------------------------------------------------


def jax_function(kind, form, q, k, v, dout, is_causal=False, scale=None, attn_mask=None):
    import jax.numpy as jnp

    arrays = [jnp.asarray(x).astype(form) for x in (q, k, v, dout)]
    mask = _causal(q, k) if is_causal and kind == "written out" else attn_mask
    found = _jitted(kind, is_causal, scale)(*arrays, None if mask is None else jnp.asarray(mask))
    return [np.asarray(x.astype("float32")) for x in found]


@functools.cache
def _jitted(kind, is_causal, scale):
    import jax
    import jax.numpy as jnp

    def own(q, k, v, mask):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, is_causal=is_causal).swapaxes(1, 2)

    def written_out(q, k, v, mask):
        k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        factor = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * jnp.asarray(factor, q.dtype)
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores, axis=-1), v)

    def both(q, k, v, dout, mask):
        function = written_out if kind == "written out" else own
        y, pullback = jax.vjp(lambda *arrays: function(*arrays, mask), q, k, v)
        return y, *pullback(dout)

    return jax.jit(both)


# --- ONNX Runtime -----------------------------------------------------------------------------------------------


def onnxruntime_model(kind, form, q, k, v, dout, is_causal=False, scale=None, attn_mask=None):
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    if kind == "graph":
        k, v = (x.repeat(q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        attn_mask, is_causal = _causal(q, k) if is_causal else attn_mask, False
    given = {name: x.astype(form) for name, x in zip("qkv", (q, k, v))}
    if attn_mask is not None:
        given["mask"] = np.ascontiguousarray(np.broadcast_to(attn_mask, (*q.shape[:3], k.shape[2])))
    session = _session(kind, form, is_causal, scale, attn_mask is not None)
    return [session.run(None, given)[0].astype(np.float32)]


@functools.cache
def _session(kind, form, is_causal, scale, masked):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    number = TensorProto.FLOAT if form == "float32" else TensorProto.FLOAT16
    types = dict.fromkeys("qkv", number) | ({"mask": TensorProto.BOOL} if masked else {})
    inputs = [helper.make_tensor_value_info(name, t, [f"{name}{i}" for i in range(4)]) for name, t in types.items()]
    constants = []
    if kind == "attention":
        nodes = [helper.make_node("Attention", list(types), ["out"], is_causal=int(is_causal), scale=scale)]
    else:
        constants = [("scale", scale), ("hidden", -math.inf)]
        constants = [numpy_helper.from_array(np.array(x, form), name) for name, x in constants]
        nodes = [
            helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["q", "turned"], ["products"]),
            helper.make_node("Mul", ["products", "scale"], ["scores"]),
            *([helper.make_node("Where", ["mask", "scores", "hidden"], ["logits"])] if masked else []),
            helper.make_node("Softmax", ["logits" if masked else "scores"], ["probs"], axis=-1),
            helper.make_node("MatMul", ["probs", "v"], ["out"]),
        ]
    out = helper.make_tensor_value_info("out", number, [f"out{i}" for i in range(4)])
    model = helper.make_model(
        helper.make_graph(nodes, "attention", inputs, [out], constants),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# --- the table --------------------------------------------------------------------------------------------------


def _table():
    short = {"float32": "float32", "bfloat16": "bf16", "float16": "f16"}
    for form, low in short.items():
        wide = form == "float32"
        arithmetics = {
            "torch math": (low if wide else f"{low}_upcast", functools.partial(torch_sdpa, "MATH")),
            "torch flash": (f"torch_cpu_{form}", functools.partial(torch_sdpa, "FLASH_ATTENTION")),
            "torch written out": (low if wide else f"{low}_eager", torch_written_out),
        }
        for name, (arithmetic, call) in arithmetics.items():
            yield name, Implementation(("torch",), form, ARITHMETICS[arithmetic], call)
        if form != "float16":
            arithmetic = ARITHMETICS["float32"] if wide else JNP_BFLOAT16
            own, plain = (functools.partial(jax_function, kind) for kind in ("own", "written out"))
            yield "jax.nn", Implementation(("jax",), form, ARITHMETICS[f"jax_cpu_{form}"], own)
            yield "jnp written out", Implementation(("jax",), form, arithmetic, plain)
        if form != "bfloat16":
            for kind in ("attention", "graph"):
                call = functools.partial(onnxruntime_model, kind)
                arithmetic = ARITHMETICS[f"onnxruntime_cpu_{form}"]
                yield f"onnxruntime {kind}", Implementation(("onnx", "onnxruntime"), form, arithmetic, call)


IMPLEMENTATIONS = {f"{name}, {each.form}": each for name, each in _table()}
