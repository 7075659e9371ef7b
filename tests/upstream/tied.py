"""f24: the common tests on classes over `TiedModelMixin`; the control of each has the same name in `stock.py`."""

import tempfile
import unittest

from families import BY_CONFIG, FAMILIES
from testers import BartTester, BertTester, CommonTests, GPT2Tester, LlamaTester, T5Tester, answer_to
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_tying import TiedModelMixin, TyingConfigMixin

TWO_WAY = {"version": 1, "scheme": "two_way"}
THREE_WAY = {"version": 1, "scheme": "three_way"}
SOURCE_TARGET = {"version": 1, "scheme": "source_target"}
# Two sub-modules as one and two single parameters as one, beside the embeddings.
LAYERS = {
    "version": 1,
    "scheme": "two_way",
    "groups": {
        "mlp": ["model.layers.0.mlp", "model.layers.1.mlp"],
        "norm": ["model.layers.1.input_layernorm.weight", "model.layers.0.input_layernorm.weight"],
    },
}

SHARED_LAYERS = {
    "version": 2,
    "scheme": "two_way",
    "depth": [{"path": "model.layers", "order": [0, 0], "relax": {"kind": "scale"}}],
}
RELAXED = {
    "version": 2,
    "groups": {
        "mlp": ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"],
        "embeddings": {"names": ["model.embed_tokens.weight", "lm_head.weight"], "relax": {"kind": "scale"}},
    },
}


class TiedLlamaConfig(TyingConfigMixin, LlamaConfig):
    # A model type of its own, as one may have or not: the other configs keep that of the stock class.
    model_type = "tied_llama"


class TiedLlama(TiedModelMixin, LlamaForCausalLM):
    config_class = TiedLlamaConfig


class TiedGPT2Config(TyingConfigMixin, GPT2Config):
    pass


class TiedGPT2(TiedModelMixin, GPT2LMHeadModel):
    config_class = TiedGPT2Config


class TiedBertConfig(TyingConfigMixin, BertConfig):
    pass


class TiedBert(TiedModelMixin, BertForMaskedLM):
    config_class = TiedBertConfig


class TiedT5Config(TyingConfigMixin, T5Config):
    pass


class TiedT5(TiedModelMixin, T5ForConditionalGeneration):
    config_class = TiedT5Config


class TiedBartConfig(TyingConfigMixin, BartConfig):
    pass


class TiedBart(TiedModelMixin, BartForConditionalGeneration):
    config_class = TiedBartConfig


def class_form(stock: type) -> type:
    """`class Tied<Stock>(TiedModelMixin, <Stock>)`, with a config class over the config mixin."""
    config = stock.config_class
    tied_config = type(f"Tied{config.__name__}", (TyingConfigMixin, config), {"__module__": __name__})
    return type(
        f"Tied{stock.__name__}", (TiedModelMixin, stock), {"config_class": tied_config, "__module__": __name__}
    )


FORMS = {name: class_form(family.model_class) for name, family in FAMILIES.items()}
answer_to(TiedLlama, TiedGPT2, TiedBert, TiedT5, TiedBart, *FORMS.values())


class TiedTests(CommonTests):
    """Upstream's tests, and one of our own: they would all pass on a class whose ties were never made."""

    one_parameter: tuple[str, ...] = ()

    def test_the_declared_names_are_one_parameter_when_made_and_when_loaded(self):
        (model_class,) = self.all_model_classes
        model = model_class(self.model_tester.get_config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            reloaded = model_class.from_pretrained(folder)
        for tied in (model, reloaded):
            self.assertEqual(len({id(tied.get_parameter(name)) for name in self.one_parameter}), 1)


class Llama(TiedTests, unittest.TestCase):
    all_model_classes = (TiedLlama,)
    model_tester = LlamaTester(TiedLlamaConfig, tying=TWO_WAY)
    one_parameter = ("model.embed_tokens.weight", "lm_head.weight")


class LlamaLayers(TiedTests, unittest.TestCase):
    all_model_classes = (TiedLlama,)
    model_tester = LlamaTester(TiedLlamaConfig, tying=LAYERS)
    one_parameter = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


class LlamaSharedLayers(TiedTests, unittest.TestCase):
    all_model_classes = (TiedLlama,)
    model_tester = LlamaTester(TiedLlamaConfig, tying=SHARED_LAYERS)
    one_parameter = ("model.embed_tokens.weight", "lm_head.weight")


class LlamaRelaxed(TiedTests, unittest.TestCase):
    all_model_classes = (TiedLlama,)
    model_tester = LlamaTester(TiedLlamaConfig, tying=RELAXED)
    one_parameter = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


class GPT2(TiedTests, unittest.TestCase):
    all_model_classes = (TiedGPT2,)
    model_tester = GPT2Tester(TiedGPT2Config, tying=TWO_WAY)
    one_parameter = ("transformer.wte.weight", "lm_head.weight")


class Bert(TiedTests, unittest.TestCase):
    all_model_classes = (TiedBert,)
    model_tester = BertTester(TiedBertConfig, tying=TWO_WAY)
    one_parameter = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")


class T5(TiedTests, unittest.TestCase):
    all_model_classes = (TiedT5,)
    model_tester = T5Tester(TiedT5Config, tying=THREE_WAY)
    one_parameter = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    is_encoder_decoder = True


class Bart(TiedTests, unittest.TestCase):
    all_model_classes = (TiedBart,)
    model_tester = BartTester(TiedBartConfig, tying=THREE_WAY)
    one_parameter = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    is_encoder_decoder = True


class BartSourceTarget(TiedTests, unittest.TestCase):
    all_model_classes = (TiedBart,)
    model_tester = BartTester(TiedBartConfig, tying=SOURCE_TARGET, tie_word_embeddings=False)
    one_parameter = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    is_encoder_decoder = True


for name, family in FAMILIES.items():
    for test_name, model_class in {name: FORMS[name], name + BY_CONFIG: family.model_class}.items():
        tester = family.tester(model_class.config_class, tying=family.entry, tie_word_embeddings=True)
        held = family.attributes(model_class, tester) | {"one_parameter": family.names}
        globals()[test_name] = type(test_name, (TiedTests, unittest.TestCase), held)
