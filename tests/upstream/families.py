"""Further families that the common tests are run on, each in two forms: a class over the mixin, and a stock class that
honours the `tying` entry of its config, which is what `tie` leaves behind."""

from dataclasses import dataclass

import transformers
from testers import (
    AlbertTester,
    BartTester,
    EncoderTester,
    GroupedTester,
    LlavaTester,
    ModernBertTester,
    OPTTester,
    TinyTester,
    WhisperTester,
)

#: The name that the tests of the second form end in.
BY_CONFIG = "ByConfig"


@dataclass(frozen=True)
class Family:
    """One class of a family.

    Args:
        model: the name of the class. Its config class is the one that it names.
        tester: makes configs and inputs.
        names: parameters that the scheme makes one.
        scheme: to tie it by.
        encoder_decoder: whether it is one.
        composite: whether its config is made of others.
    """

    model: str
    tester: type[TinyTester]
    names: tuple[str, ...]
    scheme: str = "two_way"
    encoder_decoder: bool = False
    composite: bool = False

    @property
    def model_class(self) -> type:
        return getattr(transformers, self.model)

    @property
    def entry(self) -> dict:
        """The `tying` entry of its config."""
        return {"version": 1, "scheme": self.scheme}

    def attributes(self, model_class: type, tester: TinyTester) -> dict:
        """What its class of tests holds."""
        return {
            "all_model_classes": (model_class,),
            "model_tester": tester,
            "is_encoder_decoder": self.encoder_decoder,
            "_is_composite": self.composite,
            "__module__": __name__,
        }


THREE = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
TWO = ("model.embed_tokens.weight", "lm_head.weight")

FAMILIES = {
    "OPT": Family("OPTForCausalLM", OPTTester, ("model.decoder.embed_tokens.weight", "lm_head.weight")),
    "Qwen3": Family("Qwen3ForCausalLM", GroupedTester, TWO),
    "Gemma3": Family("Gemma3ForCausalLM", GroupedTester, TWO),
    "ModernBert": Family(
        "ModernBertForMaskedLM", ModernBertTester, ("model.embeddings.tok_embeddings.weight", "decoder.weight")
    ),
    "Albert": Family(
        "AlbertForMaskedLM", AlbertTester, ("albert.embeddings.word_embeddings.weight", "predictions.decoder.weight")
    ),
    "XLMRoberta": Family(
        "XLMRobertaForMaskedLM",
        EncoderTester,
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ),
    "M2M100": Family("M2M100ForConditionalGeneration", BartTester, THREE, "three_way", encoder_decoder=True),
    "Pegasus": Family("PegasusForConditionalGeneration", BartTester, THREE, "three_way", encoder_decoder=True),
    "Marian": Family("MarianMTModel", BartTester, THREE, "three_way", encoder_decoder=True),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        WhisperTester,
        ("model.decoder.embed_tokens.weight", "proj_out.weight"),
        encoder_decoder=True,
    ),
    "Llava": Family(
        "LlavaForConditionalGeneration",
        LlavaTester,
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
        composite=True,
    ),
}
