"""`TiedEncoderDecoderModel`: any encoder and any decoder of transformers, tied across the two."""

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.encoder_decoder.configuration_encoder_decoder import EncoderDecoderConfig
from transformers.models.encoder_decoder.modeling_encoder_decoder import EncoderDecoderModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from ...config import SCHEMES, TyingConfig, TyingError
from ...ties.modeling import TiedModelMixin
from ...ties.tying import tie
from .configuration_encoder_decoder import TiedEncoderDecoderConfig

logger = logging.get_logger(__name__)

# Parts of the names that transformers' families give to cross-attention.
_CROSS_ATTENTION = ("cross", "encoder_attn", "encdecattention")


class TiedEncoderDecoderModel(TiedModelMixin, EncoderDecoderModel):
    """`EncoderDecoderModel` whose encoder embedding, decoder embedding and softmax are tied as `config.tying` says.

    Schemes: `"none"`, `"two_way"` (decoder and softmax), `"source_target"` (both embeddings), `"three_way"` (all;
    Press & Wolf 2016 section 3.3, Vaswani et al. 2017 section 3.4). The last two need equal hidden sizes and one
    vocabulary.
    Parameters are tied, never modules: position embeddings, output bias, padding indices and scales stay each side's
    own. The file is one of `EncoderDecoderModel`, and the stock class reads the same values from it.

    Args:
        config (`TiedEncoderDecoderConfig`, *optional*): config of both models. Default: made from their configs.
        encoder (`PreTrainedModel`, *optional*): model without a head.
        decoder (`PreTrainedModel`, *optional*): causal language model with cross-attention.
        init_from (`str`, *optional*): where a tied matrix takes its values, see `hf_tying.tie`. It is needed if the
            given models have different values. A model from a config alone is tied while it is initialised.

    Raises:
        TyingError: if the hidden sizes or the vocabulary sizes differ, the decoder has no cross-attention, or the
            matrices of the given models differ and `init_from` is not given.

    Example:
        >>> config = TiedEncoderDecoderConfig.from_encoder_decoder_configs(
        ...     BertConfig(), BertConfig(), tying={"version": 1, "scheme": "three_way"}
        ... )
        >>> model = TiedEncoderDecoderModel(config)
        >>> model.get_input_embeddings().weight is model.get_output_embeddings().weight
        True
    """

    config: TiedEncoderDecoderConfig
    config_class = TiedEncoderDecoderConfig

    def __init__(
        self,
        config: EncoderDecoderConfig | None = None,
        encoder: PreTrainedModel | None = None,
        decoder: PreTrainedModel | None = None,
        init_from: str | None = None,
    ) -> None:
        if config is None and encoder is not None and decoder is not None:
            config = TiedEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)
        elif type(config) is EncoderDecoderConfig:  # what the stock `from_encoder_decoder_pretrained` makes
            config = TiedEncoderDecoderConfig(**_fields(config))
        _refuse_unlike_parts(config)
        if decoder is not None:
            _refuse_without_cross_attention(decoder)
        tying = getattr(config, "tying", None)
        given = tying is not None and (encoder is not None or decoder is not None)
        if given:
            config.tying = None  # these may be trained: `tie` looks at the values, a new model's `post_init` does not
        super().__init__(config, encoder, decoder)
        if given:
            tie(self, TyingConfig.from_dict(tying), init_from=init_from)
        if isinstance(pooler := getattr(self.encoder, "pooler", None), nn.Module):
            pooler.requires_grad_(False)  # of no use here: DistributedDataParallel would wait for its gradient

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | None = None,
        decoder_pretrained_model_name_or_path: str | None = None,
        *model_args: Any,
        tying: str | dict | TyingConfig | None = None,
        init_from: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> "TiedEncoderDecoderModel":
        """Load two models as `EncoderDecoderModel` does, and tie them.

        Args:
            encoder_pretrained_model_name_or_path (`str`): folder or Hub id of the encoder.
            decoder_pretrained_model_name_or_path (`str`): folder or Hub id of the decoder.
            *model_args: further arguments of the encoder, as in transformers.
            tying: scheme, or anything else that `hf_tying.tie` accepts. Default: the ties that each of the two models
                has by itself.
            init_from (`str`, *optional*): where a tied matrix takes its values, see `hf_tying.tie`.
            tokenizer (*optional*): tokenizer of the source side. If source and target are tied, the vocabularies of
                the two sides are compared. Default: the tokenizers that are saved with the models, if both have one.
            target_tokenizer (*optional*): tokenizer of the target side, see `tokenizer`.
            **kwargs: `encoder_...` and `decoder_...` for the two models, others for the config, as in transformers.

        Returns:
            The tied model.

        Raises:
            TyingError: see the class; also if the two vocabularies differ.
        """
        declared = TyingConfig.of(tying) if tying is not None else None
        names = [encoder_pretrained_model_name_or_path, decoder_pretrained_model_name_or_path]
        if declared is not None and _joins_sides(declared) and tokenizer is None and target_tokenizer is None:
            tokenizer, target_tokenizer = _saved_tokenizers(*names)
        model = super().from_encoder_decoder_pretrained(*names, *model_args, **kwargs)
        if declared is not None:
            _refuse_unlike_parts(model.config, declared)
            tie(model, declared, init_from=init_from, tokenizer=tokenizer, target_tokenizer=target_tokenizer)
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForSeq2SeqLM") -> None:
        """Warn that nothing is registered: the stock `EncoderDecoderModel` reads the file without custom code."""
        logger.warning("A TiedEncoderDecoderModel is published without code: transformers' own class reads its file.")


