"""Inputs of the zoo: what the forward of any tiny model takes, by the names of its parameters."""

import inspect

import torch
from transformers import PreTrainedModel

from .zoo_configs import configs_of, words_of
from .zoo_exceptions import INPUTS

BATCH, LENGTH = 1, 7


def inputs(model: PreTrainedModel, labels: bool = False) -> dict:
    """Inputs for one forward pass of `model`.

    Args:
        model: a model of the zoo.
        labels: with labels, where the forward takes labels of words.

    Returns:
        Keyword arguments of `model.forward`: word ids of shape `(1, 7)` (int64, below the vocabulary's size), and
        images, sounds or boxes where the forward cannot do without them.
    """
    taken = list(inspect.signature(model.forward).parameters)
    given = {}
    generator = torch.Generator().manual_seed(1)
    for name in taken:
        make = MAKERS.get(name)
        if make and _is_needed(model, name, taken):
            given[name] = make(model, generator)
    for key in (model.config.model_type, type(model).__name__):
        for name, make in INPUTS.get(key, {}).items():
            if make is None:
                given.pop(name, None)
            elif name in taken:
                given[name] = make(model, generator)
    words = given.get("decoder_input_ids", given.get("input_ids"))
    if labels and "labels" in taken and words is not None and _predicts_words(model):
        given["labels"] = words.clone()
    return given


def _is_needed(model: PreTrainedModel, name: str, taken: list[str]) -> bool:
    if name in ("input_ids", "decoder_input_ids", model.main_input_name):
        return True
    if name == "attention_mask":
        return "input_ids" in taken and model.main_input_name == "input_ids"
    if name in ("pixel_values", "input_features", "input_values"):
        return not _writes_words(model)
    return name in ("bbox", "visual_embeds", "audio_codes")


def _writes_words(model: PreTrainedModel) -> bool:
    """Whether a text alone is enough for a model of text and images: they generate text."""
    return any(getattr(model.config, name, None) is not None for name in _PLACEHOLDERS)


_PLACEHOLDERS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id")


def _predicts_words(model: PreTrainedModel) -> bool:
    kinds = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "LMHeadModel", "MTModel")
    return type(model).__name__.endswith(kinds)


def _words(model, generator):
    ids = torch.randint(3, words_of(model.config) - 35, (BATCH, LENGTH), generator=generator)
    end = _find(model.config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < words_of(model.config):
        ids[:, -1] = end
    return ids.unsqueeze(1) if type(model).__name__.endswith("MultipleChoice") else ids


def _find(config, *names, default=None):
    """The first of the fields `names` in a config or in the configs in it."""
    for part in configs_of(config):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _image(model, generator):
    config = getattr(model.config, "vision_config", None) or model.config
    size = _find(config, "image_size", "img_size", "input_size", default=32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _find(config, "num_channels", "in_channels", "in_chans", default=3)
    return torch.rand((BATCH, channels, height, width), generator=generator)


def _sound(model, generator):
    return torch.rand((BATCH, 1600), generator=generator)


def _spectrum(model, generator):
    bins = _find(model.config, "num_mel_bins", "feature_size", "input_feat_per_channel",
                 "feature_projection_input_dim", "input_dim", "input_feat_size", default=16)  # fmt: skip
    return torch.rand((BATCH, 64, bins), generator=generator)


def _mask(model, generator):
    shape = (BATCH, 1, LENGTH) if type(model).__name__.endswith("MultipleChoice") else (BATCH, LENGTH)
    return torch.ones(shape, dtype=torch.long)


def _boxes(model, generator):
    return torch.zeros((BATCH, LENGTH, 4), dtype=torch.long)


MAKERS = {
    "input_ids": _words,
    "decoder_input_ids": _words,
    "attention_mask": _mask,
    "pixel_values": _image,
    "input_values": _sound,
    "input_features": _spectrum,
    "bbox": _boxes,
}
