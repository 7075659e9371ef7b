"""What the functions of `hf_tying.hook.TIES` do in place of the stock ones: a thin wrapper of each.

Each has the arguments `(wrapped, instance, args, kwargs)` of wrapt. What it needs is imported when it is called.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import entry_of

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def honour_entry(
    wrapped: Callable[..., Any], model: "PreTrainedModel", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Wrapper of `PreTrainedModel.post_init`: give the model's class the mixin of ties if the config declares any."""
    from .ties.shared_configs import remember_config

    remember_config(model)
    if not _declares_ties(model):
        return wrapped(*args, **kwargs)
    from .ties.classes import with_mixin
    from .ties.modeling import TiedModelMixin

    if isinstance(model, TiedModelMixin):
        return wrapped(*args, **kwargs)
    model.__class__ = with_mixin(TiedModelMixin, type(model))
    assert isinstance(model, TiedModelMixin)  # for type checkers
    model._post_init_tied(wrapped)


def _declares_ties(model: "PreTrainedModel") -> bool:
    """Whether the config has a `tying` entry, or a model inside has the mixin by an entry of its own config."""
    return entry_of(model.config) is not None or _holds_ties(model)


def _holds_ties(model: "PreTrainedModel") -> bool:
    return any("tie_groups" in vars(module) for module in model.modules())


