"""`hf_tying.hook`: its table has all that importing the package changes in other packages, and no more."""

import json
from importlib import import_module
from operator import attrgetter
from pkgutil import resolve_name
from types import ModuleType, SimpleNamespace

import pytest
import wrapt

from hf_tying.hook import CHANGES, TIED_LORA, TIES, apply_change

from .processes import run_python

#: DeepSpeed may be absent, and changes torch itself when it is imported: tests/parallel looks at what is done to it.
PRESENT = [change for change in CHANGES if change.module != "deepspeed"]
MODULES = sorted({change.module for change in PRESENT})
NAMES = {f"{change.module}:{change.name}" for change in PRESENT}


def for_each(changes):
    return pytest.mark.parametrize("change", changes, ids=lambda change: f"{change.module}:{change.name}")


class TestTheTable:
    def test_has_each_name_once_and_says_why(self):
        assert len(PRESENT) == len(NAMES) == 37 == len(CHANGES) - 1
        assert CHANGES == (*TIES, *TIED_LORA)
        assert all(change.why and "\n" not in change.why for change in CHANGES)

    def test_says_of_every_private_name_what_a_version_without_it_means(self):
        assert [change.name for change in CHANGES if change.private] == [
            "PreTrainedModel._load_pretrained_model",
            "PushToHubMixin._upload_modified_files",
            "BaseTuner._unload_and_optionally_merge",
            "PeftModel._update_offload",
            "_check_config_compatible",
        ]
        assert all(change.without for change in CHANGES if change.private)

    @for_each(PRESENT)
    def test_is_what_is_found_in_transformers_and_peft(self, change):
        module = import_module(change.module)
        found, ours = attrgetter(change.name)(module), resolve_name(change.ours)
        if isinstance(found, dict):
            assert found["TIED_LORA"] is ours
        else:
            owner, _, name = change.name.rpartition(".")
            found = vars(attrgetter(owner)(module) if owner else module)[name]
            assert type(found) is wrapt.FunctionWrapper and found._self_wrapper is ours
            assert type(found.__wrapped__) is not wrapt.FunctionWrapper  # it is wrapped once


#: The names in the loaded modules of the packages that are changed, each with its value in words that are the same in
#: every process; and the dicts among the values, by identity.
CONTENTS = """
import importlib, json, sys, types

def words(value):
    kind = type(value).__name__
    if isinstance(value, (classmethod, staticmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    if isinstance(value, type):
        return [kind, value.__module__, value.__qualname__]
    code = getattr(value, "__code__", None)
    if isinstance(code, types.CodeType):
        return [kind, code.co_filename, code.co_firstlineno, code.co_qualname]
    if type(value) in (dict, set):
        return [kind, len(value), *sorted(key for key in value if isinstance(key, str))]
    return [kind, repr(value)] if type(value) in (str, int, float, bool) else [kind]

for name in sys.argv[1:]:
    importlib.import_module(name)
found, dicts = {}, {}
for name, module in list(sys.modules.items()):
    changed = name.startswith(("transformers", "peft", "accelerate", "trl", "torch.distributed.pipelining"))
    if not changed or type(module) is not types.ModuleType:
        continue
    names = found[name] = {}
    for key, value in list(vars(module).items()):
        if not isinstance(value, types.ModuleType):
            names[key] = words(value)
        if type(value) is dict:
            dicts[f"{name}:{key}"] = id(value)
        if isinstance(value, type) and value.__module__ == name:
            names |= {f"{key}.{inside}": words(held) for inside, held in vars(value).items()}
print(json.dumps([found, dicts]))
"""


def test_nothing_else_of_transformers_and_peft_is_changed():
    one_order = {"PYTHONHASHSEED": "0"}  # of sets
    stock, _ = json.loads(run_python("-c", CONTENTS, *MODULES, environment=one_order).stdout)
    ours, dicts = json.loads(run_python("-c", CONTENTS, "hf_tying", *MODULES, environment=one_order).stdout)
    assert sum(map(len, stock.values())) > 10_000
    changed = {
        f"{module}:{name}"
        for module in stock.keys() & ours.keys()
        for name in stock[module].keys() | ours[module].keys()
        if stock[module].get(name) != ours[module].get(name)
    }
    mappings = {dicts[name] for name in NAMES if name in dicts}
    changed -= {name for name in changed - NAMES if dicts.get(name) in mappings}  # imported by another module
    other_names = {
        "transformers.utils.hub:SESSION_ID",  # is drawn anew in every process
        "transformers.configuration_utils:PretrainedConfig.push_to_hub",  # the old name of PreTrainedConfig
    }
    assert changed - other_names == {name.replace("pipelining:", "pipelining._IR:") for name in NAMES}  # defined there


class TestAMissingName:
    @for_each([change for change in CHANGES if change.without])
    def test_is_skipped_where_the_table_says_what_that_means(self, change):
        owner = change.name.rpartition(".")[0]
        module = ModuleType(change.module)
        if owner:
            setattr(module, owner, SimpleNamespace())
        before = dict(vars(module))
        apply_change(change, module)
        assert vars(module) == before and not (owner and vars(getattr(module, owner)))

    @for_each([change for change in CHANGES if not change.without])
    def test_is_an_error_elsewhere(self, change):
        with pytest.raises(AttributeError):
            apply_change(change, ModuleType(change.module))

    def test_of_peft_costs_nothing_but_what_the_table_says(self):
        program = """
import peft, torch
from peft.tuners.tuners_utils import BaseTuner
del peft.PeftModel._update_offload, BaseTuner._unload_and_optionally_merge, peft.mixed_model._check_config_compatible
from hf_tying.peft import TiedLoraConfig
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), TiedLoraConfig(r=2, target_modules=["0"]))
model.merge_adapter()
print(type(model.base_model).__name__)
"""
        assert run_python("-c", program).stdout.split() == ["TiedLoraModel"]


def test_a_peft_that_tied_lora_cannot_build_on_is_told_of_once_and_keeps_all_else():
    program = """
import peft, torch
from peft.tuners import tuners_utils
del tuners_utils.check_adapters_to_merge
import hf_tying
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
print("TIED_LORA" in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, hasattr(peft.PeftModel.from_pretrained, "__wrapped__"))
print(tuners_utils.BaseTuner.merge_adapter._self_wrapper.__name__)
"""
    done = run_python("-c", program)
    assert done.stdout.split() == ["False", "False", "guard_merges"]
    assert done.stderr.count("Tied-LoRA is not available with peft") == 1
    assert "check_adapters_to_merge" in done.stderr
