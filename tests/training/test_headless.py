"""`HeadlessTrainer` and `recover_lm_head`: training and evaluation without a head, and a head afterwards."""

import copy
import itertools
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BertForMaskedLM, Trainer, TrainingArguments
from transformers.utils import logging

from hf_tying import TyingError, assert_tied, tie, use_tied_loss
from hf_tying.objectives.objective import AugmentedObjective, ContrastiveObjective
from hf_tying.objectives.tied_loss import has_tied_loss, objective_of
from hf_tying.training import headless
from hf_tying.training.headless import HeadlessTrainer, recover_lm_head

from ..tiny import VOCAB, tiny_model, untied_model

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT, BENCHMARK = EXAMPLES / "papers" / "headless.py", EXAMPLES / "benchmarks" / "headless.py"


def arguments(folder, **changes) -> TrainingArguments:
    usual = {"max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 4, "report_to": "none"}
    quiet = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "per_device_eval_batch_size": 4}
    return TrainingArguments(folder, **{**usual, **quiet, **changes})


def data(masked: bool = False, rows: int = 12) -> list[dict]:
    ids = torch.randint(4, VOCAB, (rows, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3, ids, -100)
    return [{"input_ids": i, "labels": j if masked else i} for i, j in zip(ids, labels, strict=True)]


def contrastive(model, rows: list[dict], masked: bool) -> float:
    """Of one batch, by hand; divided by all its labels, as Trainer does, also by those that no position predicts."""
    items = sum((row["labels"] != -100).sum().item() for row in rows)
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        if masked:
            hidden = model.cls.predictions.transform(model.bert(ids).last_hidden_state)
        else:
            hidden, labels = model.transformer(ids).last_hidden_state[:, :-1], labels[:, 1:]
        hidden, labels = hidden[labels != -100], labels[labels != -100]
        products = hidden @ model.get_input_embeddings().weight[labels].T
        return F.cross_entropy(products, torch.arange(len(labels)), reduction="sum").item() / items


@pytest.mark.parametrize("arch", ["gpt2", "bert"])
def test_it_trains_and_evaluates_by_the_contrastive_loss(arch, tmp_path):
    masked, model = arch == "bert", tiny_model(arch)
    rows = data(masked)
    before = copy.deepcopy(model.state_dict())
    trainer = HeadlessTrainer(model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows[:4])
    first = trainer.evaluate()["eval_loss"]
    assert first == pytest.approx(contrastive(model, rows[:4], masked), rel=1e-4)
    trainer.train()
    last = trainer.evaluate()["eval_loss"]
    assert last == pytest.approx(contrastive(model.eval(), rows[:4], masked), rel=1e-4)
    assert abs(last - first) > 0.01
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    biases = {"cls.predictions.bias", "cls.predictions.decoder.bias"} if masked else set()
    assert set(before) - moved == biases
    assert objective_of(model) == ContrastiveObjective()


def test_evaluation_multiplies_by_no_vocabulary(tmp_path):
    counts = []
    for words in (VOCAB, 5000):
        rows = data(rows=4)
        trainer = HeadlessTrainer(tiny_model("gpt2", vocab_size=words), arguments(tmp_path), eval_dataset=rows)
        with FlopCounterMode(display=False) as flops:
            trainer.evaluate()
        counts.append(flops.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_model_is_saved_whole_and_is_a_stock_one(tmp_path):
    trainer = HeadlessTrainer(
        tiny_model("bert"), arguments(tmp_path, save_strategy="steps", save_steps=3), train_dataset=data(True)
    )
    trainer.train()
    trainer.save_model(tmp_path / "end")
    for folder in ("end", "checkpoint-3"):
        loaded = BertForMaskedLM.from_pretrained(tmp_path / folder)
        assert_tied(loaded)
        assert objective_of(loaded) is None and all(p.requires_grad for p in loaded.parameters())
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, trainer.model.state_dict()[name])


def test_a_run_is_resumed(tmp_path):
    def run(folder, **resume):
        args = arguments(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2)
        trainer = HeadlessTrainer(tiny_model("bert"), args, train_dataset=data(True))
        trainer.train(**resume)
        return trainer.model.state_dict()

    whole = run("whole")
    again = run("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


def test_a_model_of_model_init_has_the_objective(tmp_path):
    objective = ContrastiveObjective("unique")
    trainer = HeadlessTrainer(
        args=arguments(tmp_path), model_init=lambda: tiny_model("gpt2"), train_dataset=data(), objective=objective
    )
    trainer.train()
    assert objective_of(trainer.model) == objective


def test_after_recovery_the_same_trainer_evaluates_by_cross_entropy(tmp_path):
    trainer = HeadlessTrainer(tiny_model("gpt2"), arguments(tmp_path), eval_dataset=data(rows=4))
    recover_lm_head(trainer.model)
    plain = Trainer(copy.deepcopy(trainer.model), arguments(tmp_path), eval_dataset=data(rows=4)).evaluate()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"])


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(TyingError, match="compute_metrics"):
        HeadlessTrainer(tiny_model("gpt2"), arguments(tmp_path), compute_metrics=lambda predictions: {})
    with pytest.raises(TyingError, match="expected a ContrastiveObjective"):
        HeadlessTrainer(tiny_model("gpt2"), arguments(tmp_path), objective=AugmentedObjective())
    with pytest.raises(TyingError, match="no softmax matrix|no `labels`"):
        HeadlessTrainer(tiny_model("gpt2").transformer, arguments(tmp_path))


# --- the head --------------------------------------------------------------------------------------------------------


def trained(arch: str, folder, **changes):
    model = tiny_model(arch, **changes)
    HeadlessTrainer(model, arguments(folder), train_dataset=data(arch == "bert")).train()
    return model


@pytest.mark.parametrize("arch, tied", [("gpt2", True), ("bert", True), ("llama", False)])
def test_a_clone_is_a_copy_of_the_embedding_and_the_config_says_so(arch, tied, tmp_path):
    model = trained(arch, tmp_path, tie_word_embeddings=tied)
    assert recover_lm_head(model) is model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert head is not embedding and torch.equal(head, embedding) and head.requires_grad
    assert model.config.tie_word_embeddings is False
    assert objective_of(model) is None and has_tied_loss(model) and all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        head.add_(1)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight + 1)


def test_an_engine_of_zero_3_is_refused_before_the_objective_goes():
    model = use_tied_loss(tie(untied_model("llama"), "two_way", init_from="output"), objective=ContrastiveObjective())
    model.model.ds_id = 0  # as deepspeed.initialize marks each module
    with pytest.raises(TyingError, match="Cannot recover the head of .* or save the model and load it again"):
        recover_lm_head(model)
    assert objective_of(model) == ContrastiveObjective() and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_is_the_embedding_itself(tied, tmp_path):
    model = trained("llama", tmp_path, tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight.detach().clone()
    recover_lm_head(model, how="tie")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, embedding)
    assert model.config.tie_word_embeddings is True
    assert_tied(model)


@pytest.mark.parametrize("how", ["clone", "tie"])
def test_a_dataset_is_trained_on_by_cross_entropy(how, tmp_path):
    model = trained("gpt2", tmp_path)
    alone = recover_lm_head(copy.deepcopy(model), how=how)
    rows = data()
    recover_lm_head(model, rows, how=how, args=arguments(tmp_path))
    Trainer(alone, arguments(tmp_path), train_dataset=rows).train()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, alone.state_dict()[name], atol=1e-6), name
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (how == "tie")


