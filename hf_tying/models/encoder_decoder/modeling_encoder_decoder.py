"""`TiedEncoderDecoderModel`: any encoder and any decoder of transformers, tied across the two."""

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.encoder_decoder.configuration_encoder_decoder import EncoderDecoderConfig
from transformers.models.encoder_decoder.modeling_encoder_decoder import EncoderDecoderModel
from transformers.utils import cached_file, logging

from ...config import SCHEMES, TyingConfig, TyingError
from ...ties.modeling import TiedModelMixin
from ...ties.tying import tie
from .configuration_encoder_decoder import TiedEncoderDecoderConfig

logger = logging.get_logger(__name__)

# How the families that transformers gives cross-attention name it.
_CROSS_ATTENTION = ("cross", "encoder_attn", "encdecattention")


class TiedEncoderDecoderModel(TiedModelMixin, EncoderDecoderModel):
    """`EncoderDecoderModel` whose encoder embedding, decoder embedding and softmax are tied as `config.tying` says.

    Schemes: `"none"`, `"two_way"` (decoder and softmax), `"source_target"` (both embeddings), `"three_way"` (all;
    Press & Wolf 2016 section 3.3, Vaswani et al. 2017 section 3.4). The last two need equal hidden sizes and one
    vocabulary.
    Parameters are tied, never modules: position embeddings, output bias, padding indices and scales stay each side's
    own. The file is one of `EncoderDecoderModel`, and the stock class reads the same values from it.

    Args:
        config (`TiedEncoderDecoderConfig`, *optional*): of both models; by default made from theirs.
        encoder (`PreTrainedModel`, *optional*): a model without a head.
        decoder (`PreTrainedModel`, *optional*): a causal language model with cross-attention.
        init_from (`str`, *optional*): where a tied matrix takes its values, see `hf_tying.tie`. Needed where models
            are given that disagree; a model made from a config alone is tied as it is initialised.

    Raises:
        TyingError: for different hidden sizes or vocabulary sizes, a decoder without cross-attention, or given models
            whose matrices differ when `init_from` is not given.

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
    ):
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
        *model_args,
        tying: str | dict | TyingConfig | None = None,
        init_from: str | None = None,
        tokenizer=None,
        target_tokenizer=None,
        **kwargs,
    ) -> "TiedEncoderDecoderModel":
        """As in `EncoderDecoderModel`, then tied.

        Args:
            encoder_pretrained_model_name_or_path, decoder_pretrained_model_name_or_path (`str`): folders or ids.
            tying: a scheme, or whatever `hf_tying.tie` accepts. By default what the two models tie by themselves.
            init_from (`str`, *optional*): where a tied matrix takes its values, see `hf_tying.tie`.
            tokenizer, target_tokenizer (*optional*): of the two sides, compared when source and target are tied. By
                default those that are saved with the two models, where there are any.
            kwargs: `encoder_...`, `decoder_...` for the two models, others for the config, as in transformers.

        Raises:
            TyingError: as the class, and for two different vocabularies.
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
    def register_for_auto_class(cls, auto_class="AutoModelForSeq2SeqLM") -> None:
        """Nothing to register: the file is one of the stock `EncoderDecoderModel`, and is published without code."""
        logger.warning("A TiedEncoderDecoderModel is published without code: transformers' own class reads its file.")


def _fields(config: EncoderDecoderConfig) -> dict:
    """What the constructor of the tied config takes from a stock one."""
    return {key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")}


def _joins_sides(declared: TyingConfig) -> bool:
    return declared.scheme is not None and {"source", "target"} <= set(SCHEMES[declared.scheme])


def _refuse_unlike_parts(config: EncoderDecoderConfig | None, declared: TyingConfig | None = None) -> None:
    """Before any weight is made: source and target can be one matrix only if it has one shape."""
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
        for name in names:  # without a file, AutoTokenizer makes an empty one of the model's type
            cached_file(name, "tokenizer_config.json")
        return tuple(AutoTokenizer.from_pretrained(name) for name in names)
    except (OSError, ValueError, KeyError, ImportError) as error:
        logger.info(f"The vocabularies are not compared, no tokenizer is saved with both models ({error}).")
        return None, None
