"""The gradient that `Trainer` steps by, against that of plain torch: see `run_script`."""

import functools
import tempfile

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_tying import use_projection, use_tied_loss
from hf_tying.models import TiedLSTMConfig, TiedLSTMForCausalLM
from hf_tying.objectives.objective import AugmentedObjective, ContrastiveObjective
from hf_tying.training import HeadlessTrainer, set_accepts_loss_kwargs
from tests.processes import run_cases
from tests.tiny import _SEQ2SEQ, ALL, tiny_model, without_dropout

#: Models with a mean of their own and `**kwargs`, as the issue names them.
OWN_MEAN = ("bart", "mbart", "marian", "m2m_100", "pegasus", "t5", "bert")
HOW = {
    "stock": lambda model: model,
    "told": set_accepts_loss_kwargs,
    "tied loss": use_tied_loss,
    "augmented": lambda model: use_tied_loss(model, objective=AugmentedObjective(alpha=0.5)),
    "contrastive": lambda model: use_tied_loss(model, objective=ContrastiveObjective()),
    "headless": lambda model: model,
    "projection": lambda model: use_projection(model, strength=50.0),
}
ROWS = 4


def make(arch: str):
    """Also of types that are not in `tests.tiny`."""
    if arch in ALL:
        return tiny_model(arch)
    torch.manual_seed(0)
    if arch == "tied_lstm":
        scales = {"initializer_range": 1.0, "recurrent_initializer_range": 1.0}
        penalties = {"activation_regularization": 2.0, "temporal_activation_regularization": 1.0}
        sizes = {"vocab_size": 64, "embedding_size": 8, "hidden_size": 8}
        return TiedLSTMForCausalLM(TiedLSTMConfig(**sizes, **scales, **penalties))
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(arch, **_SEQ2SEQ))


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = gradients(model)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def compared(arch: str, how: str, processes: int = 1, accumulated: int = 1, **arguments) -> dict[str, float]:
    """One update on four rows of as many words: how many times the mean gradient of its steps, and how exactly."""
    model = HOW[how](without_dropout(make(arch)))
    ids = torch.randint(10, 30, (ROWS, 6), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    size = ROWS // processes // accumulated
    trainer_class = HeadlessTrainer if how == "headless" else Trainer
    with tempfile.TemporaryDirectory() as folder:
        keep = KeepGradients()
        args = TrainingArguments(
            folder, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1, max_grad_norm=0, optim="sgd",
            learning_rate=0.0, train_sampling_strategy="sequential", per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated, save_strategy="no", **arguments,
        )  # fmt: skip
        trainer = trainer_class(model, args, train_dataset=rows, callbacks=[keep], data_collator=default_data_collator)
        trainer.train()
    assert args.world_size == processes
    model.zero_grad()
    if how == "projection" or arch == "tied_lstm":  # penalties are of the whole update
        model(input_ids=ids, labels=ids, num_items_in_batch=ids[:, 1:].numel()).loss.backward()
    else:
        for piece in ids.split(size):
            (model(input_ids=piece, labels=piece).loss * size / ROWS).backward()
    expected = gradients(model)
    times = float(keep.found @ expected / (expected @ expected))
    return {"times": times, "apart": float((keep.found - times * expected).abs().max() / expected.abs().max())}


CASES = {
    f"{arch} {how}": functools.partial(compared, arch, how, processes=2)
    for arch, how in [
        *((arch, how) for arch in ("llama", "bart", "t5", "bert") for how in ("stock", "told", "tied loss")),
        *((arch, "augmented") for arch in ("llama", "bert", "bart")),
        ("bert", "headless"),
        ("llama", "projection"),
        ("tied_lstm", "stock"),
        ("tied_lstm", "projection"),
    ]
}

if __name__ == "__main__":
    run_cases(CASES)
