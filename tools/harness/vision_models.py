"""Tiny vision models of random weights, a family each, made with mlx-vlm's own classes."""

import json

from mlxserver.engine.mlx import mx

import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_vlm.utils import get_model_and_args, update_module_configs
from PIL import Image as Picture

from tools.harness.models import tiny_llama

# Chat templates in the manner of each family: where its images stand, and whether content is text or a list of parts.
_PARTS = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content -%}
{%- if part.type == 'image' -%}{{ 'IMAGE' }}{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + parts(message.content) + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
_LISTS_ONLY = """\
{%- for message in messages -%}
{{- message['role'] | capitalize }}
{%- if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif -%}
{%- for line in message['content'] -%}
{%- if line['type'] == 'text' -%}{{ line['text'] }}{%- elif line['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}
{%- endfor -%}{{ '<end_of_utterance>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 32,
    "in_channels": 3,
    "in_chans": 3,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
}
_QWEN_PIXELS = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 4096}
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_IDEFICS_TOKENS = (
    *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)
_NORMAL = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _idefics3(ids):
    processor = {"image_processor_type": "Idefics3ImageProcessor", "do_image_splitting": True, **_NORMAL}
    processor |= {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    return (
        {
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": _SIGLIP | {"model_type": "idefics3"},
            "scale_factor": 2,
            "image_token_id": ids["<image>"],
        },
        {"preprocessor_config.json": processor, "processor_config.json": {"image_seq_len": 4}},
    )


def _gemma3(ids):
    processor = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}, **_NORMAL}
    text = _TEXT | {"rope_theta": 1e6, "sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
    return (
        {
            "text_config": text | {"model_type": "gemma3_text", "mm_tokens_per_image": 4},
            "vision_config": _SIGLIP,
            "hidden_size": 64,
            "mm_tokens_per_image": 4,
            "image_token_index": ids["<image_soft_token>"],
            "pad_token_id": ids["<pad>"],
        },
        {"preprocessor_config.json": processor, "processor_config.json": {"image_seq_length": 4}},
    )


def _qwen_ids(ids):
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _qwen2_5_vl(ids):
    config = _TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}} | _qwen_ids(ids)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", **_QWEN_PIXELS, **_NORMAL}
    return (config | {"vision_config": _QWEN_VISION}, {"preprocessor_config.json": processor})


def _qwen3_vl(ids):
    text = _TEXT | {"model_type": "qwen3_vl_text", "num_hidden_layers": 3}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [3, 3, 2]}}
    processor = {"image_processor_type": "Qwen2VLImageProcessorFast", **_QWEN_PIXELS, **_NORMAL}
    vision = _QWEN_VISION | {"model_type": "qwen3_vl", "deepstack_visual_indexes": [0, 1]}
    return (
        {"text_config": text, "vision_config": vision} | _qwen_ids(ids),
        {"preprocessor_config.json": processor},
    )


def _qwen3_5(ids):
    text = _TEXT | {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "head_dim": 32,
        "rope_parameters": {
            "type": "default",
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    }
    processor = {"image_processor_type": "Qwen2VLImageProcessorFast", **_QWEN_PIXELS, **_NORMAL}
    vision = _QWEN_VISION | {"model_type": "qwen3_5", "deepstack_visual_indexes": []}
    return (
        {"text_config": text, "vision_config": vision} | _qwen_ids(ids),
        {"preprocessor_config.json": processor},
    )


def _qwen2_vl(ids):
    config, files = _qwen2_5_vl(ids)
    vision = _QWEN_VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return config | {"vision_config": vision}, files


def _of_experts(make, model_type):
    def make_of_experts(ids):
        config, files = make(ids)
        text = config["text_config"] | {"model_type": f"{model_type}_text", "norm_topk_prob": True}
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 32}
        vision = config["vision_config"] | {"model_type": model_type}
        return config | {"text_config": text, "vision_config": vision}, files

    return make_of_experts


_PIXTRAL_VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "patch_size": 8,
    "image_size": 32,
}
_PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def _mistral3(ids):
    processor = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 32}, **_NORMAL}
    processor |= {"patch_size": {"height": 8, "width": 8}}
    return (
        {
            "text_config": _TEXT | {"model_type": "mistral"},
            "vision_config": _PIXTRAL_VISION,
            "image_token_index": ids["[IMG]"],
            "spatial_merge_size": 2,
        },
        {
            "preprocessor_config.json": processor,
            "processor_config.json": {"patch_size": 8, "spatial_merge_size": 2},
        },
    )


def _pixtral(ids):
    config, files = _mistral3(ids)
    return config | {"spatial_merge_size": 1}, files | {"processor_config.json": {"patch_size": 8}}


def _llava(ids):
    processor = {"image_processor_type": "CLIPImageProcessor", **_NORMAL}
    processor |= {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return (
        {
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": _SIGLIP | {"model_type": "clip_vision_model"},
            "image_token_index": ids["<image>"],
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -2,
        },
        {
            "preprocessor_config.json": processor,
            "processor_config.json": {
                "patch_size": 8,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            },
        },
    )


def _lfm2_vl(ids):
    text = _TEXT | {"model_type": "lfm2", "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
    text |= {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "conv_dim": 64, "tie_word_embeddings": True}
    text |= {"block_dim": 64, "block_ff_dim": 128, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0}
    text |= {"block_auto_adjust_ff_dim": False}
    tiles = {"tile_size": 32, "encoder_patch_size": 8, "downsample_factor": 2, "max_tiles": 4, "min_tiles": 2}
    tiles |= {"min_image_tokens": 1, "max_image_tokens": 4, "max_pixels_tolerance": 1.5}
    vision = _SIGLIP | {"model_type": "lfm2_vl", "num_patches": 16}
    return (
        tiles
        | {"text_config": text, "vision_config": vision, "image_token_id": ids["<image>"], "projector_hidden_size": 64},
        {"preprocessor_config.json": {"image_processor_type": "Lfm2VlImageProcessorFast", **tiles, **_NORMAL}},
    )


def _kimi_vl(ids):
    text = _TEXT | {"model_type": "deepseek_v3", "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None}
    text |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1}
    text |= {"n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    text |= {"topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "routed_scaling_factor": 1.0}
    vision = {"model_type": "moonvit", "hidden_size": 32, "embed_dim": 32, "intermediate_size": 64, "depth": 2}
    vision |= {"num_heads": 2, "patch_size": 8, "spatial_patch_size": 8, "init_pos_emb_height": 8}
    vision |= {"init_pos_emb_width": 8, "merge_kernel_size": [2, 2]}
    return (
        {"text_config": text, "vision_config": vision, "media_placeholder_token_id": ids["<|media_pad|>"]},
        {"preprocessor_config.json": {"image_processor_type": "KimiVLImageProcessor", "patch_size": 8}},
    )


def _internvl(ids):
    vision = _SIGLIP | {"model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8]}
    return (
        {
            "text_config": _TEXT | {"model_type": "qwen3"},
            "vision_config": vision,
            "image_token_id": ids["<IMG_CONTEXT>"],
            "max_dynamic_patch": 3,
        },
        {
            "preprocessor_config.json": {"image_processor_type": "GotOcr2ImageProcessorFast", **_NORMAL},
            "processor_config.json": {"image_seq_length": 4},
        },
    )


def _internvl_chat(ids):
    """As InternVL's makers publish it: llm_config, and no word of a token of images."""
    vision = _SIGLIP | {"model_type": "intern_vit_6b", "qk_normalization": True, "norm_type": "rms_norm"}
    text = _TEXT | {"model_type": "qwen2", "attention_bias": True}
    tiles = {"force_image_size": 32, "max_dynamic_patch": 3, "min_dynamic_patch": 1, "use_thumbnail": True}
    return (
        tiles | {"llm_config": text, "vision_config": vision, "downsample_ratio": 0.5},
        {"preprocessor_config.json": {"image_processor_type": "CLIPFeatureExtractor", "size": 32}},
    )


def _aya_vision(ids):
    text = _TEXT | {"model_type": "cohere2", "layer_norm_eps": 1e-5, "logit_scale": 0.5, "tie_word_embeddings": True}
    text |= {"sliding_window": 24, "sliding_window_pattern": 2, "attention_bias": False, "layer_norm_bias": False}
    tiles = {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "min_patches": 1, "max_patches": 3}
    return (
        {
            "text_config": text,
            "vision_config": _SIGLIP,
            "image_token_index": ids["<|IMG_PATCH|>"],
            "downsample_factor": 2,
            "alignment_intermediate_size": 64,
            "max_splits_per_img": 3,
        },
        {
            "preprocessor_config.json": {"image_processor_type": "GotOcr2ImageProcessor", **tiles, **_NORMAL},
            "processor_config.json": {"patch_size": 8, "img_size": 32, "downsample_factor": 2},
        },
    )


def _llava_onevision(ids):
    sizes = [[32, 32], [32, 64], [64, 32], [64, 64]]
    processor = {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": sizes, **_NORMAL}
    return (
        {
            "text_config": _TEXT | {"model_type": "qwen2", "num_hidden_layers": 3, "intermediate_size": 112},
            "vision_config": _SIGLIP,
            "image_token_index": ids["<image>"],
            "video_token_index": ids["<video>"],
            "image_grid_pinpoints": sizes,
        },
        {
            "preprocessor_config.json": processor | {"size": {"height": 32, "width": 32}},
            "processor_config.json": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        },
    )


def _llama4(ids):
    text = _TEXT | {"model_type": "llama4_text", "num_hidden_layers": 4, "num_local_experts": 4, "use_qk_norm": True}
    text |= {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 128}
    text |= {"attention_chunk_size": 32, "attention_bias": False, "rope_scaling": None}
    vision = _SIGLIP | {"model_type": "llama4_vision_model", "initializer_range": 0.02, "norm_eps": 1e-5}
    vision |= {"num_channels": 3, "pixel_shuffle_ratio": 0.5, "projector_dropout": 0.0, "rope_theta": 10000.0}
    vision |= {"projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64, "hidden_size": 64}
    vision |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "default", "intermediate_size": 256}
    vision |= {"patch_size": 14, "image_size": 56}  # the processor knows no other size of a patch
    return (
        {"text_config": text, "vision_config": vision, "image_token_index": ids["<|patch|>"]},
        {"preprocessor_config.json": {"size": {"height": 56, "width": 56}, "max_patches": 4, **_NORMAL}},
    )


def _gemma4(ids):
    text = _TEXT | {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "global_head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.5, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"partial_rotary_factor": 1.0, "rope_theta": 1e4, "rope_type": "default"},
        },
        "tie_word_embeddings": True,
        "pad_token_id": ids["<pad>"],
    }
    vision = _SIGLIP | {
        "model_type": "gemma4_vision",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "position_embedding_size": 64,
        "pooling_kernel_size": 2,
        "default_output_length": 4,
        "rms_norm_eps": 1e-6,
    }
    return (
        {
            "text_config": text,
            "vision_config": vision,
            "hidden_size": 64,
            "audio_config": None,
            "image_token_id": ids["<|image|>"],
            "pad_token_id": ids["<pad>"],
            "tie_word_embeddings": True,
        },
        {
            "processor_config.json": {
                "image_processor": {"patch_size": 8, "max_soft_tokens": 24, "pooling_kernel_size": 2}
            }
        },
    )


def _gemma4_large(ids):
    config, files = _gemma4(ids)
    text = {"use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    return config | {"text_config": config["text_config"] | text}, files


_LFM2_TOKENS = (
    *("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"),
    *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
)
_AYA_TOKENS = (
    *("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"),
    *("TILE", "TILE_GLOBAL"),
)
_LLAMA4_TOKENS = (
    *("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>"),
    "<|tile_y_separator|>",
)
_INTERN_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
_QWEN_TEMPLATE = _PARTS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
# Per family: its config and processor files from the ids of its tokens, these tokens, and its chat template.
FAMILIES = {
    "smolvlm": (_idefics3, _IDEFICS_TOKENS, _LISTS_ONLY),
    "idefics3": (_idefics3, _IDEFICS_TOKENS, _LISTS_ONLY),
    "gemma3": (
        _gemma3,
        ("<pad>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        _PARTS.replace("IMAGE", "<start_of_image>"),
    ),
    "qwen2_vl": (_qwen2_vl, _QWEN_TOKENS, _QWEN_TEMPLATE),
    "qwen2_5_vl": (_qwen2_5_vl, _QWEN_TOKENS, _QWEN_TEMPLATE),
    "qwen3_vl": (_qwen3_vl, _QWEN_TOKENS, _QWEN_TEMPLATE),
    "qwen3_vl_moe": (_of_experts(_qwen3_vl, "qwen3_vl_moe"), _QWEN_TOKENS, _QWEN_TEMPLATE),
    "qwen3_5": (_qwen3_5, _QWEN_TOKENS, _QWEN_TEMPLATE),
    "qwen3_5_moe": (_of_experts(_qwen3_5, "qwen3_5_moe"), _QWEN_TOKENS, _QWEN_TEMPLATE),
    "gemma4": (_gemma4, ("<pad>", "<|image>", "<image|>", "<|image|>"), _PARTS.replace("IMAGE", "<|image|>")),
    "gemma4-large": (
        _gemma4_large,
        ("<pad>", "<|image>", "<image|>", "<|image|>"),
        _PARTS.replace("IMAGE", "<|image|>"),
    ),
    "mistral3": (_mistral3, _PIXTRAL_TOKENS, _PARTS.replace("IMAGE", "[IMG]")),
    "pixtral": (_pixtral, _PIXTRAL_TOKENS, _PARTS.replace("IMAGE", "[IMG]")),
    "llava": (_llava, ("<image>",), _PARTS.replace("IMAGE", "<image>\n")),
    "lfm2_vl": (_lfm2_vl, _LFM2_TOKENS, _PARTS.replace("IMAGE", "<image>")),
    "kimi_vl": (
        _kimi_vl,
        ("<|media_start|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>"),
        _PARTS.replace("IMAGE", "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"),
    ),
    "internvl": (_internvl, _INTERN_TOKENS, _PARTS.replace("IMAGE", "<IMG_CONTEXT>\n")),
    "internvl_chat": (_internvl_chat, _INTERN_TOKENS, _PARTS.replace("IMAGE", "<image>\n")),
    "aya_vision": (_aya_vision, _AYA_TOKENS, _PARTS.replace("IMAGE", "<image>")),
    "llava_onevision": (_llava_onevision, ("<image>", "<video>"), _PARTS.replace("IMAGE", "<image>\n")),
    "llama4": (_llama4, _LLAMA4_TOKENS, _PARTS.replace("IMAGE", "<|image|>")),
}
_TIED = ("gemma3",)  # whose output layer is their embedding, always
_NAMED = {  # what a family's processor asks of its tokenizer by name
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
    "gemma4": {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"},
}


def tiny_vision(path, family, seed=0, *, text=None, vision=None, files=None, **sizes):
    """Write a vision model of a family.

    text, vision, sizes: fields of its config.json's parts and of itself; files: of other files, by their names.
    """
    make, tokens, template = FAMILIES[family]
    tiny_llama(path, template=template)
    ids = _add_tokens(path, tokens, _NAMED.get(family.partition("-")[0], {}))
    config, own_files = make(ids)
    files = {name: content | (files or {}).get(name, {}) for name, content in own_files.items()}
    config |= {"vision_config": config["vision_config"] | (vision or {})} | sizes
    nested = next((name for name in ("text_config", "llm_config") if name in config), None)
    if nested:
        config[nested] = config[nested] | (text or {})
    else:
        config |= text or {}
    vocab = max(max(ids.values()) + 1, (text or {}).get("vocab_size", 0))
    family = family.partition("-")[0]
    config |= {"model_type": family, "vocab_size": vocab, "torch_dtype": "float32", "eos_token_id": ids["<|im_end|>"]}
    if nested:
        config[nested] = config[nested] | {"vocab_size": vocab}
    files["config.json"] = config
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2))
    weights = dict(tree_flatten(_random(_model(config), seed, ids["<|im_end|>"]).parameters()))
    if family in _TIED:
        del weights["language_model.lm_head.weight"]
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
    return path


def _add_tokens(path, tokens, named):
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    first = max(each["id"] for each in tokenizer["added_tokens"])
    first = max(first, *tokenizer["model"]["vocab"].values()) + 1
    for number, token in enumerate(tokens):
        added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": first + number, "content": token, "special": True, **added})
    file.write_text(json.dumps(tokenizer))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"extra_special_tokens": named} if named else {}
    settings |= {"pad_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return {each["content"]: each["id"] for each in tokenizer["added_tokens"]} | tokenizer["model"]["vocab"]


def _model(config):
    classes, _ = get_model_and_args(config=dict(config))
    config = json.loads(json.dumps(config))
    config.setdefault("text_config", config.pop("llm_config", {}))
    arguments = classes.ModelConfig.from_dict(config)
    arguments = update_module_configs(arguments, classes, config, ["text", "vision", "perceiver", "projector", "audio"])
    return classes.Model(arguments)


def _random(model, seed, eos):
    """The model with random weights that tell pictures apart; greedy decoding never ends."""
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(name, array):
        if "norm" in name and array.ndim == 1:
            return array
        scale = array.shape[-1] ** 0.5 if array.ndim > 1 else 10.0
        if array.ndim > 2:
            scale = np.prod(array.shape[1:]) ** 0.5
        return mx.random.normal(array.shape, key=next(keys)) / scale

    model.update(tree_map_with_path(draw, model.parameters()))
    for name, array in tree_flatten(model.parameters()):
        if name.endswith("lm_head.weight"):
            array[eos] = 0
    return model


def picture(seed, width=48, height=32):
    """A picture of coloured squares."""
    squares = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Picture.fromarray(squares, "RGB").resize((width, height), Picture.Resampling.NEAREST)
