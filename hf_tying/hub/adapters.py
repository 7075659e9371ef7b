"""Publication of Tied-LoRA adapters in two forms, so that people without this package can load them too.

    README.md                            the card, which says how to load each form
    adapter_config.json                  LoRA: `PeftModel.from_pretrained(base, repo)`
    adapter_model.safetensors
    tied_lora/adapter_config.json        Tied-LoRA: `PeftModel.from_pretrained(base, repo, subfolder="tied_lora")`
    tied_lora/adapter_model.safetensors

PEFT's list of adapter types is fixed. Without this package, a folder of type `TIED_LORA` raises a bare
`KeyError('TIED_LORA')`, before any code of this package can explain it. So the root has the LoRA form, because all
readers of adapters look there (PEFT, transformers, vLLM, the Hub's own pages). The export is exact, so a reader who
does not know of the two forms gets the right model. A subfolder has the tied form, from which training can continue
with the ties in place. The loaders of PEFT and transformers have an argument for a subfolder. An adapter that is not
named "default" has both forms in the folder of its name, as in PEFT.

Every upload has both forms, because it is for other people: `push_to_hub` of PEFT and of transformers' own adapters,
`Trainer(push_to_hub=True)` and TRL's trainers. `save_pretrained` writes the tied form alone (`also_lora=False`), and
so do the checkpoints that a training resumes from, because such a folder is for the same program.
"""

import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..peft.adapter_folder import type_of_adapter, write_folder
from ..peft.config import TiedPeftType, is_tied_lora
from ..peft.export import TIED_FOLDER, export_to_lora
from .cards import CARD
from .renewing import copy_published_card, renew_card
from .repository_names import refuse_local_base


def save_with_lora(
    model: PeftModel, out: str | os.PathLike, repo_id: str | None = None, tags: list[str] | None = None, **kwargs: Any
) -> None:
    """Write both forms of the Tied-LoRA adapters of a model, and the card. On an error, `out` is unchanged.

    Args:
        model: model with Tied-LoRA adapters.
        out: folder to write to. A card that is already there is kept, and its sections of this package are renewed.
        repo_id: name in the card's instructions for loading. Default: the name of the folder.
        tags: more tags for the card.
        **kwargs: arguments for `PeftModel.save_pretrained`: `selected_adapters`, `state_dict`, `is_main_process`, ...

    Raises:
        ValueError: an adapter has the name of the subfolder, or `out` is a file.
    """
    if kwargs.get("is_main_process") is False:  # this process helps to gather a sharded model, and writes nothing
        model.save_pretrained(os.fspath(out), also_lora=False, **kwargs)
        return
    names = kwargs.get("selected_adapters") or list(model.peft_config)
    if TIED_FOLDER in names:
        raise ValueError(f"An adapter cannot be named {TIED_FOLDER!r} here: this is the folder of the tied form.")

    def fill(folder: Path) -> None:
        card = Path(out) / CARD
        if card.is_file():
            (folder / CARD).write_bytes(card.read_bytes())
        model.save_pretrained(str(folder), also_lora=False, **kwargs)
        for name in names:
            write_both_forms(folder if name == "default" else folder / name)
        renew_card(folder, repo_id or Path(out).name, tags)

    write_folder(out, fill)


def push_with_lora(
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Push both forms in one commit. The arguments are those of `PeftModel.push_to_hub`.

    This does not call transformers' `push_to_hub`, which overwrites PEFT's card and does not upload nested folders.
    Like that method, it keeps a card that is already on the Hub: that of the revision that is pushed to.

    Args:
        model: model with Tied-LoRA adapters.
        repo_id: name of the repository, which is created if it does not exist.
        commit_message: title of the commit. Default: a line on the two forms.
        commit_description: text of the commit. Default: none.
        private: whether a new repository is private. Default: the Hub's own default.
        token: token of the Hub. Default: the saved one.
        revision: branch to push to. Default: the main branch.
        create_pr: whether to open a pull request in place of a commit. Default `False`.
        max_shard_size: ignored, because an adapter is one file.
        tags: more tags for the card.

    Returns:
        The `CommitInfo` of `huggingface_hub.HfApi.upload_folder`.

    Raises:
        TyingError: the base model is a folder of this machine; no repository is created.
    """
    refuse_local_bases(model, token)
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        # Everything that can fail here comes before the repository.
        save_with_lora(model, Path(folder) / "new", repo_id, tags)
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
        upload = Path(folder) / "new"
        copy_published_card(upload, repo_id, revision, token)
        renew_card(upload, repo_id, tags)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=upload,
            commit_message=commit_message or "Upload adapter, as LoRA and as Tied-LoRA",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def refuse_local_bases(model: Any, token: bool | str | None = None) -> None:
    """Refuse to publish Tied-LoRA adapters, of PEFT or of transformers, whose base model is a folder of this machine.

    Args:
        model: any model.
        token: token of the Hub. Default: the saved one.

    Raises:
        TyingError: with the way out.
    """
    for name, config in adapters_of(model).items():
        base = config.base_model_name_or_path
        if base is None:  # PEFT and transformers fill it in when they save
            held = model.get_base_model() if isinstance(model, PeftModel) else model
            base = getattr(held, "name_or_path", None)
        refuse_local_base(base, f'model.peft_config["{name}"].base_model_name_or_path', token)


def adapters_of(model: Any) -> dict[str, Any]:
    """The settings of the Tied-LoRA adapters of a model by their names, as PEFT or transformers holds them."""
    configs = getattr(model, "peft_config", None)
    found = configs if isinstance(configs, dict) else {}
    return {name: config for name, config in found.items() if is_tied_lora(config)}


def write_both_forms(folder: Path) -> bool:
    """Move the tied form of an adapter in `folder` to its subfolder, and export LoRA into `folder`.

    Args:
        folder: folder of an adapter. One of another type, or with no adapter, is left alone.

    Returns:
        Whether there was a tied form.
    """
    if type_of_adapter(folder) != TiedPeftType.TIED_LORA:
        return False
    tied = folder / TIED_FOLDER
    tied.mkdir(exist_ok=True)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        (tied / name).unlink(missing_ok=True)
        if (folder / name).is_file():
            os.replace(folder / name, tied / name)
    export_to_lora(tied, folder)
    return True


# Around PEFT's own methods; `hf_tying.hook` calls them.


def save_pretrained(wrapped: Callable[..., Any], model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Wrap `PeftModel.save_pretrained`, and add an argument `also_lora` for Tied-LoRA, `False` by default."""
    if not adapters_of(model):
        return wrapped(*args, **kwargs)
    also_lora = kwargs.pop("also_lora", False)
    given = dict(inspect.signature(wrapped).bind(*args, **kwargs).arguments)
    if not also_lora:
        wrapped(*args, **kwargs)
        folder = Path(given["save_directory"])
        if given.get("is_main_process", True) and (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            renew_card(folder, folder.absolute().name)  # PEFT's names a base model of this machine, and no ties
        return
    return save_with_lora(model, given.pop("save_directory"), **given.pop("kwargs", {}), **given)


def push_to_hub(wrapped: Callable[..., Any], model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wrap `PeftModel.push_to_hub`, and add an argument `also_lora` for Tied-LoRA, `True` by default."""
    if not adapters_of(model):
        return wrapped(*args, **kwargs)
    if not kwargs.pop("also_lora", True):
        refuse_local_bases(model, kwargs.get("token"))
        return wrapped(*args, **kwargs)
    return push_with_lora(model, *args, **kwargs)
