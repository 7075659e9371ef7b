r"""Does one matrix do the work of three? The experiment of Press & Wolf (2016) on translation, three-way weight tying.

The same Transformer is trained on the same sentence pairs, in the same order and for the same number of updates, with
its source embedding, target embedding and softmax apart (`none`), the last two as one matrix (`two_way`), and all of
them as one (`three_way`). Files that end in .en and .de tell their languages:

    python examples/papers/three_way.py --train_source_file train.en --train_target_file train.de \
        --validation_source_file val.en --validation_target_file val.de \
        --test_source_file test.en --test_target_file test.de --seeds 0 1 --output_dir runs/three_way

On a CPU with bfloat16 add --use_cpu --bf16. A finished run is kept in its folder and not trained again, and one that
was stopped goes on from its last checkpoint, so that the same command goes on after a stop, also with
--resume_from_checkpoint last, or adds seeds. Written: a folder with model, translations and `result.json` for each
run, and over all of them `report.json` and `three_way.png`.

The paper's model has 168 M parameters untied and 80 M tied, so one embedding is 1.22 times all the rest. The default
sizes have that ratio: 15,000 x 256 in each embedding, 3.17 M in the rest.
"""

import copy
import dataclasses
import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from sacrebleu.metrics import BLEU
from three_way_report import paired_tests, plot, results_table, role_shares
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import ExportableState

from hf_tying import TyingCallback, TyingError, tie
from hf_tying.config import SCHEMES
from hf_tying.data import train_joint_tokenizer
from hf_tying.data.parallel import encode_parallel, read_parallel_text
from hf_tying.metrics import Bleu, ChrF, generated_text
from hf_tying.parallel import last_complete_checkpoint
from hf_tying.training import set_accepts_loss_kwargs, train_from
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.results_file import RESULT, begin_run, finished_run, write_json
from hf_tying.training.resuming import go_on_by_oneself
from hf_tying.training.seeded_order import SeededOrder
from hf_tying.training.translation import check_fit, translation_collator, translation_config

#: What differs from the defaults of `Seq2SeqTrainingArguments`; each is still a flag.
TRAINING_DEFAULTS = {
    "output_dir": "runs/three_way",
    "max_steps": 3600,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "length",
    "learning_rate": 7e-4,
    "warmup_steps": 500,
    "adam_beta2": 0.98,
    "logging_steps": 50,
    "eval_strategy": "steps",
    "eval_steps": 600,
    "save_steps": 600,
    "save_total_limit": 1,
    "predict_with_generate": True,
    "generation_num_beams": 5,
}
# Arguments that differ between runs of one experiment, or change no result.
_NO_SETTINGS = ("schemes", "seeds", "seed", "output_dir", "run_name", "disable_tqdm", "log_level", "report_to")
_NO_SETTINGS += ("resume_from_checkpoint", "save_strategy", "save_steps", "save_total_limit")


