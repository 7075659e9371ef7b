"""PEFT's own tests of `LoraConfig`, with another class under that name: what `tied_lora.py` and `stock_lora.py` share.

PEFT's test modules are imported while `peft.LoraConfig` is the class to test. So all that they say of LoRA they say of
it: the cases of their lists, those inside of tests, and what their helpers allow for LoRA and skip for other methods.
"""

import importlib.util
import inspect
import re
import sys
import types
from collections import Counter
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib.machinery import ModuleSpec
from unittest.mock import patch

import peft

# The tests of what all of PEFT's methods share; run as they are too, with this package imported and without.
TUNERS = "test_tuners_utils"
TUNER_SUITE = (
    "TestPeftCustomKwargs",
    "TestTargetedModuleNames",
    "TestTargetedParameterNames",
    "TestExcludedModuleNames",
    "TestModelAndLayerStatus",
    "TestBaseTunerGetModelConfig",
    "TestBaseTunerWarnForTiedEmbeddings",
    "TestFindMinimalTargetModules",
    "TestRankAndAlphaPattern",
    "TestTunerStateDictKeyPrefixes",
)
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
    TUNERS: TUNER_SUITE,
}

STUBS = {"diffusers": "StableDiffusionPipeline", "scipy": "stats"}

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


def of_tied_lora(settings: dict) -> dict:
    """Tied-LoRA's settings for those of LoRA; its own stay as they are."""
    known = {name: value for name, value in settings.items() if name in SETTINGS or name not in DEFAULTS}
    known = {SETTINGS.get(name, name): value for name, value in known.items()}
    if known.get("bias") == "lora_only":
        known["bias"] = "tied_lora_only"
    # LoRA takes any rank. Tied-LoRA refuses one above that of all adapted layers, and the tests' own layers have 2, 5
    # and 10, one of them 1.
    if known.get("r", 16) > 8:
        known["r"] = 1 if known.get("target_modules") == ["conv1d"] else 2 if "r" not in known else 4
    return known


# Cases beside PEFT's: what Tied-LoRA has and LoRA has not. The control ignores what it does not know.
BOTH = {"target_modules": ["lin0", "lin1"]}
OWN_CASES = {
    "TL5": ("MLP", BOTH | {"variant": "TL5"}),
    "u alone": ("MLP", BOTH | {"train_v": False}),
    "v alone": ("MLP", BOTH | {"train_u": False}),
    "A and B of each module": ("MLP", BOTH | {"tie_A": False, "tie_B": False, "tie_qkv": False}),
    "shared by shape": ("MLP", BOTH | {"share_by": "shape"}),
    "shared by all": ("MLP", BOTH | {"share_by": "all"}),
    "VeRA": ("MLP", BOTH | {"share_by": "all", "train_A": False, "train_B": False, "tie_qkv": False}),
    "q and v": ("MLP", BOTH | {"qkv_modules": ["lin0", "lin1"]}),
    "embedding, Conv1D and Linear": ("EmbConv1D", {"target_modules": ["emb", "conv1d", "lin0"], "share_by": "all"}),
}
OWN_MODEL_CASES = {
    "test_decoder_models": {
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 4,
        # Those of each model are among them; without OPT's fc1, which sees a batch of another size.
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "c_attn", "c_fc", "fc_in"],
        "share_by": "all",
    },
    "test_encoder_decoder_models": {
        "task_type": "SEQ_2_SEQ_LM",
        "r": 8,
        "target_modules": ["q", "k", "v", "wo", "q_proj", "k_proj", "v_proj", "fc2"],
        "share_by": "shape",
    },
}

WEIGHTED = "add_weighted_adapter, which PEFT has for LoRA and IA3 alone: the sum of two Tied-LoRA adapters is none"
MIXED = "PeftMixedModel, which admits PEFT's own methods alone"
# Tests of what LoRA alone has, by what their source says; each with the reason.
OF_LORA_ALONE = {
    r"\blora_[AB]\b|\blora_embedding_|\blora\.|\.lora_alpha|LoraModel|LoraLayer": "reads LoRA's own parts",
    "|".join(rf"{name}=" for name in DEFAULTS if name not in SETTINGS): "a setting of LoRA alone",
    r"pissa|olora|\bmica\b|_mica_|orthogonal|[Mm]amba": "an initialisation, or a model, that only LoRA treats apart",
    'conv2d|"conv1"|mha_cls|multihead_attention|ModelMha': "layers that Tied-LoRA does not adapt",
}
COUNTS = "states the name or the number of LoRA's own parameters"
# Single tests, or all whose names begin so, and why they are left out for both.
DESELECTED = {
    "test_weighted_combination_of_adapters": WEIGHTED,
    "test_add_weighted_adapter": WEIGHTED,
    "test_multiple_adapters_mixed_modules_to_save_merging_adapters": WEIGHTED,
    "test_multiple_adapters_same_modules_to_save_merging_adapters_raises": WEIGHTED,
    "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters": WEIGHTED,
    "test_mixed_model_": MIXED,
    "test_no_infinite_recursion[PeftMixedModel]": MIXED,
    "test_add_adapter_rejects_duplicate_name_without_mutation[True]": MIXED,
    "test_peft_types_small": COUNTS,
    "test_nb_params_small": COUNTS,
    "test_no_rank_nor_alpha_pattern": "adapts a layer of rank 1 with a rank of 2, which Tied-LoRA refuses",
    "test_inject_from_state_dict_stable_diffusion": "needs diffusers and one of its models",
    "test_inject_from_state_dict_extra_keys_warning": "compares the names of modules in the file with the config's; "
    "a file of Tied-LoRA names no modules",
    "test_key_mapping_save_new_load_old_lora": "is expected to fail, and passes: a file of Tied-LoRA names no modules",
}


