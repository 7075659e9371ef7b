"""A published Tied-LoRA adapter has two forms, so that people without this package can load it too.

    README.md                            the card, which says how to load each form
    adapter_config.json                  LoRA: `PeftModel.from_pretrained(base, repo)`
    adapter_model.safetensors
    tied_lora/adapter_config.json        Tied-LoRA: `PeftModel.from_pretrained(base, repo, subfolder="tied_lora")`
    tied_lora/adapter_model.safetensors

PEFT's list of adapter types is closed. Without this package, a folder that says `TIED_LORA` ends in a bare
`KeyError('TIED_LORA')`, before any code of this package could explain it. So the root has the form that everybody can
read, because all readers of adapters look there (PEFT, transformers, vLLM, the Hub's own pages). The export is exact,
so a reader who does not know of the two forms gets the right model. A subfolder has the tied form, from which training
can continue with the ties in place; the loaders of PEFT and transformers take a subfolder as an argument. An adapter
that is not named "default" has both forms in the folder of its name, as in PEFT.

`push_to_hub` writes both forms by default (`also_lora=True`), because what is pushed is for other people.
`save_pretrained` does not (`also_lora=False`), because what is saved during training is for the same program: it finds
the tied form in the root, as `Trainer` expects when it resumes. `Trainer(push_to_hub=True)` uploads such a folder as
it is; after the training, push both forms with `trainer.model.push_to_hub(repo)`.
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
    """Write both forms of the Tied-LoRA adapters of a model, and the card. An error leaves `out` as it was.

    Args:
        model: a model with Tied-LoRA adapters.
        out: the folder. A card that is already there is kept, and its section on the forms is replaced.
        repo_id: the name that the card gives for loading. Default: the name of the folder.
        tags: more tags for the card.
        kwargs: arguments for `PeftModel.save_pretrained`: `selected_adapters`, `state_dict`, `is_main_process`, ...

    Raises:
        ValueError: an adapter has the name of the subfolder, or `out` is a file.
    """
    if kwargs.get("is_main_process") is False:  # it takes part in gathering a sharded model, and writes nothing
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
        max_shard_size: ignored, because an adapter is one file.

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


# Wrappers around PEFT's own methods; `hf_tying.hook` puts them there.


def save_pretrained(wrapped: Callable[..., Any], model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Around `PeftModel.save_pretrained`: an argument `also_lora` for Tied-LoRA, `False` by default."""
    if not _has_tied_lora(model):
        return wrapped(*args, **kwargs)
    if not kwargs.pop("also_lora", False):
        return wrapped(*args, **kwargs)
    given = dict(inspect.signature(wrapped).bind(*args, **kwargs).arguments)
    return save_with_lora(model, given.pop("save_directory"), **given.pop("kwargs", {}), **given)


def push_to_hub(wrapped: Callable[..., Any], model: PeftModel, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Around `PeftModel.push_to_hub`: an argument `also_lora` for Tied-LoRA, `True` by default."""
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