@dataclass
class ExperimentArguments:
    train_source_file: str = field(metadata={"help": "Text to train on, a sentence per line: a.en"})
    train_target_file: str = field(metadata={"help": "and its translation, line by line: a.de."})
    validation_source_file: str = field(metadata={"help": "Text for the validation loss, likewise."})
    validation_target_file: str = field(metadata={"help": "Its translation."})
    test_source_file: str = field(metadata={"help": "Text for BLEU and chrF, likewise."})
    test_target_file: str = field(metadata={"help": "Its translation."})
    schemes: list[str] = field(
        default_factory=lambda: ["none", "two_way", "three_way"],
        metadata={"help": "What to tie. With none and three_way the two are also compared by a paired test."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of start values, order and dropout."})
    source_lang: str | None = field(default=None, metadata={"help": "Source language; default: the file's suffix."})
    target_lang: str | None = field(default=None, metadata={"help": "Target language; default: the file's suffix."})
    vocab_size: int = field(default=15_000, metadata={"help": "Entries of the joint BPE over both sides."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a sentence at most, on both sides."})
    d_model: int = field(default=256, metadata={"help": "Width of the Transformer."})
    layers: int = field(default=3, metadata={"help": "Layers of the encoder, and of the decoder."})
    heads: int = field(default=4, metadata={"help": "Attention heads."})
    ffn_dim: int = field(default=256, metadata={"help": "Width of the feed-forward layers."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout."})
    attn_implementation: str = field(
        default="eager",
        metadata={"help": "How attention is computed: eager, or sdpa, one of the fused kernels of torch."},
    )
    bleu_tokenize: str = field(
        default="13a", metadata={"help": "sacrebleu's tokenization: 13a for plain text, none for tokenized text."}
    )

    def __post_init__(self):
        for scheme in self.schemes:
            if scheme not in SCHEMES:
                raise TyingError(f"--schemes has {scheme!r}: expected some of {', '.join(SCHEMES)}.")
        if self.bleu_tokenize not in BLEU.TOKENIZERS:
            raise TyingError(
                f"--bleu_tokenize is {self.bleu_tokenize!r}: expected one of {', '.join(BLEU.TOKENIZERS)}."
            )
        if min(self.d_model, self.heads) < 1 or self.d_model % self.heads or self.d_model % 2:
            raise TyingError(f"--d_model {self.d_model} must be even and a multiple of --heads {self.heads}.")
        for name in ("schemes", "seeds"):
            if len(set(getattr(self, name))) < max(1, len(getattr(self, name))):
                raise TyingError(f"--{name} is {getattr(self, name)}: expected at least one, and each once.")


def make_model(arguments: ExperimentArguments, scheme: str, seed: int, tokenizer) -> tuple[PreTrainedModel, int]:
    """A stock Marian model with equal start values for each scheme, and its number of parameters before the tie.

    All matrices start as N(0, 1/d). A word's vector is multiplied by sqrt(d) on its way in ("Attention Is All You
    Need", section 3.4), so its entries have variance 1 there, as positions nearly have; and the product with a
    normalised hidden state has variance 1 in the softmax. One matrix in both uses needs a scale that is right in both.
    """
    config = translation_config("marian", tokenizer)
    sides = {"layers": arguments.layers, "attention_heads": arguments.heads, "ffn_dim": arguments.ffn_dim}
    config.update({f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()})
    config.update(
        dict(
            d_model=arguments.d_model,
            max_position_embeddings=arguments.max_length,
            init_std=arguments.d_model**-0.5,
            scale_embedding=True,
            activation_function="relu",
            dropout=arguments.dropout,
            # Not the padding, as in the stock default: that row gets no gradient as an input.
            decoder_start_token_id=config.bos_token_id,
            tie_word_embeddings=False,
            tying={"version": 1, "scheme": "none"},
        )
    )
    set_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=arguments.attn_implementation)
    untied = count_trained(model)
    return tie(model, scheme, init_from="target"), untied


def count_trained(model) -> int:
    """Parameters that are trained, each once; the sinusoids of the positions are not."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Recorder(TrainerCallback, ExportableState):
    """Tokens per second of each update, and a digest of all batches in their order. They go with a checkpoint."""

    def __init__(self):
        self.digest, self.tokens, self.rates = "", 0, []

    def state(self):
        return {"args": {}, "attributes": {"digest": self.digest, "tokens": self.tokens, "rates": self.rates}}

    def on_train_begin(self, args, state, control, **kwargs):
        vars(self).update(state.stateful_callbacks["Recorder"]["attributes"])

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin, self._before = time.perf_counter(), self.tokens

    def on_step_end(self, args, state, control, **kwargs):
        self.rates.append((self.tokens - self._before) / (time.perf_counter() - self._begin))

    def see(self, inputs):
        self.tokens += int(inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum())
        batch = b"".join(inputs[name].cpu().numpy().tobytes() for name in ("input_ids", "labels"))
        self.digest = hashlib.sha256(self.digest.encode() + batch).hexdigest()


class RecordedTrainer(Seq2SeqTrainer):
    """Shows the recorder every training batch; has the same batches after a stop; translates in order."""

    def __init__(self, *args, recorder: Recorder, **kwargs):
        super().__init__(*args, **kwargs)
        self.recorder = recorder
        self.add_callback(recorder)

    def training_step(self, model, inputs, *args, **kwargs):
        self.recorder.see(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, *args, **kwargs):
        return SeededOrder(super()._get_train_sampler(*args, **kwargs), self)

    def _get_eval_sampler(self, eval_dataset):
        # By `group_by_length` the test sentences would be shuffled too, against their references.
        return SequentialSampler(eval_dataset)


def run(arguments, training, scheme: str, seed: int, tokenizer, corpora, settings, folder: Path) -> dict:
    """Train one model and measure it; the folder is complete when it has `result.json`."""
    model, untied = make_model(arguments, scheme, seed, tokenizer)
    check_fit(model, tokenizer, tokenizer, arguments.max_length, arguments.max_length)
    encoded = {}
    for split, corpus in corpora.items():
        data = encode_parallel(corpus, tokenizer, None, arguments.max_length, arguments.max_length)
        lengths = [len(source) + len(target) for source, target in zip(data["input_ids"], data["labels"], strict=True)]
        encoded[split] = data.add_column("length", lengths)
    training = copy.copy(training)
    training.output_dir, training.seed = str(folder), seed
    recorder = Recorder()
    trainer = RecordedTrainer(
        model=set_accepts_loss_kwargs(model),
        args=training,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=translation_collator(model, tokenizer),
        callbacks=[TyingCallback(log_roles=True)],
        recorder=recorder,
    )
    begin_run(folder, settings)
    train_from(trainer, last_complete_checkpoint(folder))
    trainer.save_model()
    history = trainer.state.log_history
    if not any("eval_loss" in log and log["step"] == trainer.state.global_step for log in history):
        trainer.evaluate()
    output = trainer.predict(encoded["test"], max_length=arguments.max_length)
    translations = [" ".join(text.split()) for text in generated_text(output.predictions, tokenizer)]
    (folder / "translations.txt").write_text("".join(f"{line}\n" for line in translations), encoding="utf-8")
    texts = dict(predictions=translations, references=corpora["test"].target, bootstrap=1000)
    bleu = Bleu(keep_in_memory=True).compute(**texts, tokenize=arguments.bleu_tokenize, force=True)
    chrf = ChrF(keep_in_memory=True).compute(**texts)
    keys = ("score", "mean", "confidence", "signature")
    return {
        "scheme": scheme,
        "seed": seed,
        "parameters": count_trained(model),
        "untied_parameters": untied,
        "share": count_trained(model) / untied,
        "updates": trainer.state.global_step,
        "tokens": recorder.tokens,
        # The upper quartile: whatever else the machine does can only slow an update down.
        "tokens_per_second": sorted(recorder.rates)[len(recorder.rates) * 3 // 4],
        "batches": recorder.digest[:16],
        "validation_loss": [log["eval_loss"] for log in history if "eval_loss" in log][-1],
        "bleu": {key: bleu[key] for key in keys} | {"brevity_penalty": bleu["bp"]},
        "chrf": {key: chrf[key] for key in keys},
        "role_shares": role_shares(history),
        "history": history,
        "settings": settings,
    }


def settings_of(arguments, training, corpora) -> dict:
    """All that a result depends on, as plain JSON values; the text itself stands for its files."""
    values = training.to_dict() | dataclasses.asdict(arguments)
    values = {name: value for name, value in values.items() if name not in _NO_SETTINGS and not name.endswith("_file")}
    values |= {split: corpus.fingerprint for split, corpus in corpora.items()}
    return json.loads(json.dumps(values, default=str))


def main():
    parser = ScriptParser((ExperimentArguments, Seq2SeqTrainingArguments), description=__doc__)
    parser.set_defaults(**TRAINING_DEFAULTS)
    arguments, training = parser.parse()
    files = {
        split: [getattr(arguments, f"{split}_{side}_file") for side in ("source", "target")]
        for split in ("train", "validation", "test")
    }
    if training.world_size > 1:
        raise TyingError(f"Started as {training.world_size} processes: expected one, the runs are one after another.")
    go_on_by_oneself(training.resume_from_checkpoint, training.output_dir)
    languages = arguments.source_lang, arguments.target_lang
    corpora = {split: read_parallel_text(*pair, *languages) for split, pair in files.items()}
    settings = settings_of(arguments, training, corpora)

    root = Path(training.output_dir)
    folders = {(s, seed): root / f"{s}-seed{seed}" for seed in arguments.seeds for s in arguments.schemes}
    done = {key: finished_run(folder, settings) for key, folder in folders.items()}
    languages = dict.fromkeys((corpora["train"].source_language, corpora["train"].target_language))
    tokenizer = train_joint_tokenizer(files["train"], arguments.vocab_size, list(languages))
    console = Console(soft_wrap=True)
    console.print(
        f"Text   {len(corpora['train']):,} pairs to train on, {len(corpora['test']):,} to test; "
        f"a joint vocabulary of {len(tokenizer):,} (asked for {arguments.vocab_size:,})"
    )
    for (scheme, seed), folder in folders.items():
        if done[scheme, seed]:
            console.print(f"Kept   {folder}")
            continue
        console.print(f"Train  {folder}")
        done[scheme, seed] = run(arguments, training, scheme, seed, tokenizer, corpora, settings, folder)
        write_json(done[scheme, seed], folder / RESULT)

    results = list(done.values())
    for seed in arguments.seeds:
        if len({result["batches"] for result in results if result["seed"] == seed}) > 1:
            raise TyingError(f"The runs of seed {seed} saw different batches, so they cannot be compared.")
    tests = paired_tests(results, folders, corpora["test"].target, arguments.bleu_tokenize)
    write_json({"results": results, "paired_bootstrap": tests, "vocabulary": len(tokenizer)}, root / "report.json")
    plot(results, root / "three_way.png")
    Console(width=max(console.width, 150)).print(results_table(results, tests))
    console.print(f"BLEU   {results[0]['bleu']['signature']}")
    console.print(f"chrF   {results[0]['chrf']['signature']}")
    console.print(f"Written {root}: report.json, three_way.png, a folder for each run")


if __name__ == "__main__":
    try:
        main()
    except TyingError as error:
        sys.exit(f"error: {error}")
