"""The flags of a training script make the objective that they name, with every option that it has."""

import inspect

import pytest
from transformers import HfArgumentParser

from hf_tying import TyingError
from hf_tying.objectives.objective import AugmentedObjective, ContrastiveObjective
from hf_tying.training import ObjectiveArguments


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", None),
        (
            "--objective al --al_temperature 5 --al_gamma 0.5 --al_detach_target",
            AugmentedObjective(5.0, gamma=0.5, detach_target=True),
        ),
        ("--objective al --al_alpha 2", AugmentedObjective(alpha=2.0)),
        ("--objective cwt", ContrastiveObjective()),
        (
            "--objective cwt --cwt_negatives sampled --cwt_num_sampled 9 --cwt_temperature 0.5 --cwt_stop_gradient "
            "--cwt_gather",
            ContrastiveObjective("sampled", 9, 0.5, True, True),
        ),
    ],
)
def test_flags_are_an_objective(flags, expected):
    (arguments,) = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses(flags.split())
    assert arguments.to_objective() == expected


def test_every_option_of_an_objective_has_a_flag():
    flags = inspect.signature(ObjectiveArguments).parameters
    for prefix, objective in (("al", AugmentedObjective), ("cwt", ContrastiveObjective)):
        options = {f"{prefix}_{name}": p.default for name, p in inspect.signature(objective).parameters.items()}
        assert options == {name: flags[name].default for name in flags if name.startswith(f"{prefix}_")}


@pytest.mark.parametrize(
    "flags, owner",
    [("--al_alpha 2", "al"), ("--objective al --cwt_gather", "cwt"), ("--objective cwt --al_temperature 3", "al")],
)
def test_an_option_of_another_objective_is_refused(flags, owner):
    (arguments,) = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses(flags.split())
    with pytest.raises(TyingError, match=f"is an option of --objective {owner}"):
        arguments.to_objective()
