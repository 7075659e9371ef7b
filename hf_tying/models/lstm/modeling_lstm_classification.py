"""The classifiers over the LSTM language model: one label for a text (ULMFiT), and one for each of its words."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from hf_tying.config import TyingError

from .configuration_lstm import TiedLSTMConfig
from .modeling_lstm import TiedLSTMModel, TiedLSTMPreTrainedModel
from .pooling import pool, real_words_first
from .state import LayerState


class ClassifierNorm(nn.BatchNorm1d):
    """Batch normalisation that takes a batch of one text as well, by the running statistics."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (texts, width)."""
        if self.training and len(input) == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)
        return super().forward(input)


class ClassifierHead(nn.Sequential):
    """Two blocks of batch normalisation, dropout and a linear layer, with ReLU between them.

    Args:
        config: config of the classifier.

    Source: Howard & Ruder 2018 section 3.3.
    """

    def __init__(self, config: TiedLSTMConfig) -> None:
        width = config.layer_widths[-1] * (3 if config.classifier_pooling == "concat" else 1)
        super().__init__(
            ClassifierNorm(width),
            nn.Dropout(config.classifier_dropout),
            nn.Linear(width, config.classifier_hidden_size),
            nn.ReLU(),
            ClassifierNorm(config.classifier_hidden_size),
            nn.Dropout(config.classifier_hidden_dropout),
            nn.Linear(config.classifier_hidden_size, config.num_labels),
        )


