"""One tiny model tester per model family, in the form that transformers' `ModelTesterMixin` asks for."""

import torch
from transformers import set_seed

import tests.test_modeling_common as upstream
from tests.generation.test_utils import GenerationTesterMixin


class TinyTester:
    """Config and inputs of a decoder; the others override what differs.

    Args:
        config_class: the config to build, stock or with `TyingConfigMixin`.
        extra: further config entries, such as `tying={"version": 1, "scheme": "two_way"}`.
    """

    batch_size = 3
    seq_length = 7
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True
    sizes: dict = {}

    def __init__(self, config_class: type, **extra):
        self.config_class, self.extra = config_class, extra

    def get_config(self):
        return self.config_class(vocab_size=self.vocab_size, pad_token_id=0, **self.sizes, **self.extra)

    def ids(self, length: int) -> torch.Tensor:
        # From 3 on: 0 to 2 are the special tokens, which some models treat apart.
        return torch.randint(3, self.vocab_size, (self.batch_size, length))

    def inputs(self) -> dict:
        ids = self.ids(self.seq_length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.inputs()


class LlamaTester(TinyTester):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }


class GPT2Tester(TinyTester):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}


class BertTester(TinyTester):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }

    def inputs(self):
        ids = self.ids(self.seq_length)
        kinds = torch.randint(0, 2, ids.shape)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds}


class SequenceToSequenceTester(TinyTester):
    # Two lengths, so that a test that takes one for the other is seen.
    seq_length = 5
    encoder_seq_length = 7

    def inputs(self):
        ids, decoder_ids = self.ids(self.encoder_seq_length), self.ids(self.seq_length)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": decoder_ids,
            "decoder_attention_mask": torch.ones_like(decoder_ids),
        }


class T5Tester(SequenceToSequenceTester):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


class BartTester(SequenceToSequenceTester):
    sizes = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 37,
        "decoder_ffn_dim": 37,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
        "eos_token_id": 2,
    }


class OPTTester(TinyTester):
    sizes = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }


class GroupedTester(TinyTester):
    """Qwen3 and Gemma3, whose heads have a size of their own."""

    sizes = LlamaTester.sizes | {"head_dim": 8}


class EncoderTester(TinyTester):
    """A masked language model without token types: ModernBERT, XLM-R."""

    sizes = BertTester.sizes | {"bos_token_id": 1, "eos_token_id": 2}


class ModernBertTester(EncoderTester):
    sizes = EncoderTester.sizes | {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}


class AlbertTester(BertTester):
    sizes = BertTester.sizes | {"embedding_size": 16}


class WhisperTester(SequenceToSequenceTester):
    encoder_seq_length = 20
    sizes = {
        **{name: value for name, value in BartTester.sizes.items() if name != "max_position_embeddings"},
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 64,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }

    def inputs(self):
        sound = torch.rand(self.batch_size, self.sizes["num_mel_bins"], 2 * self.encoder_seq_length)
        return {"input_features": sound, "decoder_input_ids": self.ids(self.seq_length)}


class LlavaTester(TinyTester):
    image_token = 3  # low, so that it is a word still when a test makes the vocabulary small
    text = LlamaTester.sizes | {"model_type": "llama", "vocab_size": TinyTester.vocab_size, "pad_token_id": 0}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "image_size": 8,
        "patch_size": 4,
    }

    def get_config(self):
        # The text config of a VLM has a flag of its own; in files of the family both say the same.
        flags = {name: value for name, value in self.extra.items() if name == "tie_word_embeddings"}
        return self.config_class(
            text_config=self.text | flags,
            vision_config=self.vision,
            image_token_index=self.image_token,
            vision_feature_layer=-1,
            **self.extra,
        )

    def inputs(self):
        ids = self.ids(self.seq_length).clamp(min=self.image_token + 1)
        ids[:, :4] = self.image_token  # one for each patch
        images = torch.rand(self.batch_size, 3, self.vision["image_size"], self.vision["image_size"])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}


class CommonTests(upstream.ModelTesterMixin, GenerationTesterMixin):
    """`ModelTesterMixin` with repeatable inputs."""

    # Off by default for configs older than 2023, that is for every family here, although initialising what a
    # checkpoint lacks is where tied weights go wrong.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        set_seed(0)


def answer_to(*tied_classes: type) -> None:
    """Let tied classes take part where upstream chooses by the name of the class.

    Its tests ask for labels, a loss or a base model only of classes named in transformers' own tables; a tied class
    counts as the stock class that it is made of.
    """
    tied_name = {base.__name__: tied.__name__ for tied in tied_classes for base in tied.__mro__[1:]}
    stock_values, stock_bases = upstream.get_values, upstream.MODEL_MAPPING

    def get_values(mapping):
        known = stock_values(mapping)
        return known + [tied_name[name] for name in known if name in tied_name]

    upstream.get_values = get_values
    upstream.MODEL_MAPPING = {
        config: next(stock_bases[base] for base in config.__mro__ if base in stock_bases)
        for tied in tied_classes
        for config in (tied.config_class, *tied.config_class.__mro__[1:])
        if any(base in stock_bases for base in config.__mro__)
    }