def why_not(item, lora_config: type) -> str | None:
    """Why a test is left out: an empty string for one that is not of LoRA, `None` for one that is run."""
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    configs = [value for value in values if isinstance(value, peft.PeftConfig)]
    classes = [value for value in values if isinstance(value, type) and issubclass(value, peft.PeftConfig)]
    if any(config_class is not lora_config for config_class in classes + [type(config) for config in configs]):
        return ""
    # What a test says is in its fixtures too.
    fixtures = [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    own = [function for function in (item.function, *fixtures) if function.__module__.startswith("tests.")]
    source = "".join(map(inspect.getsource, own))
    if not configs and not classes and "LoraConfig" not in source and "_lora" not in item.name:
        return ""
    named = next((reason for name, reason in DESELECTED.items() if item.name.startswith(name)), None)
    if named:
        return named
    given = [value for value in values if isinstance(value, dict)] + [config.settings for config in configs]
    alone = sorted({name for settings in given for name in of_lora_alone(settings)})
    if alone:
        return f"a setting of LoRA alone: {', '.join(alone)}"
    layers = [value for value in values if isinstance(value, str)] + [str(s.get("target_modules")) for s in given]
    if any(re.match(r"Conv|MHA|.*\b(conv2d|mha)\b", layer) for layer in layers):
        return "layers that Tied-LoRA does not adapt: convolutions, multi-head attention"
    if classes:
        return None  # a test for all methods
    found = ((re.search(pattern, source), reason) for pattern, reason in OF_LORA_ALONE.items())
    return next((f"{reason}: {match[0].strip('=.')}" for match, reason in found if match), None)


def collect(lora_config: type) -> dict[str, type]:
    """Import PEFT's test classes with a class in the place of `LoraConfig`.

    Returns:
        The classes of tests by name, for the module that pytest collects.
    """
    with patch.object(peft, "LoraConfig", lora_config), stubs():
        modules = {name: importlib.import_module(f"tests.{name}") for name in SUITES}
    # Every model is in the cache: nothing is looked for on the Hub.
    importlib.import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = Seen()
    for module in modules.values():
        for cases in vars(module).values():
            if isinstance(cases, list) and any(isinstance(row, tuple) and lora_config in row for row in cases):
                cases[:] = [row for row in cases if lora_config in row]
    custom = modules["test_custom_models"]
    # In the rows of this list "lora" stands for "go on with add_weighted_adapter".
    custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
        (name, method.replace("lora", "tied_lora"), *rest)
        for name, method, *rest in custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES
    ]
    custom.ALL_PEFT_CONFIG_CLASSES[:] = [lora_config]
    custom.TEST_CASES += [(name, model, lora_config, settings) for name, (model, settings) in OWN_CASES.items()]
    for name, settings in OWN_MODEL_CASES.items():
        modules[name].ALL_CONFIGS.append((lora_config, settings))
    return {name: getattr(modules[module], name) for module, names in SUITES.items() for name in names}


def collect_tuners() -> dict[str, type]:
    """Import PEFT's tests of what all of its methods share, as they are.

    Returns:
        The classes of tests by name, for the module that pytest collects. Their names are not those of `collect`.
    """
    with stubs():
        module = importlib.import_module(f"tests.{TUNERS}")
    importlib.import_module("tests.testing_utils")._HUB_MODEL_ACCESSES = Seen()
    # A parametrised class keeps its tests under its own name; another one names the family in the report.
    return {f"{name}AsItIs": getattr(module, name) for name in TUNER_SUITE}


@contextmanager
def stubs():
    """Stand-ins for packages that PEFT's test modules import and only tests use that are not run."""
    absent = {name: part for name, part in STUBS.items() if not importlib.util.find_spec(name)}
    for name, part in absent.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
        sys.modules[name].__version__ = "0"
        setattr(sys.modules[name], part, type(part, (), {}))
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


class Seen(Counter):
    """All model ids have been loaded before."""

    def __contains__(self, name):
        return True
