"""Hugging Face transformers: what its models are made of, on the CPU, written out ("eager"), with torch's autograd.

Modules get their weights from the call. What wants a config gets the smallest one.
"""

from fractions import Fraction
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.func import functional_call
from transformers import masking_utils
from transformers.models.bert import modeling_bert as bert
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.llama import modeling_llama as llama
from transformers.models.swin import modeling_swin as swin
from transformers.models.swinv2 import modeling_swinv2 as swinv2
from transformers.models.t5 import modeling_t5 as t5
from transformers.models.vitdet import modeling_vitdet as vitdet

from refattn.attention.dot_product import alibi, grouped_query_layer, latent, multi_head, swin_v2
from refattn.attention.dot_product import decomposed_2d as decomposed
from refattn.core import Call
from refattn.frameworks import Target
from refattn.frameworks.torch import EVERY_DTYPE, LOW, SUMS, Given, departs, run  # noqa: F401
from refattn.oracle.arithmetic import ARITHMETICS, FLOAT32
from refattn.oracle.contract import NotHandled
from refattn.oracle.conventions import PRESETS
from refattn.primitives import linear, rms_norm

VERSION = transformers.__version__


# --- attention as models call it ------------------------------------------------------------------------------


def llama_attention(
    q, k, v, attn_bias=None, *, scale=None, attn_mask=None, is_causal=False, q_offset=0, window=None, kv_seqlens=None
):
    mask = _mask(q, k, attn_bias, attn_mask, is_causal, q_offset, window, kv_seqlens)
    return _eager(llama.eager_attention_forward, q, k, v, mask, scale)


def gemma2_attention(
    q,
    k,
    v,
    attn_bias=None,
    *,
    scale=None,
    attn_mask=None,
    is_causal=False,
    q_offset=0,
    window=None,
    kv_seqlens=None,
    softcap,
):
    if softcap is None:
        raise NotHandled("no soft cap: as in Llama")
    if q.dtype in LOW:
        size = (q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT).abs().amax()
        large = size * abs(q.shape[-1] ** -0.5 if scale is None else scale) > softcap
        departs(large, "torch-tanh-gradient", "a gradient of tanh from what was rounded to 16 bits, and is nearly 1")
    if q.dtype == torch.float16 and softcap * v.abs().sum(-1).amax() > OVERFLOWS:
        raise NotHandled("gradients that overflow float16 when they are multiplied with the cap")
    mask = _mask(q, k, attn_bias, attn_mask, is_causal, q_offset, window, kv_seqlens)
    return _eager(gemma2.eager_attention_forward, q, k, v, mask, scale, softcap=softcap)


OVERFLOWS = 65504 / 4  # and gradients of the output are below 4


def gpt_oss_attention(
    q,
    k,
    v,
    attn_bias=None,
    sinks=None,
    *,
    scale=None,
    attn_mask=None,
    is_causal=False,
    q_offset=0,
    window=None,
    kv_seqlens=None,
):
    if sinks is None:
        raise NotHandled("no sinks")
    mask = _mask(q, k, attn_bias, attn_mask, is_causal, q_offset, window, kv_seqlens)
    return _eager(gpt_oss.eager_attention_forward, q, k, v, mask, scale, sinks=sinks)


def _eager(function, q, k, v, mask, scale, sinks=None, **options):
    nan = any(x.isnan().any() for x in (q, k, v))
    amx = q.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    departs(nan and amx, "torch-amx-nan", "NaN in bfloat16: torch 2.13's products on AMX let it into the row above")
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, sinks=sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return function(module, q, k, v, mask, scaling=scale, **options)[0].transpose(1, 2)


