"""What frameworks answer where attention is not one thing: PRESETS, a Convention for each.

    y, _ = dot_product_attention.forward(q, k, v, attn_mask=mask, convention=PRESETS["torch_sdpa"])

Each says with which version it was measured, on the CPU, and what an adapter still has to do: layouts, the sense of
a mask, numbers that mean "none". How their kernels are called is not theirs but the adapter's.

A mask of -1e9 that is added (keras_attention) swallows a logit of float32 and keeps one of float64: the masked row is
the mean of V in the one, the softmax without a mask in the other. A float32 result, judged by a reference that runs
in float64, wants PRESETS["keras_attention"]._replace(mask_op="replace").

Two are missing, since neither could be run and their documentation does not say what a masked logit becomes, nor a row
of masked ones: tensorrt (IAttention; takes queries that are scaled already: scale=1.0; a mask or causal, not both),
and transformer_engine (causal is top_left; windows and the other causal kinds are bottom_right).
"""

from refattn.attention.dot_product.dot_product_attention import Convention

LARGE = 0.7 * 3.4028234663852886e38  # of the largest float32
NOT_RUN = "documentation only, not run"

PRESETS = {
    # --- PyTorch ---------------------------------------------------------------------------------------------
    # scaled_dot_product_attention as its math backend does it. causal_lower_right is q_offset="bottom_right".
    "torch_sdpa": Convention(mask_op="add", measured="torch 2.13.0"),
    # FlexAttention: mask_mod is attn_mask, score_mod a bias or a soft cap, AuxRequest(lse=True) return_lse.
    "torch_flex": Convention(measured="torch 2.13.0"),
    # nn.MultiheadAttention, need_weights=False: negate bool masks (True is "ignore" there); key_padding_mask is (B, S).
    "torch_mha": Convention(mask_op="add", measured="torch 2.13.0"),
    # The same with need_weights=True, and in the fast path of eval without gradients.
    "torch_mha_weights": Convention(mask_op="add", fully_masked="nan", measured="torch 2.13.0"),
    # --- JAX, Flax -------------------------------------------------------------------------------------------
    # jax.nn.dot_product_attention, and flax.nnx, which calls it. (B, T, N, H); as many features in v as in k; a window
    # that is one number w is (w, w). The softmax is of float32, whatever is given.
    "jax": Convention(mask_value=-LARGE, fully_masked="nan", softmax_precision="float32", measured="jax 0.10.2"),
    # flax.linen.dot_product_attention: (B, T, N, H).
    "flax": Convention(mask_value="lowest", fully_masked="nan", measured="flax 0.12.8"),
    # --- Keras -----------------------------------------------------------------------------------------------
    # keras.ops.dot_product_attention on TensorFlow, JAX and NumPy: (B, T, N, H).
    "keras_ops": Convention(mask_value=-LARGE, fully_masked="nan", measured="keras 3.15.1"),
    # The same on torch, which takes a bias or a mask, not both.
    "keras_ops_torch": Convention(mask_op="add", mask_value=-LARGE, measured="keras 3.15.1, torch 2.13.0"),
    # layers.MultiHeadAttention, where no scores are asked for and nothing is dropped; on torch it is keras_ops_torch.
    # Float masks are cast to bool; sliding_window w is window=(w - 1, w - 1).
    "keras_mha": Convention(mask_value=-LARGE, fully_masked="nan", measured="keras 3.15.1"),
    # The same with return_attention_scores=True or dropout.
    "keras_mha_scores": Convention(mask_value=-1e9, fully_masked="zero_probs", measured="keras 3.15.1"),
    # layers.Attention: inputs are [q, v, k]; rows of its query mask are set to zero. It adds -1e9.
    "keras_attention": Convention(
        mask_op="add", mask_value=-1e9, fully_masked="nan", scale=1.0, measured="keras 3.15.1"
    ),
    # --- ONNX ------------------------------------------------------------------------------------------------
    # Attention of opset 23, 24, 25 as onnx.reference does it. q_offset is the length of the past, or
    # nonpad_kv_seqlen - (query length), or 0. A mask that is too short forbids the rest. -1 in a window is None.
    # Where no key takes part the answer is 0 even of NaN, here of numbers only. refattn.frameworks.onnx does all of it.
    "onnx_23": Convention(mask_op="add", measured="onnx 1.23.2"),
    "onnx_24": Convention(mask_op="add", measured="onnx 1.23.2"),
    "onnx_25": Convention(mask_op="add", measured="onnx 1.23.2"),
    # Up to onnx 1.21: the soft cap lets masked keys in again, and qk_matmul_output_mode 1 is "biased", 2 "softcapped".
    # A mask of bool with is_causal is NaN everywhere there, which is not imitated.
    # (onnx 1.18 differs again: gqa_order="tile", and a past moves no diagonal.)
    "onnx_23_legacy": Convention(mask_op="add", fully_masked="nan", softcap_after="mask", measured="onnx 1.19.1"),
    # --- ONNX Runtime ----------------------------------------------------------------------------------------
    # Attention of opset 23 to 25, whose scale has the precision of float32. A bias of -inf, or (23, 24) of the lowest
    # float32, is a mask: give it as attn_mask. Where no key takes part the answer is 0 even of NaN.
    "ort_attention": Convention(mask_op="add", fully_masked="zero_masked_only", measured="onnxruntime 1.32.0"),
    # com.microsoft.MultiHeadAttention: scale 0 is None; key_padding_mask m is attn_bias = -10000 (1 - m).
    # unidirectional with more keys than queries and no past is wrong there (its last row sees everything).
    "ort_mha": Convention(mask_op="add", fully_masked="nan", measured="onnxruntime 1.32.0"),
    # com.microsoft.GroupQueryAttention: kv_seqlens = seqlens_k + 1; scale 0 is None; local_window_size w is
    # window=(w - 1, 0); head_sink is sinks. Only what is padding on the right is skipped: NaN in a future v stays.
    "ort_gqa": Convention(masked_values="skip", is_causal=True, q_offset="bottom_right", measured="onnxruntime 1.32.0"),
    # --- kernels, and other frameworks -----------------------------------------------------------------------
    # flash-attn from 2.1 on: (B, T, H, D), or packed. -1 in a window is None, and causal makes its right side 0. The
    # lse of an empty row is +inf in FlashAttention-2. Its kernels need a GPU: measured is attention_ref of its tests.
    "flash_attn": Convention(q_offset="bottom_right", measured="flash-attn 0251105a, attention_ref"),
    # memory_efficient_attention: (B, M, H, K). The class of the mask says where the diagonal is (...FromBottomRight);
    # LocalAttentionMask(w) is window=(w - 1, 0). Its masks were run, its kernels (which need a GPU) not.
    "xformers": Convention(mask_op="add", fully_masked="nan", measured="xformers 0.0.35, masks only"),
    # mlx.core.fast.scaled_dot_product_attention, on the CPU: scale has no default there; masks of numbers are biases.
    "mlx": Convention(mask_value="lowest", fully_masked="nan", q_offset="bottom_right", measured="mlx 0.32.4"),
    # F.scaled_dot_product_attention: (B, T, H, D); scale 0 is None; a mask is dropped where is_causal. What is masked
    # keeps e^-64 of the largest probability there, which is not imitated.
    "paddle": Convention(mask_op="add", fully_masked="nan", measured="paddlepaddle 3.3.1"),
    # ScaledDotProductAttention-13: a mask is dropped where it is causal; without keys its answer is not defined.
    "openvino": Convention(mask_op="add", fully_masked="nan", measured="openvino 2026.4.1"),
    # window_left is window=(w, None); its lse has base 2; with a custom_mask causal is dropped; its only bias is ALiBi,
    # which is inside the soft cap.
    "flashinfer": Convention(q_offset="bottom_right", softcap_after="bias", measured=NOT_RUN),
    # cuDNN's front end, after the reference of its tests: window=(left_bound - 1, right_bound).
    "cudnn": Convention(fully_masked="nan", scale=1.0, measured=NOT_RUN),
    # Hugging Face transformers, eager_attention_forward of Llama and most others: masks are biases of 0 and the lowest
    # number, and causality is part of them; sliding_window w is window=(w - 1, 0), or (w, w) where nothing is causal.
    "hf_eager": Convention(
        mask_op="add",
        mask_value="lowest",
        fully_masked="nan",
        softmax_precision="float32",
        measured="transformers 5.24.0",
    ),
    # gpt-oss, model.sdpa: (tokens, heads, groups, D); always causal, always sinks; sliding_window w is
    # window=(w - 1, None), 0 is None.
    "gpt_oss": Convention(mask_op="add", fully_masked="nan", is_causal=True, measured="gpt-oss 7b583341"),
}
