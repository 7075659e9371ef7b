"""The names that people import stay where they are; modules of 0.1 answer to their old names, also inside a pickle."""

import importlib
import pickle
import sys

import pytest
import torch

from hf_tying import TyingConfig, _moved, assert_tied, tie, use_tied_loss
from hf_tying.objectives import ContrastiveObjective

from .processes import run_python
from .tiny import logits, tiny_inputs, tiny_model

PUBLIC = {
    "hf_tying": {
        *("TiedModelMixin", "TyingCallback", "TyingConfig", "TyingConfigMixin", "TyingError", "assert_tied"),
        *("merge_projection", "tie", "tying_report", "untie", "use_projection", "use_tied_loss"),
    },
    "hf_tying.models": {
        *("TiedEncoderDecoderConfig", "TiedEncoderDecoderModel"),
        *("TiedLSTMConfig", "TiedLSTMForCausalLM", "TiedLSTMModel"),
    },
    "hf_tying.losses": {
        *("AugmentedLoss", "ContrastiveWeightTyingLoss", "ProjectionPenalty", "TiedCrossEntropy", "TiedEmbedding"),
        *("augmented_loss", "contrastive_weight_tying_loss", "projection_penalty", "reference_cross_entropy"),
        *("tied_cross_entropy", "tied_embedding"),
    },
    "hf_tying.objectives": {"AugmentedObjective", "ContrastiveObjective"},
    "hf_tying.peft": {"TiedLoraConfig", "TiedLoraModel", "export_to_lora", "fit_from_lora"},
    "hf_tying.metrics": {
        *("Bleu", "ChrF", "Perplexity", "WordSimilarity", "generated_text", "perplexity_of", "read_word_pairs"),
        *("sequence_scores", "spearman", "translation_metrics", "word_id", "word_similarities"),
    },
    "hf_tying.training": {
        *("CarriedStateArguments", "CarriedStateTrainer", "HeadlessTrainer", "ObjectiveArguments", "RECIPES"),
        *("TyingArguments", "TyingCallback", "recover_lm_head"),
    },
    "hf_tying.data": {
        *("ContiguousText", "Corpus", "END_OF_TEXT", "JointTokenizer", "ParallelCorpus", "cldr_corpus"),
        *("blocks_for_language_modeling", "corpus_from_files", "encode_parallel", "encode_words"),
        *("join_vocabularies", "read_parallel_text", "read_translation_json", "standard_library_corpus"),
        *("train_byte_level_bpe", "train_joint_tokenizer", "train_word_level"),
    },
    "hf_tying.diagnostics": {
        *("Alignment", "MatrixDiagnosis", "RoleDiagnostics", "alignment", "diagnose", "effective_rank"),
        "gradient_shares",
    },
    "hf_tying.doctor": {"Finding", "Forecast", "diagnose", "forecast", "inspect", "rewrite"},
    "hf_tying.hub": {"diagnose", "inspect", "make_card", "publish"},
    "hf_tying.parallel": {"ParallelPlan", "last_complete_checkpoint", "parallel_plan", "seal_checkpoint"},
    "hf_tying.report": {"GroupReport", "TyingReport", "tying_report"},
}


@pytest.mark.parametrize("module", PUBLIC)
def test_a_public_name_is_listed_and_is_no_module(module):
    found = importlib.import_module(module)
    assert PUBLIC[module] <= set(found.__all__) <= set(dir(found))
    for name in PUBLIC[module]:
        assert not isinstance(getattr(found, name), type(sys)), name


def test_a_function_is_not_shadowed_by_a_module_that_is_imported_first():
    program = """
import importlib, pkgutil, hf_tying
for found in pkgutil.walk_packages(hf_tying.__path__, "hf_tying."):
    if "__main__" not in found.name:
        importlib.import_module(found.name)
for module in {modules!r}:
    for name in importlib.import_module(module).__all__:
        assert not hasattr(getattr(importlib.import_module(module), name), "__spec__"), (module, name)
"""
    run_python("-c", program.format(modules=list(PUBLIC)))


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_a_module_of_0_1_answers_to_its_old_name(old):
    shim = importlib.import_module(f"hf_tying.{old}")
    homes = [importlib.import_module(f"hf_tying.{home}") for home in _moved.MOVED[old]]
    for home in homes:
        for name, value in vars(home).items():
            if not name.startswith("__") and getattr(value, "__module__", None) == home.__name__:
                assert getattr(shim, name) is next(getattr(h, name) for h in homes if hasattr(h, name))
    with pytest.raises(AttributeError, match="has moved to"):
        shim.no_such_name  # noqa: B018


def test_what_is_neither_there_nor_moved_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hf_tying.no_such_module")


#: From where a pickle of today finds a class to where 0.1 had it; these two modules have become rooms of that name.
OF_0_1 = {f"hf_tying.{home}": f"hf_tying.{old}" for old, homes in _moved.MOVED.items() for home in homes} | {
    "hf_tying.objectives.objective": "hf_tying.objectives",
    "hf_tying.projection.head": "hf_tying.projection",
}


def as_0_1_wrote_it(model) -> bytes:
    """The pickle of a model with the module names of 0.1, in the protocol that spells them out line by line.

    0.1 did not watch whether what is declared takes part in a step.
    """
    for owner in (model, model.get_output_embeddings()):
        for name in ("participation", "_participation"):
            if (participation := vars(owner).pop(name, None)) is not None:
                participation.unwatch(model)
    text = pickle.dumps(model, protocol=0)
    for new, old in OF_0_1.items():
        text = text.replace(f"c{new}\n".encode(), f"c{old}\n".encode())
    for name in (b"hf_tying.ties", b"hf_tying.objectives.", b"hf_tying.projection."):
        assert name not in text
    return text


def test_a_whole_model_that_0_1_pickled_is_tied_and_computes_the_same():
    model = tie(tiny_model("gpt2"), "two_way")
    again = pickle.loads(as_0_1_wrote_it(model))
    assert_tied(again)
    assert type(again).__mro__ == type(model).__mro__ and torch.equal(logits(again), logits(model))


def test_its_objective_is_in_force():
    model = use_tied_loss(tie(tiny_model("gpt2"), "two_way"), objective=ContrastiveObjective())
    again = pickle.loads(as_0_1_wrote_it(model)).train()
    assert again(**tiny_inputs(again)).logits is None and again.loss_parts.keys() == {"contrastive"}


def test_its_projection_is_in_force_though_0_1_put_nothing_in_front_for_it():
    model = tie(tiny_model("gpt2"), TyingConfig("two_way", projection=True))
    stock = type(model).__mro__[1]
    assert stock.__name__ == "ProjectedModelMixin"
    model.__class__ = type(model)._stock_class  # the class that 0.1 gave it
    again = pickle.loads(as_0_1_wrote_it(model)).train()
    assert again(**tiny_inputs(again)).loss is not None and "projection" in again.loss_parts
    assert again.get_output_embeddings().participation is not None
