"""PEFT's own tests of `LoraConfig`, with another class under that name: what `tied_lora.py` and `stock_lora.py` share.

PEFT's test modules are imported while `peft.LoraConfig` is the class to test. So all that they say of LoRA they say of
it: the cases of their lists, those inside of tests, and what their helpers allow for LoRA and skip for other methods.
"""

import importlib
import inspect
import os
import re
from collections import Counter
from dataclasses import MISSING, fields
from unittest.mock import patch

import peft
import pytest

# The classes of tests, by test module.
SUITES = {
    "test_custom_models": (
        "TestPeftCustomModel",
        "TestMultipleActiveAdapters",
        "TestMixedAdapterBatches",
        "TestRequiresGrad",
        "TestDefaultTargetModules",
        "TestPeftFsdpStateDict",
    ),
    "test_decoder_models": ("TestDecoderModels",),
    "test_encoder_decoder_models": ("TestEncoderDecoderModels",),
    "test_seq_classifier": ("TestSequenceClassificationModels",),
    "test_token_classification_qa": ("TestTokenClassificationModels", "TestQuestionAnsweringModels"),
    "test_feature_extraction_models": ("TestPeftFeatureExtractionModel",),
    "test_initialization": (
        "TestLoraInitialization",
        "TestNoInfiniteRecursionDeepspeed",
        "TestCustomModelConfigWarning",
        "TestLowCpuMemUsage",
        "TestNamingConflictWarning",
        "TestLoadPeftKeyMapping",
    ),
    "test_low_level_api": (
        "TestLowLevelFunctional",
        "TestInjectAdapterFromStateDict",
        "TestPeftStateDict",
        "TestGetBaseModelStateDict",
        "TestStateDictFsdpShapeValidation",
    ),
}

# LoRA's settings that Tied-LoRA has too, by the names of both.
SETTINGS = {"lora_alpha": "alpha", "lora_dropout": "dropout", "init_lora_weights": "init_weights"}
SETTINGS |= {
    name: name
    for name in ("r", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias")
    + ("modules_to_save", "fan_in_fan_out", "task_type", "inference_mode", "base_model_name_or_path", "revision")
}
DEFAULTS = {
    setting.name: setting.default_factory() if setting.default is MISSING else setting.default
    for setting in fields(peft.LoraConfig)
    if (setting.default, setting.default_factory) != (MISSING, MISSING)
}


def of_lora_alone(settings: dict) -> list[str]:
    """The names of the settings that Tied-LoRA has no counterpart of."""
    alone = [name for name, value in settings.items() if name in DEFAULTS and name not in SETTINGS]
    alone = [name for name in alone if settings[name] != DEFAULTS[name]]
    return alone + ["init_lora_weights"] * isinstance(settings.get("init_lora_weights"), str)


#: Tests of what LoRA alone has, by what their source says.
LORA_PARTS = re.compile(
    r"\blora_[AB]\b|\blora_embedding_|\blora\.|\.lora_alpha|LoraModel|LoraLayer|"
    + r"|".join(rf"{name}=" for name in DEFAULTS if name not in SETTINGS)
)


def why_not(item, lora_config: type) -> str | None:
    """Why a test is left out: an empty string for one that is not of LoRA, `None` for one that is run."""
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    configs = [value for value in values if isinstance(value, peft.PeftConfig)]
    classes = [value for value in values if isinstance(value, type) and issubclass(value, peft.PeftConfig)]
    if any(config_class is not lora_config for config_class in classes + [type(config) for config in configs]):
        return ""
    sources = [item.function] + [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    source = "".join(inspect.getsource(function) for function in sources if function.__module__.startswith("tests."))
    if not configs and not classes and "LoraConfig" not in source and "_lora" not in item.name:
        return ""
    settings = [value for value in values if isinstance(value, dict)] + [config.settings for config in configs]
    alone = sorted({name for given in settings for name in of_lora_alone(given)})
    if alone:
        return f"a setting of LoRA alone: {', '.join(alone)}"
    targets = [str(given.get("target_modules")) for given in settings]
    if any(re.match("conv|mha", str(value), re.IGNORECASE) for value in values) or any("conv2d" in t or "mha" in t for t in targets):
        return "layers that Tied-LoRA does not adapt: convolutions and multi-head attention"
    if not classes and (found := LORA_PARTS.search(inspect.getsource(item.function))):
        return f"reads LoRA's own parts, {found[0]}"
    return None


def collect(lora_config: type, own_cases: list[tuple]) -> dict[str, type]:
    """Import PEFT's test classes with a class in the place of `LoraConfig`.

    Args:
        lora_config: the class.
        own_cases: further rows for `TEST_CASES` of the custom models: `(name, model, settings)`.

    Returns:
        The classes of tests by name, for the module that pytest collects.
    """
    with patch.object(peft, "LoraConfig", lora_config):
        modules = {name: importlib.import_module(f"tests.{name}") for name in SUITES}
    # Every model is in the cache: nothing is looked for on the Hub.
    importlib.import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = Seen()
    custom = modules["test_custom_models"]
    custom.TEST_CASES += [(name, model, lora_config, settings) for name, model, settings in own_cases]
    return {name: getattr(modules[module], name) for module, names in SUITES.items() for name in names}


class Seen(Counter):
    """All model ids have been loaded before."""

    def __contains__(self, name):
        return True
