"""`use_tied_loss`: every training step is the stock one, without logits; whatever else a model does is as it was."""

import copy
import inspect
import logging as stdlib_logging
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForPreTraining,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_tying import (
    TiedModelMixin,
    TyingCallback,
    TyingConfig,
    TyingConfigMixin,
    TyingError,
    assert_tied,
    tie,
    untie,
    use_tied_loss,
)
from hf_tying.models import TiedEncoderDecoderModel
from hf_tying.objectives import (
    deferred_logits,
)
from hf_tying.objectives.deferred_logits import DeferredLogits, LossSettings, TiedSoftmax
from hf_tying.objectives.tied_loss import TiedLossMixin, has_tied_loss
from hf_tying.training import TyingArguments
from hf_tying.training.callbacks import measured_roles

from ..forms import matrix, tied_model
from ..tied_lora import QKV, tied_lora
from ..tiny import ALL, VOCAB, WIDTH, layer_pair, tiny_inputs, tiny_model
from ..tiny import logits as logits_of
from ..tiny_translation import JOINED, STOCK, joined_config, shake, translation_inputs, translation_model

ROOT = Path(__file__).parents[2]
UNTIED_HEAD = {"tie_word_embeddings": False}


# --- what is watched, and what is compared ---------------------------------------------------------------------------


@dataclass
class Seen:
    """How often a loss went through the blocks, and for what the logits were needed whole."""

    blocks: int = 0
    whole: list[str] = field(default_factory=list)

    def taken(self) -> "Seen":
        """What was seen since the last time."""
        now = Seen(self.blocks, list(self.whole))
        self.blocks, self.whole = 0, []
        return now


@pytest.fixture
def seen(monkeypatch) -> Seen:
    seen, by_blocks, whole = Seen(), deferred_logits.cross_entropy, DeferredLogits.whole

    def counted(*args, **kwargs):
        seen.blocks += 1
        return by_blocks(*args, **kwargs)

    def told(self, why):
        seen.whole.append(why)
        return whole(self, why)

    monkeypatch.setattr(deferred_logits, "cross_entropy", counted)
    monkeypatch.setattr(DeferredLogits, "whole", told)
    return seen


BY_BLOCKS = Seen(blocks=1)


@pytest.fixture
def told():
    """The messages of this package's log; what is told once in a process can be told once more."""
    messages = []
    handler = stdlib_logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = stdlib_logging.getLogger("hf_tying")
    logger.addHandler(handler)
    stdlib_logging.Logger.warning_once.cache_clear()
    yield messages
    logger.removeHandler(handler)


@pytest.fixture
def accelerate_anew():
    """An `Accelerator` of a test's own precision: there is one state for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def without_dropout(model):
    """In training mode."""
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def pair(model):
    """A model without dropout in training mode, and the same under `use_tied_loss`."""
    stock = without_dropout(model)
    return stock, use_tied_loss(copy.deepcopy(stock))


def gpt2(**changes):
    return without_dropout(tiny_model("gpt2", **changes))


def batch(model, **kwargs) -> dict[str, torch.Tensor]:
    """Inputs of a training step, with padding (of either number) and labels that are ignored."""
    inputs = tiny_inputs(model, **kwargs)
    inputs["input_ids"][1, :2] = torch.arange(2)
    inputs["labels"][0, -3:] = -100
    return inputs


def step(model, inputs):
    """Forward and backward."""
    model.zero_grad()
    torch.manual_seed(1)
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found, expected, rtol=1e-5, atol=1e-6):
    """Which ones there are, and each to `rtol` of its own largest element and `atol` of the model's."""
    assert found.keys() == expected.keys()
    assert [n for n in found if (found[n] is None) != (expected[n] is None)] == []
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert largest > 0
    for name, wanted in expected.items():
        if wanted is not None:
            apart = float((found[name].float() - wanted.float()).abs().max())
            assert apart <= rtol * float(wanted.abs().max()) + atol * largest, (name, apart, largest)


def assert_same_step(tied, stock, inputs, rtol=1e-5, **tolerance):
    """One step of each: loss and gradients; the outputs of `tied` come back."""
    expected, found = step(stock, inputs), step(tied, inputs)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=rtol)
    assert_same_gradients(gradients(tied), gradients(stock), **tolerance)
    return found


def same(a: torch.Tensor, b: torch.Tensor, atol=1e-6) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=atol, equal_nan=True)


# --- every architecture ----------------------------------------------------------------------------------------------

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

#: Architectures beside those of `tests.models` and `tests.translation`, and what the sizes above leave open.
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
    "inkling2_text": "an index into the words",  # rows that only pad the vocabulary are cut off the logits
    "deberta-v2": "gelu",  # transformers takes the layer before the product with the embedding for the head
    "mobilebert": None,  # a product with two matrices side by side: nothing is deferred in the first place
}

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


class TestEveryArchitecture:
    @pytest.mark.parametrize("arch", ALL)
    def test_a_step_is_the_stock_one_and_has_no_logits(self, arch, seen):
        model = tiny_model(arch)
        check_step(model, batch(model), seen)

    @pytest.mark.parametrize("arch, auto, changes", COVERAGE, ids=[f"{a}-{c.__name__[9:]}" for a, c, _ in COVERAGE])
    def test_a_step_of_many_more_is_the_stock_one_and_has_no_logits(self, arch, auto, changes, seen):
        model = small(arch, auto, changes)
        inputs = batch(model)
        if "attention_mask" not in inspect.signature(model.forward).parameters:
            del inputs["attention_mask"]
        check_step(model, inputs, seen, WHOLE)

    @pytest.mark.parametrize("arch", STOCK + JOINED)
    def test_a_step_of_a_translation_model_is_the_stock_one_and_has_no_logits(self, arch, seen):
        model = translation_model(arch)
        inputs = translation_inputs(model)
        inputs["labels"][0, -2:] = -100
        check_step(model, inputs, seen, WHOLE)

    @pytest.mark.parametrize("arch", ["bert2bert", "bert2gpt2"])
    def test_a_joined_model_tied_three_way_too(self, arch, seen):
        model = three_way(arch)
        check_step(model, translation_inputs(model), seen)

    def test_a_decoder_inside_has_its_own_and_the_model_around_it_another(self, seen):
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

    def test_a_loss_beside_the_words_keeps_its_logits(self, seen):
        """BERT's pretraining heads: words, and whether two sentences follow each other."""
        config = tiny_model("bert").config
        torch.manual_seed(0)
        stock, tied = pair(shake(BertForPreTraining(config)))
        inputs = batch(stock) | {"next_sentence_label": torch.tensor([0, 1])}
        outputs = assert_same_step(tied, stock, inputs)
        assert outputs.prediction_logits is None and seen.taken() == BY_BLOCKS
        assert torch.equal(outputs.seq_relationship_logits, stock(**inputs).seq_relationship_logits)

    def test_a_second_head_keeps_its_logits(self, seen):
        torch.manual_seed(0)
        stock, tied = pair(shake(GPT2DoubleHeadsModel(tiny_model("gpt2").config)))
        ids = torch.randint(3, 60, (2, 2, 7))
        choice = {"mc_token_ids": torch.full((2, 2), 6), "mc_labels": torch.tensor([0, 1])}
        inputs = {"input_ids": ids, "labels": ids, **choice}
        outputs = assert_same_step(tied, stock, inputs)
        assert outputs.logits is None and outputs.mc_logits.shape == (2, 2) and seen.taken() == BY_BLOCKS

    def test_a_model_of_speech_too(self, seen):
        sizes = dict(d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                     decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=VOCAB,
                     num_mel_bins=4, max_source_positions=5, max_target_positions=16, pad_token_id=0, bos_token_id=1,
                     eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
        torch.manual_seed(0)
        model = shake(transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes)))
        check_step(model, {"input_features": torch.randn(2, 4, 10), "labels": torch.randint(3, 60, (2, 5))}, seen)

    def test_logits_that_the_model_writes_into_are_right(self):
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


def three_way(arch="bert2bert"):
    """A `TiedEncoderDecoderModel` with one matrix."""
    torch.manual_seed(0)
    fields = {k: v for k, v in joined_config(arch).to_dict().items() if k != "model_type"}
    config = TiedEncoderDecoderModel.config_class(**fields, tying={"version": 1, "scheme": "three_way"})
    model = shake(TiedEncoderDecoderModel(config))
    assert matrix(model, "source") is matrix(model, "output")
    return model


# --- many steps ------------------------------------------------------------------------------------------------------


