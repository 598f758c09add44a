"""Tiny models of random weights in mlx-lm's own classes, one for each kind of cache and of configuration.

The configurations are like those of mlx-lm's tests/test_models.py. Keys that an architecture does not know are ignored.
"""

import json

from mlxserver.engine.mlx import mx

from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from tools.harness.models import tiny_llama

BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
_MAMBA = {"use_bias": False, "use_conv_bias": True, "conv_kernel": 4, "state_size": 8, "time_step_rank": 4}
_NEMOTRON = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_proj_bias": False,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 2,
    "time_step_limit": [0.001, 100.0],
    "use_bias": False,
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "hybrid_override_pattern": ["M", "*", "M", "-"],
}
_JAMBA = {
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}
_RWKV = {"a_low_rank_dim": 16, "v_low_rank_dim": 16, "gate_low_rank_dim": 16, "decay_low_rank_dim": 16}
_OLMO_HYBRID = {
    "linear_allow_neg_eigval": True,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_key_value_heads": 4,
}
_LLAMA4 = {
    "attention_chunk_size": 32,
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 128,
    "rope_scaling": None,
    "use_qk_norm": True,
    "no_rope_layers": [1, 1, 1, 0],
}

CONFIGS = {
    "llama": {},
    "mamba": _MAMBA,
    "nemotron_h": _MOE | _NEMOTRON,
    "jamba": _MOE | _JAMBA,
    "rwkv7": _RWKV,
    "olmo_hybrid": _DELTA | _OLMO_HYBRID,
    "baichuan_m1": {"sliding_window": 32, "sliding_window_layers": [0, 2], "conv_window": 2},
    "gemma3_text": {"sliding_window": 32, "sliding_window_pattern": 4, "num_key_value_heads": 1},
    "kimi_k25": {"text_config": BASE | _MOE | _MLA | {"model_type": "deepseek_v3"}},
    "llama4": {"text_config": BASE | _MOE | _LLAMA4 | {"model_type": "llama4_text", "num_experts_per_tok": 1}},
}


# More of them: models that can't be batched, and one of experts.
MORE_CONFIGS = {
    "qwen3_moe": _MOE | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma2": {"sliding_window": 32, "tie_word_embeddings": True},
    "bitnet": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 4, "n_inner": 128, "n_head": 4, "n_positions": 2048},
    "afm7": {"hidden_dim": 64, "num_layers": 8, "num_kv_reuse_layers": 3, "num_heads": 4, "num_kv_heads": 2},
}


def random_model(name, **fields):
    """A model of one of CONFIGS or MORE_CONFIGS, with weights like those of a trained one in size."""
    return _make(BASE | {"model_type": name} | (CONFIGS | MORE_CONFIGS)[name] | fields)


def write_random_model(path, config):
    """Write a model of random weights, with the tokenizer and the template of tiny_llama; returns its directory."""
    tiny_llama(path)
    given = json.loads((path / "config.json").read_text())
    config = BASE | config | {name: given[name] for name in ("vocab_size", "eos_token_id", "torch_dtype")}
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(_make(config).parameters())))
    (path / "config.json").write_text(json.dumps(config))
    return path


def _make(config):
    model_class, arguments = _get_classes(config)
    mx.random.seed(1)
    model = model_class(arguments.from_dict(config))
    model.eval()
    mx.eval(model.parameters())
    return model
