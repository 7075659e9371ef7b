"""What `log_roles` says of the visits of a shared block, beside the gradients of an untied twin."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_tying import TyingCallback, share_layers, unroll
from hf_tying.training.roles import measured_roles

from ..tiny import Sentences, tiny_inputs, tiny_model, without_dropout

ORDER = [0, 1, 0, 0]


def shared(name="llama", relax=None, **settings):
    lengths = {"t5": {"num_layers": 4}}.get(name, {"num_hidden_layers": 4})
    return share_layers(without_dropout(tiny_model(name, **lengths)), order=ORDER, relax=relax, **settings)


def expected(model, path):
    """Norm, share and alignment of layers 0, 2 and 3, from a model in which each layer has its own parameters."""
    twin = unroll(copy.deepcopy(model))
    twin(**tiny_inputs(twin)).loss.backward()
    kept = {name for name, _ in model.get_submodule(f"{path}.0").named_parameters()}  # without what only some have
    layers = [dict(twin.get_submodule(f"{path}.{i}").named_parameters()) for i in (0, 2, 3)]
    names = [name for name in layers[0] if name in kept and all(name in layer for layer in layers)]
    rows = torch.stack([torch.cat([layer[name].grad.flatten() for name in names]) for layer in layers]).double()
    norms, whole = rows.norm(dim=1), rows.sum(0)
    return {
        "norm": norms,
        "share": norms / norms.sum(),
        "alignment": rows @ whole / (norms * whole.norm()),
    }


def measured(logs, path):
    block = f"{path}.0"
    keys = {key for key in logs if f"/{path}." in key}
    assert keys == {f"grad_{what}/{block}/layer_{i}" for what in ("norm", "share", "alignment") for i in (0, 2, 3)}
    return {
        what: torch.tensor([logs[f"grad_{what}/{block}/layer_{i}"] for i in (0, 2, 3)], dtype=torch.float64)
        for what in ("norm", "share", "alignment")
    }


def check(logs, model, path):
    found, wanted = measured(logs, path), expected(model, path)
    for what, values in wanted.items():
        torch.testing.assert_close(found[what], values, rtol=1e-4, atol=1e-5)
    assert (found["alignment"] < 0.999).any()


CASES = {
    "llama": ("llama", {}, None, "model.layers"),
    "relaxed": ("llama", {"relax": {"rank": 2}}, None, "model.layers"),
    "checkpointed": ("llama", {}, {"use_reentrant": False}, "model.layers"),
    "checkpointed by re-entry": ("llama", {}, {"use_reentrant": True}, "model.layers"),
    "one stack of two": ("t5", {"stack": "decoder"}, None, "decoder.block"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_visit_has_the_gradient_of_an_untied_twin(case):
    name, settings, checkpointing, path = CASES[case]
    model = shared(name, **settings)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    stock = copy.deepcopy(model)
    with measured_roles(model) as meter:
        assert not [key for key in meter.norms() if "layer_" in key]
        model(**tiny_inputs(model)).loss.backward()
    logs = meter.norms()
    check(logs, stock, path)
    assert sum(value for key, value in logs.items() if "share" in key and "layer_" in key) == pytest.approx(1)
    stock(**tiny_inputs(stock)).loss.backward()
    for (_, one), (_, other) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)  # nothing is changed by measuring
    assert all(
        isinstance(p, torch.nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None
    )


def test_the_last_pass_counts_and_a_frozen_block_has_none():
    model = shared()
    with measured_roles(model) as meter:
        for _ in range(2):
            model(**{key: value[:1] for key, value in tiny_inputs(model).items()}).loss.backward()
        model(**tiny_inputs(model)).loss.backward()
    check(meter.norms(), model, "model.layers")
    model.model.layers[0].requires_grad_(False)
    with measured_roles(model) as meter:
        model(**tiny_inputs(model)).loss.backward()
    assert not [key for key in meter.norms() if "layer_" in key]


def test_the_trainer_logs_them(tmp_path):
    model = shared()
    arguments = TrainingArguments(
        tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[TyingCallback(log_roles=True)])
    trainer.train()
    for logs in trainer.state.log_history[:2]:
        measured(logs, "model.layers")
