"""TRL's trainers train a tied model as stock does, and one with a projection by its own logits."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from hf_tying import TyingConfig, TyingError, assert_tied, merge_projection, tie, use_projection, use_tied_loss
from hf_tying.data import train_byte_level_bpe
from hf_tying.objectives import AugmentedObjective

from ..tiny import tiny_model

trl = pytest.importorskip("trl", reason="pip install hf-tying[trl]")

PAIRS = [
    {"prompt": "a few", "chosen": " words and some more", "rejected": " some"},
    {"prompt": "some", "chosen": " more", "rejected": " a few words"},
] * 2
DATA = {
    "SFT": [{"text": "a few words and some"}, {"text": "some more words"}] * 2,
    "DPO": PAIRS,
    "KTO": [{"prompt": "a few", "completion": " words and some"[: 6 + 4 * i], "label": i % 2 == 0} for i in range(4)],
    "GRPO": [{"prompt": "a few"}] * 4,
    "RLOO": [{"prompt": "a few"}] * 4,
}
every_trainer = pytest.mark.parametrize("name", DATA)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_byte_level_bpe(["a few words and some more"] * 5, 300)
    made.pad_token = made.pad_token or made.eos_token or made.convert_ids_to_tokens(0)
    return made


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Models by what is declared of them. Some of the trainers load their reference model from the folder."""
    made = {}
    for kind in ("stock", "tied", "projection", "merged"):
        model = tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
        if kind == "tied":
            tie(model, TyingConfig("two_way", loss="tied"))
        if kind in ("projection", "merged"):
            use_projection(tie(model, "two_way"), strength=0.0)
            with torch.no_grad():
                model.lm_head.projection.weight.add_(0.1 * torch.randn(16, 16))
        if kind == "merged":
            merge_projection(model)
        made[kind] = tmp_path_factory.mktemp("models") / kind
        model.save_pretrained(made[kind])
    return made


def train(name: str, model, tokenizer, folder) -> list[float]:
    """Two steps; their losses."""
    settings = dict(max_steps=2, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no")
    settings |= dict(per_device_train_batch_size=2, learning_rate=1e-2, gradient_checkpointing=False, seed=1)
    more = {}
    if name in ("GRPO", "RLOO"):  # one generation for both steps, by the same weights in every run
        settings |= {"num_generations": 2, "max_completion_length": 4, "num_iterations": 2, "beta": 0.1}
        more["reward_funcs"] = lambda completions, **kwargs: [float(i) for i in range(len(completions))]
    if name == "GRPO":
        settings["loss_type"] = "bnpo"
    set_seed(1)
    trainer_class, config_class = (getattr(trl, name + kind) for kind in ("Trainer", "Config"))
    data, arguments = Dataset.from_list(DATA[name]), config_class(folder / "out", **settings)
    trainer = trainer_class(model, args=arguments, train_dataset=data, processing_class=tokenizer, **more)
    losses, compute = [], trainer.compute_loss

    def noted(*args, **kwargs):
        loss = compute(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = noted
    trainer.train()
    assert len(losses) == 2
    return losses


def trained(name, folder, tokenizer, out, loaded_by=AutoModelForCausalLM):
    model = loaded_by.from_pretrained(folder)
    before = copy.deepcopy(model.state_dict())
    losses = train(name, model, tokenizer, out)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    return model, losses, moved


@every_trainer
def test_a_tied_loss_is_that_of_stock_step_by_step(name, folders, tokenizer, tmp_path):
    _, expected, _ = trained(name, folders["stock"], tokenizer, tmp_path)
    model, found, moved = trained(name, folders["tied"], tokenizer, tmp_path)
    assert found == pytest.approx(expected, rel=0, abs=1e-5) and any(expected)
    assert_tied(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and "lm_head.weight" in moved


@every_trainer
def test_a_projection_is_trained(name, folders, tokenizer, tmp_path):
    """The first loss is that of the merged matrix, which is plain to TRL; stock leaves the projection out."""
    _, expected, _ = trained(name, folders["merged"], tokenizer, tmp_path)
    model, found, moved = trained(name, folders["projection"], tokenizer, tmp_path)
    assert found[0] == pytest.approx(expected[0], rel=0, abs=1e-5)
    assert {"lm_head.projection.weight", "lm_head.weight"} <= moved
    assert_tied(model)


@every_trainer
def test_an_objective_is_refused_before_anything_is_changed(name, folders, tokenizer, tmp_path):
    model = use_tied_loss(AutoModelForCausalLM.from_pretrained(folders["tied"]), objective=AugmentedObjective())
    with pytest.raises(TyingError, match="AugmentedObjective.*take its place"):
        train(name, model, tokenizer, tmp_path)
    assert "forward" not in vars(model)


def test_evaluation_is_of_the_model_itself(folders, tokenizer, tmp_path):
    """As a reloaded file computes it: a trained projection is no dead weight in it."""
    model, _, _ = trained("SFT", folders["projection"], tokenizer, tmp_path)
    data = Dataset.from_list(DATA["SFT"])
    arguments = trl.SFTConfig(tmp_path / "out", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
    found = trl.SFTTrainer(model, arguments, eval_dataset=data, train_dataset=data, processing_class=tokenizer)
    found = found.evaluate()["eval_loss"]
    model.save_pretrained(tmp_path / "saved")
    again, losses, words = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), 0.0, 0
    for row in DATA["SFT"]:
        ids = torch.tensor([tokenizer(row["text"]).input_ids + [tokenizer.eos_token_id]])
        with torch.no_grad():
            losses += again(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
        words += ids.shape[1] - 1
    assert found == pytest.approx(float(losses / words), abs=1e-4)


def test_a_reward_model_of_a_tied_checkpoint_is_that_of_a_stock_one(folders, tokenizer, tmp_path):
    """It has no softmax: what is declared for one is for another head over the same file."""

    def rewarding(kind):
        model = AutoModelForSequenceClassification.from_pretrained(folders[kind], num_labels=1)
        with torch.no_grad():  # a new head is drawn anew
            model.score.weight.copy_(torch.linspace(-1, 1, 16))
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    data = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in PAIRS]
    found = {}
    for kind in ("stock", "tied"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(DATA, "Reward", data)
            model = rewarding(kind)
            found[kind] = train("Reward", model, tokenizer, tmp_path)
    assert found["tied"] == pytest.approx(found["stock"], rel=0, abs=1e-6) and found["stock"][0] > 0