def curve(model, inputs, optimizer, steps=20) -> list[float]:
    """The losses of training with dropout; each run draws the same numbers."""
    torch.manual_seed(0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return losses


def masked(model) -> dict:
    inputs = tiny_inputs(model)
    hidden = torch.arange(7) % 3 == 0
    inputs["labels"][:, ~hidden] = -100
    inputs["input_ids"][:, hidden] = 3
    return inputs


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)


class TestTwentySteps:
    @pytest.mark.parametrize("make, inputs, optimizer, tolerance", [
        (lambda: tiny_model("gpt2"), batch, adamw, 1e-4),
        (lambda: tiny_model("gpt2"), batch, sgd, 1e-4),
        (lambda: tiny_model("gpt2", dtype=torch.bfloat16), batch, adamw, 2e-2),
        (lambda: tiny_model("bert"), masked, adamw, 1e-4),
        (lambda: translation_model("marian"), translation_inputs, adamw, 1e-4),
        (three_way, translation_inputs, adamw, 1e-4),
    ], ids=["gpt2", "gpt2-sgd", "gpt2-bfloat16", "bert", "marian", "bert2bert"])  # fmt: skip
    def test_the_curve_of_the_loss_is_the_stock_models(self, make, inputs, optimizer, tolerance, seen):
        stock = make().train()
        tied = use_tied_loss(copy.deepcopy(stock))
        expected = curve(stock, inputs(stock), optimizer(stock))
        found = curve(tied, inputs(tied), optimizer(tied))
        assert seen.taken() == Seen(blocks=20)
        assert found == pytest.approx(expected, rel=tolerance)


# --- memory ----------------------------------------------------------------------------------------------------------


def allocated(run, at_least: int) -> int:
    """How many allocations of at least so many bytes there are."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return sum(e.name() == "[memory]" and e.nbytes() >= at_least for e in events)


class TestOneGradient:
    WORDS = 20_000

    @pytest.mark.parametrize("arch, scheme", [("gpt2", "two_way"), ("bart", "three_way")])
    def test_a_step_allocates_one_matrix_of_the_size_of_the_softmax(self, arch, scheme):
        stock = without_dropout(tied_model("in place", arch, scheme, vocab_size=self.WORDS))
        tied = use_tied_loss(copy.deepcopy(stock))
        inputs = tiny_inputs(stock, batch=1, length=8)  # logits have half the size of a gradient
        size = self.WORDS * WIDTH * 4
        assert allocated(lambda: step(tied, inputs), size) == 1
        assert allocated(lambda: step(stock, inputs), size) >= 3
        assert_same_gradients(gradients(tied), gradients(stock))


# --- Trainer ---------------------------------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    """Of several lengths; `meaning` is nothing that a model takes."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(3, 60, (8,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: i % 5] = -100
        return {"input_ids": ids, "labels": labels, "meaning": torch.tensor(i)}


def trainer(model, folder, steps=4, callbacks=(), compute_metrics=None, **kwargs):
    arguments = TrainingArguments(**{
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 2, "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": 0.01,
    } | kwargs)  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(),
                   callbacks=list(callbacks), compute_metrics=compute_metrics)  # fmt: skip


def history(model, folder, **kwargs) -> list[dict[str, float]]:
    """What a run logs, without the clock."""
    run = trainer(model, folder, **kwargs)
    run.train()
    clock = ("runtime", "per_second", "flos")
    return [{k: v for k, v in entry.items() if not any(c in k for c in clock)} for entry in run.state.log_history]


def assert_same_history(found, expected, rel=1e-4):
    assert len(found) == len(expected) > 3
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=rel)


def mean_logit(prediction) -> dict[str, float]:
    """A metric that needs the logits."""
    assert prediction.predictions.shape == (16, 8, VOCAB)
    return {"mean_logit": float(prediction.predictions.mean()), "largest": float(prediction.predictions.max())}


class TestTrainer:
    @pytest.mark.parametrize("kwargs, blocks", [
        (dict(gradient_accumulation_steps=2), 8),
        (dict(label_smoothing_factor=0.1), 0),
        (dict(eval_strategy="steps", eval_steps=2, compute_metrics=mean_logit), 4),
        (dict(eval_strategy="steps", eval_steps=2, prediction_loss_only=True), 4),
        (dict(remove_unused_columns=True, max_grad_norm=0.1), 4),
        (dict(gradient_checkpointing=True), 4),
    ], ids=["accumulation", "smoothing", "metrics", "loss only", "columns", "checkpointing"])  # fmt: skip
    def test_the_log_is_the_stock_models(self, kwargs, blocks, seen, tmp_path):
        model = tied_model("in place")
        tied = use_tied_loss(copy.deepcopy(model))
        expected = history(model, tmp_path / "stock", **kwargs)
        assert seen.taken() == Seen()
        assert_same_history(history(tied, tmp_path / "tied", **kwargs), expected)
        assert seen.taken() == Seen(blocks)  # Trainer's own smoothing takes the labels away, and needs the logits

    def test_a_sum_is_divided_by_the_items_of_all_steps_that_are_accumulated(self, seen):
        stock, tied = pair(tiny_model("gpt2"))
        inputs = batch(stock)
        for model in (stock, tied):
            model.loss = model(**inputs, num_items_in_batch=torch.tensor(31)).loss
            model.loss.backward()
        assert tied.loss.item() == pytest.approx(stock.loss.item(), rel=1e-5)
        assert tied.loss.item() < 0.5 * stock(**inputs).loss.item()
        assert_same_gradients(gradients(tied), gradients(stock))
        assert seen.taken() == BY_BLOCKS

    @pytest.mark.parametrize("kwargs", [{}, dict(gradient_accumulation_steps=2)])
    def test_bfloat16_by_autocast_trains_as_the_stock_model(self, kwargs, seen, tmp_path):
        model = tied_model("in place")
        tied = use_tied_loss(copy.deepcopy(model))
        expected = history(model, tmp_path / "stock", bf16=True, **kwargs)
        found = history(tied, tmp_path / "tied", bf16=True, **kwargs)
        assert seen.taken().blocks >= 4
        for key, tolerance in (("loss", 5e-3), ("grad_norm", 3e-2)):
            assert [e[key] for e in found[:-1]] == pytest.approx([e[key] for e in expected[:-1]], rel=tolerance)

    def test_a_run_that_resumes_from_a_checkpoint_is_the_whole_run(self, seen, tmp_path):
        whole, resumed = (use_tied_loss(tied_model("in place")) for _ in range(2))
        kwargs = dict(save_strategy="steps", save_steps=2)
        trainer(whole, tmp_path, **kwargs).train()
        trainer(resumed, tmp_path, **kwargs).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert torch.equal(logits_of(resumed), logits_of(whole))
        assert_tied(resumed)
        assert seen.taken() == Seen(blocks=6)

    def test_a_checkpoint_of_a_declared_loss_gives_it_back(self, seen, tmp_path):
        model = tie(tiny_model("gpt2"), TyingConfig(loss="tied"))
        trainer(model, tmp_path, steps=1, save_strategy="steps", save_steps=1).train()
        loaded = without_dropout(GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-1"))
        seen.taken()
        assert step(loaded, batch(loaded)).logits is None and seen.taken() == BY_BLOCKS

    @pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
    def test_the_signature_of_forward_is_the_models_own(self, arch):
        model = tiny_model(arch)
        before = inspect.signature(model.forward)
        assert inspect.signature(use_tied_loss(model).forward) == before
        assert inspect.signature(tie(model, "two_way").forward) == before

    def test_the_callback_logs_the_same_shares_by_role(self, seen, tmp_path):
        model = tied_model("in place")
        tied = use_tied_loss(copy.deepcopy(model))
        expected = history(model, tmp_path / "stock", callbacks=[TyingCallback(log_roles=True)])
        found = history(tied, tmp_path / "tied", callbacks=[TyingCallback(log_roles=True)])
        assert seen.taken() == Seen(blocks=4)
        assert 0 < expected[0]["grad_share/embeddings/output"] < 1
        assert_same_history(found, expected)

    @pytest.mark.parametrize("arch, scheme", [("gpt2", "two_way"), ("bart", "three_way")])
    def test_the_meter_outside_trainer_gives_the_same_norms(self, arch, scheme, seen):
        norms = []
        for model in pair(tied_model("in place", arch, scheme)):
            with measured_roles(model) as meter:
                step(model, batch(model))
            norms.append(meter.norms())
        assert seen.taken() == BY_BLOCKS
        assert norms[1] == pytest.approx(norms[0], rel=1e-5) and len(norms[0]) in (4, 6)


class TestLabelSmoothing:
    def test_it_is_that_of_torch(self, seen):
        stock = gpt2()
        tied = use_tied_loss(copy.deepcopy(stock), label_smoothing=0.1)
        inputs = batch(stock)
        whole = stock(**{k: v for k, v in inputs.items() if k != "labels"}).logits
        expected = F.cross_entropy(whole[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=0.1)
        expected.backward()
        found = step(tied, inputs).loss
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert abs(found.item() - stock(**inputs).loss.item()) > 1e-3
        assert_same_gradients(gradients(tied), gradients(stock))
        assert seen.taken() == BY_BLOCKS

    def test_it_is_of_training_steps_alone(self):
        stock = gpt2()
        tied = use_tied_loss(copy.deepcopy(stock), label_smoothing=0.5)
        for model in (stock, tied):
            model.eval()
        assert torch.equal(tied(**batch(tied)).loss, stock(**batch(stock)).loss)

    def test_it_holds_where_the_logits_are_needed_whole(self, seen):
        model = use_tied_loss(gpt2(), label_smoothing=0.1)
        inputs = batch(model)
        by_blocks = step(model, inputs).loss
        assert seen.taken() == BY_BLOCKS
        for config, whole in ((dict(target_modules=["lm_head"]), ["a sum"]), (dict(modules_to_save=["lm_head"]), [])):
            head = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **{"target_modules": ["c_attn"]} | config))
            assert step(head, inputs).loss.item() == pytest.approx(by_blocks.item(), rel=1e-5)  # nothing added so far
            assert seen.taken() == Seen(0, whole)


