"""The changes that importing the package makes in transformers, PEFT, Accelerate, DeepSpeed, TRL and torch: a table.

With these changes, stock classes honour a `tying` entry of their config: `AutoModelForCausalLM.from_pretrained(path)`
gives a tied model or a `TyingError`, never a silently untied one. A config without the entry works as before. PEFT
knows Tied-LoRA, and does not merge an adapter into a tie that the merge would break.

A change is made when its module is imported, before or after this package, so `import hf_tying` stays light. The
same moment tells of a transformers newer than the versions that the tests have seen (`TESTED`).
"""

import functools
import sys
from dataclasses import dataclass
from operator import attrgetter
from pkgutil import resolve_name
from types import ModuleType

from wrapt import when_imported, wrap_function_wrapper


@dataclass(frozen=True)
class Change:
    """One name of another library that is changed when its module is imported.

    Args:
        module: the module to change.
        name: the function, the method or the dict in that module.
        ours: our replacement, as `"module:name"`. A function gets it as a wrapper, with the arguments `(wrapped,
            instance, args, kwargs)` of wrapt. A dict gets it as its entry `TIED_LORA`.
        why: effect of the change.
        without: behaviour of versions without this name. Default `None`: every version has it, and its absence is an
            error. A private name may go at any time, so it always says this.
        copied: whether other modules of the package import the name itself. Those that have done so before get ours
            too. Default `False`.
    """

    module: str
    name: str
    ours: str
    why: str
    without: str | None = None
    copied: bool = False

    @property
    def private(self) -> bool:
        """Whether the name is private in its module."""
        return any(part.startswith("_") for part in self.name.split("."))


_MODELS = "transformers.modeling_utils"
_CONFIGS, _TOKENIZERS = (f"transformers.models.auto.{name}_auto" for name in ("configuration", "tokenization"))
_TUNERS, _MAPPING, _PEFT_MODEL = "peft.tuners.tuners_utils", "peft.mapping", "peft.peft_model"
_OURS, _MERGING = "hf_tying.wrappers", "hf_tying.peft.merging"
_REGISTRATION, _STATUS = (f"hf_tying.peft.{name}" for name in ("registration", "status"))