def _fields(config: EncoderDecoderConfig) -> dict:
    """The arguments that make a tied config of a stock config."""
    return {key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")}


def _joins_sides(declared: TyingConfig) -> bool:
    return declared.scheme is not None and {"source", "target"} <= set(SCHEMES[declared.scheme])


def _refuse_unlike_parts(config: EncoderDecoderConfig | None, declared: TyingConfig | None = None) -> None:
    """Refuse to tie source and target matrices of different shapes, before any weight is made."""
    declared = declared or TyingConfig.from_dict(getattr(config, "tying", None))
    if config is None or not _joins_sides(declared):
        return
    for size, way_out in (
        ("hidden_size", "choose models of one width, or the scheme two_way"),
        ("vocab_size", "join the vocabularies by hf_tying.data.join_vocabularies, or choose the scheme two_way"),
    ):
        source, target = getattr(config.encoder, size), getattr(config.decoder, size)
        if source != target:
            raise TyingError(
                f"Cannot tie {declared.scheme}: expected one {size} for encoder and decoder, found {source} "
                f"({config.encoder.model_type}) and {target} ({config.decoder.model_type}): {way_out}."
            )


def _refuse_without_cross_attention(decoder: PreTrainedModel) -> None:
    if not any(mark in name.lower() for name, _ in decoder.named_modules() for mark in _CROSS_ATTENTION):
        raise TyingError(
            f"The decoder ({type(decoder).__name__}) has no cross-attention: expected a causal language model made "
            "with add_cross_attention=True and is_decoder=True. Load it by "
            "TiedEncoderDecoderModel.from_encoder_decoder_pretrained, which adds the layers, or choose a family that "
            "has them, such as bert, roberta or gpt2."
        )


def _saved_tokenizers(*names: str | None) -> tuple:
    if None in names or names[0] == names[1]:
        return None, None
    from transformers import AutoTokenizer

    try:
        for name in names:  # without this file, AutoTokenizer makes an empty tokenizer of the model's type
            cached_file(name, "tokenizer_config.json")
        return tuple(AutoTokenizer.from_pretrained(name) for name in names)
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.info(f"The vocabularies are not compared, no tokenizer is saved with both models ({error}).")
        return None, None