# --- outputs ---------------------------------------------------------------------------------------------------------


class TestOutputs:
    def test_generation_is_the_stock_models(self):
        stock, tied = pair(tiny_model("gpt2"))
        ids = tiny_inputs(stock)["input_ids"]
        how = dict(max_new_tokens=5, num_beams=2, do_sample=False)
        for mode in (True, False):
            assert torch.equal(*(model.train(mode).generate(ids, **how) for model in (stock, tied)))

    @pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
    def test_logits_are_there_wherever_it_is_no_training_step(self, arch, seen):
        stock, tied = pair(tiny_model(arch))
        inputs = batch(stock)
        unlabelled = dict(inputs, labels=None)
        if arch == "t5":
            unlabelled["decoder_input_ids"] = inputs["input_ids"]

        def same_everywhere(inputs):
            expected, found = stock(**inputs), tied(**inputs)
            assert torch.equal(found.logits, expected.logits) and found.keys() == expected.keys()
            return found

        assert same_everywhere(unlabelled).logits.requires_grad  # in training mode, but without labels
        with torch.no_grad():
            same_everywhere(inputs)
        stock.eval(), tied.eval()
        assert same_everywhere(inputs).loss.requires_grad
        assert seen.taken() == Seen()
        tied.train()
        assert tied(**inputs).logits is None

    def test_labels_can_be_given_by_their_place(self, seen):
        stock, tied = pair(tiny_model("bert"))
        ids, labels = batch(stock)["input_ids"], batch(stock)["labels"]
        place = list(inspect.signature(stock.forward).parameters).index("labels")
        outputs = tied(ids, *[None] * (place - 1), labels)
        assert outputs.logits is None and seen.taken() == BY_BLOCKS
        assert outputs.loss.item() == pytest.approx(stock(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
        assert torch.equal(tied(ids, None).logits, stock(ids, None).logits) and seen.taken() == Seen()

    @pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
    def test_a_tuple_has_none_in_the_place_of_the_logits(self, arch, seen):
        stock, tied = pair(tiny_model(arch))
        inputs = batch(stock) | {"return_dict": False}
        expected, found = stock(**inputs), tied(**inputs)
        assert isinstance(found, tuple) and len(found) == len(expected)
        assert found[1] is None and expected[1].shape[-1] == VOCAB
        assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
        assert [type(value) for value in found[2:]] == [type(value) for value in expected[2:]]
        assert seen.taken() == BY_BLOCKS

    def test_everything_else_in_the_outputs_is_there(self):
        stock, tied = pair(tiny_model("gpt2"))
        inputs = batch(stock) | {"output_hidden_states": True}
        expected, found = stock(**inputs), tied(**inputs)
        assert type(found) is type(expected)
        assert set(found.keys()) == set(expected.keys()) - {"logits"}
        assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))

    def test_a_loss_without_any_label_is_zero(self, seen):
        stock, tied = pair(tiny_model("gpt2"))
        inputs = batch(stock)
        inputs["labels"].fill_(-100)
        assert stock(**inputs).loss.isnan()
        assert step(tied, inputs).loss.item() == 0 and seen.taken() == BY_BLOCKS
        assert all(g is not None and torch.count_nonzero(g) == 0 for g in gradients(tied).values())

    def test_new_rows_of_a_resize_take_part(self, seen):
        stock, tied = pair(tiny_model("gpt2"))
        step(tied, batch(tied))
        seen.taken()
        for model in (stock, tied):
            torch.manual_seed(3)
            model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
        inputs = batch(stock)
        inputs["labels"][:, -1] = inputs["input_ids"][:, -1] = VOCAB + 5
        assert assert_same_step(tied, stock, inputs).logits is None
        assert seen.taken() == BY_BLOCKS
        assert tied.get_parameter("lm_head.weight").grad[VOCAB + 5].abs().sum() > 0


# --- PEFT ------------------------------------------------------------------------------------------------------------


def adapted(model, config):
    """With adapters that are not zero."""
    torch.manual_seed(4)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return without_dropout(peft_model)


BEFORE_AND_AFTER = pytest.mark.parametrize("when", ["before", "after"])


def adapted_pair(when: str, config, arch="gpt2"):
    """The stock model under an adapter, and the same with the tied loss put on before or after the adapter."""
    base = tiny_model(arch)
    stock = adapted(copy.deepcopy(base), config)
    if when == "before":
        return stock, adapted(use_tied_loss(base), config)
    return stock, use_tied_loss(adapted(base, config))


