"""The LSTM language model that the literature on weight tying grew from, and that transformers lacks."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_lstm import TiedLSTMConfig
from .modeling_lstm import TiedLSTMForCausalLM, TiedLSTMModel
from .modeling_lstm_classification import TiedLSTMForSequenceClassification, TiedLSTMForTokenClassification

__all__ = [
    "TiedLSTMConfig",
    "TiedLSTMForCausalLM",
    "TiedLSTMForSequenceClassification",
    "TiedLSTMForTokenClassification",
    "TiedLSTMModel",
]

AutoConfig.register(TiedLSTMConfig.model_type, TiedLSTMConfig, exist_ok=True)
AutoModel.register(TiedLSTMConfig, TiedLSTMModel, exist_ok=True)
AutoModelForCausalLM.register(TiedLSTMConfig, TiedLSTMForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(TiedLSTMConfig, TiedLSTMForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(TiedLSTMConfig, TiedLSTMForTokenClassification, exist_ok=True)
