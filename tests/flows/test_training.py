"""f10, f13: a Trainer resumes, and adapters over shared layers and relaxed ties are merged right, or refused."""

import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_tying import TyingError, assert_tied, gap, unroll, untie

from ..tiny import Sentences, logits, tiny_inputs
from .kinds import KINDS, made, names_in, plain


@pytest.mark.parametrize(("kind", "save_format"), [("shared layers, relaxed", "dedup"), ("relaxed pair", "portable")])
def test_a_trainer_resumes_bit_for_bit(kind, save_format, tmp_path):
    """f10."""

    def trainer():
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path, max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        return Trainer(made(kind, save_format=save_format), arguments, train_dataset=Sentences())

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=os.fspath(tmp_path / "checkpoint-1"))
    assert_tied(resumed.model)
    assert torch.equal(logits(resumed.model), logits(whole.model)) and gap(resumed.model) == gap(whole.model)
    assert not torch.equal(logits(resumed.model), logits(made(kind)))


def adapted(model, **config):
    """`model` under a LoRA adapter whose update is not zero."""
    peft_model = get_peft_model(model, LoraConfig(r=2, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return peft_model.eval()


def outputs(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(8)[None]).logits


class TestAdapters:
    """f13: an adapter over one place of a group cannot be merged into the matrix of all."""

    @pytest.mark.parametrize("place", ["root", "member", "both"])
    def test_over_a_tied_place_is_not_merged_and_changes_nothing(self, kind, model, place):
        root, member = (name.removesuffix(".weight") for name in names_in(kind))
        targets = {"root": f"^{root}$", "member": f"^{member}$", "both": f"^({root}|{member})$"}[place]
        peft_model = adapted(model, target_modules=targets.replace(".", r"\."))
        before = outputs(peft_model)
        for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
            with pytest.raises(TyingError, match="Cannot merge"):
                merge()
        assert torch.equal(outputs(peft_model), before)
        assert_tied(peft_model)

    def test_it_merges_over_the_base_model_that_is_unrolled_or_untied(self, kind, model):
        """The way out: the same adapter, over matrices of their own."""
        member = names_in(kind)[1].removesuffix(".weight")
        peft_model = adapted(model, target_modules=[member.rpartition(".")[2]])
        expected = outputs(peft_model)
        adapter = {name: p for name, p in peft_model.state_dict().items() if "lora_" in name and "default" in name}
        base = peft_model.unload()
        assert_tied(base)
        base = untie(base) if "factors" in kind or kind == "relaxed pair" else unroll(base)
        again = get_peft_model(base, LoraConfig(r=2, target_modules=[member.rpartition(".")[2]])).eval()
        again.load_state_dict(adapter, strict=False)
        torch.testing.assert_close(outputs(again.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)

    def test_elsewhere_it_merges_as_always(self, kind, model):
        elsewhere = ["up_proj"] if kind == "relaxed pair" else ["lm_head"]
        peft_model = adapted(model, target_modules=elsewhere)
        expected = outputs(peft_model)
        assert not torch.allclose(expected, outputs(made(kind)), atol=1e-3)
        merged = peft_model.merge_and_unload()
        torch.testing.assert_close(outputs(merged), expected, atol=1e-5, rtol=1e-5)
        assert_tied(merged)

    def test_it_trains_alone_and_is_read_over_the_base_again(self, kind, model, tmp_path):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).train()
        trained = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
        assert trained and not any("_relaxation" in name or "visit_factor" in name for name in trained)
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            peft_model(**tiny_inputs(model)).loss.backward()
            optimizer.step()
        peft_model.save_pretrained(tmp_path)
        expected = outputs(peft_model.eval())
        base = peft_model.unload()
        assert_tied(base)
        assert all(torch.equal(value, start[name]) for name, value in base.state_dict().items())
        assert torch.equal(outputs(PeftModel.from_pretrained(base, tmp_path).eval()), expected)

    def test_sharing_a_model_that_carries_adapters_is_refused(self, kind):

        peft_model = adapted(plain(), target_modules=["q_proj"])
        with pytest.raises(TyingError, match="adapters"):
            KINDS[kind](peft_model.base_model.model)