@BEFORE_AND_AFTER
class TestAdapters:
    @pytest.mark.parametrize("arch", ["gpt2", "t5", "bert"])
    def test_lora_on_attention_trains_by_blocks(self, arch, when, seen):
        stock, tied = adapted_pair(when, LoraConfig(r=2, target_modules=QKV[arch]), arch)
        assert assert_same_step(tied, stock, batch(stock.base_model.model)).logits is None
        assert seen.taken() == BY_BLOCKS
        trained = [n for n, g in gradients(tied).items() if g is not None]
        assert trained and all("lora_" in name for name in trained)

    def test_lora_on_the_input_embedding_trains_by_blocks(self, when, seen):
        stock, tied = adapted_pair(when, LoraConfig(r=2, target_modules=["wte"]))
        assert assert_same_step(tied, stock, batch(stock.base_model.model)).logits is None
        assert seen.taken() == BY_BLOCKS

    def test_lora_on_the_head_has_the_right_numbers_and_the_log_tells_once(self, when, seen, told):
        stock, tied = adapted_pair(when, LoraConfig(r=2, target_modules=["c_attn", "lm_head"]))
        for _ in range(3):
            outputs = assert_same_step(tied, stock, batch(stock.base_model.model))
        assert outputs.logits.shape == (2, 7, VOCAB)
        assert seen.taken() == Seen(0, ["a sum"] * 3)
        assert len([m for m in told if "needed whole (a sum)" in m]) == 1

    def test_a_trained_copy_of_the_head_has_the_right_numbers(self, when):
        config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])
        stock, tied = adapted_pair(when, config)
        assert_same_step(tied, stock, batch(stock.base_model.model))
        assert any("modules_to_save" in name for name, g in gradients(tied).items() if g is not None)

    def test_prompt_tuning_trains_by_blocks(self, when, seen):
        stock, tied = adapted_pair(when, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        assert assert_same_step(tied, stock, batch(stock.base_model)).logits is None
        assert seen.taken() == BY_BLOCKS
        assert [n for n, g in gradients(tied).items() if g is not None] == ["prompt_encoder.default.embedding.weight"]

    def test_tied_lora_trains_by_blocks(self, when, seen):
        base = tiny_model("llama")
        stock = without_dropout(tied_lora(copy.deepcopy(base)))
        if when == "before":
            tied = without_dropout(tied_lora(use_tied_loss(base)))
        else:
            tied = use_tied_loss(without_dropout(tied_lora(base)))
        assert assert_same_step(tied, stock, batch(base)).logits is None
        assert seen.taken() == BY_BLOCKS


def test_an_adapter_that_is_taken_off_the_head_gives_the_blocks_back(seen):
    stock, tied = pair(tiny_model("gpt2"))
    peft_model = adapted(tied, LoraConfig(r=2, target_modules=["lm_head"]))
    step(peft_model, batch(stock))
    assert seen.taken().blocks == 0
    base = peft_model.unload().requires_grad_()
    assert assert_same_step(base, stock, batch(stock)).logits is None
    assert seen.taken() == BY_BLOCKS


# --- files, declarations, classes ------------------------------------------------------------------------------------


class TiedGPT2Config(TyingConfigMixin, GPT2Config):
    model_type = "tied_gpt2"


class TiedGPT2(TiedModelMixin, GPT2LMHeadModel):
    config_class = TiedGPT2Config


def a_tied_gpt2(**entry) -> TiedGPT2:
    """The class form; `entry` goes into its declaration."""
    fields = {k: v for k, v in tiny_model("gpt2").config.to_dict().items() if k != "model_type"}
    torch.manual_seed(0)
    return shake(TiedGPT2(TiedGPT2Config(**fields, tying={"version": 1, "scheme": "two_way", **entry})))


DECLARED = TyingConfig("two_way", loss="tied")
#: The ways to a model with a tied loss.
WAYS = {
    "stock class": lambda: use_tied_loss(tiny_model("gpt2")),
    "tied before": lambda: use_tied_loss(tied_model("in place")),
    "tied after": lambda: tie(use_tied_loss(tiny_model("gpt2")), "two_way"),
    "untied before": lambda: use_tied_loss(untie(tiny_model("gpt2"))),
    "untied after": lambda: untie(use_tied_loss(tiny_model("gpt2"))),
    "declared": lambda: tie(tiny_model("gpt2"), DECLARED),
    "class form": lambda: use_tied_loss(a_tied_gpt2()),
    "class form, declared": lambda: a_tied_gpt2(loss="tied"),
    "three_way": lambda: use_tied_loss(three_way()),
}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def trains_by_blocks(model, seen) -> bool:
    """A step without logits, of the value that the model has in evaluation."""
    model = without_dropout(model)
    inputs = translation_inputs(model) if model.config.is_encoder_decoder else batch(model)
    outputs = step(model, inputs)
    by_blocks = outputs.logits is None and seen.taken() == BY_BLOCKS
    assert outputs.loss.item() == pytest.approx(model.eval()(**inputs).loss.item(), rel=1e-5)
    return by_blocks


class TestFiles:
    @pytest.mark.parametrize("make", [
        lambda: tiny_model("gpt2"), lambda: tied_model("in place"), lambda: tiny_model("llama"), three_way,
    ], ids=["gpt2", "tied gpt2", "llama", "bert2bert"])  # fmt: skip
    def test_a_file_under_use_tied_loss_is_the_stock_one_byte_by_byte(self, make, tmp_path):
        stock, tied = make(), use_tied_loss(make(), label_smoothing=0.1)
        stock.save_pretrained(tmp_path / "stock")
        tied.save_pretrained(tmp_path / "tied")
        assert files(tmp_path / "tied") == files(tmp_path / "stock")
        assert not has_tied_loss(type(stock).from_pretrained(tmp_path / "tied"))

    @pytest.mark.parametrize("load", [
        GPT2LMHeadModel.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        lambda folder: GPT2LMHeadModel(GPT2Config.from_pretrained(folder)),
        lambda folder: AutoModelForCausalLM.from_config(GPT2Config.from_pretrained(folder)),
    ], ids=["from_pretrained", "Auto", "from a config", "Auto from a config"])  # fmt: skip
    def test_a_declared_loss_comes_with_the_file(self, load, seen, tmp_path):
        model = tie(tiny_model("gpt2", **UNTIED_HEAD), DECLARED, init_from="target")
        assert model.config.tying["loss"] == "tied"
        assert trains_by_blocks(model, seen)
        model.save_pretrained(tmp_path)
        loaded = load(tmp_path)
        assert TyingConfig.from_dict(loaded.config.tying) == TyingConfig.from_dict(model.config.tying)
        assert_tied(loaded)
        assert trains_by_blocks(loaded, seen)

    def test_a_declared_loss_comes_with_the_file_of_a_class_too(self, seen, tmp_path):
        a_tied_gpt2(loss="tied").save_pretrained(tmp_path)
        loaded = TiedGPT2.from_pretrained(tmp_path)
        assert loaded.config.tying_config.loss == "tied" and trains_by_blocks(loaded, seen)
        assert not has_tied_loss(a_tied_gpt2())

    def test_a_model_of_that_file_without_the_head_has_no_loss_and_loads(self, tmp_path):
        model = tie(tiny_model("gpt2"), DECLARED)
        model.save_pretrained(tmp_path)
        body = AutoModel.from_pretrained(tmp_path)
        assert not has_tied_loss(body)
        assert torch.equal(body.get_input_embeddings().weight, model.get_input_embeddings().weight)

    def test_transformers_alone_reads_the_file(self, tmp_path):
        model = tie(tiny_model("gpt2"), DECLARED)
        model.save_pretrained(tmp_path / "model")
        script = (
            "import sys, torch\n"
            "from tests.models import logits\n"
            "from transformers import AutoModelForCausalLM\n"
            "torch.set_num_threads(1)\n"
            "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
            "assert 'hf_tying' not in sys.modules\n"
            "torch.save(logits(model), sys.argv[2])\n"
        )
        command = [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "logits.pt")]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        assert same(torch.load(tmp_path / "logits.pt"), logits_of(model))


class TestDeclarations:
    def test_without_the_package_a_published_class_says_so_and_trains_by_the_stock_loss(self, monkeypatch, told, seen):
        monkeypatch.setitem(sys.modules, "hf_tying.objectives.tied_loss", None)
        model = without_dropout(a_tied_gpt2(loss="tied"))
        assert not has_tied_loss(model) and ["needs hf_tying" in message for message in told] == [True]
        assert step(model, batch(model)).logits is not None and seen.taken() == Seen()

    def test_an_entry_without_a_loss_has_no_such_key(self):
        assert "loss" not in TyingConfig("two_way").to_dict()
        assert "loss" not in tied_model("in place").config.tying
        assert "loss" not in a_tied_gpt2(loss="stock").config.tying
        assert DECLARED.to_dict()["loss"] == "tied"
        assert TyingConfig.from_dict(DECLARED.to_dict()) == DECLARED

    def test_an_empty_loss_in_a_file_is_the_stock_one(self):
        assert TyingConfig.from_dict({"version": 1, "loss": None}).loss == "stock"

    @pytest.mark.parametrize("loss", ["blocks", "", 3, True, ["tied"]])
    def test_an_unknown_loss_is_refused(self, loss):
        for make in (lambda: TyingConfig(loss=loss), lambda: TyingConfig.from_dict({"version": 1, "loss": loss})):
            with pytest.raises(TyingError, match="Unknown loss .*expected 'stock' or 'tied'"):
                make()

    def test_the_flag_declares_it_with_a_scheme_and_alone(self, seen):
        assert TyingArguments().to_tying_config() is None
        assert TyingArguments(scheme="two_way", loss="tied").to_tying_config() == DECLARED
        alone = TyingArguments(loss="tied").to_tying_config()
        assert alone == TyingConfig(loss="tied")
        model = tie(tiny_model("gpt2"), alone)
        assert_tied(model)
        assert matrix(model, "target") is matrix(model, "output") and trains_by_blocks(model, seen)

    def test_a_tie_that_names_no_loss_leaves_it_as_it_is(self, seen):
        model = tie(tiny_model("gpt2"), DECLARED)
        for spec in ("none", "two_way", {"mlp": layer_pair(model)}):
            tie(model, spec, init_from="mean")
            assert model.config.tying["loss"] == "tied" and trains_by_blocks(model, seen), spec
        untie(model)
        assert model.config.tying["loss"] == "tied" and trains_by_blocks(model, seen)


