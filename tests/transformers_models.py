"""Models of the `transformers` package, tiny and random, and the norms that they write by hand.

The counts come from reading the models: instances of classes whose forward is arithmetic, and
lines such as `x / x.norm(dim=-1, keepdim=True)`. `nn.LayerNorm`, its subclasses that only permute,
`F.layer_norm` and `F.normalize` are native and not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

Build = Callable[[], tuple[nn.Module, dict[str, Any]]]

BATCH, LENGTH, WORDS, HIDDEN, HEADS = 2, 8, 32, 16, 2
DECODER: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
}
VISION: dict[str, Any] = {**ENCODER, "image_size": 8, "patch_size": 4}
TEXT: dict[str, Any] = {
    **ENCODER,
    "vocab_size": WORDS,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA: dict[str, Any] = {"state_size": 4, "num_heads": 4, "head_dim": 8, "chunk_size": 4}


@dataclass(frozen=True)
class Model:
    """A model and the norms that it writes by hand.

    Attributes:
        build: makes the model and the keyword arguments of its call.
        modules: by class of norm: the kind of its formula, and how often it is called.
        lines: by kind: how many norms are written out where they are needed.
    """

    build: Build
    modules: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, int]:
        """How many norms of each kind there are."""
        counts = dict(self.lines)
        for kind, count in self.modules.values():
            counts[kind] = counts.get(kind, 0) + count
        return counts


def made(model: Model, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """The model with weights away from their starting values, and the arguments of its call."""
    torch.manual_seed(0)
    module, arguments = model.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.5 * torch.rand_like(buffer))
    cast = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in arguments.items()
    }
    return module.to(dtype), cast


def words(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, WORDS, (BATCH, length))


def images(size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(BATCH, channels, size, size)


def configured(name: str, **settings: Any) -> Any:
    """A configuration of the package, by its class without "Config"."""
    return getattr(transformers, f"{name}Config")(**settings)


def model_of(name: str, config: Any) -> Any:
    """A model with attention in plain matrix products, and experts too where there are some."""
    config._attn_implementation = "eager"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "batched_mm"
    return getattr(transformers, name)(config)


def decoder(name: str, **settings: Any) -> Build:
    """A language model without its head, called with words."""
    return lambda: (
        model_of(f"{name}Model", configured(name, **{**DECODER, **settings})),
        {"input_ids": words()},
    )


def rms(name: str, count: int, /, **settings: Any) -> Model:
    """A language model all of whose norms are `<name>RMSNorm`."""
    family = settings.pop("norm", f"{name}RMSNorm")
    return Model(decoder(name, **settings), {family: ("rms_norm", count)})


def towers(name: str, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """The configurations of a model of texts and images."""
    return {
        "text_config": configured(f"{name}Text", **TEXT, **text).to_dict(),
        "vision_config": configured(f"{name}Vision", **VISION, **vision).to_dict(),
    }


def vision(name: str, size: int, **settings: Any) -> Build:
    """A model of images."""
    return lambda: (
        model_of(f"{name}Model", configured(name, **settings)),
        {"pixel_values": images(size)},
    )


def t5() -> tuple[nn.Module, dict[str, Any]]:
    settings = {"vocab_size": WORDS, "d_model": HIDDEN, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    config = configured("T5", **settings, num_heads=HEADS, use_cache=False)
    return model_of("T5Model", config), {"input_ids": words(), "decoder_input_ids": words(5)}


def idefics() -> tuple[nn.Module, dict[str, Any]]:
    eyes = {"embed_dim": 16, "image_size": 8, "patch_size": 4, "num_hidden_layers": 1}
    config = configured(
        "Idefics",
        **{**DECODER, "num_key_value_heads": HEADS},
        additional_vocab_size=0,
        cross_layer_interval=1,
        qk_layer_norms=True,
        use_resampler=False,
        vision_config={**eyes, "num_attention_heads": 2, "intermediate_size": 16},
    )
    arguments = {
        "input_ids": words(),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "pixel_values": images(8)[:, None],
        "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
    }
    return model_of("IdeficsModel", config), arguments


def image_gpt() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"vocab_size": WORDS + 1, "n_positions": 16, "n_embd": HIDDEN, "n_layer": 1}
    config = configured("ImageGPT", **sizes, n_head=HEADS, use_cache=False)
    return model_of("ImageGPTModel", config), {"input_ids": words()}


def deberta() -> tuple[nn.Module, dict[str, Any]]:
    positions = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    config = configured("Deberta", **TEXT, **positions)
    return model_of("DebertaModel", config), {"input_ids": words()}


def detr_backbone() -> tuple[nn.Module, dict[str, Any]]:
    """DETR's convolutional part; its transformer has native norms only."""
    sizes = {"embedding_size": 8, "hidden_sizes": [16], "depths": [1]}
    resnet = configured("ResNet", **sizes, layer_type="basic", out_features=["stage1"])
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": HIDDEN, "num_queries": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    wide = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    source = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    config = configured("Detr", backbone_config=resnet, **source, **layers, **heads, **wide)
    backbone = model_of("DetrModel", config).backbone
    mask = torch.ones(BATCH, 32, 32, dtype=torch.long)
    return backbone, {"pixel_values": images(32), "pixel_mask": mask}