#: Ties, and the classes of this package.
TIES = (
    Change(_MODELS, "PreTrainedModel.post_init", f"{_OURS}:honour_entry", "a `tying` entry ties a stock class"),
    Change(_MODELS, "PreTrainedModel._load_pretrained_model", f"{_OURS}:check_checkpoint",
           "a device map that splits a tie, and a broken file, are refused before weights are read",
           without="both errors are transformers' own"),
    Change(_MODELS, "PreTrainedModel.from_pretrained", f"{_OURS}:take_tying",
           "it takes `tying=`, for any class, and finds a file of shared blocks"),
    Change(_MODELS, "PreTrainedModel.save_pretrained", f"{_OURS}:adopt_ties",
           "ties of a model inside are saved with the outer one"),
    *(Change(f"transformers.{module}", "custom_object_save", f"{_OURS}:carry_code",
             "published code of a custom class loads without this package",
             without="the class is published as it is, and needs this package")
      for module in ("modeling_utils", "configuration_utils", "tokenization_utils_base")),
    *(Change(f"transformers.{module}", f"{name}.push_to_hub", f"{_OURS}:check_upload",
             "what others could not load is refused before a repository is created")
      for module, name in (("modeling_utils", "PreTrainedModel"), ("configuration_utils", "PreTrainedConfig"),
                           ("tokenization_utils_base", "PreTrainedTokenizerBase"))),
    Change("transformers.trainer", "Trainer.init_hf_repo", f"{_OURS}:check_trainers_upload",
           "what others could not load is refused before a repository is created"),
    Change("transformers.utils.hub", "PushToHubMixin._upload_modified_files", f"{_OURS}:finish_upload",
           "an upload has both forms of a Tied-LoRA adapter, and a card that says what is tied",
           without="the upload is transformers' own"),
    Change("transformers.trainer", "hf_api", f"{_OURS}:finishing_api",
           "an upload of a trainer has both forms of a Tied-LoRA adapter, and a card that says what is tied"),
    Change("transformers.trainer", "Trainer.create_model_card", f"{_OURS}:renew_trainers_card",
           "the card of a tied model says what is tied"),
    Change(_CONFIGS, "AutoConfig.from_pretrained", f"{_OURS}:register_models", "it finds our model types"),
    Change(_CONFIGS, "AutoConfig.for_model", f"{_OURS}:register_models", "it finds our model types"),
    Change(_TOKENIZERS, "AutoTokenizer.from_pretrained", f"{_OURS}:register_tokenizer", "it finds JointTokenizer"),
    Change(_TUNERS, "BaseTuner.merge_adapter", f"{_MERGING}:guard_merges",
           "a delta is merged into a tie once, or refused",
           without="merges by this method are PEFT's own"),
    Change(_TUNERS, "BaseTuner.unmerge_adapter", f"{_MERGING}:guard_merges",
           "a delta is taken out of a tie once",
           without="unmerging is PEFT's own"),
    Change(_TUNERS, "BaseTuner._unload_and_optionally_merge", f"{_MERGING}:guard_merges",
           "a delta is merged into a tie once, or refused",
           without="merge_and_unload is PEFT's own"),
    Change("transformers.integrations.peft", "PeftAdapterMixin.load_adapter", f"{_OURS}:load_adapter",
           "transformers loads an adapter's file by its names in the model, or refuses it",
           without="only PEFT loads a Tied-LoRA adapter"),
    Change("accelerate.accelerator", "fsdp2_prepare_model", f"{_OURS}:shard_ties_whole",
           "FSDP2 keeps a tie in one unit, and the tie is checked",
           without="torch refuses a tie over several units"),
    Change("accelerate.utils.fsdp_utils", "fsdp2_prepare_auto_wrap_policy", f"{_OURS}:wrap_no_part_of_a_tie",
           "a module with a part of a tie is no unit of FSDP2",
           without="torch refuses a tie over several units"),
    Change("trl.trainer.utils", "add_fused_lm_head", f"{_OURS}:answer_fused_head",
           "log-probabilities of a projection and of a tied loss are the model's own",
           without="a trainer that goes around the head of such a model is named, and raises", copied=True),
    Change("torch.distributed.pipelining", "Pipe.from_tracing", f"{_OURS}:watch_stages",
           "stages of a tied model may be evaluated, and training copies of a matrix raises",
           without="the copies of a matrix drift apart"),
    Change("deepspeed", "initialize", f"{_OURS}:hold_matrices",
           "ZeRO-3 keeps the softmax matrix of a tied loss gathered until the loss"),
)  # fmt: skip

#: Tied-LoRA. These changes wait until PEFT has been imported whole, because what is ours in them builds on it.
TIED_LORA = (
    Change(_MAPPING, "PEFT_TYPE_TO_CONFIG_MAPPING", "hf_tying.peft.config:TiedLoraConfig", "PEFT finds the config"),
    Change(_MAPPING, "PEFT_TYPE_TO_TUNER_MAPPING", "hf_tying.peft.model:TiedLoraModel", "PEFT finds the tuner"),
    Change(_MAPPING, "PEFT_TYPE_TO_PREFIX_MAPPING", "hf_tying.peft.model:FACTOR_PREFIX", "PEFT finds the factors"),
    Change(_PEFT_MODEL, "PeftModel.from_pretrained", f"{_REGISTRATION}:from_pretrained",
           "a file that does not fit is refused before the model is changed",
           without="the error is PEFT's own, and comes later"),
    Change(_PEFT_MODEL, "PeftModel.load_adapter", f"{_REGISTRATION}:load_adapter",
           "a file that does not fit is refused before the model is changed",
           without="the error is PEFT's own, and comes later"),
    Change(_PEFT_MODEL, "PeftModel._update_offload", f"{_REGISTRATION}:update_offload",
           "the factors of layers on a disk are found there by their names in the model",
           without="factors are not offloaded to a disk"),
    Change(_PEFT_MODEL, "PeftModel.save_pretrained", f"{_OURS}:save_adapter",
           "`also_lora=True` saves the LoRA form too",
           without="there is no such argument"),
    Change(_PEFT_MODEL, "PeftModel.push_to_hub", f"{_OURS}:push_adapter",
           "both forms are pushed, unless `also_lora=False`",
           without="only the Tied-LoRA form is pushed"),
    Change(_PEFT_MODEL, "get_layer_status", f"{_STATUS}:layer_status", "the status of a model counts its layers"),
    Change("peft", "get_layer_status", f"{_STATUS}:layer_status", "the status of its layers is the same by this name"),
    Change("peft.mixed_model", "_check_config_compatible", f"{_REGISTRATION}:refuse_mixed_model",
           "the refusal of a PeftMixedModel names the way out",
           without="the refusal is PEFT's own"),
    Change("peft.utils.hotswap", "check_hotswap_configs_compatible", f"{_REGISTRATION}:refuse_hotswap",
           "the refusal of a hotswap names the way out",
           without="the refusal is PEFT's own"),
)  # fmt: skip