class TestTheClass:
    @pytest.mark.parametrize("way", WAYS)
    def test_every_way_to_it_trains_by_blocks(self, way, seen):
        assert trains_by_blocks(WAYS[way](), seen)

    @pytest.mark.parametrize("way", WAYS)
    def test_undone_it_is_the_class_that_it_was(self, way, seen, tmp_path):
        model = WAYS[way]()
        kept = [cls for cls in type(model).__mro__ if cls is not TiedLossMixin and cls.__name__ == "TiedModelMixin"]
        fronted = type(model)
        assert use_tied_loss(model, False) is model and not has_tied_loss(model)
        assert TiedLossMixin not in type(model).__mro__ and type(model) is not fronted
        assert [cls for cls in type(model).__mro__ if cls.__name__ == "TiedModelMixin"] == kept
        assert not {"_tied_loss", "_softmax_name"} & vars(model).keys()
        assert "loss" not in (getattr(model.config, "tying", None) or {})
        assert_tied(model)
        assert not trains_by_blocks(model, seen) and seen.taken() == Seen()
        use_tied_loss(model, False)  # nothing to undo
        model.save_pretrained(tmp_path)
        assert not has_tied_loss(type(model).from_pretrained(tmp_path))
        assert trains_by_blocks(use_tied_loss(model), seen)

    def test_undone_without_any_tie_the_class_is_the_stock_one(self):
        model = use_tied_loss(use_tied_loss(tiny_model("gpt2")), False)
        assert type(model) is GPT2LMHeadModel and not hasattr(model.config, "tying")

    @pytest.mark.parametrize("way", WAYS)
    def test_said_again_it_changes_the_settings_and_puts_nothing_on_top(self, way):
        model = WAYS[way]()
        before, inputs = type(model), None
        use_tied_loss(model, label_smoothing=0.25, memory_budget=10_000, backend="torch")
        use_tied_loss(model, label_smoothing=0.5, memory_budget=20_000, backend="torch")
        assert type(model) is before
        assert model._tied_loss == LossSettings(0.5, 20_000, "torch")
        inputs = translation_inputs(model) if model.config.is_encoder_decoder else batch(model)
        smoothed = step(without_dropout(model), inputs).loss.item()
        assert step(use_tied_loss(model), inputs).loss.item() != pytest.approx(smoothed, rel=1e-3)
        assert model._tied_loss == LossSettings() and type(model) is before

    def test_the_budget_reaches_the_blocks(self, monkeypatch):
        given = []
        by_blocks = deferred_logits.cross_entropy
        monkeypatch.setattr(
            deferred_logits, "cross_entropy", lambda *args: given.append(args[-2:]) or by_blocks(*args)
        )
        model = use_tied_loss(gpt2(), memory_budget=12345, backend="torch")
        step(model, batch(model))
        assert given == [(12345, "torch")]

    @pytest.mark.parametrize("copied", [
        lambda model, folder: copy.deepcopy(model),
        lambda model, folder: pickle.loads(pickle.dumps(model)),
        lambda model, folder: torch.save(model, folder / "m.pt") or torch.load(folder / "m.pt", weights_only=False),
    ], ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
    @pytest.mark.parametrize("way", WAYS)
    def test_a_copy_is_one_of_its_kind(self, way, copied, seen, tmp_path):
        model = WAYS[way]()
        if way != "class form, declared":
            use_tied_loss(model, label_smoothing=0.0, memory_budget=54321)
        twin = copied(model, tmp_path)
        assert type(twin) is type(model) and twin._tied_loss == model._tied_loss
        assert_tied(twin)
        assert trains_by_blocks(twin, seen)
        use_tied_loss(twin, False)
        assert has_tied_loss(model) and trains_by_blocks(model, seen)


# --- other ways through a model --------------------------------------------------------------------------------------


class TestOtherWaysThroughAModel:
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("arch", ["gpt2", "bart"])
    def test_gradient_checkpointing(self, arch, reentrant, seen):
        stock, tied = pair(tiny_model(arch))
        for model in (stock, tied):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        assert assert_same_step(tied, stock, batch(stock)).logits is None
        assert seen.taken() == BY_BLOCKS

    def test_autocast(self, seen):
        stock, tied = pair(tiny_model("gpt2"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_step(tied, stock, batch(stock), rtol=1e-3, atol=2e-2)
        assert seen.taken() == BY_BLOCKS
        assert tied(**batch(stock)).loss.dtype == torch.float32

    def test_bfloat16_weights(self, seen):
        stock, tied = pair(tiny_model("gpt2", dtype=torch.bfloat16))
        assert_same_step(tied, stock, batch(stock), rtol=1e-3, atol=2e-2)
        assert seen.taken() == BY_BLOCKS

    @pytest.mark.filterwarnings("ignore")
    def test_torch_compile_of_a_model_with_it_and_with_it_put_on_later(self, seen):
        stock, tied = pair(tiny_model("gpt2"))
        inputs = batch(stock)
        expected = step(stock, inputs)
        later = copy.deepcopy(stock)
        compiled = torch.compile(later, backend="aot_eager")
        assert step(compiled, inputs).logits is not None
        use_tied_loss(compiled)
        for model, run in ((tied, torch.compile(tied, backend="aot_eager")), (later, compiled)):
            found = step(run, inputs)
            assert found.logits is None and found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
            assert_same_gradients(gradients(model), gradients(stock))
        assert seen.taken() == Seen(blocks=2)
        torch._dynamo.reset()

    def test_functional_call_gives_its_gradients_to_the_tensors_that_are_given(self, seen):
        stock, tied = pair(tiny_model("gpt2"))
        assert_same_step(tied, stock, batch(stock))
        tied.zero_grad()
        seen.taken()
        given = {name: p.detach().clone().requires_grad_() for name, p in tied.named_parameters()}
        outputs = torch.func.functional_call(tied, given, (), batch(tied))
        outputs.loss.backward()
        assert outputs.logits is None and seen.taken() == BY_BLOCKS
        assert_same_gradients({name: p.grad for name, p in given.items()}, gradients(stock))
        assert all(g is None for g in gradients(tied).values())

    def test_a_frozen_matrix_and_a_frozen_body(self, seen):
        for frozen in ("transformer.wte", "transformer.h"):
            stock, tied = pair(tiny_model("gpt2"))
            for model in (stock, tied):
                model.get_submodule(frozen).requires_grad_(False)
            assert_same_step(tied, stock, batch(stock))
            assert None in gradients(tied).values() and seen.taken() == BY_BLOCKS

    def test_inputs_by_their_embeddings(self, seen):
        stock, tied = pair(tiny_model("gpt2"))
        inputs = batch(stock)
        inputs["inputs_embeds"] = torch.randn(2, 7, WIDTH)
        del inputs["input_ids"]
        assert assert_same_step(tied, stock, inputs).logits is None
        assert seen.taken() == BY_BLOCKS

    @pytest.mark.parametrize("prepare", [
        lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
        lambda model: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
    ], ids=["dispatched", "mixed precision"])  # fmt: skip
    def test_a_model_that_accelerate_has_wrapped_is_refused_and_unchanged(self, prepare, accelerate_anew):
        model = prepare(gpt2())
        with pytest.raises(TyingError, match=r"forward of this GPT2LMHeadModel is wrapped already.*\(model\) before"):
            use_tied_loss(model)
        assert type(model) is GPT2LMHeadModel and step(model, batch(model)).logits is not None

    def test_a_model_that_accelerate_wraps_later_trains_by_blocks(self, seen, accelerate_anew):
        for prepare in (
            lambda model: dispatch_model(model, {"": "cpu"}, force_hooks=True),
            lambda model: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
        ):
            model = prepare(use_tied_loss(gpt2()))
            assert step(model, batch(model)).logits is None and seen.taken() == BY_BLOCKS
            assert use_tied_loss(model, label_smoothing=0.25)._tied_loss == LossSettings(0.25)


class TestLossesOfTheUser:
    def test_one_that_needs_the_logits_has_them_and_the_log_tells_once(self, seen, told):
        def mine(logits, labels, vocab_size, **kwargs):
            chances = logits[:, :-1].log_softmax(-1)
            return F.nll_loss(chances.flatten(0, 1), labels[:, 1:].flatten()) + 0.1 * logits.square().mean()

        stock, tied = pair(tiny_model("gpt2"))
        stock.loss_function = tied.loss_function = mine
        for _ in range(3):
            assert_same_step(tied, stock, batch(stock))
        now = seen.taken()
        assert now.blocks == 0 and {"log_softmax", "square"} <= set(now.whole)
        assert len([m for m in told if "needed whole (log_softmax)" in m]) == 1

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_weights_of_the_words_go_through_the_blocks(self, reduction, seen):
        loss = nn.CrossEntropyLoss(weight=torch.rand(VOCAB) + 0.1, reduction=reduction, ignore_index=7)

        def mine(logits, labels, vocab_size, **kwargs):
            return loss(logits[..., :-1, :].reshape(-1, vocab_size), labels[..., 1:].reshape(-1))

        stock, tied = pair(tiny_model("gpt2"))
        stock.loss_function = tied.loss_function = mine
        inputs = tiny_inputs(stock)
        inputs["labels"][0, 2] = inputs["labels"][1, 4] = 7
        assert assert_same_step(tied, stock, inputs).logits is None
        assert seen.taken() == BY_BLOCKS

    def test_a_loss_for_each_token_goes_through_the_blocks(self, seen):
        weights = torch.rand(14)

        def mine(logits, labels, vocab_size, **kwargs):
            return (F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), reduction="none") * weights).sum()

        stock, tied = pair(tiny_model("gpt2"))
        stock.loss_function = tied.loss_function = mine
        assert assert_same_step(tied, stock, batch(stock)).logits is None
        assert seen.taken() == BY_BLOCKS

    def test_two_losses_of_the_same_logits_are_both_there(self, seen):
        def mine(logits, labels, vocab_size, **kwargs):
            flat, words = logits.view(-1, vocab_size), labels.view(-1)
            return F.cross_entropy(flat, words) + 0.5 * F.cross_entropy(flat[2:], words[2:], label_smoothing=0.2)

        stock, tied = pair(tiny_model("gpt2"))
        stock.loss_function = tied.loss_function = mine
        assert assert_same_step(tied, stock, batch(stock)).logits is None
        assert seen.taken() == Seen(blocks=2)


# --- refusals --------------------------------------------------------------------------------------------------------


def int8_head():
    """As quantisers leave it: the matrix is a buffer of small integers."""
    model = tiny_model("llama", **UNTIED_HEAD)
    rows = model.lm_head.weight.detach()
    del model.lm_head.weight
    model.lm_head.register_buffer("weight", (rows * 100).to(torch.int8))
    return model


def int8_parameter():
    """As bitsandbytes leaves it: a parameter of small integers."""
    model = tiny_model("llama", **UNTIED_HEAD)
    rows = (model.lm_head.weight.detach() * 100).to(torch.int8)
    model.lm_head.weight = nn.Parameter(rows, requires_grad=False)
    return model


def dynamic_head():
    return torch.ao.quantization.quantize_dynamic(tiny_model("llama", **UNTIED_HEAD), {nn.Linear})


def classifier():
    return AutoModelForSequenceClassification.from_config(tiny_model("gpt2").config)


@pytest.mark.filterwarnings("ignore")
class TestRefusals:
    @pytest.mark.parametrize("make, message", [
        (lambda: AutoModel.from_config(tiny_model("llama").config), "takes no `labels`. Expected a model with a head"),
        (classifier, "GPT2ForSequenceClassification has no softmax matrix"),
        (int8_head, "'lm_head.weight', is a buffer.*expected a floating-point parameter"),
        (int8_parameter, "'lm_head.weight', is of dtype torch.int8: expected a floating-point parameter"),
        (dynamic_head, "'lm_head.weight', is quantised.*expected a floating-point parameter"),
    ], ids=["no head", "classifier", "int8 buffer", "int8 parameter", "dynamic"])  # fmt: skip
    def test_a_model_that_cannot_have_it_is_refused_and_unchanged(self, make, message):
        model = make()
        cls, held, config = type(model), set(vars(model)), model.config.to_dict()
        with pytest.raises(TyingError, match=message):
            use_tied_loss(model)
        assert type(model) is cls and set(vars(model)) == held and model.config.to_dict() == config

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), None, "gpt2"])
    def test_what_is_no_model_is_refused(self, model):
        with pytest.raises(TyingError, match="Expected a PreTrainedModel .*found (Linear|NoneType|str)"):
            use_tied_loss(model)

    @pytest.mark.parametrize("kwargs, message", [
        (dict(backend="cuda"), "Unknown backend 'cuda': expected one of .*'torch'"),
        (dict(label_smoothing=1.0), r"label_smoothing=1.0: expected a number in \[0, 1\)"),
        (dict(label_smoothing=-0.1), r"label_smoothing=-0.1: expected a number in \[0, 1\)"),
        (dict(label_smoothing=float("nan")), r"label_smoothing=nan: expected a number in \[0, 1\)"),
    ])  # fmt: skip
    def test_settings_that_mean_nothing_are_refused_and_the_model_is_unchanged(self, kwargs, message):
        model = tiny_model("gpt2")
        with pytest.raises(ValueError, match=message):
            use_tied_loss(model, **kwargs)
        assert type(model) is GPT2LMHeadModel and not {"_tied_loss", "_softmax_name"} & vars(model).keys()
        use_tied_loss(model, label_smoothing=0.25)
        with pytest.raises(ValueError, match=message):
            use_tied_loss(model, **kwargs)
        assert model._tied_loss == LossSettings(0.25)

    def test_a_declaration_that_a_model_cannot_have_changes_nothing(self):
        body = tiny_model("llama").model
        names = layer_pair(body)
        with pytest.raises(TyingError, match="takes no `labels`"):
            tie(body, TyingConfig(groups={"mlp": names}, loss="tied"), init_from="mean")
        assert not isinstance(body, TiedModelMixin) and getattr(body.config, "tying", None) is None
        assert body.get_parameter(names[0]) is not body.get_parameter(names[1])

    def test_a_label_outside_the_vocabulary_is_torchs_own_error(self):
        stock, tied = pair(tiny_model("gpt2"))
        inputs = batch(stock)
        inputs["labels"][1, 3] = VOCAB
        for model in (stock, tied):
            with pytest.raises(IndexError, match=f"Target {VOCAB} is out of bounds"):
                step(model, inputs)
        assert type(tied.eval()(**batch(stock)).logits) is torch.Tensor  # nothing is left of the error
        assert assert_same_step(tied.train(), stock, batch(stock)).logits is None