def test_the_usual_fine_tuning_is_an_epoch_at_the_papers_rate(tmp_path, monkeypatch):
    seen = []

    class Watched(Trainer):
        def __init__(self, model, args, **kwargs):
            args.use_cpu = args.disable_tqdm = True
            seen.append((args.learning_rate, args.num_train_epochs, args.warmup_steps, kwargs.keys()))
            super().__init__(model, args, **kwargs)

    monkeypatch.setattr(headless, "Trainer", Watched)
    recover_lm_head(trained("gpt2", tmp_path), data(), data_collator=None)
    assert seen == [(1e-4, 1, 0.2, {"train_dataset", "data_collator"})]


def test_other_ties_of_an_encoder_decoder_stay(tmp_path):
    model = tie(tiny_model("bart"), "three_way")
    recover_lm_head(model)
    assert model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight is not model.model.decoder.embed_tokens.weight
    assert_tied(recover_lm_head(model, how="tie"))
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight


def test_wrong_recoveries_are_refused(tmp_path):
    model = tiny_model("gpt2")
    with pytest.raises(TyingError, match="'clone' or 'tie'"):
        recover_lm_head(model, how="copy")
    with pytest.raises(TyingError, match="args, data_collator.*no train_dataset"):
        recover_lm_head(model, args=arguments(tmp_path), data_collator=None)
    untied = tiny_model("gpt2", tie_word_embeddings=False)
    untied.set_input_embeddings(torch.nn.Embedding(VOCAB + 1, 16))
    with pytest.raises(TyingError, match=r"\(64, 16\).*\(65, 16\)"):
        recover_lm_head(untied)


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, start in (("train", 0), ("valid", 1000), ("test", 2000)):
        lines = [f"{i} and {i + 1} and {i * i % 97} make a line ." for i in range(start, start + 300)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def script(monkeypatch):
    """Runs the script in this process."""

    def run(*flags) -> None:
        monkeypatch.syspath_prepend(SCRIPT.parent)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    level = logging.get_verbosity()
    yield run
    logging.set_verbosity(level)


@pytest.mark.parametrize(
    "model, objective, budget",
    [
        ("causal", "cwt", ("--max_steps", 4, "--recover_steps", 2)),
        ("masked", "cwt", ("--minutes", 0.01)),
        ("masked", "ce", ("--max_steps", 4)),
    ],
)
def test_the_script_ends_in_results(script, corpus, model, objective, budget, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import headless_parts

    # A clock that goes on by a hundredth of a second whenever it is read: on it all machines are equally fast.
    monkeypatch.setattr(headless_parts, "time", SimpleNamespace(monotonic=itertools.count(0, 0.01).__next__))
    script(
        *("--data_dir", corpus, "--model", model, "--objective", objective, "--size", "tiny", "--seed", 3),
        *("--output_dir", tmp_path, "--use_cpu", "--vocab_size", 300, "--block_size", 32, *budget),
    )
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("train_perplexity", "valid_perplexity", "test_perplexity"):
        assert 1 < results[name] < 1e4
    assert results["tokens_per_second"] > 0 and results["minutes"] > 0
    assert results["seed"] == 3 and results["parameters"] > 1000 and results["published"]
    if "--max_steps" in budget:
        assert (results["steps"], results["recover_steps"]) == (4, 2 if objective == "cwt" else 0)
    else:
        # Of 0.54 and 0.06 seconds; a step reads the clock once.
        assert (results["steps"], results["recover_steps"]) == (54, 6)
    loaded = (AutoModelForCausalLM if model == "causal" else BertForMaskedLM).from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings == (objective == "ce")


def test_perplexity_is_that_of_every_token_once(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from headless_parts import PASSES, perplexity

    class Tokenizer:
        mask_token_id: int | None = None

    ids = torch.randint(4, VOCAB, (5, 9))
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    causal = tiny_model("gpt2")
    with torch.no_grad():
        expected = F.cross_entropy(causal(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    assert perplexity(causal, rows, Tokenizer, batch_size=2) == pytest.approx(expected, rel=1e-5)

    masked, Tokenizer.mask_token_id = tiny_model("bert"), 3
    losses = []
    for row in ids:
        for place in range(9):
            seen = row.clone()
            seen[place % PASSES :: PASSES] = 3
            with torch.no_grad():
                losses.append(F.cross_entropy(masked(seen[None]).logits[0, place], row[place]))
    expected = torch.stack(losses).mean().exp().item()
    assert perplexity(masked, rows, Tokenizer, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_the_script_refuses_what_it_cannot_read(script, tmp_path):
    with pytest.raises(SystemExit, match="train.txt cannot be read"):
        script("--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--max_steps", 1)
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text("\n")
    with pytest.raises(SystemExit, match="train.txt is empty"):
        script("--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--max_steps", 1)
    with pytest.raises(SystemExit, match="either --max_steps or --minutes"):
        script("--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--max_steps", 1, "--minutes", 1)


def test_the_benchmark_measures_time_and_memory(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    flags = ["--quick", "--models", "bert", "--device", "cpu", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *flags])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    figures = json.loads((tmp_path / "figures.json").read_text())["bert"]
    assert all(row["seconds"] > row["forward_backward_seconds"] > 0 for row in figures.values())
    assert figures["cwt"]["speed_of_cwt"] == 1
    assert 0 < figures["cwt"]["peak_bytes"] < figures["tied"]["peak_bytes"] < figures["stock"]["peak_bytes"]
