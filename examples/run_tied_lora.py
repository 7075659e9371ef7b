r"""Fine-tune a saved or published model with Tied-LoRA, beside LoRA and VeRA if you like; compare them in one table.

    python examples/run_tied_lora.py --task classification --model_name_or_path runs/base --train_file train.tsv \
        --validation_file dev.tsv --test_file test.tsv --r 32 --variant TL6 --compare lora,vera,TL5 --seeds 0 1 2 \
        --learning_rates lora=2e-3,tied=4e-3 --max_steps 800 --output_dir runs/sst2
    python examples/run_tied_lora.py --task clm --model_name_or_path gpt2 --train_file train.txt \
        --validation_file valid.txt --output_dir runs/text
    python examples/run_tied_lora.py --task translation --model_name_or_path Helsinki-NLP/opus-mt-en-de \
        --train_source_file train.en --train_target_file train.de --test_source_file test.en \
        --test_target_file test.de --compare lora --output_dir runs/en-de

All methods of one seed start from the same weights (those of a new classifier included) and see the same batches in
the same order. A finished run is kept in its folder and not trained again, and one that was stopped goes on from its
last checkpoint: the same command continues after a stop, also with --resume_from_checkpoint last, or adds seeds and
methods. Written: a folder with the adapter
and `result.json` for each run, and over all of them `report.json`. On a CPU with bfloat16 add --use_cpu --bf16.
"""

import copy
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from peft import get_peft_model
from rich.console import Console
from tied_lora_methods import (
    AdapterArguments,
    Method,
    adapted_modules,
    compared,
    learning_rates,
    make_methods,
    tied_config,
)
from tied_lora_report import results_table, summary_of
from tied_lora_tasks import TASKS, Task
from tied_lora_training import RecordedTrainer, Recorder
from transformers import AutoConfig, AutoTokenizer, Seq2SeqTrainingArguments, set_seed

from hf_tying import TyingCallback, TyingError
from hf_tying.parallel import last_complete_checkpoint
from hf_tying.training import set_accepts_loss_kwargs, train_from
from hf_tying.training.command_line import ScriptParser, naming
from hf_tying.training.results_file import RESULT, begin_run, finished_run, write_json
from hf_tying.training.resuming import go_on_by_oneself

#: What differs from the defaults of `Seq2SeqTrainingArguments`; each is still a flag.
TRAINING_DEFAULTS = {
    "output_dir": "runs/tied_lora",
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "length",
    "label_names": ["labels"],
    "learning_rate": 2e-3,
    "save_total_limit": 1,
    "report_to": "none",
}
# What differs between the runs of one experiment, or changes no result.
_NO_SETTINGS = ("compare", "seeds", "seed", "learning_rate", "learning_rates", "vera_r", "output_dir", "run_name")
_NO_SETTINGS += ("disable_tqdm", "log_level", "report_to", "logging_steps", "save_steps", "save_total_limit")
_NO_SETTINGS += ("resume_from_checkpoint",)


