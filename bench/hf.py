"""Small random models of Hugging Face families: a tiny configuration each, with inputs that they accept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BATCH, LENGTH, SIDE = 2, 12, 64
MIXTURES = ("mixtral",)

# Sizes under all the names that configurations give them; each configuration takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 64, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "n_embd": 64,
    "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 128, "d_model": 64, "d_ff": 128, "d_kv": 16,
    "num_layers": 2, "num_heads": 4,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_key_value_heads": 2, "head_dim": 16, "ffn_dim": 128,
    "embedding_size": 64, "image_size": SIDE, "patch_size": 8, "state_size": 8, "time_step_rank": 8,
    "word_embed_proj_dim": 64, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32,
    "conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2, "num_local_experts": 4, "sliding_window": 32,
    "rotary_dim": 8, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "hidden_size": 64},
    "swin": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "swinv2": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "focalnet": {"embed_dim": 32, "depths": [1, 1], "patch_size": 4, "focal_levels": [2, 2], "focal_windows": [3, 3],
                 "hidden_sizes": [32, 64]},
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "convnextv2": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "segformer": {"hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
                  "patch_sizes": [7, 3, 3, 3]},
    "resnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]},
    "regnet": {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "groups_width": 8},
    "poolformer": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
                   "strides": [4, 2], "padding": [2, 1]},
    "mobilevit": {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 16, 24, 32, 40, 80], "patch_size": 2},
    "levit": {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
              "image_size": 128, "patch_size": 16},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "mobilenet_v1": {}, "mobilenet_v2": {},
    "detr": {"use_timm_backbone": False, "use_pretrained_backbone": False, "num_queries": 8,
             "backbone_config": "resnet"},
    "mamba": {"conv_kernel": 4},
    "mamba2": {"conv_kernel": 4, "num_heads": 8, "head_dim": 16, "hidden_size": 64, "expand": 2, "n_groups": 2,
               "chunk_size": 4},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "dinov2": {"patch_size": 8}, "beit": {"patch_size": 8},
    "gemma2": {"query_pre_attn_scalar": 16}, "falcon": {"num_kv_heads": 4},
    "stablelm": {"num_key_value_heads": 4}, "gptj": {"rotary_dim": 8}, "phi": {"num_key_value_heads": 4},
}  # fmt: skip
SEQ2SEQ = {"t5", "bart", "mbart", "pegasus", "marian", "m2m_100"}
ENCODERS = {
    "bert", "roberta", "distilbert", "deberta-v2", "albert", "electra", "camembert", "xlm-roberta", "mpnet",
}  # fmt: skip
VISION = {
    "vit", "deit", "beit", "swin", "swinv2", "convnext", "convnextv2", "segformer", "resnet", "regnet", "poolformer",
    "mobilenet_v1", "mobilenet_v2", "mobilevit", "levit", "dinov2", "efficientnet", "focalnet",
}  # fmt: skip
CAUSAL = {
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "llama", "qwen2", "qwen3", "mistral", "mixtral",
    "gemma", "gemma2", "phi", "phi3", "stablelm", "starcoder2", "olmo", "granite", "cohere", "mamba", "mamba2",
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Any]:
    """(model, inputs by name) of one family."""
    import transformers

    library: Any = transformers  # its classes are chosen by name here
    config = _config(name)
    if name in VISION:
        # Two classes serve some families, and the automatic choice cannot tell which is meant.
        named = {"deit": "DeiTForImageClassification", "levit": "LevitForImageClassification"}
        if name in named:
            model = getattr(library, named[name])._from_config(config)
        else:
            model = library.AutoModelForImageClassification.from_config(config)
        side = getattr(config, "image_size", SIDE) or SIDE
        side = side if isinstance(side, int) else side[0]
        return model, {"pixel_values": torch.randn(BATCH, 3, min(side, 224), min(side, 224))}
    if name in MIXTURES:  # its default is a kernel of its own that ONNX does not have
        config._experts_implementation = "batched_mm"
    if name in CAUSAL:
        return library.AutoModelForCausalLM.from_config(config), {"input_ids": _tokens()}
    # With a head, as models are deployed: the last hidden state of a bare encoder is an output, so it cannot shrink.
    kinds = library.AutoModelForSequenceClassification if name in ENCODERS else library.AutoModel
    return kinds.from_config(config), _inputs(name, config)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    if name in ("clip", "siglip"):
        return _two_towers(name)
    own = dict(OWN.get(name, {}))
    if own.get("backbone_config") == "resnet":
        own["backbone_config"] = AutoConfig.for_model(
            "resnet", embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], out_features=["stage4"]
        )
    plain = AutoConfig.for_model(name)
    maps = plain.attribute_map
    known = {
        key: value
        for key, value in SIZES.items()
        if (key in plain.to_dict() or key in maps) and maps.get(key, key) not in own
    }
    return AutoConfig.for_model(name, **{**known, **own})


def _two_towers(name: str) -> Any:
    from transformers import AutoConfig

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, "vocab_size": 100, "max_position_embeddings": 64, "eos_token_id": 2, "projection_size": 64}
    vision = {**small, "image_size": SIDE, "patch_size": 8}
    options = {"projection_dim": 64} if name == "clip" else {}
    return AutoConfig.for_model(name, text_config=text, vision_config=vision, **options)


def _tokens() -> torch.Tensor:
    return torch.randint(3, 100, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def _inputs(name: str, config: Any) -> dict[str, torch.Tensor]:
    if name in SEQ2SEQ:
        return {"input_ids": _tokens(), "decoder_input_ids": _tokens()}
    if name in ("clip", "siglip"):
        return {"input_ids": _tokens(), "pixel_values": torch.randn(BATCH, 3, SIDE, SIDE)}
    if name == "whisper":
        return {"input_features": torch.randn(BATCH, config.num_mel_bins, 64), "decoder_input_ids": _tokens()}
    if name in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(BATCH, 2000)}
    if name == "detr":
        return {"pixel_values": torch.randn(BATCH, 3, 128, 128)}
    return {"input_ids": _tokens()}