# --- `DeferredLogits` itself -----------------------------------------------------------------------------------------

WORDS = 11


def deferred(*shape: int, dtype=torch.float32, bias=True, num_items=None):
    """Deferred logits and the real ones of equal leaves: `(logits, [hidden, weight, bias])`, twice."""
    leaves = [torch.randn(*shape, 4), torch.randn(WORDS, 4), torch.randn(WORDS) if bias else None]
    sides = []
    for side in ("deferred", "real"):
        hidden, weight, bias = (None if x is None else x.to(dtype).clone().requires_grad_() for x in leaves)
        weight = nn.Parameter(weight.detach())
        if side == "deferred":
            with TiedSoftmax(weight, LossSettings(), num_items):
                logits = F.linear(hidden, weight, bias)
            assert type(logits) is DeferredLogits
        else:
            logits = F.linear(hidden, weight, bias)
        sides.append((logits, [hidden, weight, bias]))
    return sides


@dataclass
class Operation:
    """`apply` makes logits of other logits, whose shape before the words is `lead` then; `keeps`: it is noted down."""

    name: str
    apply: Callable
    lead: list[int]
    keeps: bool = True


def some_operation(chance: Random, lead: list[int], before: set[str]) -> Operation:
    """What forward passes do with their logits, of the shape `(*lead, WORDS)`; `before`: what was done so far."""
    capped, stepped = "tanh" in before, before & {"tanh", "scale", "quotient", "tensor"}
    kinds = ["flatten", "view", "float", "double", "half", "contiguous", "scale", "quotient", "tensor", "bias"]
    kinds += [] if capped else ["tanh"]
    kinds += ["slice", "mask", "choose"] if lead[0] > 1 else []
    kinds += ["one", "split", "last", "dots", "mask of two"] if len(lead) > 1 and lead[0] > 1 else []
    kind = chance.choice(kinds)
    count, rest = torch.Size(lead).numel(), lead[1:]
    factor = chance.choice([0.5, 2.0, 3] if capped else [0.5, 2.0, 3, -0.75])
    rows = torch.randn(chance.choice([(WORDS,), (1, WORDS)]))
    mask = torch.rand(lead[: 2 if kind == "mask of two" else 1]) < 0.6
    shape = chance.choice([(-1, WORDS), ([count, WORDS],), (torch.Size([count, WORDS]),), (count, -1)])
    tanh = chance.choice([torch.tanh, lambda x: x.tanh()])
    apply, after = {
        "flatten": (lambda x: x.reshape(*shape), [count]),
        "view": (lambda x: x.contiguous().view(*shape), [count]),
        "split": (lambda x: x.reshape(*lead[::-1], WORDS), lead[::-1]),
        "float": (lambda x: x.float(), lead),
        "double": (lambda x: x.to(torch.float64), lead),
        "half": (lambda x: x.to(dtype=torch.bfloat16), lead),
        "contiguous": (lambda x: x.contiguous(), lead),
        "scale": (lambda x: factor * x, lead),
        "quotient": (lambda x: x / factor, lead),
        "tensor": (lambda x: x * torch.tensor(float(factor)), lead),
        "bias": (lambda x: x + rows, lead),
        "tanh": (lambda x: tanh(x), lead),
        "slice": (lambda x: x[1:], [lead[0] - 1, *rest]),
        "mask": (lambda x: x[mask], [int(mask.sum()), *rest]),
        "mask of two": (lambda x: x[mask], [int(mask.sum()), *rest[1:]]),
        "choose": (lambda x: x[torch.tensor([0, 1, 0])], [3, *rest]),
        "one": (lambda x: x[-1], rest),
        "last": (lambda x: x[:, :-1], [lead[0], *[size - 1 for size in rest[:1]], *rest[1:]]),
        "dots": (lambda x: x[..., :-1, :], [*lead[:-1], lead[-1] - 1]),
    }[kind]
    return Operation(kind, apply, after, keeps=not (kind == "bias" and stepped))