def _mask(q, k, bias, own, is_causal, q_offset, window, lengths):
    """What a model adds to the scores: a bias, or a mask of 0 and the lowest number, one's own or made by its rules."""
    ruled = is_causal or window is not None or lengths is not None
    if (bias is not None) + (own is not None) + ruled > 1:
        raise NotHandled("a bias, a mask of one's own, and what transformers makes a mask of: it adds one")
    if bias is not None:
        return bias
    if own is not None:
        return torch.where(own, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
    if not ruled:
        return None
    if not isinstance(q_offset, (int, str)) or (q_offset == "bottom_right" and lengths is not None):
        raise NotHandled("an offset for each item")
    padding = None if lengths is None else torch.arange(k.shape[2]) < lengths[:, None]
    offset = {"top_left": 0, "bottom_right": k.shape[2] - q.shape[2]}.get(q_offset, q_offset)
    sizes = {"batch_size": q.shape[0], "q_length": q.shape[2], "kv_length": k.shape[2], "q_offset": offset}
    rule = _rule(is_causal, window)
    return masking_utils.eager_mask(**sizes, mask_function=rule, attention_mask=padding, dtype=q.dtype)


def _rule(is_causal, window):
    left, right = window or (None, None)
    if is_causal and (right is None or right >= 0):
        sliding = masking_utils.sliding_window_causal_mask_function
        return masking_utils.causal_mask_function if left is None else sliding(left + 1)
    if left != right or is_causal:
        raise NotHandled("a window that differs on both sides")
    both = masking_utils.sliding_window_bidirectional_mask_function
    return masking_utils.bidirectional_mask_function if left is None else both(left)


# --- positions ------------------------------------------------------------------------------------------------


def llama_rotary(x, cos, sin, *, pairing):
    return _rotate(llama.apply_rotary_pos_emb, "half", x, cos, sin, pairing)


def deepseek_rotary(x, cos, sin, *, pairing):
    return _rotate(deepseek.apply_rotary_pos_emb_interleave, "interleaved_to_half", x, cos, sin, pairing)


def gpt_neox_rotary(x, cos, sin, *, pairing):
    return _rotate(gpt_neox.apply_rotary_pos_emb, "half", x, cos, sin, pairing, partial=True)


def gptj_rotary(x, cos, sin, *, pairing):
    def apply(q, k, cos, sin):
        cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
        return gptj.apply_rotary_pos_emb(q.transpose(1, 2), sin, cos).transpose(1, 2), k

    return _rotate(apply, "interleaved", x, cos, sin, pairing)


def _rotate(apply, has, x, cos, sin, pairing, partial=False):
    """Tables have every column twice there."""
    if pairing != has:
        raise NotHandled(f"pairs that are {pairing}")
    if x.shape[-1] != 2 * cos.shape[-1] and not partial:
        raise NotHandled("features that are not turned")
    tables = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    heads = x if x.ndim == 4 else x[:, None]
    return apply(heads, heads, *tables)[0].reshape(x.shape)


def t5_bias(table, *, queries, keys, offset, bidirectional, max_distance):
    attention = SimpleNamespace(
        relative_attention_bias=lambda ids: F.embedding(ids, table),
        is_decoder=not bidirectional,
        relative_attention_num_buckets=len(table),
        relative_attention_max_distance=max_distance,
        _relative_position_bucket=t5.T5Attention._relative_position_bucket,
    )
    return t5.T5Attention.compute_bias(attention, queries, keys, table.device, offset)[0]


def bloom_alibi(slopes, *, queries, keys, form):
    if form != "key_position":
        raise NotHandled(f"form {form}")
    bias = bloom.build_alibi_tensor(torch.ones(1, keys, dtype=torch.long), len(slopes), slopes.dtype)
    return bias.expand(-1, queries, -1)


def alibi_example(draw):
    slopes = alibi.slopes(draw.size("H", high=12))
    return Call((slopes,), {"queries": draw.size("Q"), "keys": draw.size("K"), "form": "key_position"})


def swin_bias(table, *, window):
    window = (window, window) if isinstance(window, int) else window
    module = swin.SwinRelativePositionBias(table.shape[1], window)
    return functional_call(module, {"relative_position_bias_table": table}, ())[0]


def decomposed_2d(q, k, v, params, *, size, key_size, scale=None):
    """Its scores; the products around them are ours."""
    sizes = tuple(size), tuple(key_size)
    words = "positions counted in float32, where one is a whole number"
    departs(any(map(_rounds_down, *sizes)), "transformers-decomposed-floor", words)
    lead, scale = q.shape[:-2], q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.flatten(0, -3) for x in (q, k, v))
    scores = (q * scale) @ k.mT
    scores = vitdet.add_decomposed_relative_positions(scores, q, params.rows, params.columns, *sizes)
    return (scores.softmax(-1) @ v).unflatten(0, lead)


def _rounds_down(queries, keys):
    """Whether some whole number becomes a smaller one, counted as torch counts it."""
    a, b = Fraction(max(keys, queries), queries), Fraction(max(keys, queries), keys)
    exact = [[y * a - x * b + (keys - 1) * b for x in range(keys)] for y in range(queries)]
    y, x = torch.arange(queries)[:, None] * float(a), torch.arange(keys)[None] * float(b)
    theirs = (y - x + (keys - 1) * float(b)).long().tolist()
    return any(int(e) != t for row, others in zip(exact, theirs) for e, t in zip(row, others))


