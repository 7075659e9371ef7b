"""A published Tied-LoRA adapter has two forms, so that whoever has not this package can load it too.

    README.md                            the card; it says how each form is loaded
    adapter_config.json                  LoRA: what `PeftModel.from_pretrained(base, repo)` finds
    adapter_model.safetensors
    tied_lora/adapter_config.json        Tied-LoRA: `PeftModel.from_pretrained(base, repo, subfolder="tied_lora")`
    tied_lora/adapter_model.safetensors

PEFT's list of adapter types is closed: without this package, a folder that says `TIED_LORA` ends in a bare
`KeyError('TIED_LORA')`, before anything of ours could explain it. So the form that all can read is in the root, where
everything looks that reads adapters (PEFT, transformers, vLLM, the Hub's own pages); and as the export is exact, who
loads it without knowing of two forms has the right model. The tied form, from which training goes on with the ties in
place, is beside it, in a subfolder, which PEFT's and transformers' loaders take as an argument. An adapter that is
not named "default" has both forms in the folder of its name, as with PEFT.

`push_to_hub` does that by default (`also_lora=True`): what is pushed is for others. `save_pretrained` does not
(`also_lora=False`): what is saved during training is for the same program, which finds the tied form in the root, as
`Trainer` expects when it resumes. `Trainer(push_to_hub=True)` uploads such a folder as it is: push once more with
`trainer.model.push_to_hub(repo)` when the training is over.
"""

import inspect
import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .adapter_folder import write_folder
from .config import TiedLoraConfig, TiedPeftType
from .export import TIED_FOLDER, export_to_lora
from .tensor_names import names_in_model

CARD = "README.md"
_BEGIN, _END = "<!-- the forms of this adapter -->", "<!-- end of the forms -->"


def save_with_lora(
    model: PeftModel, out: str | os.PathLike, repo_id: str | None = None, tags: list[str] | None = None, **kwargs
) -> None:
    """Write both forms of the Tied-LoRA adapters of a model, and the card; on an error `out` is as it was.

    Args:
        model: with Tied-LoRA adapters.
        out: the folder. A card that is there is kept, and its section on the forms written anew.
        repo_id: the name to load it by that the card gives. Default: the folder.
        tags: more tags for the card.
        kwargs: for `PeftModel.save_pretrained`: `selected_adapters`, `state_dict`, `is_main_process`, ...

    Raises:
        ValueError: an adapter has the name of the subfolder, or `out` is a file.
    """
    if kwargs.get("is_main_process") is False:  # its part of a sharded model is wanted, and nothing is written
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
        _write_card(folder / CARD, _section(model, names, repo_id or Path(out).name), tags)

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
):
    """`PeftModel.push_to_hub`, with both forms: the same arguments, and one commit.

    transformers writes a card of its own over PEFT's before it uploads, and does not look into folders in folders; so
    this is not built on it. A card that is on the Hub is kept, as transformers does.

    Args:
        max_shard_size: has no meaning for an adapter, which is one file.

    Returns:
        What `huggingface_hub.HfApi.upload_folder` returns, a `CommitInfo`.
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


# What `registration` puts around PEFT's own methods.


def save_pretrained(wrapped, model: PeftModel, args, kwargs):
    """`PeftModel.save_pretrained` with `also_lora`, `False` by default."""
    if not _is_tied(model):
        return wrapped(*args, **kwargs)
    if not kwargs.pop("also_lora", False):
        return wrapped(*args, **kwargs)
    given = dict(inspect.signature(wrapped).bind(*args, **kwargs).arguments)
    return save_with_lora(model, given.pop("save_directory"), **given.pop("kwargs", {}), **given)


def push_to_hub(wrapped, model: PeftModel, args, kwargs):
    """`PeftModel.push_to_hub` with `also_lora`, `True` by default."""
    if not _is_tied(model):
        return wrapped(*args, **kwargs)
    if not kwargs.pop("also_lora", True):
        return wrapped(*args, **kwargs)
    return push_with_lora(model, *args, **kwargs)


def _is_tied(model: PeftModel) -> bool:
    return any(config.peft_type == TiedPeftType.TIED_LORA for config in model.peft_config.values())


# The parts of the folder.


def _both_forms(folder: Path) -> None:
    """From the tied form in `folder` to LoRA there, and the tied form in its subfolder."""
    tied = folder / TIED_FOLDER
    tied.mkdir()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / name).is_file():
            os.replace(folder / name, tied / name)
    export_to_lora(tied, folder)


def _write_card(path: Path, section: str, tags: list[str] | None) -> None:
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or ()), "lora", "tied-lora", *(tags or ())})
    text = re.sub(f"{_BEGIN}.*?{_END}\n*", "", card.text, flags=re.DOTALL)
    heading = "## Model Details" if "## Model Details" in text else "### Framework versions"
    before, found, after = text.partition(heading)
    card.text = f"{before.rstrip()}\n\n{section}\n\n{found}{after}"
    card.save(path)


def _section(model: PeftModel, names: list[str], repo_id: str) -> str:
    """The card's section on the two forms."""
    configs: dict[str, PeftConfig] = {name: model.peft_config[name] for name in names}
    lines = [_BEGIN, "## Two forms of one adapter", ""]
    lines += [
        "This adapter was trained as [Tied-LoRA](https://arxiv.org/abs/2311.09578): layers share its low-rank "
        "matrices. It is here in two forms, with exactly the same update of the base model.",
        "",
        "| folder | form | is loaded by |",
        "|---|---|---|",
    ]
    for name in names:
        folder = "" if name == "default" else f"{name}/"
        lines += [
            f"| `{folder or '.'}` | LoRA, exported without approximation | PEFT, transformers, and what reads LoRA |",
            f"| `{folder}{TIED_FOLDER}` | Tied-LoRA, for further training | PEFT with `hf-tying` installed |",
        ]
    first = names[0]
    root = "" if first == "default" else f', subfolder="{first}"'
    tied = TIED_FOLDER if first == "default" else f"{first}/{TIED_FOLDER}"
    lines += [
        "",
        "```python",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base_model, "{repo_id}"{root})  # LoRA',
        "```",
        "```python",
        "import hf_tying  # tells PEFT of Tied-LoRA",
        "",
        f'model = PeftModel.from_pretrained(base_model, "{repo_id}", subfolder="{tied}")',
        "```",
        "",
        *(f"What is tied in `{name}`: {_ties(config)}\n" for name, config in configs.items()),
        _END,
    ]
    return "\n".join(lines)


def _ties(config: TiedLoraConfig) -> str:
    """How many factors serve how many modules."""
    modules = [names_in_model(config, module) for module in config.adapted_modules]
    counts = {kind: len({names[kind] for names in modules}) for kind in modules[0]}
    factors = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    name = f"{config.variant}, " if config.variant else ""
    absent = [kind for kind in "uv" if kind not in counts]
    ones = f" ({' = '.join([*absent, '1'])})" if absent else ""
    return f"{name}r = {config.r}; {len(modules)} modules use {factors}{ones}."