def siglip() -> tuple[nn.Module, dict[str, Any]]:
    config = configured("Siglip", **towers("Siglip", {"projection_size": HIDDEN}, {}))
    model = model_of("SiglipModel", config)
    return model, {"input_ids": words(), "pixel_values": images(8)}


def owl_vit() -> tuple[nn.Module, dict[str, Any]]:
    config = configured("OwlViT", **towers("OwlViT", {}, {}), projection_dim=HIDDEN)
    model = model_of("OwlViTForObjectDetection", config)
    return model, {"input_ids": words(), "pixel_values": images(8)}


def x_clip() -> tuple[nn.Module, dict[str, Any]]:
    frames = {"mit_hidden_size": 8, "mit_intermediate_size": 8, "mit_num_hidden_layers": 1}
    frames |= {"mit_num_attention_heads": HEADS, "num_frames": 2}
    prompts = {"projection_dim": 8, "prompt_num_attention_heads": HEADS, "prompt_layers": 1}
    model = model_of("XCLIPModel", configured("XCLIP", **towers("XCLIP", {}, frames), **prompts))
    return model, {"input_ids": words(), "pixel_values": torch.randn(BATCH, 2, 3, 8, 8)}


def vit_mae() -> tuple[nn.Module, dict[str, Any]]:
    behind = {f"decoder_{name}": value for name, value in ENCODER.items()}
    config = configured("ViTMAE", **VISION, **behind, norm_pix_loss=True)
    model = model_of("ViTMAEForPreTraining", config)
    return model, {"pixel_values": images(8), "noise": torch.rand(BATCH, 4)}


def patch_tst() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4}
    layers = {"d_model": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8}
    config = configured("PatchTST", **sizes, **layers, scaling="std")
    return model_of("PatchTSTModel", config), {"past_values": torch.randn(BATCH, 16, 2)}


def moonshine() -> tuple[nn.Module, dict[str, Any]]:
    config = configured("MoonshineStreamingEncoder", **ENCODER, num_key_value_heads=2, head_dim=8)
    from transformers.models.moonshine_streaming import modeling_moonshine_streaming as moonshine

    config._attn_implementation = "eager"
    encoder = moonshine.MoonshineStreamingEncoder(config)
    return encoder, {"input_values": torch.randn(BATCH, 5 * 80)}


STAGES: dict[str, Any] = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
SAM: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "output_channels": 8,
    "num_hidden_layers": 1,
    "mlp_dim": 16,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
    "window_size": 2,
    "num_pos_feats": 4,
    "global_attn_indexes": [],
}
VITDET: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "pretrain_image_size": 16,
    "patch_size": 4,
    "residual_block_indices": [0],
    "window_block_indices": [],
}
SWIN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 0,
    "num_key_value_heads": HEADS,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "mlp_only_layers": [0],
}
EXPERTS: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
RECURRENT: dict[str, Any] = {"lru_width": 16, "attention_window_size": 8}
BAMBA: dict[str, Any] = {
    "num_hidden_layers": 2,
    "attn_layer_indices": [1],
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
LLAMA4: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["full_attention"],
    "interleave_moe_layer_step": 10,
    "intermediate_size_mlp": 16,
}