def take_tying(
    wrapped: Callable[..., Any], cls: "type[PreTrainedModel]", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> "PreTrainedModel":
    """Wrapper of `PreTrainedModel.from_pretrained`: `tying=` is the declaration for this load.

    A file that stock loaders would misread (shared layers, each block once) has a name that only this finds.
    """
    if "tying" in kwargs:
        from .ties.declaring import from_pretrained

        return from_pretrained(wrapped, cls, args, kwargs)
    try:
        return wrapped(*args, **kwargs)
    except OSError:
        from .ties.declaring import shared_variant

        if (variant := shared_variant(args, kwargs)) is None:
            raise
    return wrapped(*args, **kwargs, variant=variant)


def adopt_ties(
    wrapped: Callable[..., Any], model: "PreTrainedModel", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Wrapper of `PreTrainedModel.save_pretrained`: ties of a model inside are saved as ties of `model`."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    if getattr(model, "_auto_class", None) is not None:
        from .ties.remote_code import code_of, refuse_overwriting

        if code_of(model):
            refuse_overwriting(model, given["save_directory"])
    if given.get("push_to_hub"):
        _refuse_unloadable(model, given.get("token"))
    if _holds_ties(model):
        from .ties.inner import adopt_inner_ties

        if adopt_inner_ties(model):
            return model.save_pretrained(*args, **kwargs)  # the method of its new class
    return wrapped(*args, **kwargs)


def carry_code(wrapped: Callable[..., Any], instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrapper of `custom_object_save`: what the class needs of this package is copied beside it."""
    from .ties.remote_code import save_code

    return save_code(wrapped, *args, **kwargs)


def check_upload(wrapped: Callable[..., Any], instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrapper of `push_to_hub`: refuse what others could not load, before a repository is created."""
    _refuse_unloadable(instance, kwargs.get("token"))
    return wrapped(*args, **kwargs)


def check_trainers_upload(
    wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Wrapper of `Trainer.init_hf_repo`: refuse what others could not load, before a repository is created."""
    if trainer.is_world_process_zero():
        _refuse_unloadable(trainer.model, trainer.args.hub_token)
    return wrapped(*args, **kwargs)


def _refuse_unloadable(instance: Any, token: Any) -> None:
    if getattr(instance, "_auto_class", None) is not None:
        from .ties.remote_code import refuse_unloadable

        refuse_unloadable(instance)
    if hasattr(instance, "parameters"):
        from .hub.uploads import prepare_upload

        prepare_upload(instance, token)


def finish_upload(wrapped: Callable[..., Any], instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrapper of `PushToHubMixin._upload_modified_files`: finish the folder that `push_to_hub` of a model has made."""
    if hasattr(instance, "parameters"):
        from .hub.folders import finish_folder

        given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        finish_folder(given["working_dir"], given["repo_id"], given.get("revision"), given.get("token"))
    return wrapped(*args, **kwargs)


def finishing_api(wrapped: Callable[..., Any], instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrapper of `hf_api` in the module of `Trainer`: the folders of a run are finished when they are uploaded."""
    from .hub.uploads import FinishingApi

    return FinishingApi(wrapped(*args, **kwargs))


def renew_trainers_card(
    wrapped: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Wrapper of `Trainer.create_model_card`: the card of a tied model says what is tied."""
    wrapped(*args, **kwargs)
    if trainer.is_world_process_zero():
        from .hub.uploads import renew_trainers_card

        renew_trainers_card(trainer)


def check_checkpoint(
    wrapped: Callable[..., Any], instance: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Wrapper of `PreTrainedModel._load_pretrained_model`: refuse what would break a tie before weights are read."""
    given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    groups = getattr(given["model"], "tie_groups", None)
    if groups is not None:
        from .ties.headers import refuse_broken, refuse_split

        refuse_split(groups, getattr(given["load_config"], "device_map", None))
        refuse_broken(given["checkpoint_files"])
    loaded = wrapped(*args, **kwargs)
    if groups is not None and isinstance(loaded[-1], dict):
        from .ties.relaxing import offload_roots

        offload_roots(given["model"], loaded[-1])
    return loaded


def load_adapter(
    wrapped: Callable[..., Any], model: "PreTrainedModel", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Wrapper of `PeftAdapterMixin.load_adapter`: its names are those in the model. It may import PEFT first."""
    from transformers.utils import is_peft_available

    if not is_peft_available():
        return wrapped(*args, **kwargs)
    import_module("peft")
    try:
        ours = import_module("hf_tying.peft.registration").load_natively
    except ImportError:  # a PEFT outside the tested range, for which `hf_tying.hook` has warned
        return wrapped(*args, **kwargs)
    return ours(wrapped, model, args, kwargs)


def save_adapter(wrapped: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrapper of `PeftModel.save_pretrained`: it takes `also_lora=` for Tied-LoRA."""
    from .hub.adapters import save_pretrained

    return save_pretrained(wrapped, model, args, kwargs)


def push_adapter(wrapped: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrapper of `PeftModel.push_to_hub`: Tied-LoRA goes up in both forms."""
    from .hub.adapters import push_to_hub

    return push_to_hub(wrapped, model, args, kwargs)


def shard_ties_whole(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Around `fsdp2_prepare_model`, by the name that `Accelerator.prepare` calls: a tie lies in one unit."""
    from .parallel.fsdp2 import prepare_model

    return prepare_model(wrapped, args, kwargs)


def wrap_no_part_of_a_tie(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Around `fsdp2_prepare_auto_wrap_policy`: in `shard_ties_whole`, a module with a part of a tie is no unit."""
    from .parallel.fsdp2 import wrap_policy

    return wrap_policy(wrapped, args, kwargs)


def watch_stages(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Around `Pipe.from_tracing`: a gradient of one of several copies of a tied matrix raises."""
    from .parallel.pipelining import watch_copies

    return watch_copies(wrapped, args, kwargs)


def answer_fused_head(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Around TRL's `add_fused_lm_head`: what the trainers ask of each token is answered by the model's own forward."""
    from .objectives.fused_head import add_fused_head

    add_fused_head(wrapped, args, kwargs)


def hold_matrices(wrapped: Callable[..., Any], instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Around `deepspeed.initialize`: the matrices that a tied loss reads are gathered for the whole of a step."""
    made = wrapped(*args, **kwargs)
    for module in made[0].modules():
        if getattr(module, "_tied_loss", None) is not None:
            module.hold_matrices()
    return made


# Our classes are registered with the Auto classes at first use. While those are being imported, the stock modules that
# our classes build on may be incomplete.


def register_models(wrapped: Callable[..., Any], cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrapper of `AutoConfig.from_pretrained` and `for_model`: register the model types of this package."""
    from . import models

    for family in models.FAMILIES:
        import_module(f"{models.__name__}.{family}")
    return wrapped(*args, **kwargs)


def register_tokenizer(wrapped: Callable[..., Any], cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wrapper of `AutoTokenizer.from_pretrained`: register `JointTokenizer`."""
    from .vocabularies import tokenizer

    tokenizer.register()
    return wrapped(*args, **kwargs)
