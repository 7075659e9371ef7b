"""The tiny models that PEFT's tests load from the Hub, made here: a folder of the form of the Hub's cache."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 1024}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 4, "vocab_size": 1024}
OPT |= {"max_position_embeddings": 128, "num_hidden_layers": 4}
BART = {
    f"{part}_{size}": value
    for part in ("encoder", "decoder")
    for size, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}
BART |= {"d_model": 32, "max_position_embeddings": 128, "vocab_size": 1024}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 1024}
T5 |= {"decoder_start_token_id": 0}

# Written last: a model with it is whole, and made from these sizes by this transformers.
RECIPE = "recipe.json"

# For each id: the class, and what is not its config's default. Sizes are near those of the models on the Hub.
MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", OPT | {"num_hidden_layers": 12}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", GPT2 | {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", GROUPED | {"vocab_size": 1024}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", GROUPED | {"vocab_size": 1024}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        GROUPED | {"vocab_size": 1024, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        T5,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", T5),
    "google/flan-t5-small": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", GROUPED | {"vocab_size": 1024}),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 5, "n_head": 4, "vocab_size": 1024},
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", SMALL | {"vocab_size": 1024}),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", SMALL | {"vocab_size": 1024}),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", SMALL | {"vocab_size": 1024}),
    "peft-internal-testing/tiny-random-DebertaModel": (
        "DebertaModel",
        SMALL | {"vocab_size": 1024, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": (
        "DebertaV2Model",
        SMALL | {"vocab_size": 1024, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        SMALL | {"vocab_size": 1024},
    ),
    "bert-base-uncased": ("BertForSequenceClassification", SMALL | {"vocab_size": 1024}),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        SMALL | {"vocab_size": 1024},
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        GROUPED | {"vocab_size": 1024, "num_labels": 1, "pad_token_id": 0},
    ),
}


def make_models(cache: Path) -> None:
    """Write the models that are not there yet.

    Args:
        cache: where the Hub's library looks for what it has downloaded, `HF_HUB_CACHE`.
    """
    wanted = {cache / f"models--{name.replace('/', '--')}": recipe for name, recipe in MODELS.items()}
    wanted = {folder: json.dumps([*recipe, version("transformers")]) for folder, recipe in wanted.items()}
    absent = {folder: recipe for folder, recipe in wanted.items() if _read(folder / RECIPE) != recipe}
    if not absent:
        return
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for folder, recipe in absent.items():
        class_name, sizes, _ = json.loads(recipe)
        shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(0)
        model_class = getattr(transformers, class_name)
        model_class(model_class.config_class(**{"pad_token_id": 0} | sizes)).save_pretrained(
            folder / "snapshots" / "made-here"
        )
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("made-here", encoding="utf-8")
        (folder / RECIPE).write_text(recipe, encoding="utf-8")


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.exists() else None