MODELS: dict[str, Model] = {
    # the weight multiplies after the cast back
    "llama": rms("Llama", 5, num_hidden_layers=2),
    "qwen2": rms("Qwen2", 3),
    "phi3": rms("Phi3", 3),
    "mistral": rms("Mistral", 3),
    "mixtral": rms("Mixtral", 3, **EXPERTS),
    # (1 + w), before the cast back
    "gemma": rms("Gemma", 3, head_dim=8),
    # also after attention and after the MLP, before the residual is added
    "gemma2": rms("Gemma2", 5, head_dim=8),
    "olmo2": rms("Olmo2", 5),
    # also of queries and keys, which rotate and repeat afterwards
    "gemma3": rms(
        "Gemma3Text", 7, norm="Gemma3RMSNorm", head_dim=8, layer_types=["full_attention"]
    ),
    "qwen3": rms("Qwen3", 5, head_dim=8),
    # no weight
    "nanochat": rms("NanoChat", 6, head_dim=8),
    "llama4": Model(
        decoder("Llama4Text", **EXPERTS, **LLAMA4),
        {"Llama4TextRMSNorm": ("rms_norm", 3), "Llama4TextL2Norm": ("rms_norm", 2)},
    ),
    # compressed queries and keys, split and written into slices
    "deepseek_v3": rms("DeepseekV3", 5, **DEEPSEEK),
    # no bias, weights of heads
    "cohere": Model(decoder("Cohere", use_qk_norm=True), {"CohereLayerNorm": ("layer_norm", 4)}),
    "t5": Model(t5, {"T5LayerNorm": ("rms_norm", 7)}),
    "image_gpt": Model(image_gpt, {"ImageGPTLayerNorm": ("rms_norm", 3)}),
    "deberta": Model(deberta, {"DebertaLayerNorm": ("layer_norm", 3)}),
    "idefics": Model(idefics, {"IdeficsRMSNorm": ("rms_norm", 7)}),
    # state spaces: gated, in groups, without a weight, beside an associative scan
    "mamba": rms("Mamba", 2, state_size=4, time_step_rank=4),
    "falcon_mamba": Model(
        decoder("FalconMamba", state_size=4, time_step_rank=4),
        {"FalconMambaRMSNorm": ("rms_norm", 2), "FalconMambaWeightlessRMSNorm": ("rms_norm", 3)},
    ),
    "mamba2": Model(
        decoder("Mamba2", **MAMBA, n_groups=2, expand=2),
        {"Mamba2RMSNorm": ("rms_norm", 2), "MambaRMSNormGated": ("rms_norm", 1)},
    ),
    "bamba": Model(
        decoder("Bamba", **BAMBA),
        {"BambaRMSNorm": ("rms_norm", 5), "BambaRMSNormGated": ("rms_norm", 1)},
    ),
    "recurrent_gemma": rms("RecurrentGemma", 3, head_dim=8, block_types=["recurrent"], **RECURRENT),
    "xlstm": Model(
        decoder("xLSTM", num_heads=2, num_blocks=1, chunk_size=4, mode="inference"),
        {"xLSTMRMSNorm": ("rms_norm", 3), "xLSTMMultiHeadLayerNorm": ("layer_norm", 1)},
    ),
    # `l2norm` of queries and keys inside the delta rule
    "qwen3_next": Model(
        decoder("Qwen3Next", **LINEAR_ATTENTION),
        {"Qwen3NextRMSNorm": ("rms_norm", 3), "Qwen3NextRMSNormGated": ("rms_norm", 1)},
        {"lp_normalize": 2},
    ),
    # x / x.norm(p=2, dim=-1, keepdim=True), then a matrix product with a temperature
    "siglip": Model(siglip, lines={"lp_normalize": 2}),
    "x_clip": Model(x_clip, lines={"lp_normalize": 2}),
    # two of them x / (x.norm() + 1e-6)
    "owl_vit": Model(owl_vit, lines={"lp_normalize": 3}),
    # targets: each patch by its own mean and unbiased variance
    "vit_mae": Model(vit_mae, lines={"layer_norm": 1}),
    # each series by statistics of what was observed
    "patch_tst": Model(patch_tst, {"PatchTSTStdScaler": ("general", 1)}),
    # each frame of a waveform (B, T): samples in groups
    "moonshine": Model(moonshine, {"MoonshineStreamingFrameCMVN": ("group_norm", 1)}),
    # images
    "convnext": Model(vision("ConvNext", 16, **STAGES, patch_size=2)),
    "convnext_v2": Model(
        vision("ConvNextV2", 16, **STAGES, patch_size=2), {"ConvNextV2GRN": ("general", 2)}
    ),
    "vitdet": Model(vision("VitDet", 16, **VITDET), {"VitDetLayerNorm": ("layer_norm", 3)}),
    "sam": Model(vision("SamVision", 16, **SAM)),
    "detr": Model(detr_backbone, {"DetrFrozenBatchNorm2d": ("affine", 4)}),
    "swin_v2": Model(vision("Swinv2", 16, **SWIN)),
}
