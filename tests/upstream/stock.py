"""The control: the common tests on transformers' own classes, without this package."""

import unittest

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
