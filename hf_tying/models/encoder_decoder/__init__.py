"""Encoder-decoders put together from two models, with one embedding for both languages and the softmax if you like."""

from transformers import AutoConfig, AutoModelForSeq2SeqLM

from .configuration_encoder_decoder import TiedEncoderDecoderConfig
from .modeling_encoder_decoder import TiedEncoderDecoderModel

__all__ = ["TiedEncoderDecoderConfig", "TiedEncoderDecoderModel"]

# Over the stock class of that type, to which `from_dict` hands every file without an entry.
AutoConfig.register(TiedEncoderDecoderConfig.model_type, TiedEncoderDecoderConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(TiedEncoderDecoderConfig, TiedEncoderDecoderModel, exist_ok=True)
