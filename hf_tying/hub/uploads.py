"""What becomes of uploads by other libraries: checked before a repository is created, finished before they are sent.

`push_to_hub` and `save_pretrained(push_to_hub=True)` of transformers, and the trainers of transformers and TRL, upload
a folder as they have written it. `hf_tying.hook` lists where this is called from.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import entry_of
from ..ties.anatomy import Anatomy
from .folders import finish_folder, is_tied
from .renewing import renew_card
from .tags import OURS, tags_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def prepare_upload(model: Any, token: bool | str | None = None) -> None:
    """Refuse a model that others could not load, and give it the tags of its ties.

    Args:
        model: what is about to be uploaded.
        token: token of the Hub. Default: the saved one.

    Raises:
        TyingError: an adapter's base model is a folder of this machine.
    """
    if getattr(model, "peft_config", None):
        from .adapters import refuse_local_bases

        refuse_local_bases(model, token)
        return  # its tags are those of the base model
    if hasattr(model, "add_model_tags"):
        config = getattr(model, "config", None)
        tags = tags_of(config, Anatomy(model).role_of) if entry_of(config) is not None else []
        if model.model_tags or tags:
            model.model_tags = [tag for tag in model.model_tags or [] if not tag.startswith(OURS)]
            model.add_model_tags(tags)


class FinishingApi:
    """The client that `Trainer` uses. An upload into a subfolder is a checkpoint to resume from, and stays as it is.

    Args:
        api: client of `huggingface_hub`, which does all the rest.
    """

    def __init__(self, api: "HfApi") -> None:
        self._api = api

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    def upload_folder(self, **kwargs: Any) -> Any:
        """Finish the folder, then upload it."""
        if kwargs.get("path_in_repo") is None:
            finish_folder(kwargs["folder_path"], kwargs["repo_id"], kwargs.get("revision"), kwargs.get("token"))
        return self._api.upload_folder(**kwargs)


def renew_trainers_card(trainer: Any) -> None:
    """Renew the card in the output folder of a trainer whose model is tied.

    Args:
        trainer: a `Trainer` that has written its own card.
    """
    output = Path(trainer.args.output_dir)
    if is_tied(output):
        renew_card(output, getattr(trainer, "hub_model_id", None) or output.absolute().name)