def decomposed_example(draw):
    """Tables as long as they are used, or twice as long: positions that torch rounds, the reference has exactly."""
    call = decomposed.example(draw)
    (q, k, v, _), prefix = call.args, call.options["prefix"]
    size, key_size = call.options["size"], call.options["key_size"] or call.options["size"]
    lengths = ((2 * max(pair) - 1) * draw.choice("stretched", 1, 2) for pair in zip(size, key_size))
    params = decomposed.Params(*(draw.array(length, q.shape[-1]) for length in lengths))
    return Call(
        (q[..., prefix:, :], k[..., prefix:, :], v[..., prefix:, :], params),
        {"size": size, "key_size": key_size, "scale": call.options["scale"]},
    )


# --- layers ---------------------------------------------------------------------------------------------------


def llama_norm(x, params=None, *, eps):
    return _norm(llama.LlamaRMSNorm, x, params, eps)


def t5_norm(x, params=None, *, eps):
    return _norm(t5.T5LayerNorm, x, params, eps)


def gemma2_norm(x, params=None, *, eps):
    """It multiplies with 1 + weight."""
    return _norm(gemma2.Gemma2RMSNorm, x, params and params._replace(gamma=params.gamma - 1), eps)


def gemma2_norm_example(draw):
    """gamma is between 1/2 and 2, so that gamma - 1 is exact."""
    call = rms_norm.example(draw)
    gamma = draw.rng.uniform(0.5, 2, call.args[0].shape[-1])
    return Call((call.args[0], rms_norm.Params(gamma)), call.options)


def _norm(kind, x, params, eps):
    if params is None:
        raise NotHandled("no gamma")
    return functional_call(kind(x.shape[-1], eps=eps), {"weight": params.gamma}, (x,))


def bert_attention(q, k, v, params, *, heads, mask, key_mask, is_causal):
    features = len(params.q.weight)
    config = transformers.BertConfig(hidden_size=features, num_attention_heads=heads, attn_implementation="eager")
    module = bert.BertSelfAttention(config).eval()
    module.query, module.key, module.value = _projected(q, k, v, params)
    return module(q.new_empty(*q.shape[:2], features), _of_layer(q, mask, key_mask, is_causal))[0]


def llama_layer(q, k, v, params, *, heads, key_heads, mask, key_mask, is_causal):
    """Nothing is turned: all angles are 0."""
    width = len(params.q.weight) // heads
    config = transformers.LlamaConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=width,
        attn_implementation="eager",
    )
    module = llama.LlamaAttention(config, 0).eval()
    module.q_proj, module.k_proj, module.v_proj = _projected(q, k, v, params)
    module.o_proj = _Linear(params.out)
    angles = q.new_ones(*q.shape[:2], width), q.new_zeros(*q.shape[:2], width)
    return module(q, angles, _of_layer(q, mask, key_mask, is_causal))[0]


def deepseek_layer(x, cos, sin, params, *, heads, pairing, scale, mask, is_causal, eps):
    rotary, rank = 2 * cos.shape[-1], params.kv_norm.gamma.shape[0]
    compared, passed = len(params.q_up) // heads, params.out.weight.shape[1] // heads
    config = transformers.DeepseekV3Config(
        hidden_size=x.shape[-1],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=None if params.q_down is None else len(params.q_down.weight),
        kv_lora_rank=rank,
        qk_rope_head_dim=rotary,
        qk_nope_head_dim=compared - rotary,
        v_head_dim=passed,
        attention_bias=params.out.bias is not None,
        rope_interleave=pairing != "half",
        attn_implementation="eager",
    )
    module = deepseek.DeepseekV3Attention(config, 0).eval()
    names = {"q_down": "q_a_proj", "kv_down": "kv_a_proj_with_mqa", "out": "o_proj"}
    weights = {
        "q_proj.weight" if params.q_down is None else "q_b_proj.weight": params.q_up,
        "kv_b_proj.weight": params.kv_up,
        "kv_a_layernorm.weight": params.kv_norm.gamma,
    }
    for ours, theirs in names.items():
        if getattr(params, ours) is not None:
            weights |= {f"{theirs}.{part}": w for part, w in getattr(params, ours)._asdict().items() if w is not None}
    norms = [module.kv_a_layernorm]
    if params.q_down is not None:
        weights["q_a_layernorm.weight"] = params.q_norm.gamma
        norms.append(module.q_a_layernorm)
    for norm in norms:
        norm.variance_epsilon = eps
    module.scaling = compared**-0.5 if scale is None else scale
    tables = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    masks = {"attention_mask": _of_layer(x, mask, None, is_causal), "position_embeddings": tables}
    return functional_call(module, weights, (x,), masks)[0]


