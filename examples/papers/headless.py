"""Headless language models (Godey et al. 2023): contrastive weight tying (CWT) beside cross entropy (CE).

    python examples/papers/headless.py --data_dir DIR --model causal --objective cwt --max_steps 2000 --output_dir runs/cwt
    python examples/papers/headless.py --data_dir DIR --model masked --objective ce --minutes 10 --output_dir runs/ce
    python examples/papers/headless.py --data_dir DIR --size tiny --max_steps 20 --recover_steps 5 --output_dir runs/quick

DIR has train.txt, valid.txt and test.txt: one sentence on a line. With --minutes both objectives are trained for the
same time, recovery of the head included: CWT has nine tenths of it, and a tenth is the recovery's. Perplexities are
those of the model after recovery, per token of a byte-level BPE of the training text; of a masked model they are
pseudo-perplexities: every token is predicted once, in seven passes of which each masks every seventh token.
With `--resume_from_checkpoint last` a run that was stopped goes on from its last checkpoint, in the training or in the
recovery; a masked model then has other masks than without the stop. `OUT/results.json` has the figures and the
published ones beside them, which are of far larger runs.
"""  # noqa: E501

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from headless_parts import TimeBudget, make_model, perplexity, read_blocks
from lstm_training import run
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_tying import TyingCallback, use_tied_loss
from hf_tying.config import TyingError
from hf_tying.objectives.objective import ContrastiveObjective
from hf_tying.parallel import last_complete_checkpoint
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.headless import HeadlessTrainer, recover_lm_head
from hf_tying.training.results_file import write_json
from hf_tying.training.resuming import go_on_by_oneself, save_whole_model, train_from

