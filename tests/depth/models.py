"""The models of these tests, text, vision and speech, with four layers each, and what they compute."""

import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.tiny import tiny_inputs, tiny_model

LENGTHS = {"gpt2": {"n_layer": 4}, "t5": {"num_layers": 4}, "bart": {"encoder_layers": 4, "decoder_layers": 4}}


def vision():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=8,
            patch_size=4,
        )
    )


def speech():
    return WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=16, encoder_layers=4, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, max_source_positions=10, num_mel_bins=8,
            max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    )  # fmt: skip


def plain(name="llama", **changes):
    torch.manual_seed(0)
    if name in ("vision", "speech"):
        return {"vision": vision, "speech": speech}[name]().eval()
    return tiny_model(name, **LENGTHS.get(name, {"num_hidden_layers": 4}), **changes)


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    if isinstance(model, WhisperForConditionalGeneration):
        sound = torch.randn(1, 8, 20, generator=generator)
        return {"input_features": sound, "decoder_input_ids": torch.tensor([[1, 3, 4]])}
    return tiny_inputs(model)


def output(model):
    with torch.no_grad():
        return model(**inputs(model)).logits


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())