#: The whole table.
CHANGES = TIES + TIED_LORA

#: The oldest and the newest transformers that the whole test suite passes on (`make test-oldest`, `make test-newest`).
#: Every release between them may be used without a word, and a patch of the newest one too.
TESTED = ("5.17.0", "5.24.0")


def install() -> None:
    """Arrange for all changes, and for the word about an untested version; called once, by `import hf_tying`."""
    when_imported("transformers")(warn_if_untested)
    for change in TIES:
        when_imported(change.module)(functools.partial(apply_change, change))
    when_imported("peft")(_add_tied_lora)


def apply_change(change: Change, module: ModuleType) -> None:
    """Make one change. A missing name is skipped where the table says what that means.

    Args:
        change: the row of the table.
        module: the imported module that it names.

    Raises:
        AttributeError: a name is missing that every version has.
    """
    try:
        found = attrgetter(change.name)(module)
    except AttributeError:
        if change.without is None:
            raise
        return
    if isinstance(found, dict):
        from .peft.config import TiedPeftType

        found[TiedPeftType.TIED_LORA] = resolve_name(change.ours)
        return
    made = wrap_function_wrapper(module, change.name, resolve_name(change.ours))
    if change.copied:
        package = change.module.partition(".")[0] + "."
        for name, other in list(sys.modules.items()):
            if name.startswith(package) and other is not None and vars(other).get(change.name) is found:
                setattr(other, change.name, made)


def warn_if_untested(transformers: ModuleType) -> None:
    """Warn of a transformers newer than the tested range. It is used all the same.

    A cap in the package's metadata would keep users from a new transformers, or bring them an old `hf_tying` without a
    word. What a new version has broken shows as an error: of the table above, or of the checks of the ties themselves.

    Args:
        transformers: the imported module.
    """
    from packaging.version import Version  # which transformers has imported by now

    oldest, newest = TESTED
    major, minor = Version(newest).release[:2]
    if Version(transformers.__version__).release[:2] > (major, minor):
        from transformers.utils import logging

        logging.get_logger(__name__).warning(
            f"hf_tying is tested with transformers {oldest} to {newest}, and this is {transformers.__version__}. If a "
            "tie or an adapter fails where it did not before, look for a newer hf_tying, or go back by: "
            f"pip install 'transformers<{major}.{minor + 1}'."
        )


def _add_tied_lora(peft: ModuleType) -> None:
    try:
        for change in TIED_LORA:
            resolve_name(change.ours)
    except ImportError as error:  # with a PEFT outside the tested range, its other adapters must still work
        from transformers.utils import logging

        logging.get_logger(__name__).warning(f"Tied-LoRA is not available with peft {peft.__version__}: {error}")
        return
    for change in TIED_LORA:
        when_imported(change.module)(functools.partial(apply_change, change))