@dataclass
class ExperimentArguments:
    task: str = field(metadata={"help": "What to train for.", "choices": list(TASKS)})
    model_name_or_path: str = field(metadata={"help": "A saved model, or its id on the Hub."})
    train_file: str | None = field(
        default=None, metadata={"help": "classification: .tsv, .csv or .json with sentence and label; clm: text."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "To be measured on, of the same form."})
    test_file: str | None = field(default=None, metadata={"help": "To be measured on in place of that."})
    train_source_file: str | None = field(default=None, metadata={"help": "translation: a sentence per line: a.en"})
    train_target_file: str | None = field(default=None, metadata={"help": "and its translation, line by line: a.de."})
    validation_source_file: str | None = field(default=None, metadata={"help": "Likewise."})
    validation_target_file: str | None = field(default=None, metadata={"help": "Its translation."})
    test_source_file: str | None = field(default=None, metadata={"help": "Likewise."})
    test_target_file: str | None = field(default=None, metadata={"help": "Its translation."})
    source_lang: str | None = field(default=None, metadata={"help": "Source language; default: the file's suffix."})
    target_lang: str | None = field(default=None, metadata={"help": "Target language; default: the file's suffix."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a sentence at most; of a block of text."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Take only the first ones."})
    compare: str = field(default="", metadata={"help": "Methods to train beside it: some of lora,vera,TL5,TL6."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of start values, order and dropout."})
    learning_rates: list[str] = field(
        default_factory=list,
        metadata={"help": "In place of --learning_rate: lora=2e-3,tied=4e-3. A variant may be named too: TL5=1e-2."},
    )
    vera_r: int | None = field(default=None, metadata={"help": "VeRA's rank, if it is not --r."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto, float32, bfloat16 or float16."})

    def __post_init__(self):
        if len(set(self.seeds)) < max(1, len(self.seeds)):
            raise TyingError(f"--seeds is {self.seeds}: expected at least one, and each once.")


def run(arguments, training, task: Task, method: Method, seed: int, settings: dict, folder: Path) -> dict:
    """Train one adapter and measure it; the folder is complete when it has `result.json`."""
    training = copy.copy(training)
    training.output_dir, training.seed, training.learning_rate = str(folder), seed, method.learning_rate
    where = {"revision": arguments.model_revision, "dtype": arguments.dtype}
    set_seed(seed)
    with naming(f"--model_name_or_path {arguments.model_name_or_path}"):
        model = task.auto_class.from_pretrained(arguments.model_name_or_path, **where, **task.model_arguments)
    task.prepare(model)
    set_seed(seed)
    model = get_peft_model(model, copy.deepcopy(method.config))
    recorder = Recorder()
    trainer = RecordedTrainer(
        model=set_accepts_loss_kwargs(model),
        args=training,
        train_dataset=task.data["train"],
        eval_dataset=task.data.get("validation"),
        processing_class=task.tokenizer,
        data_collator=task.collator(model.get_base_model()),
        recorder=recorder,
        callbacks=[TyingCallback()],
        **task.trainer_arguments,
    )
    on_gpu = training.device.type == "cuda"
    saved = trainer.saved_bytes()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin_run(folder, settings)
    train_from(trainer, last_complete_checkpoint(folder))
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    trainer.save_model()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = [parameter for name, parameter in trained.items() if ".modules_to_save." in name]
    in_file = (folder / "adapter_model.safetensors").stat().st_size
    return {
        "method": method.name,
        "seed": seed,
        "learning_rate": method.learning_rate,
        "updates": trainer.state.global_step,
        "scores": task.score(trainer, folder),
        "parameters": sum(parameter.numel() for parameter in trained.values()) - sum(p.numel() for p in head),
        "head_parameters": sum(parameter.numel() for parameter in head),
        "adapter_bytes": in_file - sum(parameter.numel() * parameter.element_size() for parameter in head),
        "step_seconds": median(recorder.seconds) if recorder.seconds else float("nan"),
        "memory_kind": "peak" if on_gpu else "saved",
        "memory_bytes": peak if on_gpu else saved,
        "saved_bytes": saved,
        "last_batch": recorder.last_batch,
        "history": trainer.state.log_history,
    }


def settings_of(arguments, training, task: Task, method: Method) -> dict:
    """All that a result depends on, as plain JSON values; the text itself stands for its files."""
    values = training.to_dict() | dataclasses.asdict(arguments)
    values = {name: value for name, value in values.items() if name not in _NO_SETTINGS and not name.endswith("_file")}
    values |= {"data": task.fingerprint, "learning_rate": method.learning_rate, "adapter": method.config.to_dict()}
    return json.loads(
        json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def main():
    parser = ScriptParser((ExperimentArguments, AdapterArguments, Seq2SeqTrainingArguments), description=__doc__)
    parser.set_defaults(**TRAINING_DEFAULTS)
    arguments, adapter, training = parser.parse()
    if training.world_size > 1:
        raise TyingError(f"Started as {training.world_size} processes: expected one, the runs are one after another.")

    # What costs nothing first, so that a wrong flag is said now.
    go_on_by_oneself(training.resume_from_checkpoint, training.output_dir)
    kind = TASKS[arguments.task]
    config = tied_config(adapter, kind.task_type)
    names = compared(arguments.compare, config)
    rates = learning_rates(arguments.learning_rates, training.learning_rate, names)
    where = {"revision": arguments.model_revision}
    with naming(f"--model_name_or_path {arguments.model_name_or_path}"):
        model_config = AutoConfig.from_pretrained(arguments.model_name_or_path, **where)
        modules = adapted_modules(lambda: kind.auto_class.from_config(model_config), config)
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or arguments.model_name_or_path, **where)
    methods = make_methods(names, arguments, adapter, config, modules, rates)
    task = kind(arguments, tokenizer)
    of_lora = config.r * sum(map(sum, modules.values()))

    root = Path(training.output_dir)
    plan = {(m.name, seed): (m, root / f"{m.name}-seed{seed}") for seed in arguments.seeds for m in methods}
    settings = {m.name: settings_of(arguments, training, task, m) for m in methods}
    done = {key: finished_run(folder, settings[key[0]]) for key, (_, folder) in plan.items()}
    console = Console(soft_wrap=True)
    for key, (method, folder) in plan.items():
        console.print(f"{'Kept ' if done[key] else 'Train'}  {folder}")
        if not done[key]:
            result = run(arguments, training, task, method, key[1], settings[method.name], folder)
            done[key] = result | {"of_lora": result["parameters"] / of_lora, "settings": settings[method.name]}
            write_json(done[key], folder / RESULT)

    results = list(done.values())
    for seed in arguments.seeds:
        if len({(result["updates"], result["last_batch"]) for result in results if result["seed"] == seed}) > 1:
            raise TyingError(f"The runs of seed {seed} saw different batches, so they cannot be compared.")
    rows = summary_of(results, task.metrics)
    write_json(
        {"task": arguments.task, "model": arguments.model_name_or_path, "scored_on": task.scored, "methods": rows}
        | {"r": config.r, "lora_parameters": of_lora, "adapted_modules": modules, "results": results},
        root / "report.json",
    )
    title = f"{arguments.task} on the {task.scored} data, r = {config.r}, seeds {', '.join(map(str, arguments.seeds))}"
    Console(width=max(console.width, 150)).print(results_table(rows, title))
    console.print(f"Written {root}: report.json, a folder for each run")


if __name__ == "__main__":
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
