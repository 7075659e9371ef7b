"""The config of the LSTM language model."""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from hf_tying.config import TyingConfigMixin, TyingError

from .sizes import SIZES

_DROPOUTS = (
    *("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout"),
    *("recurrent_dropout", "weight_dropout"),
)


class TiedLSTMConfig(TyingConfigMixin, PreTrainedConfig):
    """An LSTM language model; the defaults are Zaremba et al. 2014's small one, tied.

    Args:
        vocab_size (`int`): words. Default 10,000, the Penn Treebank's.
        embedding_size (`int`): width of the embedding. Default 200.
        hidden_size (`int`): width of the layers. The last one of a tied model has `embedding_size` (Merity et al.
            2017): its output is multiplied by the embedding.
        layer_sizes (`list[int]`, *optional*): the width of each layer, where they are not as above.
        num_hidden_layers (`int`): Default 2.
        tie_word_embeddings (`bool`): one matrix for the embedding and the softmax (Press & Wolf 2016; RE in Inan et
            al. 2016). Default `True`; `tying` says it too.
        output_bias (`bool`): the softmax has a bias: kept in Press & Wolf's tied models, not in Inan's (section 4).
        initializer_range (`float`): all weights and the softmax's bias are uniform in +- this. Default 0.1.
        recurrent_initializer_range (`float`, *optional*): the same of the layers' weights; `None` for the one of
            `torch.nn.LSTM`, one over the root of the layer's width. A layer's bias starts at 0 (TensorFlow's cell).
        zero_output_bias (`bool`): the softmax's bias starts at 0 instead (Merity et al. 2017).
        dropout_kind (`str`): `"standard"`, a new mask at each step (Zaremba et al. 2014), or `"variational"`, one for
            each example through all steps of a forward pass (Gal & Ghahramani 2016; "locked" in Merity et al. 2017).
        embedding_dropout (`float`): whole words dropped from the embedding, **in its input role only**: the softmax
            keeps all its rows (Merity et al. 2017 section 4.3).
        input_dropout, hidden_dropout, output_dropout (`float`): of the vectors looked up, of each layer's output but
            the last, of the last.
        recurrent_dropout (`float`): of a layer's last output as its input in the next step (Gal & Ghahramani 2016);
            variational whatever the kind.
        shared_recurrent_mask (`bool`): the mask of a layer's output is also the one of its recurrent input (Inan et
            al. 2016 section 5), instead of `recurrent_dropout`.
        weight_dropout (`float`): of the recurrent weights, one mask for a forward pass (DropConnect, Merity et al.
            2017 section 2).
        activation_regularization, temporal_activation_regularization (`float`): AR and TAR (Merity et al. 2017
            section 4.6): in training the loss has `alpha * mean(dropped output ** 2)`, and `beta * mean(d ** 2)` where
            d is the difference of the outputs of two steps.
        tying (`dict`, *optional*): see `hf_tying.TyingConfig`; it can also give the model a projection (PR).

    Raises:
        TyingError: for a tied model whose last layer has another width than the embedding, a rate outside [0, 1), an
            unknown kind, or sizes that are not positive.

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
        if self.is_tied and self.layer_widths[-1] != self.embedding_size:
            raise TyingError(
                f"The model is tied, and its last layer has {self.layer_widths[-1]} units where the embedding has "
                f"{self.embedding_size}: expected equal widths, since the output of one is multiplied by the other. "
                "Change layer_sizes, or give tie_word_embeddings=False."
            )

    @classmethod
    def named(cls, size: str, **changes: Any) -> "TiedLSTMConfig":
        """A size of the papers: `zaremba_` or `inan_` and `small`, `medium` or `large`, or `awd`.

        Raises:
            TyingError: for another name.
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