def swin_v2_attention(q, k, v, params, *, window, pretrained, mask):
    """What stands for its projections gives what is given."""
    sizes = (window, window) if isinstance(window, int) else tuple(window)
    if min(sizes) == 1 or (pretrained and min(pretrained) == 1):
        raise NotHandled("windows of one row or column: 0 / 0, as in the authors' code")
    heads, features = q.shape[1], q.shape[-1]
    config = transformers.Swinv2Config()
    # A mask is added twice: the page transformers-swinv2-mask-twice.
    module = swinv2.Swinv2SelfAttention(config, heads * features, heads, sizes, list(pretrained or (0, 0)))
    module.continuous_position_bias_mlp = nn.Sequential(
        nn.Linear(2, len(params.w1)), nn.ReLU(), nn.Linear(len(params.w1), heads, bias=False)
    ).to(q.dtype)
    module.relative_coords_table = module.create_coords_table_and_index()[0]
    module.query, module.key, module.value = (Given(x.transpose(1, 2)) for x in (q, k, v))
    weights = dict(zip(("0.weight", "0.bias", "2.weight"), params[1:]))
    weights = {f"continuous_position_bias_mlp.{name}": w for name, w in weights.items()}
    weights["logit_scale"] = params.logit_scale[:, None, None]
    if mask is not None:
        mask = torch.zeros_like(mask[:, 0], dtype=q.dtype).masked_fill(~mask[:, 0], -torch.inf)
    hidden = q.new_empty(q.shape[0], q.shape[2], heads * features)
    y = functional_call(module.eval(), weights, (hidden, mask))[0]
    return y.unflatten(-1, (heads, features)).transpose(1, 2)


def _projected(q, k, v, params):
    """In the place of three projections of one array: those of three."""
    return [Given(F.linear(x, *projection)) for x, projection in zip((q, k, v), params)]


