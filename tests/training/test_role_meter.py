"""What `TyingCallback` says in the log: the gradient by role, a role that it cannot see, and what it changes."""

import logging

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from hf_tying import TyingCallback, tie, use_tied_loss
from hf_tying.training.roles import measured_roles

from ..tiny import Sentences, tiny_inputs, tiny_model


def around_the_head(self, input_ids=None, labels=None, **kwargs):
    """As Liger and fused losses do: the product with `lm_head.weight`, without a call of `lm_head`."""
    hidden = self.transformer(input_ids=input_ids).last_hidden_state
    scores = nn.functional.linear(hidden, self.lm_head.weight)
    return CausalLMOutput(loss=nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def by_embeddings(self, input_ids=None, labels=None, **kwargs):
    """A step that looks nothing up."""
    inputs = self.transformer.wte.weight.detach()[input_ids]
    return GPT2LMHeadModel.forward(self, inputs_embeds=inputs, labels=labels)


def run(model, folder, **callback):
    arguments = TrainingArguments(
        folder, max_steps=3, logging_steps=1, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
        report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[TyingCallback(**callback)])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def measured(entry) -> set[str]:
    return {key for key in entry if key.startswith("grad_") and "/" in key}


BOTH = {f"grad_{what}/embeddings/{role}" for what in ("norm", "share") for role in ("target", "output")}


@pytest.mark.parametrize("held", [True, False], ids=["held", "stock"])
@pytest.mark.parametrize("forward,seen,hidden", [
    (around_the_head, "target", "output"), (by_embeddings, "output", "target"),
], ids=["a fused loss", "embeddings as inputs"])  # fmt: skip
def test_a_role_that_is_not_seen_is_told_once_and_counts_for_nothing(
    forward, seen, hidden, held, tmp_path, told, monkeypatch
):
    model = tiny_model("gpt2")
    model = tie(model, "two_way") if held else model
    monkeypatch.setattr(model, "forward", forward.__get__(model))
    for entry in run(model, tmp_path, log_roles=True):
        assert measured(entry) == {f"grad_norm/embeddings/{seen}"}
    (message,) = [message for message in told if "log_roles" in message]
    assert f"embeddings/{hidden} was not seen" in message and "no grad_share of its group" in message


def test_before_the_first_pass_there_is_nothing_to_miss():
    model = tie(tiny_model("bart", tie_word_embeddings=False), "source_target", init_from="source")
    with measured_roles(model) as meter:
        assert meter.unseen() == [] and meter.norms() == {}
        model(**tiny_inputs(model)).loss.backward()
    assert meter.unseen() == []
    assert sum(value for key, value in meter.norms().items() if "share" in key) == pytest.approx(1.0)


@pytest.mark.parametrize("change", [lambda model: model, use_tied_loss], ids=["own loss", "use_tied_loss"])
def test_nothing_is_told_where_both_roles_are_seen(model, change, tmp_path, told):
    for entry in run(change(model), tmp_path, log_roles=True):
        assert measured(entry) == BOTH
    assert not [message for message in told if "log_roles" in message]


def test_a_matrix_that_is_not_trained_has_no_role_to_miss(model, tmp_path, told):
    model.lm_head.weight.requires_grad_(False)
    for entry in run(model, tmp_path, log_roles=True):
        assert not measured(entry)
    assert not [message for message in told if "log_roles" in message]


class TestWhatIsChangedIsSeen:
    """transformers shows warnings and errors unless it is asked for more."""

    @pytest.mark.parametrize("callback,messages", [
        (dict(untie_at=2), ["Step 2: untying (untie_at=2)"]),
        (dict(freeze="output"), ["Step 0: role output is frozen to the end"]),
        (dict(freeze="input", freeze_until=2),
         ["Step 0: role input is frozen until freeze_until=2", "Step 2: role input is trained from now on"]),
    ], ids=["untie_at", "freeze", "freeze_until"])  # fmt: skip
    def test_a_change_in_mid_run_is_a_warning(self, model, callback, messages, tmp_path, caplog):
        with caplog.at_level(logging.WARNING, logger="hf_tying"):
            run(model, tmp_path, **callback)
        shown = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        for message in messages:
            assert len([line for line in shown if message in line]) == 1

    def test_a_run_that_changes_nothing_says_nothing(self, model, tmp_path, told):
        torch.manual_seed(0)
        logging.getLogger("hf_tying").setLevel(logging.WARNING)
        run(model, tmp_path)
        assert not told
