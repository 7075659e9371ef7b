"""The config of the LSTM language model."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from hf_tying.config import TyingConfigMixin, TyingError

from .sizes import SIZES

_DROPOUTS = (
    *("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout"),
    *("recurrent_dropout", "weight_dropout"),
    *("classifier_dropout", "classifier_hidden_dropout"),
)
#: What the head of a classifier reads, see `TiedLSTMForSequenceClassification`.
POOLINGS = ("concat", "last")


class TiedLSTMConfig(TyingConfigMixin, PreTrainedConfig):
    """The config of an LSTM language model. The defaults are the small model of Zaremba et al. 2014, tied.

    Every dropout of the language model is a rate in [0, 1), and 0 by default. The fields from `reads_backward` on are
    for `TiedLSTMForSequenceClassification`, and have no effect on the language model.

    Args:
        vocab_size (`int`): number of words. Default 10,000, the size of the Penn Treebank's vocabulary.
        embedding_size (`int`): width of the embedding. Default 200.
        hidden_size (`int`): width of the layers. Default 200. The last layer of a tied model has `embedding_size`
            units instead (Merity et al. 2017), because its output is multiplied by the embedding.
        layer_sizes (`list[int]`, *optional*): width of each layer, in place of the widths above.
        num_hidden_layers (`int`): number of layers. Default 2.
        tie_word_embeddings (`bool`): whether the embedding and the softmax are one matrix (Press & Wolf 2016; RE in
            Inan et al. 2016). Default `True`. `tying` can say the same.
        output_bias (`bool`): whether the softmax has a bias. Default `True`, as in Press & Wolf's tied models; Inan's
            have none (section 4).
        initializer_range (`float`): bound of the uniform distribution from which all weights and the bias of the
            softmax are drawn, around 0. Default 0.1.
        recurrent_initializer_range (`float`, *optional*): the same bound for the weights of the layers. Default 0.1;
            `None` for that of `torch.nn.LSTM`, 1 / sqrt(width of the layer). The bias of a layer starts at 0, as in
            TensorFlow's cell.
        zero_output_bias (`bool`): whether the bias of the softmax starts at 0 (Merity et al. 2017). Default `False`.
        dropout_kind (`str`): `"standard"` (the default) draws a new mask at each step (Zaremba et al. 2014);
            `"variational"` draws one mask for each example, and keeps it for all steps of a forward pass (Gal &
            Ghahramani 2016; "locked" in Merity et al. 2017).
        embedding_dropout (`float`): rate of the words that are dropped whole from the embedding, **in its input role
            only**. The softmax keeps all rows (Merity et al. 2017 section 4.3).
        input_dropout (`float`): dropout of the vectors that are looked up.
        hidden_dropout (`float`): dropout of the output of each layer except the last.
        output_dropout (`float`): dropout of the output of the last layer.
        recurrent_dropout (`float`): dropout of a layer's own output, where it is the layer's input at the next step
            (Gal & Ghahramani 2016). It is variational under either `dropout_kind`.
        shared_recurrent_mask (`bool`): whether the recurrent input of a layer has the mask of the layer's output (Inan
            et al. 2016 section 5), in place of `recurrent_dropout`. Default `False`.
        weight_dropout (`float`): dropout of the recurrent weights, with one mask for a forward pass (DropConnect,
            Merity et al. 2017 section 2).
        activation_regularization (`float`): alpha of AR (Merity et al. 2017 section 4.6), which adds
            `alpha * mean(dropped_output ** 2)` to the loss in training. Default 0.
        temporal_activation_regularization (`float`): beta of TAR (same section), which adds `beta * mean(d ** 2)` to
            the loss in training, where d is the difference between the outputs of two successive steps. Default 0.
        reads_backward (`bool`): whether a text is read from its last word to its first. A classifier turns its input
            around itself. A language model does not: it is trained on a text that was turned around before. Default
            `False`.
        classifier_pooling (`str`): `"concat"` (the default) is the last output, the largest and the mean one of all
            words, side by side (Howard & Ruder 2018 section 3.3); `"last"` is the last output alone.
        classifier_hidden_size (`int`): number of units between the two blocks of the head. Default 50 (section 4.1).
        classifier_dropout (`float`): dropout of the pooled outputs. Default 0.4 (section 4.1).
        classifier_hidden_dropout (`float`): dropout of the units between the blocks. Default 0.1.
        gradient_length (`int`): largest number of words, at the end of a text, through which gradients flow (BPT3C,
            section 3.3). The words before them are read, and pooled, without gradient. Default 1,400.
        piece_length (`int`): number of words that are read at once where no gradient flows. It bounds the memory, and
            without dropout it does not change a number. Default 70.
        temperature (`float`): divisor of the logits of a classifier in evaluation (Guo et al. 2017 section 4.2).
            Default 1, which changes nothing. `hf_tying.training.fit_temperature` finds it.
        tying (`dict`, *optional*): the entry that `hf_tying.TyingConfig` reads. It can also give the model a
            projection (PR).

    Raises:
        TyingError: if the last layer of a tied model has a different width than the embedding, a rate is outside
            [0, 1), a kind is unknown, or a size or the temperature is not positive.

    Example:
        >>> TiedLSTMConfig.named("zaremba_small", tie_word_embeddings=False).layer_widths
        [200, 200]
    """

    model_type = "tied_lstm"
    keys_to_ignore_at_inference = ["state"]

    vocab_size: int = 10_000
    embedding_size: int = 200
    hidden_size: int = 200
    num_hidden_layers: int = 2
    layer_sizes: list[int] | None = None
    output_bias: bool = True
    initializer_range: float = 0.1
    recurrent_initializer_range: float | None = 0.1
    zero_output_bias: bool = False
    dropout_kind: str = "standard"
    embedding_dropout: float = 0.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    output_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    shared_recurrent_mask: bool = False
    weight_dropout: float = 0.0
    activation_regularization: float = 0.0
    temporal_activation_regularization: float = 0.0
    reads_backward: bool = False
    classifier_pooling: str = "concat"
    classifier_hidden_size: int = 50
    classifier_dropout: float = 0.4
    classifier_hidden_dropout: float = 0.1
    gradient_length: int = 1400
    piece_length: int = 70
    temperature: float = 1.0
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.dropout_kind not in ("standard", "variational"):
            raise TyingError(f"dropout_kind={self.dropout_kind!r}: expected 'standard' or 'variational'.")
        for name in _DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise TyingError(f"{name}={getattr(self, name)}: expected a rate in [0, 1).")
        if self.shared_recurrent_mask and (self.dropout_kind != "variational" or self.recurrent_dropout):
            raise TyingError(
                "shared_recurrent_mask takes the mask of a layer's output for its recurrent input: expected "
                f"dropout_kind='variational' and recurrent_dropout=0, found {self.dropout_kind!r} and "
                f"{self.recurrent_dropout}."
            )
        if not self.layer_widths or min(self.vocab_size, self.embedding_size, *self.layer_widths) < 1:
            raise TyingError(
                f"vocab_size={self.vocab_size}, embedding_size={self.embedding_size}, layers {self.layer_widths}: "
                "expected at least one word, one layer, and positive widths."
            )
        if self.classifier_pooling not in POOLINGS:
            raise TyingError(f"classifier_pooling={self.classifier_pooling!r}: expected one of {', '.join(POOLINGS)}.")
        for name in ("classifier_hidden_size", "gradient_length", "piece_length"):
            if getattr(self, name) < 1:
                raise TyingError(f"{name}={getattr(self, name)}: expected 1 or more.")
        if not 0 < self.temperature < float("inf"):
            raise TyingError(f"temperature={self.temperature}: expected a number above 0.")
        if self.is_tied and self.layer_widths[-1] != self.embedding_size:
            raise TyingError(
                f"The model is tied, and its last layer has {self.layer_widths[-1]} units where the embedding has "
                f"{self.embedding_size}: expected equal widths, since the output of one is multiplied by the other. "
                "Change layer_sizes, or give tie_word_embeddings=False."
            )

    @classmethod
    def named(cls, size: str, **changes: Any) -> "TiedLSTMConfig":
        """Make the config of a model of the papers.

        Args:
            size: `"zaremba_small"`, `"zaremba_medium"`, `"zaremba_large"`, `"inan_small"`, `"inan_medium"`,
                `"inan_large"` or `"awd"`; see `hf_tying.models.lstm.sizes`.
            **changes: keywords of this class that differ from the paper.

        Raises:
            TyingError: if there is no such size.
        """
        if size not in SIZES:
            raise TyingError(f"There is no size {size!r}: expected one of {', '.join(SIZES)}.")
        return cls(**SIZES[size] | changes)

    @property
    def is_tied(self) -> bool:
        """Whether the config asks for one matrix in both roles."""
        scheme = self.tying_config.scheme
        return self.tie_word_embeddings if scheme is None else scheme == "two_way"

    @property
    def layer_widths(self) -> list[int]:
        """The number of units of each layer."""
        if self.layer_sizes is not None:
            return list(self.layer_sizes)
        last = self.embedding_size if self.is_tied else self.hidden_size
        return [self.hidden_size] * (self.num_hidden_layers - 1) + [last] * (self.num_hidden_layers > 0)
