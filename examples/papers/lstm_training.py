"""What the scripts of the LSTM papers have in common: reading a folder, training by a recipe, the results."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.utils import logging

from hf_tying import TyingCallback, use_tied_loss
from hf_tying.config import TyingError
from hf_tying.data.words import ContiguousText, encode_words, train_word_level
from hf_tying.models import TiedLSTMForCausalLM
from hf_tying.training.carried_state import CarriedStateArguments, CarriedStateTrainer
from hf_tying.training.results_file import write_json
from hf_tying.training.resuming import resume_path, save_whole_model, train_from, vocabulary_as_saved

FIGURES = ("parameters", "train_perplexity", "valid_perplexity", "test_perplexity")


@dataclass
class LSTMArguments:
    """The flags of all these scripts."""

    data_dir: str = field(metadata={"help": "Folder with train.txt, valid.txt and test.txt: a sentence on a line."})
    output_dir: str = field(metadata={"help": "Where model, checkpoints and results.json go."})
    epochs: int | None = field(default=None, metadata={"help": "Fewer than the paper's; the rates stay as they are."})
    seed: int = field(default=0, metadata={"help": "Of initial values and dropout."})
    loss: str = field(
        default="tied",
        metadata={
            "help": "tied computes the loss by blocks, in less time; stock whole.",
            "choices": ["tied", "stock"],
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Go on from this checkpoint; last: the newest complete one in output_dir."}
    )
    resume: bool = field(default=False, metadata={"help": "The same as --resume_from_checkpoint last."})
    save_steps: int | None = field(default=None, metadata={"help": "A checkpoint after so many updates, not epochs."})
    log_roles: bool = field(default=False, metadata={"help": "Log the gradient of the tied matrix by role."})
    use_cpu: bool = field(default=False, metadata={"help": "Not the GPU, if there is one."})


class Text:
    """A folder's three texts in ids, and their tokenizer."""

    def __init__(self, folder: str):
        files = {name: Path(folder, f"{name}.txt") for name in ("train", "valid", "test")}
        self.tokenizer = train_word_level(files["train"], others=(files["valid"], files["test"]))
        self.ids = {name: encode_words(file, self.tokenizer) for name, file in files.items()}
        if len(self.tokenizer) < 2 or len(self.ids["train"]) < 3:
            raise TyingError(f"{files['train']} has {len(self.ids['train']) - 1} word: there is nothing to learn.")


def train_and_report(
    arguments: LSTMArguments, make_config, recipe: dict, published: dict, objective=None, cascade=None, **facts
):
    """Train a model by a recipe, evaluate it, write `results.json`, print the published row beside it.

    Args:
        make_config: from the keywords that depend on the text (sizes and ids) to a `TiedLSTMConfig`.
        recipe: of `hf_tying.training.recipes`, with `time_steps`.
        published: figures of the paper, by the names in `FIGURES`.
        objective: of `use_tied_loss`, such as the augmented loss.
        cascade: of `TyingCallback`: train the classifier first.
        facts: what else is written to the results, such as the variant's name.
    """
    logging.set_verbosity_error()
    start, recipe = time.time(), dict(recipe)
    text, output = Text(arguments.data_dir), Path(arguments.output_dir)
    time_steps, batch_size = recipe.pop("time_steps"), recipe["per_device_train_batch_size"]
    train = ContiguousText(text.ids["train"], batch_size, time_steps)
    if arguments.epochs is not None:
        recipe["num_train_epochs"] = arguments.epochs
    steps = {"save_strategy": "steps", "save_steps": arguments.save_steps} if arguments.save_steps else {}
    args = CarriedStateArguments(
        **recipe | {"output_dir": str(output), "seed": arguments.seed, "use_cpu": arguments.use_cpu},
        resume_from_checkpoint=arguments.resume_from_checkpoint or arguments.resume,
        **{"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1, "report_to": "none"} | steps,
        logging_strategy="epoch",
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available() and not arguments.use_cpu,
    )
    if (checkpoint := resume_path(args)) is not None:
        vocabulary_as_saved(text.tokenizer, checkpoint)
    set_seed(arguments.seed)
    model = TiedLSTMForCausalLM(make_config(vocab_size=len(text.tokenizer), eos_token_id=text.tokenizer.eos_token_id))
    if objective is not None:
        use_tied_loss(model, objective=objective)
    elif arguments.loss == "tied":
        use_tied_loss(model)
    trainer = CarriedStateTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=text.ids["valid"],
        processing_class=text.tokenizer,
        callbacks=[TyingCallback(log_roles=arguments.log_roles, cascade=cascade)],
    )
    train_from(trainer, checkpoint)
    save_whole_model(trainer)
    history = [log for log in trainer.state.log_history if "train_perplexity" in log]
    scores = {name: trainer.evaluate(text.ids[name])["eval_perplexity"] for name in ("valid", "test")}
    results = facts | {
        "parameters": model.num_parameters(),
        "train_perplexity": history[-1]["train_perplexity"] if history else None,
        "valid_perplexity": scores["valid"],
        "test_perplexity": scores["test"],
        "tokens_per_second": _speed(history),
        "vocabulary": len(text.tokenizer),
        "words": {name: len(ids) for name, ids in text.ids.items()},
        "epochs": args.num_train_epochs,
        "seed": arguments.seed,
        "minutes": (time.time() - start) / 60,
        "published": published,
        "epoch_perplexities": [
            {key: log[key] for key in ("epoch", "train_perplexity", "eval_perplexity", "loss") if key in log}
            for log in trainer.state.log_history
            if "train_perplexity" in log or "eval_perplexity" in log
        ],
    }
    if trainer.is_world_process_zero():
        write_json(results, output / "results.json")
        print_table(results, output)
    return results


def _speed(history: list[dict]) -> float | None:
    """Words by seconds over all epochs."""
    words = sum(log["tokens_per_second"] * log["epoch_seconds"] for log in history)
    return words / sum(log["epoch_seconds"] for log in history) if history else None


def print_table(results: dict, output: Path) -> None:
    """Measured, and published."""
    table = Table(title=f"{results['variant']}, {results['epochs']:g} epochs, seed {results['seed']}")
    for column in ("", "parameters", "train", "valid", "test", "words/s", "minutes"):
        table.add_column(column, justify="right" if column else "left")
    row = [f"{results[name]:,.2f}" if results[name] is not None else "-" for name in FIGURES[1:]]
    speed = f"{results['tokens_per_second']:,.0f}" if results["tokens_per_second"] else "-"
    table.add_row("here", f"{results['parameters']:,}", *row, speed, f"{results['minutes']:.1f}")
    published = [str(results["published"].get(name, "")) for name in FIGURES]
    table.add_row("published", *published, "", "")
    Console().print(table)
    Console(soft_wrap=True).print(f"Written {output}: the model and results.json")


def run(main) -> None:
    """`main()`, with its refusals as one line."""
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
