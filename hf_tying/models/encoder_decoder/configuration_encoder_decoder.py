"""The config of an encoder-decoder that can be tied across its two models."""

from typing import Any

from transformers.models.encoder_decoder.configuration_encoder_decoder import EncoderDecoderConfig

from ...config import TyingConfigMixin


class TiedEncoderDecoderConfig(TyingConfigMixin, EncoderDecoderConfig):
    """`EncoderDecoderConfig` with the keyword `tying`.

    The model type in the file stays `encoder-decoder`: transformers without this package reads the file as its own
    `EncoderDecoderModel`. With this package the Auto classes give this class for a file that has a `tying` entry, and
    the stock class for any other.

    Args:
        encoder (`PreTrainedConfig` or `dict`): config of the encoder.
        decoder (`PreTrainedConfig` or `dict`): config of the decoder.
        tying (`dict`, *optional*): what is tied, see `TyingConfig`. `{"version": 1, "scheme": "three_way"}` makes one
            matrix of all three roles.

    Raises:
        TyingError: if the `tying` entry cannot be read.

    Example:
        >>> TiedEncoderDecoderConfig.from_encoder_decoder_configs(
        ...     BertConfig(), BertConfig(), tying={"version": 1, "scheme": "three_way"}
        ... ).tying_config.scheme
        'three_way'
    """

    model_type = "encoder-decoder"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> EncoderDecoderConfig:
        """Make a config of this class for a dict with a `tying` entry, and a stock config for any other.

        `AutoConfig` calls this for each file of the model type.

        Args:
            config_dict: content of `config.json`.
            **kwargs: further arguments, as in transformers.

        Returns:
            The config. With `return_unused_kwargs=True`, also the unused arguments, as in transformers.
        """
        if cls is TiedEncoderDecoderConfig and config_dict.get("tying") is None and kwargs.get("tying") is None:
            return EncoderDecoderConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as a dict, with the stock architecture, which reads the same file."""
        fields = super().to_dict()
        if fields.get("architectures") == ["TiedEncoderDecoderModel"]:
            fields["architectures"] = ["EncoderDecoderModel"]
        return fields
