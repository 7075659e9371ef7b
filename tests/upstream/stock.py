"""The control: the common tests on transformers' own classes, without this package."""

import unittest

from families import BY_CONFIG, FAMILIES
from testers import BartTester, BertTester, CommonTests, GPT2Tester, LlamaTester, T5Tester
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


class Llama(CommonTests, unittest.TestCase):
    all_model_classes = (LlamaForCausalLM,)
    model_tester = LlamaTester(LlamaConfig)


class LlamaLayers(Llama):
    pass


class LlamaSharedLayers(Llama):
    pass


class LlamaRelaxed(Llama):
    model_tester = LlamaTester(LlamaConfig, tie_word_embeddings=False)


class GPT2(CommonTests, unittest.TestCase):
    all_model_classes = (GPT2LMHeadModel,)
    model_tester = GPT2Tester(GPT2Config)


class Bert(CommonTests, unittest.TestCase):
    all_model_classes = (BertForMaskedLM,)
    model_tester = BertTester(BertConfig)


class T5(CommonTests, unittest.TestCase):
    all_model_classes = (T5ForConditionalGeneration,)
    model_tester = T5Tester(T5Config)
    is_encoder_decoder = True


class Bart(CommonTests, unittest.TestCase):
    all_model_classes = (BartForConditionalGeneration,)
    model_tester = BartTester(BartConfig)
    is_encoder_decoder = True


class BartSourceTarget(Bart):
    model_tester = BartTester(BartConfig, tie_word_embeddings=False)


for name, family in FAMILIES.items():
    # Tied as the tied one is, by the flag where it is not so by default.
    tester = family.tester(family.model_class.config_class, tie_word_embeddings=True)
    for test_name in (name, name + BY_CONFIG):
        held = family.attributes(family.model_class, tester)
        globals()[test_name] = type(test_name, (CommonTests, unittest.TestCase), held)
