"""Model families that transformers lacks, each in a folder of its own.

A family registers itself with the Auto classes when it is imported, and `hf_tying.hook` imports all of them.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

_HOME = {
    "TiedEncoderDecoderConfig": "encoder_decoder",
    "TiedEncoderDecoderModel": "encoder_decoder",
    "TiedLSTMConfig": "lstm",
    "TiedLSTMModel": "lstm",
    "TiedLSTMForCausalLM": "lstm",
    "TiedLSTMForSequenceClassification": "lstm",
    "TiedLSTMForTokenClassification": "lstm",
}

__all__ = [
    "TiedEncoderDecoderConfig",
    "TiedEncoderDecoderModel",
    "TiedLSTMConfig",
    "TiedLSTMModel",
    "TiedLSTMForCausalLM",
    "TiedLSTMForSequenceClassification",
    "TiedLSTMForTokenClassification",
]
FAMILIES = tuple(dict.fromkeys(_HOME.values()))

if TYPE_CHECKING:
    from .encoder_decoder import TiedEncoderDecoderConfig, TiedEncoderDecoderModel
    from .lstm import (
        TiedLSTMConfig,
        TiedLSTMForCausalLM,
        TiedLSTMForSequenceClassification,
        TiedLSTMForTokenClassification,
        TiedLSTMModel,
    )
else:
    __getattr__, __dir__ = lazy_names(globals(), _HOME)