#: Tables 1 and 4: a BERT of 110M on 4.1B tokens (average of GLUE), a Pythia of 70M (validation perplexity as printed).
PUBLISHED = {
    ("causal", "ce"): {"parameters": "70M", "valid_perplexity": 3.143, "gpu_hours": 1712},
    ("causal", "cwt"): {"parameters": "70M", "valid_perplexity": 3.283, "gpu_hours": 1052},
    ("masked", "ce"): {"parameters": "110M", "glue_average": 82.43, "gpu_hours": 989},
    ("masked", "cwt"): {"parameters": "110M", "glue_average": 83.29, "gpu_hours": 444},
}
RECOVERY_SHARE = 0.1  # of --minutes


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "Folder with train.txt, valid.txt and test.txt: a sentence on a line."})
    output_dir: str = field(metadata={"help": "Where the model and results.json go."})
    model: str = field(default="causal", metadata={"help": "GPT-2 or BERT.", "choices": ["causal", "masked"]})
    objective: str = field(default="cwt", metadata={"help": "What is trained by.", "choices": ["ce", "cwt"]})
    size: str = field(
        default="small", metadata={"help": "See SIZES in headless_parts.", "choices": ["tiny", "small", "base"]}
    )
    max_steps: int | None = field(default=None, metadata={"help": "Updates by the objective. Default 2000."})
    recover_steps: int = field(default=200, metadata={"help": "Updates by cross entropy after those of cwt."})
    minutes: float | None = field(default=None, metadata={"help": "In place of both: the time of the training."})
    negatives: str = field(default="batch", metadata={"help": "Of cwt.", "choices": ["batch", "unique"]})
    loss: str = field(
        default="tied", metadata={"help": "How ce is computed: by blocks, or whole.", "choices": ["tied", "stock"]}
    )
    vocab_size: int = field(default=30000, metadata={"help": "Of the tokenizer, at most."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a sequence."})
    batch_size: int = field(default=32, metadata={"help": "Sequences in a step: CWT's negatives come from them."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Warmed up, then linearly down to 0."})
    recover_learning_rate: float = field(default=1e-4, metadata={"help": "The paper's."})
    seed: int = field(default=0, metadata={"help": "Of initial values, dropout, order and masks."})
    save_steps: int = field(default=500, metadata={"help": "Updates between two checkpoints; the last one is kept."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "last: go on from the newest complete checkpoint in output_dir."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Not the GPU, if there is one."})


def main():
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    if arguments.minutes is not None and (arguments.max_steps is not None or not arguments.minutes > 0):
        raise TyingError("Expected either --max_steps or --minutes, and minutes above 0.")
    go_on_by_oneself(arguments.resume_from_checkpoint, arguments.output_dir)
    logging.set_verbosity_error()
    set_seed(arguments.seed)
    start, output, masked = time.time(), Path(arguments.output_dir), arguments.model == "masked"
    tokenizer, blocks = read_blocks(arguments.data_dir, arguments.vocab_size, arguments.block_size, masked)
    model = make_model(arguments.model, arguments.size, tokenizer, arguments.block_size)
    parameters = model.num_parameters()
    common = {
        "train_dataset": blocks["train"],
        "data_collator": DataCollatorForLanguageModeling(tokenizer, mlm=True) if masked else None,
    }
    if arguments.objective == "cwt":
        args, checkpoint = training_arguments(arguments, recovery=False)
        options = {"objective": ContrastiveObjective(arguments.negatives), **common}
        trainer = HeadlessTrainer(model, args, callbacks=callbacks(arguments, 1 - RECOVERY_SHARE), **options)
        trained = train_from(trainer, checkpoint)
        was_trained = checkpoint is not None and Path(checkpoint).name.endswith(f"-{trained.global_step}")
        model = recover_lm_head(read_back(trainer, output, masked))
        args, checkpoint = training_arguments(arguments, recovery=True)
        trainer = Trainer(model, args, callbacks=callbacks(arguments, RECOVERY_SHARE), **common)
        recovered = 0
        if arguments.minutes is not None or arguments.recover_steps > 0:
            recovered = train_from(trainer, checkpoint if was_trained else None).global_step
    else:
        if arguments.loss == "tied":
            use_tied_loss(model)
        recovered = 0
        args, checkpoint = training_arguments(arguments, recovery=False)
        trainer = Trainer(model, args, callbacks=callbacks(arguments, 1.0), **common)
        trained = train_from(trainer, checkpoint)
    minutes = (time.time() - start) / 60
    save_whole_model(trainer, output)
    some = blocks["train"].select(range(min(len(blocks["train"]), max(len(blocks["valid"]), 1))))
    scores = {
        f"{name}_perplexity": perplexity(model, part, tokenizer, arguments.batch_size)
        for name, part in {"train": some, "valid": blocks["valid"], "test": blocks["test"]}.items()
    }
    results = {
        "model": arguments.model,
        "objective": arguments.objective,
        "size": arguments.size,
        "parameters": parameters,
        **scores,
        "tokens_per_second": trained.global_step * arguments.batch_size * arguments.block_size
        * PartialState().num_processes / trained.metrics["train_runtime"],
        "vocabulary": len(tokenizer),
        "tokens": {name: len(part) * arguments.block_size for name, part in blocks.items()},
        "steps": trained.global_step,
        "recover_steps": recovered,
        "seed": arguments.seed,
        "minutes": minutes,
        "published": {name: PUBLISHED[arguments.model, name] for name in ("ce", "cwt")},
    }  # fmt: skip
    if not trainer.is_world_process_zero():
        return  # it has evaluated too: of a model that is in parts, all processes have to
    tokenizer.save_pretrained(output)
    write_json(results, output / "results.json")
    console = Console(soft_wrap=True)
    console.print({key: value for key, value in results.items() if key != "published"})
    console.print(f"Written {output}: the model and results.json")


def read_back(trainer: Trainer, output: Path, masked: bool) -> PreTrainedModel:
    """The model of a run, which the next one can begin with: FSDP and ZeRO-3 leave each process a part of it."""
    save_whole_model(trainer, output)
    trainer.accelerator.wait_for_everyone()
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    return auto.from_pretrained(output).to(trainer.args.device)


def training_arguments(arguments: Arguments, recovery: bool) -> tuple[TrainingArguments, str | None]:
    """Those of the objective or of the recovery, and the checkpoint to go on from."""
    folder = Path(arguments.output_dir, "recovery" if recovery else "training")
    checkpoint = last_complete_checkpoint(folder) if arguments.resume_from_checkpoint else None
    steps = arguments.recover_steps if recovery else arguments.max_steps or 2000
    timed = arguments.minutes is not None  # then `TimeBudget` sets the rate
    args = TrainingArguments(
        str(folder),
        max_steps=10**9 if timed else steps,
        lr_scheduler_type="constant" if timed else "linear",
        warmup_steps=0 if timed else 0.2 if recovery else 0.05,
        learning_rate=arguments.recover_learning_rate if recovery else arguments.learning_rate,
        per_device_train_batch_size=arguments.batch_size,
        weight_decay=0.01,
        seed=arguments.seed,
        use_cpu=arguments.use_cpu,
        save_steps=arguments.save_steps,
        save_total_limit=1,
        report_to="none",
        logging_steps=50,
        disable_tqdm=not sys.stderr.isatty(),
    )
    return args, checkpoint


def callbacks(arguments: Arguments, share: float) -> list[TrainerCallback]:
    budget = [] if arguments.minutes is None else [TimeBudget(60 * arguments.minutes * share)]
    return [*budget, TyingCallback()]


if __name__ == "__main__":
    run(main)
