"""`Trainer` logs, saves and resumes a model under `use_tied_loss` as it does the stock model."""

import copy
import inspect

import pytest
import torch
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from hf_tying import TyingCallback, TyingConfig, assert_tied, tie, use_tied_loss
from hf_tying.training.callbacks import measured_roles

from ..forms import tied_model
from ..tiny import VOCAB, tiny_model, without_dropout
from ..tiny import logits as logits_of
from .helpers import BY_BLOCKS, Seen, assert_same_gradients, batch, gradients, pair, step


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


@pytest.mark.parametrize("kwargs, blocks", [
    (dict(gradient_accumulation_steps=2), 8),
    (dict(label_smoothing_factor=0.1), 0),
    (dict(eval_strategy="steps", eval_steps=2, compute_metrics=mean_logit), 4),
    (dict(eval_strategy="steps", eval_steps=2, prediction_loss_only=True), 4),
    (dict(remove_unused_columns=True, max_grad_norm=0.1), 4),
    (dict(gradient_checkpointing=True), 4),
], ids=["accumulation", "smoothing", "metrics", "loss only", "columns", "checkpointing"])  # fmt: skip
def test_the_log_of_a_training_is_the_stock_models(kwargs, blocks, seen, tmp_path):
    model = tied_model("in place")
    tied = use_tied_loss(copy.deepcopy(model))
    expected = history(model, tmp_path / "stock", **kwargs)
    assert seen.taken() == Seen()
    assert_same_history(history(tied, tmp_path / "tied", **kwargs), expected)
    assert seen.taken() == Seen(blocks)  # Trainer's own smoothing takes the labels away, and needs the logits


def test_a_summed_loss_is_divided_by_the_items_of_all_accumulated_steps(seen):
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
def test_bfloat16_by_autocast_trains_as_the_stock_model(kwargs, seen, tmp_path):
    model = tied_model("in place")
    tied = use_tied_loss(copy.deepcopy(model))
    expected = history(model, tmp_path / "stock", bf16=True, **kwargs)
    found = history(tied, tmp_path / "tied", bf16=True, **kwargs)
    assert seen.taken().blocks >= 4
    for key, tolerance in (("loss", 5e-3), ("grad_norm", 3e-2)):
        assert [e[key] for e in found[:-1]] == pytest.approx([e[key] for e in expected[:-1]], rel=tolerance)


def test_a_run_that_resumes_from_a_checkpoint_is_the_whole_run(seen, tmp_path):
    whole, resumed = (use_tied_loss(tied_model("in place")) for _ in range(2))
    kwargs = dict(save_strategy="steps", save_steps=2)
    trainer(whole, tmp_path, **kwargs).train()
    trainer(resumed, tmp_path, **kwargs).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits_of(resumed), logits_of(whole))
    assert_tied(resumed)
    assert seen.taken() == Seen(blocks=6)


def test_a_checkpoint_gives_back_a_declared_loss(seen, tmp_path):
    model = tie(tiny_model("gpt2"), TyingConfig(loss="tied"))
    trainer(model, tmp_path, steps=1, save_strategy="steps", save_steps=1).train()
    loaded = without_dropout(GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-1"))
    seen.taken()
    assert step(loaded, batch(loaded)).logits is None and seen.taken() == BY_BLOCKS


@pytest.mark.parametrize("arch", ["gpt2", "bert", "t5"])
def test_the_signature_of_forward_stays_the_models_own(arch):
    model = tiny_model(arch)
    before = inspect.signature(model.forward)
    assert inspect.signature(use_tied_loss(model).forward) == before
    assert inspect.signature(tie(model, "two_way").forward) == before


def test_the_callback_logs_the_same_gradient_shares_by_role(seen, tmp_path):
    model = tied_model("in place")
    tied = use_tied_loss(copy.deepcopy(model))
    expected = history(model, tmp_path / "stock", callbacks=[TyingCallback(log_roles=True)])
    found = history(tied, tmp_path / "tied", callbacks=[TyingCallback(log_roles=True)])
    assert seen.taken() == Seen(blocks=4)
    assert 0 < expected[0]["grad_share/embeddings/output"] < 1
    assert_same_history(found, expected)


@pytest.mark.parametrize("arch, scheme", [("gpt2", "two_way"), ("bart", "three_way")])
def test_the_role_meter_outside_trainer_gives_the_same_norms(arch, scheme, seen):
    norms = []
    for model in pair(tied_model("in place", arch, scheme)):
        with measured_roles(model) as meter:
            step(model, batch(model))
        norms.append(meter.norms())
    assert seen.taken() == BY_BLOCKS
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and len(norms[0]) in (4, 6)
