"""Small inputs for a model of which nothing is known but its modules and configuration."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from polylens.hosts.batch import accepted

Example = dict[str, Any] | tuple[Any, ...]


def guessed_inputs(model: nn.Module) -> Iterator[Example]:
    """Arguments to try in a forward pass, the likeliest first."""
    if getattr(model, "config", None) is not None:
        yield from _from_config(model)
    yield from _from_modules(model)


def _from_config(model: Any) -> Iterator[dict[str, Any]]:
    config, names = model.config, accepted(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known: dict[str, Tensor] = {}
    if "input_ids" in names and getattr(text, "vocab_size", None):
        known["input_ids"] = _tokens(text.vocab_size)
    if "pixel_values" in names:
        known["pixel_values"] = _pixels(getattr(config, "vision_config", config))
    if "input_features" in names and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 64)
        known["input_features"] = torch.randn(2, config.num_mel_bins, frames, generator=_seeded())
    if "input_values" in names:
        known["input_values"] = torch.randn(2, 4000, generator=_seeded())
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        extra["decoder_input_ids"] = _tokens(text.vocab_size)
    if known:
        yield {**known, **extra}
    main = getattr(model, "main_input_name", "")
    if main in known and len(known) > 1:
        yield {main: known[main], **extra}


def _from_modules(model: nn.Module) -> Iterator[tuple[Tensor]]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield (_tokens(module.num_embeddings),)
            return
        if isinstance(width := getattr(module, "in_features", None), int):
            yield (torch.randn(8, width, generator=_seeded()),)
            yield (torch.randn(2, 8, width, generator=_seeded()),)
            return
        if isinstance(module, nn.Conv2d):
            for size in (32, 28, 64, 224):
                yield (torch.randn(2, module.in_channels, size, size, generator=_seeded()),)
            return


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tokens(d_vocab: int) -> Tensor:
    return (torch.arange(16).reshape(2, 8) * 37 + 11) % d_vocab


def _pixels(config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(config, "num_channels", 3)
    return torch.randn(2, channels, height, width, generator=_seeded())