class _Linear(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = params

    def forward(self, x):
        return F.linear(x, *self.params)


def _of_layer(x, mask, key_mask, is_causal):
    """A mask to be added (B, 1 or H, T, T), or None."""
    allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    allowed = allowed.tril() if is_causal else allowed
    if mask is not None:
        allowed = allowed & mask
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    if allowed.all():
        return None
    allowed = allowed.expand(x.shape[0], *(allowed.shape[1:] if allowed.ndim == 4 else (1, *allowed.shape)))
    return torch.where(allowed, torch.zeros((), dtype=x.dtype), torch.finfo(x.dtype).min)


def _masks(draw, b, heads, length):
    """No query is without a key: models answer that with a mean of all values."""
    mask = draw.mask(b, heads, length, length) if draw.choice("masked", False, True) else None
    key_mask = draw.mask(b, length) if draw.choice("padded", False, True) else None
    for some in (mask, key_mask):
        if some is not None:
            some[..., 0] = True
    return {"mask": mask, "key_mask": key_mask, "is_causal": draw.choice("is_causal", False, True)}


def bert_example(draw):
    heads, b, length = draw.choice("heads", 1, 2, 3), draw.size("B"), draw.size("T")
    e, f, g = (draw.size(name) for name in "EFG")
    params = multi_head.init(draw.rng, heads * draw.size("E / heads"), key_features=f, value_features=g, bias=True)
    params = params._replace(q=linear.init(draw.rng, e, len(params.q.weight), True), out=None)
    arrays = (draw.array(b, length, size) for size in (e, f, g))
    return Call((*arrays, draw.like(params)), {"heads": heads} | _masks(draw, b, heads, length))


def llama_example(draw):
    key_heads = draw.choice("key_heads", 1, 2)
    heads, b, length = key_heads * draw.size("heads / key_heads", high=3), draw.size("B", high=2), draw.size("T")
    width, bias = 2 * draw.size("D / 2", high=2), draw.choice("bias", True, False)
    e, f, g, o = (draw.size(name, high=3) for name in "EFGO")
    sizes = (e, heads * width), (f, key_heads * width), (g, key_heads * width), (heads * width, o)
    params = grouped_query_layer.Params(*(linear.init(draw.rng, *size, bias) for size in sizes))
    arrays = (draw.array(b, length, size) for size in (e, f, g))
    options = {"heads": heads, "key_heads": key_heads} | _masks(draw, b, heads, length)
    return Call((*arrays, draw.like(params)), options)


def deepseek_example(draw):
    call = latent.example(draw)
    mask = call.options["mask"]
    if mask is not None:
        mask[..., 0] = True
    return call


def swin_v2_example(draw):
    """Masks are for all heads, and values as wide as keys."""
    call = swin_v2.example(draw)
    q, k, _, params = call.args
    mask = call.options["mask"]
    if mask is not None:
        mask[...] = mask[:, :1]
        mask[..., 0] = True
    return Call((q, k, draw.array(*q.shape), params), call.options)


# --- what it promises -----------------------------------------------------------------------------------------

# float64 is not float64 all through: softmax and norms are told to be of float32, and tables of positions are.
WIDE = ARITHMETICS["float64"]._replace(
    name="float64, some in float32",
    **{"lse": FLOAT32, "scores": FLOAT32, "score_roundings": 1, "softmax": FLOAT32, "exp_error": 4 * FLOAT32.u},
    **{"probs": FLOAT32, "probs_normalised": True, "probs_in_dscores": True, "dprobs": FLOAT32, "dscores": FLOAT32},
    accumulator=FLOAT32,
)
EAGER = {"float64": WIDE}
LOW_EAGER = ARITHMETICS["bf16_eager"], ARITHMETICS["f16_eager"]
# A soft cap divides, takes tanh and multiplies: three more results that are stored.
CAPPED = EAGER | {a.out.name: a._replace(name=f"{a.name}, soft cap", score_roundings=6) for a in LOW_EAGER}
# gpt-oss subtracts the largest logit itself, and stores the difference.
SHIFTED = {a.out.name: a._replace(name=f"{a.name}, softmax too", softmax=a.out) for a in LOW_EAGER}
EAGER_MODELS = {"convention": "hf_eager", "times": 4}


def _target(*row, **options):
    return Target(*row, **{"dtypes": EVERY_DTYPE} | options)


TARGETS = (
    _target(
        *("Llama, eager_attention_forward", "dot_product_attention", llama_attention), arithmetic=EAGER, **EAGER_MODELS
    ),
    _target(
        *("Gemma 2, eager_attention_forward", "dot_product_attention", gemma2_attention),
        arithmetic=CAPPED,
        **EAGER_MODELS,
    ),
    _target(
        *("gpt-oss, eager_attention_forward", "dot_product_attention", gpt_oss_attention),
        arithmetic=SHIFTED,
        convention=PRESETS["hf_eager"]._replace(softmax_precision=None),
        gradients=False,  # docs/findings/transformers-gpt-oss-maximum.md
        times=4,
    ),
    _target("Llama, apply_rotary_pos_emb", "rotary", llama_rotary),
    _target("GPT-NeoX, apply_rotary_pos_emb", "rotary", gpt_neox_rotary),
    _target("GPT-J, apply_rotary_pos_emb", "rotary", gptj_rotary),
    _target("DeepSeek-V3, apply_rotary_pos_emb_interleave", "rotary", deepseek_rotary),
    _target("T5Attention.compute_bias", "t5_bias", t5_bias, arithmetic=SUMS),
    _target("Bloom, build_alibi_tensor", "alibi", bloom_alibi, alibi_example, dtypes=("float32",), gradients=False),
    _target("SwinRelativePositionBias", "swin_bias", swin_bias, arithmetic=SUMS),
    _target(
        *("ViTDet, add_decomposed_relative_positions", "decomposed_2d", decomposed_2d, decomposed_example),
        arithmetic=SUMS,
    ),
    _target("LlamaRMSNorm", "rms_norm", llama_norm, arithmetic=EAGER),
    _target("T5LayerNorm", "rms_norm", t5_norm, arithmetic=EAGER),
    _target("Gemma2RMSNorm", "rms_norm", gemma2_norm, gemma2_norm_example, arithmetic=EAGER),
    _target("BertSelfAttention", "multi_head", bert_attention, bert_example),
    _target("LlamaAttention", "grouped_query_layer", llama_layer, llama_example, arithmetic=EAGER),
    _target("DeepseekV3Attention", "latent", deepseek_layer, deepseek_example, arithmetic=EAGER),
    _target("Swinv2SelfAttention", "swin_v2", swin_v2_attention, swin_v2_example, arithmetic=EAGER | SUMS),
)