def operations(chance: Random, lead: list[int]) -> list[Operation]:
    """Up to six, one after the other."""
    done = []
    for _ in range(chance.randint(0, 6)):
        if 0 not in lead:
            done.append(some_operation(chance, lead, {operation.name for operation in done}))
            lead = done[-1].lead
    return done


class TestDeferredLogits:
    @pytest.mark.parametrize("at_last", ["mean", "sum", "none", "logits"])
    def test_whatever_is_noted_down_in_any_order_is_what_the_logits_would_be(self, at_last, seen):
        chance, ways = Random(at_last), Counter()
        for number in range(200):
            torch.manual_seed(number)
            shape = chance.choice([(2, 5), (3,), (1, 1), (2, 3, 2), (3, 2, 2), (5, 2), (1, 4)])
            done = operations(chance, list(shape))
            names, kept = [operation.name for operation in done], all(operation.keeps for operation in done)
            ways.update(names), ways.update([kept])
            sides = deferred(*shape, bias=chance.random() < 0.5)
            options = {
                "label_smoothing": chance.choice([0.0, 0.2]),
                "weight": chance.choice([None, torch.rand(WORDS)]),
            }
            found, expected = (self._results(side, done, at_last, options) for side in sides)
            assert (seen.taken().whole == []) == (kept and at_last != "logits"), names
            rounded = 0.05 if "half" in names else 2e-5
            for ours, real in zip(found, expected, strict=True):
                assert (ours is None) == (real is None)
                if real is not None and real.numel() and not expected[0].isnan().any():  # the mean of nothing
                    assert ours.shape == real.shape
                    apart = (ours.double() - real.double()).abs().max()
                    assert apart <= rounded * max(float(real.abs().max()), 1e-3), (number, names, options)
        assert len(ways) == 21 and min(ways.values()) >= 4, ways

    @staticmethod
    def _results(side, done: list[Operation], at_last: str, options: dict) -> list[torch.Tensor | None]:
        """What comes out at last, and the gradients."""
        logits, leaves = side
        for operation in done:
            logits = operation.apply(logits)
        if at_last == "logits":
            value = logits * torch.linspace(0.5, 1.5, WORDS)
        else:
            flat = logits.float().reshape(-1, WORDS)
            labels = torch.arange(len(flat)) * 5 % WORDS
            labels[1::3] = -100
            value = F.cross_entropy(flat, labels, reduction=at_last, **options)
        value.sum().backward()
        return [value.detach(), *(None if x is None else x.grad for x in leaves)]

    def test_it_answers_what_a_tensor_is_asked(self):
        other = torch.zeros(2, dtype=torch.float64)
        for number, ask in enumerate((
            lambda x: x.shape, lambda x: x.size(), lambda x: x.size(-1), lambda x: x.size(0), lambda x: x.ndim,
            lambda x: x.dim(), lambda x: len(x), lambda x: x.device, lambda x: x.dtype, lambda x: x.numel(),
            lambda x: x.to(torch.bfloat16).dtype, lambda x: x.to(other).dtype, lambda x: x.requires_grad,
            lambda x: x.to("cpu", torch.float64).dtype, lambda x: x.to("cpu").dtype, lambda x: x[0].shape,
            lambda x: x.float().dtype, lambda x: x.to(torch.float64).float().dtype, lambda x: x[:, -1].shape,
            lambda x: x.view(-1, WORDS).shape, lambda x: (x + torch.ones(WORDS, dtype=torch.float64)).dtype,
            lambda x: (x + torch.ones(WORDS, dtype=torch.bfloat16)).dtype, lambda x: (x * 2).dtype,
            lambda x: (x[0] + torch.ones(1, 1, WORDS)).shape, lambda x: torch.tanh(x).shape,
        )):  # fmt: skip
            (logits, _), (real, _) = deferred(2, 5)
            assert ask(logits) == ask(real), number

    @pytest.mark.parametrize("names, by_blocks", [
        ((), True), (("view",), True), (("transpose",), False), (("probabilities",), False), (("words",), False),
        (("bytes",), False),
    ])  # fmt: skip
    def test_only_a_loss_of_words_is_computed_by_blocks(self, names, by_blocks, seen):
        losses, probabilities = [], torch.rand(6, WORDS).softmax(-1)
        for logits, _ in deferred(6):
            labels = torch.arange(6)
            if "view" in names:
                logits = logits.view(2, 3, WORDS).view(6, WORDS)
            if "transpose" in names:
                logits, labels = logits.view(2, 3, WORDS).transpose(1, 2), labels.view(2, 3)
            if "probabilities" in names:
                labels = probabilities
            if "bytes" in names:
                labels = labels.to(torch.uint8)
            if "words" in names:
                logits = logits[:, :9]
            losses.append(F.cross_entropy(logits, labels))
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        now = seen.taken()
        assert (now == BY_BLOCKS) if by_blocks else (now.blocks == 0 and now.whole)

    def test_a_sum_that_will_be_divided_is_right_whatever_it_is_divided_by(self):
        for items in (5, torch.tensor(5), 0, torch.tensor(0)):
            results = []
            for logits, leaves in deferred(6, num_items=items):
                loss = F.cross_entropy(logits, torch.arange(6), reduction="sum") / 3
                loss.backward()
                results.append([loss.detach(), *(x.grad for x in leaves)])
            assert all(same(a, b, 1e-5) for a, b in zip(*results, strict=True)), items

    def test_a_matrix_that_is_not_the_softmax_is_multiplied_as_always(self):
        weight, other = nn.Parameter(torch.randn(WORDS, 4)), nn.Parameter(torch.randn(WORDS, 4))
        with TiedSoftmax(weight, LossSettings()):
            assert type(F.linear(torch.randn(3, 4), other)) is torch.Tensor
            assert type(F.linear(torch.randn(3, 4), weight)) is DeferredLogits
            assert type(F.linear(torch.randn(3, 4), weight.view_as(weight))) is DeferredLogits
        assert type(F.linear(torch.randn(3, 4), weight)) is torch.Tensor

    def test_rows_that_are_looked_up_keep_what_their_embedding_says(self):
        weight = nn.Parameter(torch.randn(WORDS, 4))
        ids = torch.tensor([[1, 2, 2], [3, 1, 0]])
        for options in ({}, dict(padding_idx=2), dict(scale_grad_by_freq=True), dict(max_norm=0.5), dict(sparse=True)):
            results = []
            for softmax in (True, False):
                parameter = nn.Parameter(weight.detach().clone())
                if softmax:
                    with TiedSoftmax(parameter, LossSettings()):
                        rows = F.embedding(ids, parameter, **options)
                else:
                    rows = F.embedding(ids, parameter, **options)
                (rows * torch.arange(1.0, 5)).sum().backward()
                results.append((rows.detach(), parameter.grad.to_dense()))
            assert all(same(a, b) for a, b in zip(*results, strict=True)), options

    def test_a_scale_that_is_learnt_has_its_gradient(self):
        gradients = []
        for logits, _ in deferred(6):
            scale = torch.ones(1, requires_grad=True)
            F.cross_entropy(logits * scale, torch.arange(6)).backward()
            gradients.append(scale.grad)
        assert same(*gradients) and gradients[1].abs() > 1e-3

    @pytest.mark.parametrize("copied", [
        lambda x: x * 2, lambda x: x / 2, lambda x: x.tanh(), lambda x: x + torch.ones(WORDS),
        lambda x: x.to(torch.float64), lambda x: x[torch.ones(2, 5, dtype=torch.bool)], lambda x: x[[0]],
        lambda x: x[:, :-1].contiguous(), lambda x: (x.view(-1, WORDS) * 3)[1:],
    ], ids=["scale", "quotient", "tanh", "bias", "cast", "mask", "rows", "contiguous", "long ago"])  # fmt: skip
    def test_what_was_copied_before_a_write_is_what_it_was(self, copied):
        values = []
        for logits, _ in deferred(2, 5):
            earlier = copied(logits)
            logits[..., 0] = 5.0
            losses = F.cross_entropy(earlier.reshape(-1, WORDS), torch.zeros(earlier.shape[:-1].numel()).long())
            values.append((earlier.sum(0).detach(), losses.detach()))
        assert all(same(a, b, 1e-5) for a, b in zip(*values, strict=True))

    @pytest.mark.parametrize("shared", [
        lambda x: x.view(-1, WORDS), lambda x: x[:, :-1], lambda x: x[1], lambda x: x.float(),
        lambda x: x.contiguous(), lambda x: x.to("cpu"),
    ], ids=["view", "slice", "row", "float", "contiguous", "to"])  # fmt: skip
    def test_a_write_into_what_shares_memory_is_seen(self, shared):
        values = []
        for logits, _ in deferred(2, 5):
            later = shared(logits)
            shared(logits)[..., 0] = 5.0
            loss = F.cross_entropy(shared(logits).reshape(-1, WORDS)[:5], torch.arange(5))
            values.append((loss.detach(), logits.sum(0).detach(), later.sum(0).detach()))
        assert all(same(a, b, 1e-5) for a, b in zip(*values, strict=True))

    def test_it_is_not_iterated_over_and_says_what_to_do(self):
        (logits, _), _ = deferred(2, 5)
        for act in (list, tuple, lambda x: [*x], lambda x: [row for row in x]):
            with pytest.raises(TypeError, match=r"not iterable.*use_tied_loss\(model, False\)"):
                act(logits)

    def test_the_matrix_can_be_given_by_name(self):
        weight, hidden = nn.Parameter(torch.randn(WORDS, 4)), torch.randn(3, 4)
        with TiedSoftmax(weight, LossSettings()):
            logits = F.linear(input=hidden, weight=weight)
        assert same(torch.as_tensor(logits.softmax(-1)), F.linear(hidden, weight).softmax(-1))


