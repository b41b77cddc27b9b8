"""The families that are known: diffusers' video transformers, by the names of their classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_zoo.bridge.family import UNSERVED, Arguments, Family, Sizes, largest, register_family


def _config(model: nn.Module) -> Any:
    return model.config


def _tuple_patch(model: nn.Module) -> Sizes:
    f, h, w = _config(model).patch_size
    return f, h, w


def _split_patch(model: nn.Module) -> Sizes:
    config = _config(model)
    return config.get("patch_size_t") or 1, config.patch_size, config.patch_size


def _frames_first(model: nn.Module, arguments: Arguments) -> Sizes:  # noqa: ARG001
    """CogVideoX and AnyFlow have latents (B, F, C, H, W)."""
    f, _, h, w = arguments["hidden_states"].shape[1:]
    return f, h, w


def _packed(model: nn.Module, arguments: Arguments) -> Sizes:  # noqa: ARG001
    """LTX and LTX-2 have packed tokens (B, L, C); their grid is told apart."""
    return arguments["num_frames"], arguments["height"], arguments["width"]


def _channels_last(model: nn.Module, arguments: Arguments) -> Sizes:  # noqa: ARG001
    """Kandinsky 5 and 6 have latents (B, F, H, W, C)."""
    f, h, w = arguments["hidden_states"].shape[1:4]
    return f, h, w


def _kandinsky_shape(attention: nn.Module) -> Sizes:
    project: Any = attention.to_query
    heads: Any = attention.num_heads
    return heads, project.out_features // heads, project.in_features


def _unit_time(model: nn.Module, arguments: Arguments) -> Tensor | None:  # noqa: ARG001
    """Cosmos is told sigma / (sigma + 1), which is the noise time already; of several a sample, the largest."""
    return largest(arguments["timestep"])


WAN = register_family(
    Family(
        name="wan",
        classes=(
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "WanAnimateTransformer3DModel",
            "ChronoEditTransformer3DModel",
        ),
        sites=r"(vace_)?blocks\.\d+\.attn1",
        text="none",
        patch=_tuple_patch,
    )
)
register_family(
    Family(
        name="skyreels_v2",
        classes=("SkyReelsV2Transformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        text="none",
        patch=_tuple_patch,
    )
)
register_family(
    Family(
        name="hunyuan_video",
        classes=("HunyuanVideoTransformer3DModel",),
        sites=r"(single_)?transformer_blocks\.\d+\.attn",
        text="after",
        patch=_split_patch,
    )
)
register_family(
    Family(
        name="hunyuan_video_15",
        classes=("HunyuanVideo15Transformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn",
        text="after",
        patch=_split_patch,
    )
)
register_family(
    Family(
        name="ltx",
        classes=("LTXVideoTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        text="none",
        patch=lambda _: (1, 1, 1),
        latent=_packed,
    )
)
register_family(
    Family(
        name="cogvideox",
        classes=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        sites=r"transformer_blocks\.\d+\.attn1",
        text="before",
        patch=_split_patch,
        latent=_frames_first,
    )
)
register_family(
    Family(
        name="kandinsky5",
        classes=("Kandinsky5Transformer3DModel",),
        sites=r"visual_transformer_blocks\.\d+\.self_attention",
        text="none",
        patch=_tuple_patch,
        latent=_channels_last,
        shape=_kandinsky_shape,
    )
)
register_family(
    Family(
        name="cosmos",
        classes=("CosmosTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        text="none",
        patch=_tuple_patch,
        noise=_unit_time,
    )
)
register_family(
    Family(
        name="anyflow",
        classes=("AnyFlowTransformer3DModel",),
        sites=r"blocks\.\d+\.attn1",
        text="none",
        patch=_tuple_patch,
        latent=_frames_first,
    )
)
register_family(
    Family(
        name="allegro",
        classes=("AllegroTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        text="none",
        patch=_split_patch,
    )
)
register_family(
    Family(
        name="ltx2",
        classes=("LTX2VideoTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",  # the sound's are its own, audio_attn1
        text="none",
        patch=lambda _: (1, 1, 1),
        latent=_packed,
    )
)
register_family(
    Family(
        name="easyanimate",
        classes=("EasyAnimateTransformer3DModel",),
        sites=r"transformer_blocks\.\d+\.attn1",
        text="before",
        patch=_split_patch,
    )
)
register_family(
    Family(
        name="kandinsky6",
        classes=("Kandinsky6Transformer3DModel",),
        sites=r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
        text="none",
        patch=_tuple_patch,
        latent=_channels_last,
        shape=_kandinsky_shape,
    )
)

UNSERVED.update(
    {
        "AnyFlowFARTransformer3DModel": "its self-attention is causal from chunk to chunk, by FlexAttention",
        "Cosmos3OmniTransformer": "its stream is packed of text, which is causal, pictures, video and sound",
        "HeliosTransformer3DModel": "its stream holds frames of the past at several resolutions, which no grid has",
        "HunyuanVideoFramepackTransformer3DModel": "its stream holds frames of the past at several resolutions, "
        "which no grid has",
        "Kandinsky6SRTransformer3DModel": "it is sparse itself: its self-attention is NABLA's, by FlexAttention",
        "LatteTransformer3DModel": "it attends within frames and across them apart, never over the whole video",
        "MiniMaxH3Transformer3DModel": "its stream is packed of text, pictures, video and sound in an order that the "
        "caller chooses",
        "MochiTransformer3DModel": "it attends to the films of a batch one after the other, each without its padding",
        "MotifVideoTransformer3DModel": "its last layers read the video twice, as two streams in one",
        "SanaVideoTransformer3DModel": "its self-attention is linear and has no scores",
        "SanaWMLTX2RefinerTransformer3DModel": "it keeps keys and values of earlier calls in a cache",
        "SanaWMTransformer3DModel": "its self-attention is a recurrence in most layers",
        "WanAnimate2Transformer3DModel": "it keeps keys and values of earlier calls in a cache",
    }
)
