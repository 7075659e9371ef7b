"""Training with a carried state inside Trainer: a plain loop gives the same numbers, a resumed run the same bits."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import TrainerState

from hf_tying import TyingCallback, TyingError, untie
from hf_tying.data.words import ContiguousText, encode_words, train_word_level
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.training import carried_state
from hf_tying.training.averaging import Averaging
from hf_tying.training.carried_state import (
    CarriedStateArguments,
    CarriedStateTrainer,
    negative_log_likelihood,
)

from ..word_text import word_folder

BATCH, STEPS = 5, 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = word_folder(tmp_path_factory.mktemp("text"))
    tokenizer = train_word_level(folder / "train.txt")
    return {name: encode_words(folder / f"{name}.txt", tokenizer) for name in ("train", "valid", "test")}


def make_model(text, **changes) -> TiedLSTMForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": int(text["train"].max()) + 1, "embedding_size": 12, "hidden_size": 12}
    return TiedLSTMForCausalLM(TiedLSTMConfig(**sizes | changes))


def make_trainer(model, text, folder, **changes) -> CarriedStateTrainer:
    changes = {"num_train_epochs": 2, "save_strategy": "no", "logging_strategy": "epoch"} | changes
    args = CarriedStateArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    train = ContiguousText(text["train"], BATCH, STEPS)
    return CarriedStateTrainer(model, args, train_dataset=train, eval_dataset=text["valid"])


def plain_loop(model, text, epochs: int, decay=1.0, decay_after=0, clip=5.0, penalty=None, per_word=False):
    """The papers' recipe in plain torch, on a copy of the model's weights; the perplexity of each epoch."""
    plain = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    lstm = nn.LSTM(12, 12, len(model.lstm.layers))
    embedding, bias = plain["lstm.embed_tokens.weight"], plain["lm_head.bias"]
    output = plain.get("lm_head.weight", embedding)
    rows = len(text["train"]) // BATCH
    columns = text["train"][: rows * BATCH].view(BATCH, rows)
    perplexities = []
    for epoch in range(epochs):
        state = (torch.zeros(len(model.lstm.layers), BATCH, 12),) * 2
        total = count = 0
        for start in range(0, (rows - 1) // STEPS * STEPS, STEPS):
            words = columns[:, start : start + STEPS].t()
            labels = columns[:, start + 1 : start + STEPS + 1].t().reshape(-1)
            weights = []
            for layer in range(len(model.lstm.layers)):
                names = [f"lstm.layers.{layer}.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih")]
                weights += [*(plain[name] for name in names), torch.zeros(48)]
            hidden, *state = torch.lstm(
                F.embedding(words, embedding), tuple(state), weights, True, lstm.num_layers, 0.0, True, False, False
            )
            state = [part.detach() for part in state]
            if "lm_head.projection.weight" in plain:
                hidden = F.linear(hidden, plain["lm_head.projection.weight"], plain.get("lm_head.projection.bias"))
            summed = F.cross_entropy(F.linear(hidden, output, bias).flatten(0, 1), labels, reduction="sum")
            loss = summed / (len(labels) if per_word else BATCH)
            if penalty is not None:
                loss = loss + penalty(plain["lm_head.projection.weight"])
            gradients = torch.autograd.grad(loss, list(plain.values()))
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            rate = decay ** max(epoch - decay_after, 0) * min(1.0, clip / (float(norm) + 1e-6))
            with torch.no_grad():
                for parameter, gradient in zip(plain.values(), gradients, strict=True):
                    parameter -= rate * gradient
            total, count = total + float(summed.detach()), count + len(labels)
        perplexities.append(math.exp(total / count))
    return plain, perplexities


def same_weights(model, plain, **tolerances):
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), plain[name].detach(), msg=name, **tolerances)


def perplexities(trainer) -> list[float]:
    return [log["train_perplexity"] for log in trainer.state.log_history if "train_perplexity" in log]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss", ["stock", "tied"])
def test_an_epoch_is_that_of_a_plain_loop(text, tmp_path, tied, loss):
    scheme = "two_way" if tied else "none"
    model = make_model(text, tying={"version": 1, "scheme": scheme, "loss": loss})
    plain, expected = plain_loop(model, text, epochs=3, decay=0.5, decay_after=1, clip=1.0)
    trainer = make_trainer(model, text, tmp_path, num_train_epochs=3, decay=0.5, decay_after=1, max_grad_norm=1.0)
    trainer.train()
    assert perplexities(trainer) == pytest.approx(expected, rel=1e-4)
    same_weights(model, plain, rtol=1e-3, atol=1e-4)
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("accumulated", [3, 5])
def test_the_rate_falls_with_the_epochs_however_many_batches_make_an_update(text, tmp_path, accumulated):
    how = {"gradient_accumulation_steps": accumulated, "decay": 0.5, "num_train_epochs": 4}
    trainer = make_trainer(make_model(text), text, tmp_path, **how)
    assert trainer.train_dataset.pieces % accumulated  # the last update of an epoch has fewer
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("norm", ["fro_squared_half", "fro"])
def test_projection_regularisation_is_that_of_a_plain_loop(text, tmp_path, norm):
    model = make_model(text, tying={"version": 1, "scheme": "two_way", "projection": {"norm": norm}})

    def penalty(p):
        return (p.square().sum() / 2 / 6.5 if norm == "fro_squared_half" else 0.15 * p.norm()) / BATCH

    plain, expected = plain_loop(model, text, epochs=2, penalty=penalty)
    trainer = make_trainer(model, text, tmp_path)
    trainer.train()
    assert perplexities(trainer) == pytest.approx(expected, rel=1e-4)  # without the penalty
    same_weights(model, plain, rtol=1e-3, atol=1e-4)


def test_a_loss_per_word_is_that_of_a_plain_loop(text, tmp_path):
    model = make_model(text)
    plain, expected = plain_loop(model, text, epochs=2, per_word=True)
    make_trainer(model, text, tmp_path, sum_over_time=False).train()
    same_weights(model, plain, rtol=1e-4, atol=1e-5)


def test_the_sum_of_losses_is_divided_by_the_batch_or_by_the_words_of_an_update(text, tmp_path):
    for summed, divisor in ((True, BATCH), (False, 3 * BATCH * STEPS)):
        how = {"sum_over_time": summed, "gradient_accumulation_steps": 3}
        trainer = make_trainer(make_model(text), text, tmp_path, **how)
        batches, found = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 3, "cpu")
        assert len(batches) == 3 and found == divisor


def test_the_state_is_carried_from_batch_to_batch_and_begins_at_zero_in_each_epoch(text, tmp_path):
    model, states = make_model(text), []
    model.register_forward_pre_hook(lambda m, args, kwargs: states.append(kwargs["state"]), with_kwargs=True)
    outputs = []
    model.register_forward_hook(lambda m, args, output: outputs.append(output.state))
    trainer = make_trainer(model, text, tmp_path)
    trainer.train()
    pieces = trainer.train_dataset.pieces
    assert len(states) == 2 * pieces
    for step, state in enumerate(states):
        if step % pieces == 0:
            assert state is None
        else:
            for one, other in zip(state, outputs[step - 1], strict=True):
                assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_resumed_in_mid_epoch_it_goes_on_bit_for_bit(text, tmp_path, accumulated):
    changes = {"input_dropout": 0.3, "dropout_kind": "variational", "shared_recurrent_mask": True}
    changes |= {"hidden_dropout": 0.2, "output_dropout": 0.2}
    how = {"save_strategy": "steps", "save_steps": 7, "gradient_accumulation_steps": accumulated, "decay": 0.7}
    whole = make_trainer(make_model(text, **changes), text, tmp_path / "whole", **how)
    whole.train()
    assert whole.train_dataset.pieces // accumulated not in (7, 14)  # in the middle
    shutil.copytree(tmp_path / "whole" / "checkpoint-7", tmp_path / "elsewhere")
    for source in (tmp_path / "elsewhere", tmp_path / "whole" / "checkpoint-14"):
        resumed = make_trainer(make_model(text, **changes), text, tmp_path / "resumed", **how)
        torch.manual_seed(123)
        resumed.train(resume_from_checkpoint=str(source))
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other)
        assert perplexities(resumed)[-2:] == perplexities(whole)[-len(perplexities(resumed)) :][-2:]


def test_a_checkpoint_at_the_end_of_an_epoch_begins_the_next_one_from_zero(text, tmp_path):
    how = {"save_strategy": "epoch", "num_train_epochs": 2}
    whole = make_trainer(make_model(text), text, tmp_path / "whole", **how)
    whole.train()
    resumed = make_trainer(make_model(text), text, tmp_path / "resumed", **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{whole.train_dataset.pieces}"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resume_from_the_last_checkpoint_and_its_refusals(text, tmp_path):
    trainer = make_trainer(make_model(text), text, tmp_path, save_strategy="steps", save_steps=5)
    with pytest.raises(TyingError, match="no complete checkpoint in"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    last = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    again = make_trainer(make_model(text), text, tmp_path, num_train_epochs=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3 * again.train_dataset.pieces > last
    (tmp_path / f"checkpoint-{last}" / "carried_state.safetensors").unlink()
    with pytest.raises(TyingError, match="has no carried_state.safetensors"):
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}"))


def test_evaluation_is_one_long_pass_over_the_text(text, tmp_path, monkeypatch):
    # Large weights: with those of the start the state and the dropout would hardly be seen.
    large = {"initializer_range": 1.0, "recurrent_initializer_range": 1.0}
    model = make_model(text, output_dropout=0.5, **large).train()
    tokens = text["valid"]
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens[None, :-1]).logits[0]
    model.train()
    expected = F.cross_entropy(logits, tokens[1:], reduction="sum")
    assert negative_log_likelihood(model, tokens) == pytest.approx(float(expected), rel=1e-5)
    monkeypatch.setattr(carried_state, "_MOST_LOGITS", 7 * model.config.vocab_size)  # in many pieces
    assert negative_log_likelihood(model, tokens) == pytest.approx(float(expected), rel=1e-5)
    assert model.training
    trainer = make_trainer(model, text, tmp_path)
    started = trainer._epoch.start
    metrics = trainer.evaluate()
    assert trainer._epoch.start - started == pytest.approx(metrics["eval_runtime"], abs=1e-3)  # not of the training
    assert metrics["eval_tokens"] == len(tokens) - 1
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(float(expected) / (len(tokens) - 1)), rel=1e-5)


def test_several_texts_are_evaluated_by_name_and_none_is_an_error(text, tmp_path):
    trainer = make_trainer(make_model(text), text, tmp_path)
    metrics = trainer.evaluate({"valid": text["valid"], "test": text["test"]})
    assert {"eval_valid_perplexity", "eval_test_perplexity"} <= metrics.keys()
    for nothing in (torch.tensor([1]), torch.zeros(2, 2), ["text"]):
        with pytest.raises(TyingError, match="of two words at least"):
            trainer.evaluate(nothing)


def test_it_learns_and_stays_tied_through_trainers_own_evaluation_and_saving(tmp_path):
    """Eight words in a circle: after each only one can follow, so that the perplexity falls from 8 to nearly 1."""
    circle = torch.arange(1000) % 8
    text = {"train": circle, "valid": circle[:100]}
    trainer = make_trainer(
        make_model(text, initializer_range=0.5, recurrent_initializer_range=0.5),
        text,
        tmp_path,
        num_train_epochs=6,
        learning_rate=0.5,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    trainer.add_callback(TyingCallback(log_roles=True))
    before = trainer.evaluate()["eval_perplexity"]
    trainer.train()
    logs = json.loads((tmp_path / f"checkpoint-{trainer.state.global_step}" / "trainer_state.json").read_text())
    evaluated = [log["eval_perplexity"] for log in logs["log_history"] if "eval_perplexity" in log]
    assert before > 7 and len(evaluated) == 6 and evaluated[-1] < 1.5
    assert all(log["tokens_per_second"] > 0 for log in trainer.state.log_history if "train_perplexity" in log)


def test_another_dataset_or_another_batch_is_refused(text, tmp_path):
    model = make_model(text)
    args = CarriedStateArguments(str(tmp_path), per_device_train_batch_size=BATCH + 1, use_cpu=True)
    with pytest.raises(TyingError, match=f"{BATCH} columns, and the batch has {BATCH + 1} rows"):
        CarriedStateTrainer(model, args, train_dataset=ContiguousText(text["train"], BATCH, STEPS))
    with pytest.raises(TyingError, match="expected a ContiguousText"):
        CarriedStateTrainer(model, args, train_dataset=[{"input_ids": [1, 2]}])


# --- NT-ASGD ---------------------------------------------------------------------------------------------------------


def test_averaging_begins_when_the_last_evaluations_were_no_better_than_the_best_before(text):
    averaging, begun = Averaging(make_model(text), patience=2), []
    for loss in (5.0, 4.0, 3.0, 3.5, 2.9, 3.1, 3.2, 3.3):
        averaging.evaluated(loss)
        begun.append(averaging.mean is not None)
    # As in the released code: at 3.2 the best but the last two is 3.0, at the one before 3.0 too; 3.1 > 3.0 begins.
    assert begun == [False, False, False, False, False, True, True, True]


def test_what_was_evaluated_before_a_checkpoint_counts_after_it(text, tmp_path):
    before, after = (Averaging(make_model(text), patience=2) for _ in range(2))
    for loss in (5.0, 4.0, 3.0, 3.5, 2.9):
        before.evaluated(loss)
    before.save(tmp_path)
    after.load(tmp_path)
    assert after.mean is None
    after.evaluated(3.1)
    assert after.mean is not None


def test_the_mean_is_that_of_torchs_asgd(text):
    model, twin = make_model(text), make_model(text)
    averaging = Averaging(model, patience=0)
    averaging.evaluated(1.0), averaging.evaluated(2.0)
    plain = torch.optim.SGD(model.parameters(), lr=0.5)
    asgd = torch.optim.ASGD(twin.parameters(), lr=0.5, t0=0, lambd=0.0)
    words = text["train"][None, :40]
    for step in range(4):
        for m, optimizer in ((model, plain), (twin, asgd)):
            optimizer.zero_grad()
            m(input_ids=words, labels=words).loss.backward()
            optimizer.step()
        if step > 0:  # torch's leaves the first one out
            averaging.updated()
    for (name, _), parameter in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(averaging.mean[str(name)], asgd.state[parameter]["ax"])
    last = [p.detach().clone() for p in model.parameters()]
    with averaging.in_place():
        assert all(torch.equal(p, averaging.mean[str(name)]) for name, p in model.named_parameters())
        assert model.lm_head.weight is model.lstm.embed_tokens.weight
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), last, strict=True))


def test_an_averaged_run_is_evaluated_with_the_mean_and_ends_with_it_and_resumes(text, tmp_path, monkeypatch):
    how = {"average_after": 0, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 14}
    how |= {"learning_rate": 20.0, "max_grad_norm": 1.0}  # so that it gets worse at once
    whole, is_mean = make_trainer(make_model(text), text, tmp_path / "whole", **how), []
    at_last_file, write = [], TrainerState.save_to_json

    def written(state, path):  # Trainer's last file: from then on, a stopped run goes on from this checkpoint
        at_last_file.append({"carried_state.safetensors", "averaging.safetensors"} <= {*os.listdir(Path(path).parent)})
        write(state, path)

    def seen(model, tokens):
        mean = whole.averaging.mean if whole.averaging.updates else None
        if mean is not None:
            is_mean.append(all(torch.equal(p, mean[str(name)]) for name, p in model.named_parameters()))
        return negative_log_likelihood(model, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(carried_state, "negative_log_likelihood", seen)
        patch.setattr(TrainerState, "save_to_json", written)
        whole.train()
    assert at_last_file and all(at_last_file)
    assert is_mean and all(is_mean)
    assert whole.averaging.history == [log["eval_loss"] for log in whole.state.log_history if "eval_loss" in log]
    assert 0 < whole.averaging.updates < whole.state.global_step
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, whole.averaging.mean[str(name)])
    checkpoint = tmp_path / "whole" / "checkpoint-28"
    assert load_file(checkpoint / "averaging.safetensors")["updates"] > 0
    resumed = make_trainer(make_model(text), text, tmp_path / "resumed", **how)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_tie_undone_and_a_matrix_freed_on_the_way_are_averaged_from_then_on(text):
    model = make_model(text)
    model.lm_head.bias.requires_grad_(False)
    averaging = Averaging(model, patience=0)
    averaging.evaluated(1.0), averaging.evaluated(2.0)
    averaging.updated()
    untie(model)
    model.lm_head.bias.requires_grad_(True)
    with averaging.in_place():  # before the next update they are what they are
        assert torch.equal(model.lm_head.weight, model.lstm.embed_tokens.weight)
    averaging.updated()
    first = model.lm_head.weight.detach().clone()
    with torch.no_grad():
        model.lm_head.weight.add_(3.0)
    averaging.updated()
    torch.testing.assert_close(averaging.mean["lm_head.weight"], first + 1.0)
    assert "lm_head.bias" in averaging.mean
    torch.testing.assert_close(averaging.mean["lstm.embed_tokens.weight"], first)


@pytest.mark.parametrize("summed", [True, False])
def test_the_penalties_of_the_steps_of_an_update_add_up_to_one(text, tmp_path, summed):
    model, parts = make_model(text, tying={"version": 1, "scheme": "two_way", "projection": {}}), []
    how = {"sum_over_time": summed, "max_steps": 1, "learning_rate": 0.0}
    for accumulated in (1, 3):
        trainer = make_trainer(model, text, tmp_path, gradient_accumulation_steps=accumulated, **how)
        model.register_forward_hook(
            lambda m, args, kwargs, output: parts.append(kwargs["penalty_share"]), with_kwargs=True
        )
        trainer.train()
        assert len(parts) == accumulated and sum(parts) == pytest.approx(1)
        model._forward_hooks.clear()
        parts.clear()


def test_a_state_is_read_onto_the_device_of_one_of_several_processes(tmp_path):
    kept = carried_state._Epoch()
    kept.state, kept.batches, kept.words = ((torch.ones(1, 2), torch.zeros(1, 2)),), 3, 6
    kept.save(tmp_path / "state.safetensors")
    found = carried_state._Epoch.load(tmp_path / "state.safetensors", torch.device("cpu:0"))
    assert torch.equal(found.state[0][0], torch.ones(1, 2)) and (found.batches, found.words) == (3, 6)


def test_the_perplexity_of_the_log_is_over_the_columns_of_all_processes(monkeypatch):
    monkeypatch.setattr(carried_state, "from_every_rank", lambda own: [own, (3.0, 2, 2)])
    epoch = carried_state._Epoch()
    epoch.loss, epoch.words = 1.0, 2
    assert epoch.report()["train_perplexity"] == pytest.approx(math.e)