def in_place(name, *args):
    """A method that changes the tensor that it is called on."""

    def act(logits):
        getattr(logits, name)(*args)
        return logits

    return act


def item_assigned(logits):
    logits[..., 3] = -5.0
    return logits


def augmented(logits):
    logits += torch.ones(WORDS)
    logits *= 2
    logits /= 3
    return logits


def less_one(logits):
    logits -= 1
    return logits


FIRST = torch.zeros(WORDS, dtype=torch.bool).index_fill(0, torch.arange(3), True)
#: What is nowhere noted down.
OTHER = {
    "an index into the words": lambda x: x[..., 3],
    "a slice of the words": lambda x: x[:, :, 2:5],
    "a mask of the words": lambda x: x[:, :, FIRST],
    "a mask of everything": lambda x: x[torch.ones(2, 5, WORDS, dtype=torch.bool)],
    "chosen in two dimensions": lambda x: x[torch.tensor([[0, 1], [1, 0]])],
    "a new dimension": lambda x: x[None],
    "no index": lambda x: x[()],
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "mT": lambda x: x.mT,
    "argmax": lambda x: x.argmax(-1),
    "torch.argmax": lambda x: torch.argmax(x, -1),
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: torch.logsumexp(x, dim=-1),
    "sum": lambda x: x.sum(),
    "torch.sum": lambda x: torch.sum(x, 0),
    "max": lambda x: x.max(-1).values,
    "topk": lambda x: torch.topk(x, 3).values,
    "gather": lambda x: x.gather(-1, torch.zeros(2, 5, 1, dtype=torch.long)),
    "flat": lambda x: x.view(-1),
    "flatten": lambda x: torch.flatten(x, 0, 1),
    "words cut up": lambda x: x[..., :10].reshape(2, 5, 2, 5),
    "view of a size that is no word count": lambda x: x.view(5, -1),
    "a shape by name": lambda x: x.reshape(shape=(10, WORDS)),
    "view of another dtype": lambda x: x.view(torch.int32).float(),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "type": lambda x: x.type(torch.float64),
    "half": lambda x: x.bfloat16(),
    "tanh of tanh": lambda x: F.cross_entropy(x.tanh().tanh().view(-1, WORDS), torch.arange(10)),
    "a sum in another type": lambda x: x.to(torch.float64).sum(0),
    "a capped bias": lambda x: x.tanh() + torch.ones(WORDS),
    "a cap upside down": lambda x: F.cross_entropy(-2 * x.tanh().view(-1, WORDS), torch.arange(10)),
    "a cap without a factor": lambda x: F.cross_entropy(x.tanh().view(-1, WORDS), torch.arange(10)),
    "a cap and two factors": lambda x: F.cross_entropy((3 * (x / 2).tanh() * 2).view(-1, WORDS), torch.arange(10)),
    "a bias for each token": lambda x: x + torch.arange(5.0)[:, None],
    "a bias with a dimension more": lambda x: x[0] + torch.ones(1, 1, WORDS),
    "a bias with a factor": lambda x: torch.add(x, torch.ones(WORDS), alpha=2),
    "a sum with a number": lambda x: x + 1.5,
    "a scale for each word": lambda x: x * torch.linspace(0, 1, WORDS),
    "a quotient by tensors": lambda x: x / torch.linspace(1, 2, WORDS),
    "a quotient by zero": lambda x: (x / 0).isinf(),
    "a rounded quotient": lambda x: x.div(2, rounding_mode="floor"),
    "less a tensor": lambda x: x - torch.ones(WORDS),
    "a tensor less it": lambda x: torch.ones(WORDS) - x,
    "less a number": lambda x: x - 1,
    "a number less it": lambda x: 1 - x,
    "a number by it": lambda x: 1 / x,
    "negative": lambda x: -x,
    "power": lambda x: x**2,
    "absolute": lambda x: abs(x),
    "greater than a number": lambda x: x > 0,
    "greater than a tensor": lambda x: x > torch.zeros(WORDS),
    "equal to a number": lambda x: x == 0.0,
    "a product": lambda x: x @ torch.ones(WORDS, 3),
    "where": lambda x: torch.where(FIRST, x, -1.0),
    "masked_fill": lambda x: x.masked_fill(FIRST, -1.0),
    "cat": lambda x: torch.cat([x, torch.ones(2, 5, WORDS)]),
    "stack": lambda x: torch.stack((x, x)),
    "einsum": lambda x: torch.einsum("btv->tv", x),
    "nll_loss": lambda x: F.nll_loss(F.log_softmax(x.view(-1, WORDS), -1), torch.arange(10)),
    "kl_div": lambda x: F.kl_div(x.log_softmax(-1), torch.full((2, 5, WORDS), 1 / WORDS), reduction="batchmean"),
    "mul_": in_place("mul_", 2.0),
    "div_": in_place("div_", 2.0),
    "add_": in_place("add_", 1.0),
    "clamp_": in_place("clamp_", -1.0, 1.0),
    "masked_fill_": in_place("masked_fill_", FIRST, -1.0),
    "index_fill_": in_place("index_fill_", -1, torch.arange(3), -1.0),
    "an item assigned": item_assigned,
    "augmented": augmented,
    "less one in place": less_one,
}


@pytest.mark.parametrize("name", OTHER)
def test_anything_else_is_done_to_the_logits_themselves(name):
    results = []
    for logits, leaves in deferred(2, 5):
        torch.manual_seed(0)
        value = OTHER[name](logits)
        value = value.whole("a test") if type(value) is DeferredLogits else value
        if value.requires_grad:
            value.float().sum().backward()
        results.append([value.detach(), *(x.grad if value.requires_grad else None for x in leaves)])
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or same(found, expected, atol=1e-5)
