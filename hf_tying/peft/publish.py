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

`push_to_hub` writes both forms by default (`also_lora=True`), because an upload is for other people.
`save_pretrained` does not (`also_lora=False`), because a folder that is saved during training is for the same program.
It has the tied form in the root, as `Trainer` expects when it resumes. `Trainer(push_to_hub=True)` uploads such a
folder as it is. After the training, push both forms with `trainer.model.push_to_hub(repo)`.
"""

import inspect
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .adapter_card import write_card
from .adapter_folder import write_folder
from .config import is_tied_lora
from .export import TIED_FOLDER, export_to_lora

CARD = "README.md"


def save_with_lora(
    model: PeftModel, out: str | os.PathLike, repo_id: str | None = None, tags: list[str] | None = None, **kwargs: Any
) -> None:
    """Write both forms of the Tied-LoRA adapters of a model, and the card. On an error, `out` is unchanged.

    Args:
        model: model with Tied-LoRA adapters.
        out: folder to write to. A card that is already there is kept, and its section on the forms is replaced.
        repo_id: name in the card's instructions for loading. Default: the name of the folder.
        tags: more tags for the card.
        **kwargs: arguments for `PeftModel.save_pretrained`: `selected_adapters`, `state_dict`, `is_main_process`, ...

    Raises:
        ValueError: an adapter has the name of the subfolder, or `out` is a file.
    """
    if kwargs.get("is_main_process") is False:  # this process helps to gather a sharded model, and writes nothing
        model.save_pretrained(out, also_lora=False, **kwargs)
        return
    names = kwargs.get("selected_adapters") or list(model.peft_config)
    if TIED_FOLDER in names:
        raise ValueError(f"An adapter cannot be named {TIED_FOLDER!r} here: this is the folder of the tied form.")

    def fill(folder: Path) -> None:
        card = Path(out) / CARD
        if card.is_file():
            (folder / CARD).write_bytes(card.read_bytes())
        model.save_pretrained(folder, also_lora=False, **kwargs)
        for name in names:
            _both_forms(folder if name == "default" else folder / name)
        configs = {name: model.peft_config[name] for name in names}
        write_card(folder / CARD, configs, repo_id or Path(out).name, TIED_FOLDER, tags)

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
    Like that method, it keeps a card that is already on the Hub.

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
    """
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        try:
            ModelCard.load(repo_id, token=token).save(Path(folder) / CARD)
        except EntryNotFoundError:
            pass  # a new repository
        save_with_lora(model, folder, repo_id, tags)
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter, as LoRA and as Tied-LoRA",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


# Wrappers of PEFT's own methods, which `hf_tying.hook` installs.


def save_pretrained(wrapped: Callable[..., Any], model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Wrap `PeftModel.save_pretrained`, and add an argument `also_lora` for Tied-LoRA, `False` by default."""
    if not _has_tied_lora(model):
        return wrapped(*args, **kwargs)
    if not kwargs.pop("also_lora", False):
        return wrapped(*args, **kwargs)
    given = dict(inspect.signature(wrapped).bind(*args, **kwargs).arguments)
    return save_with_lora(model, given.pop("save_directory"), **given.pop("kwargs", {}), **given)


def push_to_hub(wrapped: Callable[..., Any], model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Wrap `PeftModel.push_to_hub`, and add an argument `also_lora` for Tied-LoRA, `True` by default."""
    if not _has_tied_lora(model):
        return wrapped(*args, **kwargs)
    if not kwargs.pop("also_lora", True):
        return wrapped(*args, **kwargs)
    return push_with_lora(model, *args, **kwargs)


def _has_tied_lora(model: PeftModel) -> bool:
    return any(map(is_tied_lora, model.peft_config.values()))


def _both_forms(folder: Path) -> None:
    """Move the tied form in `folder` to its subfolder, and export LoRA into `folder`."""
    tied = folder / TIED_FOLDER
    tied.mkdir()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            os.replace(folder / name, tied / name)
    export_to_lora(tied, folder)
