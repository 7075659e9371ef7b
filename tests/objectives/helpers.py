"""Training steps of a stock model and of the same model under `use_tied_loss`: how they are made and compared."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from hf_tying import TiedModelMixin, TyingConfig, TyingConfigMixin, use_tied_loss
from hf_tying.models import TiedEncoderDecoderModel
from hf_tying.objectives.deferred_logits import DeferredLogits
from hf_tying.objectives.objective import AugmentedObjective, ContrastiveObjective
from hf_tying.objectives.step_loss import LossSettings
from hf_tying.objectives.tied_softmax import TiedSoftmax

from ..forms import matrix
from ..tiny import tiny_inputs, tiny_model, without_dropout
from ..tiny_translation import joined_config, shake, translation_inputs

UNTIED_HEAD = {"tie_word_embeddings": False}
DECLARED = TyingConfig("two_way", loss="tied")
CWT, AL = ContrastiveObjective(), AugmentedObjective(temperature=5.0, alpha=2.0)


# --- models ----------------------------------------------------------------------------------------------------------


def pair(model):
    """A model without dropout in training mode, and the same under `use_tied_loss`."""
    stock = without_dropout(model)
    return stock, use_tied_loss(copy.deepcopy(stock))


def model_of(arch: str, **changes):
    """A tiny model without dropout in training mode; in float64, where its operations know that."""
    dtype = torch.float32 if arch == "mixtral" else torch.float64
    return without_dropout(tiny_model(arch, dtype=dtype, **changes))


def gpt2(**changes):
    return without_dropout(tiny_model("gpt2", **changes))


def three_way(arch="bert2bert"):
    """A `TiedEncoderDecoderModel` with one matrix."""
    torch.manual_seed(0)
    fields = {k: v for k, v in joined_config(arch).to_dict().items() if k != "model_type"}
    config = TiedEncoderDecoderModel.config_class(**fields, tying={"version": 1, "scheme": "three_way"})
    model = shake(TiedEncoderDecoderModel(config))
    assert matrix(model, "source") is matrix(model, "output")
    return model


class TiedGPT2Config(TyingConfigMixin, GPT2Config):
    model_type = "tied_gpt2"


class TiedGPT2(TiedModelMixin, GPT2LMHeadModel):
    config_class = TiedGPT2Config


def a_tied_gpt2(**entry) -> TiedGPT2:
    """The class form; `entry` goes into its declaration."""
    fields = {k: v for k, v in tiny_model("gpt2").config.to_dict().items() if k != "model_type"}
    torch.manual_seed(0)
    return shake(TiedGPT2(TiedGPT2Config(**fields, tying={"version": 1, "scheme": "two_way", **entry})))


class HeadAndLoss(GPT2LMHeadModel):
    """Its loss is `of(self, hidden, labels)`, which calls the head."""

    of = None

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.transformer(input_ids=input_ids).last_hidden_state * 1.0
        return CausalLMOutput(loss=type(self).of(self, hidden, labels))


def model_with(loss, dtype=torch.float64, frozen_head=False) -> HeadAndLoss:
    """A model with this loss. With a frozen head, untied, plain torch saves no hidden states for it."""
    stock = tiny_model("gpt2", tie_word_embeddings=not frozen_head)
    model = type("Made", (HeadAndLoss,), {"of": loss})(stock.config)
    model.load_state_dict(stock.state_dict())
    model.lm_head.weight.requires_grad_(not frozen_head)
    return without_dropout(model.to(dtype))


def cross_entropy(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1))


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """How often a loss went through the blocks, and for what the logits were needed whole."""

    blocks: int = 0
    whole: list[str] = field(default_factory=list)

    def taken(self) -> "Seen":
        """What was seen since the last time."""
        now = Seen(self.blocks, list(self.whole))
        self.blocks, self.whole = 0, []
        return now


BY_BLOCKS = Seen(blocks=1)


def batch(model) -> dict[str, torch.Tensor]:
    """Inputs of a training step: with padding (of either number), labels that are ignored, and a label twice."""
    inputs = tiny_inputs(model)
    inputs["input_ids"][1, :2] = torch.arange(2)
    inputs["labels"][0, -3:] = -100
    inputs["labels"][1, 1] = inputs["labels"][1, 2]
    return inputs


def step(model, inputs):
    """Forward and backward."""
    model.zero_grad()
    torch.manual_seed(1)
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found, expected, rtol=1e-5, atol=1e-6):
    """Which ones there are, and each to `rtol` of its own largest element and `atol` of the model's."""
    assert found.keys() == expected.keys()
    assert [n for n in found if (found[n] is None) != (expected[n] is None)] == []
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert largest > 0
    for name, wanted in expected.items():
        if wanted is not None:
            apart = float((found[name].float() - wanted.float()).abs().max())
            assert apart <= rtol * float(wanted.abs().max()) + atol * largest, (name, apart, largest)


def assert_same_step(tied, stock, inputs, rtol=1e-5, **tolerance):
    """One step of each: loss and gradients; the outputs of `tied` come back."""
    expected, found = step(stock, inputs), step(tied, inputs)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=rtol)
    assert_same_gradients(gradients(tied), gradients(stock), **tolerance)
    return found


def same(a: torch.Tensor, b: torch.Tensor, atol=1e-6) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=atol, equal_nan=True)


def trains_by_blocks(model, seen) -> bool:
    """A step without logits, of the value that the model has in evaluation."""
    model = without_dropout(model)
    inputs = translation_inputs(model) if model.config.is_encoder_decoder else batch(model)
    outputs = step(model, inputs)
    by_blocks = outputs.logits is None and seen.taken() == BY_BLOCKS
    assert outputs.loss.item() == pytest.approx(model.eval()(**inputs).loss.item(), rel=1e-5)
    return by_blocks


# --- deferred logits and real ones -----------------------------------------------------------------------------------

WORDS = 11


def deferred(*shape: int, dtype=torch.float32, bias=True, num_items=None):
    """Deferred logits and the real ones of equal leaves: `(logits, [hidden, weight, bias])`, twice."""
    leaves = [torch.randn(*shape, 4), torch.randn(WORDS, 4), torch.randn(WORDS) if bias else None]
    sides = []
    for side in ("deferred", "real"):
        hidden, weight, bias = (None if x is None else x.to(dtype).clone().requires_grad_() for x in leaves)
        weight = nn.Parameter(weight.detach())
        if side == "deferred":
            with TiedSoftmax(weight, LossSettings(), num_items):
                logits = F.linear(hidden, weight, bias)
            assert type(logits) is DeferredLogits
        else:
            logits = F.linear(hidden, weight, bias)
        sides.append((logits, [hidden, weight, bias]))
    return sides
