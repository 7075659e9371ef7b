"""The section of an adapter's card on its two forms, and on how to load each."""

import re
from pathlib import Path

from huggingface_hub import ModelCard

from .config import TiedLoraConfig
from .tensor_names import names_in_model

_BEGIN, _END = "<!-- the forms of this adapter -->", "<!-- end of the forms -->"


def write_card(
    path: Path, configs: dict[str, TiedLoraConfig], repo_id: str, tied_folder: str, tags: list[str] | None = None
) -> None:
    """Write the section on the two forms and the tags into a card. An older section is replaced.

    Args:
        path: card that PEFT has written.
        configs: settings of the adapters by their names.
        repo_id: name of the repository, for the instructions.
        tied_folder: name of the subfolder with the tied form.
        tags: more tags for the card.
    """
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or ()), "lora", "tied-lora", *(tags or ())})
    text = re.sub(f"{_BEGIN}.*?{_END}\n*", "", card.text, flags=re.DOTALL)
    heading = "## Model Details" if "## Model Details" in text else "### Framework versions"
    before, found, after = text.partition(heading)
    card.text = f"{before.rstrip()}\n\n{_section(configs, repo_id, tied_folder)}\n\n{found}{after}"
    card.save(path)


def _section(configs: dict[str, TiedLoraConfig], repo_id: str, tied_folder: str) -> str:
    lines = [_BEGIN, "## Two forms of one adapter", ""]
    lines += [
        "This adapter was trained as [Tied-LoRA](https://arxiv.org/abs/2311.09578): layers share its low-rank "
        "matrices. It is here in two forms, with exactly the same update of the base model.",
        "",
        "| folder | form | is loaded by |",
        "|---|---|---|",
    ]
    for name in configs:
        folder = "" if name == "default" else f"{name}/"
        lines += [
            f"| `{folder or '.'}` | LoRA, exported without approximation | PEFT, transformers, and what reads LoRA |",
            f"| `{folder}{tied_folder}` | Tied-LoRA, for further training | PEFT with `hf-tying` installed |",
        ]
    first = next(iter(configs))
    root = "" if first == "default" else f', subfolder="{first}"'
    tied = tied_folder if first == "default" else f"{first}/{tied_folder}"
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
    """The sentence on one adapter: how many factors serve how many modules."""
    modules = [names_in_model(config, module) for module in config.adapted_modules]
    counts = {kind: len({names[kind] for names in modules}) for kind in modules[0]}
    factors = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    name = f"{config.variant}, " if config.variant else ""
    absent = [kind for kind in "uv" if kind not in counts]
    ones = f" ({' = '.join([*absent, '1'])})" if absent else ""
    return f"{name}r = {config.r}; {len(modules)} modules use {factors}{ones}."
