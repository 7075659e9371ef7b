"""A training step under `use_tied_loss` is the stock step of each architecture, without logits."""

import copy
import inspect

import pytest
import torch
import transformers
from packaging import version
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BertForPreTraining,
    GPT2DoubleHeadsModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_tying import use_tied_loss

from ..tiny import ALL, VOCAB, WIDTH, tiny_model, without_dropout
from ..tiny_translation import JOINED, STOCK, shake, translation_inputs, translation_model
from .helpers import BY_BLOCKS, Seen, assert_same_step, batch, pair, three_way

#: Sizes under the names that config classes have for them: a config takes those that it knows.
_SIZES = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "n_embed"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "attention_hidden_size", "lru_width", "sliding_window"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("d_inner", "dff", "ffn_hidden_size", "hidden_dim"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "attention_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("rotary_dim", "state_size", "qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "encoder_layers", "bos_token_id"), 1),
    "pad_token_id": 0, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip

_MAMBA = dict(num_heads=4, head_dim=8, n_groups=1)
_LSH = dict(axial_pos_embds=False, attn_layers=["local", "local"], attention_head_size=8, local_attn_chunk_length=7)

_DELTA = dict(num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=4,
              linear_value_head_dim=4)  # fmt: skip

_BAMBA = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, attn_layer_indices=[1], mamba_chunk_size=4)
_JAMBA = dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4)
#: Architectures beside those of `tests.tiny` and `tests.tiny_translation`, and what the sizes above leave open.
MORE_CAUSAL = {
    **dict.fromkeys([
        "apertus", "arcee", "bert", "big_bird", "biogpt", "bitnet", "bloom", "cohere", "cohere2", "ctrl",
        "deepseek_v2", "diffllama", "ernie4_5", "exaone4", "falcon_mamba", "flex_olmo", "gemma", "glm", "glm4",
        "glm4_moe", "gpt_bigcode", "gpt_neox_japanese", "gpt_oss", "gptj", "granitemoe", "helium", "jetmoe", "lfm2",
        "minimax", "modernbert-decoder", "moshi", "mpt", "nanochat", "nemotron", "olmo", "olmo3", "olmoe",
        "openai-gpt", "persimmon", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3_moe", "rembert", "roberta",
        "roformer", "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "trocr", "vaultgemma", "whisper", "xglm",
        "xlm", "xlnet", "prophetnet", "inkling2_text",
    ], {}),
    "gemma2": dict(final_logit_softcapping=1.0), "gemma3_text": dict(final_logit_softcapping=2.0),
    "granite": dict(logits_scaling=4.0), "codegen": dict(n_head=4), "deepseek_v3": dict(head_dim=4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=4), "mamba2": _MAMBA, "bamba": _BAMBA,
    "recurrent_gemma": dict(num_hidden_layers=3), "jamba": _JAMBA, "qwen3_next": _DELTA,
    "reformer": dict(_LSH, is_decoder=True),
}  # fmt: skip

MORE_MASKED = {
    **dict.fromkeys([
        "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "distilbert", "electra", "ernie", "esm",
        "eurobert", "flaubert", "fnet", "funnel", "ibert", "layoutlm", "megatron-bert", "mpnet", "mra", "nomic_bert",
        "nystromformer", "rembert", "roberta-prelayernorm", "roformer", "squeezebert", "tapas", "xlm", "xlm-roberta",
        "xlm-roberta-xl", "yoso",
    ], {}),
    "reformer": dict(_LSH, is_decoder=False), "xmod": dict(languages=["en_XX"], default_language="en_XX"),
    "mobilebert": dict(embedding_size=8, intra_bottleneck_size=16, true_hidden_size=16),
    "deberta-v2": dict(legacy=False),
}  # fmt: skip

MORE_SEQ2SEQ = {
    **dict.fromkeys(["bigbird_pegasus", "blenderbot", "mvp", "nllb-moe", "pegasus_x", "seamless_m4t"], {}),
    "longt5": dict(decoder_start_token_id=0),
}
#: Where the logits are needed whole all the same: by which operation, and why.
WHOLE = {
    "prophetnet": "transpose",  # nll_loss of log_softmax, over the logits of two streams
    "deberta-v2": "gelu",  # transformers takes the layer before the product with the embedding for the head
    "mobilebert": None,  # a product with two matrices side by side: nothing is deferred in the first place
}

if version.parse(transformers.__version__) < version.parse("5.24"):
    # Rows that only pad the vocabulary are cut off the logits; later versions cut them off when they load the matrix.
    WHOLE["inkling2_text"] = "an index into the words"

COVERAGE = [
    *((arch, AutoModelForCausalLM, changes) for arch, changes in MORE_CAUSAL.items()),
    *((arch, AutoModelForMaskedLM, changes) for arch, changes in MORE_MASKED.items()),
    *((arch, AutoModelForSeq2SeqLM, changes) for arch, changes in MORE_SEQ2SEQ.items()),
]


def small(arch: str, auto, changes: dict):
    if arch not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {arch}")
    known = CONFIG_MAPPING[arch]().to_dict()
    sizes = {k: v for k, v in _SIZES.items() if k in known and not isinstance(known[k], list | dict)}
    torch.manual_seed(0)
    return shake(auto.from_config(CONFIG_MAPPING[arch](**sizes | changes)))


