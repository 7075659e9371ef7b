"""TRL's five trainers train a tied model; with a projection or an objective, which they leave out, a step raises."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_tying import TyingError, assert_tied, merge_projection, tie, use_projection, use_tied_loss
from hf_tying.data import train_byte_level_bpe
from hf_tying.objectives import AugmentedObjective, ContrastiveObjective

from ..tiny import tiny_model

trl = pytest.importorskip("trl", reason="pip install hf-tying[trl]")

PAIRS = [{"prompt": "a few", "chosen": " words", "rejected": " some"}] * 4
DATA = {
    "SFT": [{"text": "a few words and some"}] * 4,
    "DPO": PAIRS,
    "KTO": [{"prompt": "a few", "completion": " words", "label": i % 2 == 0} for i in range(4)],
    "GRPO": [{"prompt": "a few"}] * 4,
    "RLOO": [{"prompt": "a few"}] * 4,
}
DECLARED = {
    "projection": use_projection,
    "AL": lambda model: use_tied_loss(model, objective=AugmentedObjective()),
    "CWT": lambda model: use_tied_loss(model, objective=ContrastiveObjective()),
    "smoothing": lambda model: use_tied_loss(model, label_smoothing=0.1),
}
every_trainer = pytest.mark.parametrize("name", DATA)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_byte_level_bpe(["a few words and some more"] * 5, 300)
    made.pad_token = made.pad_token or made.eos_token or made.convert_ids_to_tokens(0)
    return made


@pytest.fixture
def model(tokenizer, tmp_path):
    """A tied model from a folder, from which some of the trainers load their reference model."""
    tie(tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True), "two_way").save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


def train(name: str, model, tokenizer, folder) -> None:
    settings = dict(max_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no")
    settings |= dict(per_device_train_batch_size=2, learning_rate=1e-2, gradient_checkpointing=False)
    more = {}
    if name in ("GRPO", "RLOO"):
        settings |= {"num_generations": 2, "max_completion_length": 4}
        more["reward_funcs"] = lambda completions, **kwargs: [float(i) for i in range(len(completions))]
    trainer_class, config_class = (getattr(trl, name + kind) for kind in ("Trainer", "Config"))
    data = Dataset.from_list(DATA[name])
    arguments = config_class(folder / "out", **settings)
    trainer_class(model, args=arguments, train_dataset=data, processing_class=tokenizer, **more).train()


@every_trainer
@pytest.mark.parametrize("made", [lambda model: model, lambda model: merge_projection(use_projection(model))])
def test_what_needs_no_forward_of_its_own_is_trained(name, made, model, tokenizer, tmp_path):
    model = made(model)
    before = copy.deepcopy(model.state_dict())
    train(name, model, tokenizer, tmp_path)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_tied(model)


@every_trainer
@pytest.mark.parametrize("declared", DECLARED)
def test_what_is_declared_and_left_out_raises(name, declared, model, tokenizer, tmp_path):
    model = DECLARED[declared](model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TyingError, match="took no part in this training step: trl.trainer.utils computes the loss"):
        train(name, model, tokenizer, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
