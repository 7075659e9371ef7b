"""Hooks on a head are given what a stock model gives them; deferred logits leave a step as what they stand for."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import CausalLMOutput

from hf_tying import TyingError, use_tied_loss
from hf_tying.objectives.deferred_logits import DeferredLogits
from hf_tying.training.roles import measured_roles

from ..tiny import tiny_model
from .helpers import (
    AL,
    BY_BLOCKS,
    CWT,
    WORDS,
    Seen,
    assert_same_step,
    batch,
    cross_entropy,
    deferred,
    model_with,
    pair,
    same,
    step,
)

# --- hooks -----------------------------------------------------------------------------------------------------------


def a_forward_hook_that_logs(module, seen):
    @torch.no_grad()
    def log(module, inputs, output):
        seen.append(output.float().std().item())

    return module.register_forward_hook(log)


def a_forward_hook_that_changes_tensors(module, seen):
    def change(module, inputs, output):
        return output * 0.5 if isinstance(output, torch.Tensor) else output

    return module.register_forward_hook(change)


def a_full_backward_hook(module, seen):
    return module.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].norm().item()))


def a_full_backward_pre_hook(module, seen):
    return module.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))


def a_forward_hook_on_every_module(module, seen):
    return nn.modules.module.register_module_forward_hook(
        lambda each, inputs, output: seen.append(output.detach().mean().item()) if each is module else None
    )


def a_backward_hook_on_every_module(module, seen):
    return nn.modules.module.register_module_full_backward_hook(
        lambda each, inputs, outputs: seen.append(outputs[0].norm().item()) if each is module else None
    )


HOOKS = (
    a_forward_hook_that_logs,
    a_forward_hook_that_changes_tensors,
    a_full_backward_hook,
    a_full_backward_pre_hook,
    a_forward_hook_on_every_module,
    a_backward_hook_on_every_module,
)
#: A model, the names of its head and of the module around it.
HEADS = [("gpt2", "lm_head"), ("bert", "cls.predictions.decoder"), ("bert", "cls"), ("mixtral", "lm_head")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("arch, name", HEADS)
def test_a_hook_sees_and_does_what_it_does_in_a_stock_step(arch, name, hook, seen):
    changes = {"output_router_logits": True} if arch == "mixtral" else {}
    stock, tied = pair(tiny_model(arch, **changes))
    found = []
    for model in (stock, tied):
        handle = hook(model.get_submodule(name), noted := [])
        try:
            outputs = step(model, batch(stock))
        finally:
            handle.remove()
        gradient = model.get_output_embeddings().weight.grad.clone()
        found.append((outputs.loss.item(), noted, gradient))
    (loss, noted, gradient), (tied_loss, tied_noted, tied_gradient) = found
    assert tied_loss == pytest.approx(loss, rel=1e-5) and tied_noted == pytest.approx(noted, rel=1e-5)
    assert noted or hook in (a_forward_hook_that_changes_tensors, a_full_backward_pre_hook)
    assert same(tied_gradient, gradient) and gradient.any()
    assert seen.taken() == Seen() and step(tied, batch(stock)).logits is None and seen.taken() == BY_BLOCKS


@pytest.mark.parametrize("objective", [AL, CWT], ids=str)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_step_with_an_objective_and_a_hook_that_reads_logits_is_refused(hook, objective):
    model = use_tied_loss(pair(tiny_model("gpt2"))[1], objective=objective)
    handle = hook(model.lm_head, [])
    try:
        with pytest.raises(TyingError, match="a hook reads the output of 'lm_head'"):
            model(**batch(model))
    finally:
        handle.remove()
    assert step(model, batch(model)).logits is None


def test_hooks_that_look_at_no_logits_leave_a_step_by_blocks(seen):
    stock, tied = pair(tiny_model("gpt2"))
    tied.transformer.wte.register_forward_hook(lambda module, inputs, output: output * 1.0)
    tied.lm_head.register_forward_pre_hook(lambda module, inputs: None)
    tied.register_forward_hook(lambda module, inputs, outputs: None)
    with measured_roles(tied), FlopCounterMode(display=False):
        assert_same_step(tied, stock, batch(stock))
    assert seen.taken() == BY_BLOCKS


def test_the_usual_path_smooths_labels_as_the_blocks_do():
    stock = model_with(lambda model, hidden, labels: cross_entropy(model.lm_head(hidden), labels))
    model = use_tied_loss(stock, label_smoothing=0.3)
    inputs = batch(model)
    expected = step(model, inputs).loss.item()
    unsmoothed = use_tied_loss(copy.deepcopy(model))(**inputs).loss.item()
    assert expected != pytest.approx(unsmoothed, rel=1e-3)
    with torch.autograd.forward_ad.dual_level():
        assert model(**inputs).loss.item() == pytest.approx(expected, rel=1e-6)
    model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert step(model, inputs).loss.item() == pytest.approx(expected, rel=1e-6)


# --- what leaves a step ----------------------------------------------------------------------------------------------


def test_the_outputs_of_a_part_lose_their_logits_too():
    stock = model_with(lambda model, hidden, labels: cross_entropy(model.lm_head(hidden), labels))

    class Whole(type(stock)):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            hidden = self.transformer(input_ids=input_ids).last_hidden_state
            logits = self.lm_head(hidden)
            part = CausalLMOutput(logits=logits, hidden_states=(hidden, logits))
            loss = cross_entropy(logits, labels)
            return CausalLMOutput(loss=loss, logits=logits, hidden_states=[part, {"a": logits, "b": hidden}, 1])

    stock.__class__ = Whole
    outputs = step(use_tied_loss(stock), batch(stock))
    part, others, one = outputs.hidden_states
    assert outputs.logits is None and type(part) is CausalLMOutput and part.logits is None
    assert part.hidden_states[1] is None and others["a"] is None and one == 1
    assert part.hidden_states[0] is others["b"]
    torch.save(outputs, io.BytesIO())


def data_set(logits):
    logits.data = torch.ones(2, 5, WORDS)
    return logits


BECOMES = {
    "pickled": lambda logits: pickle.loads(pickle.dumps(logits)),
    "copied": copy.copy,
    "an array": lambda logits: torch.from_numpy(np.asarray(logits)),
    "exchanged": torch.from_dlpack,
    "data set": data_set,
}


@pytest.mark.parametrize("name", BECOMES)
def test_deferred_logits_become_plain_where_somebody_keeps_them(name):
    values = []
    with torch.no_grad():
        for logits, _ in deferred(2, 5):
            value = BECOMES[name](logits)
            values.append(value.materialize("a test") if type(value) is DeferredLogits else value)
    assert all(type(value) is torch.Tensor for value in values)
    assert same(*(value.detach() for value in values))