def check_step(model, inputs, seen, whole: dict | None = None):
    """Training is the stock model's, by blocks unless `whole` says otherwise; everything else is untouched."""
    stock, tied = pair(model)
    outputs = assert_same_step(tied, stock, inputs)
    arch = model.config.model_type
    if whole and arch in whole:
        now = seen.taken()
        assert now.blocks == 0 and (whole[arch] in now.whole if whole[arch] else now.whole == []), now
    else:
        assert seen.taken() == BY_BLOCKS
        assert outputs.logits is None
    for model in (stock, tied):
        model.eval()
    with torch.no_grad():
        torch.manual_seed(2)
        expected = stock(**inputs)
        torch.manual_seed(2)
        found = tied(**inputs)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert seen.taken() == Seen()


@pytest.mark.parametrize("arch", ALL)
def test_a_step_of_each_architecture_is_the_stock_one_and_has_no_logits(arch, seen):
    model = tiny_model(arch)
    check_step(model, batch(model), seen)


@pytest.mark.parametrize("arch, auto, changes", COVERAGE, ids=[f"{a}-{c.__name__[9:]}" for a, c, _ in COVERAGE])
def test_a_step_of_many_more_architectures_is_the_stock_one_and_has_no_logits(arch, auto, changes, seen):
    model = small(arch, auto, changes)
    inputs = batch(model)
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        del inputs["attention_mask"]
    check_step(model, inputs, seen, WHOLE)


@pytest.mark.parametrize("arch", STOCK + JOINED)
def test_a_step_of_a_translation_model_is_the_stock_one_and_has_no_logits(arch, seen):
    model = translation_model(arch)
    inputs = translation_inputs(model)
    inputs["labels"][0, -2:] = -100
    check_step(model, inputs, seen, WHOLE)


@pytest.mark.parametrize("arch", ["bert2bert", "bert2gpt2"])
def test_a_step_of_a_joined_model_tied_three_way_is_the_stock_one_and_has_no_logits(arch, seen):
    model = three_way(arch)
    check_step(model, translation_inputs(model), seen)


def test_a_decoder_inside_has_its_own_tied_loss_and_the_model_around_it_another(seen):
    stock = without_dropout(translation_model("bert2bert"))
    outer = copy.deepcopy(stock)
    use_tied_loss(outer.decoder)
    assert assert_same_step(outer, stock, translation_inputs(stock)).logits is not None  # by the outer loss
    assert seen.taken() == Seen()
    assert assert_same_step(use_tied_loss(outer), stock, translation_inputs(stock)).logits is None
    assert seen.taken() == BY_BLOCKS
    words = torch.randint(3, 50, (2, 5))
    inputs = {"input_ids": words, "labels": words, "encoder_hidden_states": torch.randn(2, 7, WIDTH)}
    assert assert_same_step(outer.decoder, stock.decoder, inputs).logits is None
    assert seen.taken() == BY_BLOCKS


def test_a_loss_beside_the_words_keeps_its_logits(seen):
    """BERT's pretraining heads: words, and whether two sentences follow each other."""
    config = tiny_model("bert").config
    torch.manual_seed(0)
    stock, tied = pair(shake(BertForPreTraining(config)))
    inputs = batch(stock) | {"next_sentence_label": torch.tensor([0, 1])}
    outputs = assert_same_step(tied, stock, inputs)
    assert outputs.prediction_logits is None and seen.taken() == BY_BLOCKS
    assert torch.equal(outputs.seq_relationship_logits, stock(**inputs).seq_relationship_logits)


def test_a_second_head_keeps_its_logits(seen):
    torch.manual_seed(0)
    stock, tied = pair(shake(GPT2DoubleHeadsModel(tiny_model("gpt2").config)))
    ids = torch.randint(3, 60, (2, 2, 7))
    choice = {"mc_token_ids": torch.full((2, 2), 6), "mc_labels": torch.tensor([0, 1])}
    inputs = {"input_ids": ids, "labels": ids, **choice}
    outputs = assert_same_step(tied, stock, inputs)
    assert outputs.logits is None and outputs.mc_logits.shape == (2, 2) and seen.taken() == BY_BLOCKS


def test_a_step_of_a_speech_model_is_the_stock_one_and_has_no_logits(seen):
    sizes = dict(d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                 decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=VOCAB,
                 num_mel_bins=4, max_source_positions=5, max_target_positions=16, pad_token_id=0, bos_token_id=1,
                 eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    torch.manual_seed(0)
    model = shake(transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes)))
    check_step(model, {"input_features": torch.randn(2, 4, 10), "labels": torch.randint(3, 60, (2, 5))}, seen)


def test_logits_that_the_model_writes_into_are_right():
    """Chameleon: `logits[:, :, image_tokens] = -inf`."""
    quantiser = dict(embed_dim=8, num_embeddings=16, latent_channels=8, resolution=16, base_channels=32,
                     channel_multiplier=[1, 1], num_res_blocks=1, attn_resolutions=[])  # fmt: skip
    sizes = dict(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    words = {"<image>": 8, "IMGIMGBSA": 9, "dog": 3}
    config = transformers.ChameleonConfig(**sizes, vq_config=quantiser, vocabulary_map=words)
    torch.manual_seed(0)
    stock, tied = pair(transformers.ChameleonForConditionalGeneration(config))
    ids = torch.randint(20, 60, (2, 7))
    assert_same_step(tied, stock, {"input_ids": ids, "labels": ids})
