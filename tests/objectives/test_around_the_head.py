"""Trainers and kernels that compute the loss themselves leave an objective out: a step of them raises."""

import copy
import types

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_tying import TyingError, use_tied_loss
from hf_tying.objectives import AugmentedObjective, ContrastiveObjective
from hf_tying.ties.anatomy import roles
from hf_tying.ties.participation import Participation
from hf_tying.ties.slots import find_slot

from .. import zoo
from ..tiny import tiny_inputs, tiny_model

SETTINGS = {
    "AL": {"objective": AugmentedObjective()},
    "CWT": {"objective": ContrastiveObjective()},
    "smoothing": {"label_smoothing": 0.1},
}
every_setting = pytest.mark.parametrize("kind", SETTINGS)


def trained_by(kind: str | None = None, arch: str = "llama"):
    model = tiny_model(arch).train()
    return model if kind is None else use_tied_loss(model, **SETTINGS[kind])


def around(model):
    """The loss as TRL's `add_fused_lm_head` and Liger's forwards compute it."""
    inputs = tiny_inputs(model)
    labels = inputs.pop("labels")
    logits = F.linear(model.base_model(**inputs)[0], model.get_output_embeddings().weight)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def own(model):
    return model(**tiny_inputs(model)).loss


@every_setting
class TestAStep:
    def test_around_the_model_raises_and_says_who_went(self, kind):
        around(trained_by()).backward()
        around(use_tied_loss(tiny_model("llama").train())).backward()  # the same loss: nothing is lost
        with pytest.raises(TyingError, match=rf"of use_tied_loss took no part.*{__name__} computes.*Trainer"):
            around(trained_by(kind)).backward()

    def test_by_the_models_own_forward_is_as_before(self, kind):
        model = trained_by(kind)
        for _ in range(2):
            own(model).backward()
        with pytest.raises(TyingError, match="took no part"):
            around(model).backward()

    @pytest.mark.parametrize("way_out", [{"enabled": False}, {}], ids=str)
    def test_the_way_out_is_walked(self, kind, way_out):
        model = use_tied_loss(trained_by(kind), **way_out)
        around(model).backward()
        assert not any(isinstance(hook, Participation) for hook in model.base_model._forward_hooks.values())

    def test_a_forward_that_is_put_in_the_place_of_the_class_raises(self, kind, monkeypatch):
        """As Liger's patched classes do."""

        def forward(self, input_ids, labels=None, **kwargs):
            logits = torch.ops.aten.linear.default(self.model(input_ids)[0], self.lm_head.weight)
            return types.SimpleNamespace(loss=torch.ops.aten.logsumexp(logits, [-1]).mean())

        model = trained_by()
        monkeypatch.setattr(type(model), "forward", forward)
        own(model).backward()
        with pytest.raises(TyingError, match="took no part|needs its logits whole"):
            own(trained_by(kind)).backward()

    def test_a_copy_is_watched_too(self, kind):
        model = copy.deepcopy(trained_by(kind))
        own(model).backward()
        with pytest.raises(TyingError, match="took no part"):
            around(model).backward()

    def test_evaluation_is_not_watched(self, kind):
        around(trained_by(kind).eval()).backward()

    def test_trainer_trains_it(self, kind, tmp_path):
        model = trained_by(kind)
        inputs = tiny_inputs(model)
        rows = [{name: value[i].tolist() for name, value in inputs.items()} for i in (0, 1)]
        arguments = TrainingArguments(tmp_path, max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
        Trainer(model, arguments, train_dataset=rows * 4).train()
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "EncoderDecoderModel",
        "VisionEncoderDecoderModel",
        "Blip2ForConditionalGeneration",
        "Llama4ForConditionalGeneration",
        "BlipForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "T5ForConditionalGeneration",
    ],
)
class TestModelsInsideModels:
    """The part that is watched has no head: hooks around a head are what an objective cannot be trained under."""

    def step(self, model):
        inputs = zoo.inputs(model)
        words = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        return model(**inputs | {"labels": words}).loss

    def test_an_objective_is_trained_where_stock_trains(self, name):
        stock = zoo.build(name).train()
        try:
            self.step(stock).backward()
        except AttributeError as error:
            if not (name.startswith("Llama4") and "image_outputs" in str(error)):
                raise
            pytest.skip(f"Llama 4 with pictures does not run in transformers {transformers.__version__}: {error}")
        model = use_tied_loss(zoo.build(name).train(), objective=AugmentedObjective(temperature=2.0))
        self.step(model).backward()
        assert set(model.loss_parts) == {"cross_entropy", "augmented"}

    def test_what_is_watched_makes_hidden_states(self, name):
        model = use_tied_loss(zoo.build(name), label_smoothing=0.1)
        watched = [m for m in model.modules() if model._participation in m._forward_hooks.values()]
        head = find_slot(model, roles(model)["output"].name)[0]
        # Llama4ForCausalLM names no part of its own that makes hidden states: there is none to watch.
        assert len(watched) == (0 if name.startswith("Llama4") else 1)
        assert all(module is not head for each in watched for module in each.modules())


class TestTRL:
    def step(self, model):
        return model(**tiny_inputs(model), fused_lm_head=True).log_probs.mean()

    @every_setting
    def test_its_fused_head_raises(self, kind):
        utils = pytest.importorskip("trl.trainer.utils", reason="pip install hf-tying[trl]")
        stock, model = trained_by(), trained_by(kind)
        for each in (stock, model):  # as a version puts it in by another name than the one that is wrapped
            utils.add_fused_lm_head.__wrapped__(each)
        self.step(stock).backward()
        with pytest.raises(TyingError, match="took no part.*trl.trainer.utils computes the loss"):
            self.step(model).backward()

    def test_a_forward_that_it_has_wrapped_is_named(self):
        utils = pytest.importorskip("trl.trainer.utils", reason="pip install hf-tying[trl]")
        model = trained_by()
        utils.add_fused_lm_head(model)
        with pytest.raises(TyingError, match=r"wrapped already \(by trl.trainer.utils\)"):
            use_tied_loss(model)
