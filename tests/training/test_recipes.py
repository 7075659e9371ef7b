"""The named models and how they are trained, against the tables of hyper-parameters of the papers and their code."""

import dataclasses

import pytest

from hf_tying.models import TiedLSTMConfig
from hf_tying.models.lstm.sizes import SIZES
from hf_tying.training.carried_state import CarriedStateArguments
from hf_tying.training.recipes import RECIPES

# Width, layers, initial range, share dropped; steps, batch, rate, decay, epochs without it less one, all, clip.
PUBLISHED = {
    "zaremba_small": (200, 2, 0.1, 0.0, 20, 20, 1.0, 0.5, 4, 13, 5),
    "zaremba_medium": (650, 2, 0.05, 0.5, 35, 20, 1.0, 0.8, 6, 39, 5),
    "zaremba_large": (1500, 2, 0.04, 0.65, 35, 20, 1.0, 1 / 1.15, 14, 55, 10),
    "inan_small": (200, 2, 0.1, 0.3, 35, 20, 1.0, 0.9, 5, 39, 5),
    "inan_medium": (650, 2, 0.05, 0.5, 35, 20, 1.0, 0.9, 10, 39, 5),
    "inan_large": (1500, 2, 0.04, 0.65, 35, 20, 1.0, 0.97, 1, 75, 6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_and_recipes_of_zaremba_and_inan(name):
    config, recipe = TiedLSTMConfig.named(name), RECIPES[name]
    rates = {config.input_dropout, config.hidden_dropout, config.output_dropout}
    assert config.embedding_size == config.hidden_size and len(rates) == 1
    assert config.recurrent_initializer_range == config.initializer_range
    assert PUBLISHED[name] == (
        *(config.hidden_size, config.num_hidden_layers, config.initializer_range, *rates),
        *(recipe["time_steps"], recipe["per_device_train_batch_size"], recipe["learning_rate"], recipe["decay"]),
        *(recipe["decay_after"], recipe["num_train_epochs"], recipe["max_grad_norm"]),
    )
    assert recipe["sum_over_time"] is True
    inan = name.startswith("inan")
    assert (config.dropout_kind, config.shared_recurrent_mask) == ("variational" if inan else "standard", inan)
    others = (config.embedding_dropout, config.recurrent_dropout, config.weight_dropout)
    assert others == (0.0, 0.0, 0.0) and config.vocab_size == 10_000 and config.output_bias


def test_the_small_models_rate_is_one_for_five_epochs_and_ends_at_a_256th():
    recipe = RECIPES["zaremba_small"]
    rates = [recipe["decay"] ** max(epoch - recipe["decay_after"], 0) for epoch in range(recipe["num_train_epochs"])]
    assert rates == [1.0] * 5 + [0.5**n for n in range(1, 9)] and rates[-1] == 1 / 256


def test_the_model_and_the_recipe_of_merity():
    assert SIZES["awd"] == {
        **{"embedding_size": 400, "hidden_size": 1150, "num_hidden_layers": 3},
        **{"initializer_range": 0.1, "recurrent_initializer_range": None, "zero_output_bias": True},
        **{"embedding_dropout": 0.1, "input_dropout": 0.65, "hidden_dropout": 0.2, "output_dropout": 0.4},
        **{"dropout_kind": "variational", "weight_dropout": 0.5},
        **{"activation_regularization": 2.0, "temporal_activation_regularization": 1.0},
    }
    assert RECIPES["awd"] == {
        **{"time_steps": 70, "per_device_train_batch_size": 80, "num_train_epochs": 750, "learning_rate": 30.0},
        **{"max_grad_norm": 0.25, "weight_decay": 1.2e-6, "average_after": 5, "sum_over_time": False},
        **{"decay": 1.0, "decay_after": 0},
    }


def test_every_model_has_a_recipe_of_arguments_that_the_trainer_knows(tmp_path):
    assert RECIPES.keys() == SIZES.keys()
    fields = {field.name for field in dataclasses.fields(CarriedStateArguments)}
    for recipe in RECIPES.values():
        assert recipe.keys() - {"time_steps"} <= fields
    arguments = CarriedStateArguments(str(tmp_path), use_cpu=True)  # what no recipe says
    assert arguments.optim == "sgd" and arguments.train_sampling_strategy == "sequential"