class TiedLSTMClassifier(TiedLSTMPreTrainedModel):
    """What both classifiers share: `from_pretrained` takes a language model, whose softmax has no place here."""

    def _is_declared_class(self) -> bool:
        """The record in the config names the softmax of the language model, which is not here."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.BatchNorm1d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        elif isinstance(module, nn.Linear):  # torch's own initial values, as in the released code
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    def _real_words(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Which words are real: what the mask says, else all that are not the padding token."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected either input_ids or inputs_embeds.")
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        return attention_mask

    def _refuse_other_classes(self, labels: torch.Tensor) -> None:
        if self.num_labels > 1 and not (((labels >= 0) & (labels < self.num_labels)) | (labels == -100)).all():
            raise TyingError(
                f"The labels go from {int(labels.min())} to {int(labels.max())}: expected 0 to {self.num_labels - 1}. "
                f"num_labels={self.num_labels} in the config is the number of classes."
            )


class TiedLSTMForSequenceClassification(TiedLSTMClassifier):
    """A text classifier over the layers of the LSTM language model (ULMFiT, Howard & Ruder 2018).

    `from_pretrained` takes the folder of a `TiedLSTMForCausalLM`: the embedding and the layers are kept, the softmax
    is left out (transformers' report names it), and the head is new. The embedding is that of the language model; its
    other role, the softmax, is not in this model, so nothing is tied here.

    Only real words are pooled: those where `attention_mask` is 1, or, without a mask, those that are not
    `config.pad_token_id`. Padding may be on either side. A text may have any length, see `gradient_length`.

    Args:
        config: sizes and dropout, `num_labels`, `problem_type`, and the fields of the classifier.

    Example:
        >>> classifier = TiedLSTMForSequenceClassification.from_pretrained("runs/lm", num_labels=6)
        >>> classifier(**tokenizer(["what is a knot ?"], return_tensors="pt")).logits.shape
        torch.Size([1, 6])
    """

    #: The loss is a mean over the texts of a batch, which `Trainer` divides by the steps of accumulation.
    accepts_loss_kwargs = False

    def __init__(self, config: TiedLSTMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lstm = TiedLSTMModel(config)
        self.classifier = ClassifierHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Compute the logits of each text, and the loss if there are labels.

        Args:
            input_ids: (texts, words), int64.
            attention_mask: (texts, words), 0 for padding. Default: the words that are `config.pad_token_id`.
            inputs_embeds: (texts, words, embedding_size), in place of `input_ids`.
            labels: one of these. (texts,), int64: the classes, -100 for a text that is left out of the loss. (texts,
                classes), floating point, with `problem_type="single_label_classification"`: the distribution over the
                classes of each text (soft labels). (texts, classes), floating point, otherwise: 1 for each class that
                a text has (int64 too, with `problem_type="multi_label_classification"`). (texts,) or (texts, 1),
                floating point, for `num_labels=1`: numbers (regression).
            return_dict: whether to return a `ModelOutput` in place of a tuple. Default: `config.return_dict`.
            **kwargs: arguments of other models, which are ignored.

        Returns:
            A `SequenceClassifierOutput` with (texts, classes) logits, or a tuple of its values.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given.
            TyingError: if a text has no real word, or the labels do not fit the classes.
        """
        config = self.config
        attention_mask = self._real_words(input_ids, attention_mask, inputs_embeds)
        words = inputs_embeds if input_ids is None else input_ids
        words, lengths = real_words_first(words, attention_mask, config.reads_backward)
        like = inputs_embeds if input_ids is None else self.lstm.embed_tokens.weight
        state = self.lstm.initial_state(len(words), like)
        pooled = pool(self._read, words, lengths, state, config.gradient_length, config.piece_length)
        features = pooled.last
        if config.classifier_pooling == "concat":
            mean = (pooled.total / lengths[:, None]).to(features.dtype)
            features = torch.cat([pooled.last, pooled.largest, mean], dim=1)
        logits = self.classifier(features)
        if not self.training:
            logits = logits / config.temperature
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _read(self, words: torch.Tensor, state: tuple[LayerState, ...]) -> tuple[torch.Tensor, tuple[LayerState, ...]]:
        name = "inputs_embeds" if words.is_floating_point() else "input_ids"
        outputs = self.lstm(**{name: words}, state=state, use_cache=True, return_dict=True)
        return outputs.last_hidden_state, outputs.state

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of transformers' classifiers, with soft labels and a check of the classes beside it."""
        labels = labels.to(logits.device)
        classes = self.num_labels
        if labels.is_floating_point():
            if classes > 1 and labels.shape != logits.shape:
                raise TyingError(
                    f"Floating-point labels have the shape {tuple(labels.shape)}: expected {tuple(logits.shape)}, one "
                    "number for each class. Give int64 labels for one class each."
                )
            if not torch.isfinite(labels).all():
                raise TyingError("The labels have a NaN or an infinity: expected numbers. Leave these texts out.")
            if self.config.problem_type == "single_label_classification":
                return F.cross_entropy(logits, labels.to(logits.dtype))
        elif self.config.problem_type == "multi_label_classification":
            if labels.shape != logits.shape or not ((labels == 0) | (labels == 1)).all():
                raise TyingError(
                    f"The labels of texts of several classes have the shape {tuple(labels.shape)}, from "
                    f"{int(labels.min())} to {int(labels.max())}: expected 0 or 1 for each class, "
                    f"{tuple(logits.shape)}."
                )
            labels = labels.to(logits.dtype)
        else:
            self._refuse_other_classes(labels)
        return self.loss_function(labels=labels, pooled_logits=logits, config=self.config)


class TiedLSTMForTokenClassification(TiedLSTMClassifier):
    """A classifier of words over the layers of the LSTM language model: dropout and a linear layer.

    `from_pretrained` takes the folder of a `TiedLSTMForCausalLM`, as `TiedLSTMForSequenceClassification` does. A word
    is classified by what was read up to it; by what comes after it, with `reads_backward`. Padding may be on either
    side. The gradient flows through the whole text, which has to fit into memory.

    Args:
        config: sizes and dropout, `num_labels`, and `classifier_dropout`.
    """

    def __init__(self, config: TiedLSTMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lstm = TiedLSTMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.layer_widths[-1], config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """Compute the logits of each word, and the loss if there are labels.

        Args:
            input_ids: (texts, words), int64.
            attention_mask: (texts, words), 0 for padding. Default: the words that are `config.pad_token_id`.
            inputs_embeds: (texts, words, embedding_size), in place of `input_ids`.
            labels: (texts, words), int64, the class of each word; -100 is left out of the loss.
            return_dict: whether to return a `ModelOutput` in place of a tuple. Default: `config.return_dict`.
            **kwargs: `num_items_in_batch`, divisor of the sum of the losses. Others are ignored.

        Returns:
            A `TokenClassifierOutput` with (texts, words, classes) logits, or a tuple of its values.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given.
            TyingError: if the labels do not fit the classes.
        """
        config = self.config
        attention_mask = self._real_words(input_ids, attention_mask, inputs_embeds)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if config.reads_backward:
            inputs = {name: None if value is None else value.flip(1) for name, value in inputs.items()}
        hidden = self.lstm(**inputs, use_cache=False, return_dict=True).last_hidden_state
        logits = self.classifier(self.dropout(hidden.flip(1) if config.reads_backward else hidden))
        if not self.training:
            logits = logits / config.temperature
        loss = None
        if labels is not None:
            self._refuse_other_classes(labels)
            items = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, config, num_items_in_batch=items)
        output = TokenClassifierOutput(loss=loss, logits=logits)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()
