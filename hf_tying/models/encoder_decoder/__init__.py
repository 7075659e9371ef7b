"""Encoder-decoders made of two models, whose embeddings and softmax can be one matrix."""

from transformers import AutoConfig, AutoModelForSeq2SeqLM

from .configuration_encoder_decoder import TiedEncoderDecoderConfig
from .modeling_encoder_decoder import TiedEncoderDecoderModel

__all__ = ["TiedEncoderDecoderConfig", "TiedEncoderDecoderModel"]

# This replaces the stock class of the model type. `from_dict` makes a stock config for every file without an entry.
AutoConfig.register(TiedEncoderDecoderConfig.model_type, TiedEncoderDecoderConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(TiedEncoderDecoderConfig, TiedEncoderDecoderModel, exist_ok=True)
