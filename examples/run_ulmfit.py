r"""Classify texts by ULMFiT (Howard & Ruder 2018): a tied language model, tuned to your texts, becomes the classifier.

    python examples/run_ulmfit.py --pretrain_file WIKI.txt --train_file T.csv --validation_file V.csv \
        --test_file W.csv --text_column text --label_column label --output_dir OUT

Three stages, each in a folder that `from_pretrained` opens: OUT/lm (a language model of WIKI.txt), OUT/lm_tuned (the
same, tuned to the texts of T.csv, with their words) and OUT/classifier. The figures of each split are in
OUT/results.json, pictures beside it. The same command after a stop goes on where it was; a finished stage is not
repeated. The default sizes are small, for a CPU; the paper's are --embedding_size 400 --hidden_size 1150
--num_layers 3 --vocab_size 30000.

    (the same) --bidirectional --label_smoothing 0.1 --self_distillation 1
    (the same) --unlabeled_file U.csv --pseudo_labels 0.95          (texts without a label, in the same column)
    (the same) --label_separator ";"                                (texts of several classes)
    (the same) --chunk 256 --overlap 64                             (long documents in overlapping pieces)
    (the same without --pretrain_file) --pretrained_lm OTHER/lm     (the first stage of another run)
    (the same) --no_pretrain --no_lm_tuning                         (from scratch; each --no_... takes a part away)
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging
from ulmfit_classifier import ClassifierStage, train_rounds
from ulmfit_data import read_data
from ulmfit_language_model import pretrain, tune
from ulmfit_report import report

from hf_tying import TyingError
from hf_tying.training import ScriptParser
from hf_tying.training.resuming import go_on_by_oneself


@dataclass
class DataArguments:
    _argument_group_name = "texts"

    train_file: str = field(metadata={"help": "Training texts with labels: .csv, .tsv, .json or .jsonl."})
    output_dir: str = field(metadata={"help": "Where the three models, the figures and the pictures go."})
    pretrain_file: str | None = field(
        default=None, metadata={"help": "Text of the language model, a document on each line; not of the task."}
    )
    pretrained_lm: str | None = field(
        default=None, metadata={"help": "In place of --pretrain_file: the folder of a first stage, such as OUT/lm."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Texts for the temperature. Default: a tenth of the training texts."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Texts for the last figures. Default: none."})
    unlabeled_file: str | None = field(
        default=None, metadata={"help": "Texts without labels, which tune the language model too."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    label_separator: str | None = field(
        default=None, metadata={"help": "What stands between the labels of a text of several classes, such as ;."}
    )
    lowercase: bool = field(default=False, metadata={"help": "Make all letters small."})
    vocab_size: int = field(default=10_000, metadata={"help": "Most words that are taken from each text."})
    min_frequency: int = field(default=2, metadata={"help": "How often a word occurs, at least."})
    chunk: int = field(default=0, metadata={"help": "Words of a piece of a long text. 0: texts are read whole."})
    overlap: int = field(default=64, metadata={"help": "Words that two neighbouring pieces share."})
    chunk_pooling: str = field(
        default="mean",
        metadata={"help": "What a text has of its pieces' predictions.", "choices": ["mean", "max"]},
    )

    def __post_init__(self) -> None:
        if self.chunk < 0 or (self.chunk and not 0 <= self.overlap < self.chunk):
            raise TyingError(f"--chunk {self.chunk} --overlap {self.overlap}: expected fewer words shared than read.")


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    embedding_size: int = field(default=128, metadata={"help": "Width of the embedding and the last layer."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the layers before it."})
    num_layers: int = field(default=2, metadata={"help": "Number of layers."})
    dropout: float = field(default=0.3, metadata={"help": "Factor of AWD-LSTM's dropout rates."})
    gradient_length: int = field(default=1400, metadata={"help": "Last words of a text that gradients flow through."})
    bidirectional: bool = field(
        default=False, metadata={"help": "Train a second model on reversed texts, and average the predictions."}
    )
    no_tying: bool = field(default=False, metadata={"help": "A softmax of its own for the language model."})
    no_concat_pooling: bool = field(default=False, metadata={"help": "The last output, without maximum and mean."})


@dataclass
class StageArguments:
    _argument_group_name = "stages"

    pretrain_epochs: float = field(default=2, metadata={"help": "Epochs of the first stage."})
    tune_epochs: float = field(default=8, metadata={"help": "Epochs of the second stage."})
    epochs: float = field(default=12, metadata={"help": "Epochs of the third stage."})
    pretrain_learning_rate: float = field(default=4e-3, metadata={"help": "Highest rate of the first stage."})
    tune_learning_rate: float = field(default=4e-3, metadata={"help": "Highest rate of the second stage."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Highest rate of the third stage."})
    lm_batch_size: int = field(default=32, metadata={"help": "Columns of text, as far as the text is long enough."})
    bptt: int = field(default=70, metadata={"help": "Words that a language model reads at once."})
    batch_size: int = field(default=32, metadata={"help": "Texts of an update of the classifier."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of matrices."})
    save_steps: int = field(default=500, metadata={"help": "Updates between two checkpoints of a stage."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Share of each label given to all classes."})
    self_distillation: int = field(
        default=0, metadata={"help": "How often the classifier is trained again by its own predictions."}
    )
    pseudo_labels: float | None = field(
        default=None,
        metadata={"help": "Train again with the texts of --unlabeled_file whose label has this probability."},
    )
    seed: int = field(default=0, metadata={"help": "Of initial values, dropout and order."})
    use_cpu: bool = field(default=False, metadata={"help": "Not the GPU, if there is one."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "last: go on in output_dir, which is done without this flag too."}
    )
    no_pretrain: bool = field(default=False, metadata={"help": "No first stage: OUT/lm is not trained."})
    no_lm_tuning: bool = field(default=False, metadata={"help": "No second stage: OUT/lm_tuned has new words only."})
    no_slanted_triangular: bool = field(default=False, metadata={"help": "Constant learning rates."})
    no_discriminative_rates: bool = field(default=False, metadata={"help": "One learning rate for all layers."})
    no_gradual_unfreezing: bool = field(default=False, metadata={"help": "Train all layers from the beginning."})
    no_calibration: bool = field(default=False, metadata={"help": "Leave the probabilities as they are."})

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise TyingError(f"--label_smoothing {self.label_smoothing}: expected a share in [0, 1).")
        for name in ("pretrain_epochs", "tune_epochs", "epochs", "batch_size", "lm_batch_size", "bptt", "save_steps"):
            if getattr(self, name) <= 0:
                raise TyingError(f"--{name} {getattr(self, name)}: expected more than 0.")


def main() -> None:
    """Do what the command line says."""
    classes = (DataArguments, ModelArguments, StageArguments)
    data_args, model_args, stage_args = ScriptParser(classes, description=__doc__).parse()
    sources = bool(data_args.pretrain_file) + bool(data_args.pretrained_lm)
    if sources > 1 or not (sources or stage_args.no_pretrain):
        raise TyingError("Expected --pretrain_file or --pretrained_lm, or --no_pretrain to have no first stage.")
    if stage_args.pseudo_labels is not None and data_args.unlabeled_file is None:
        raise TyingError("--pseudo_labels needs texts without labels: give --unlabeled_file.")
    if (size := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise TyingError(f"Started as {size} processes: expected one, the stages are one after another.")
    go_on_by_oneself(stage_args.resume_from_checkpoint, data_args.output_dir)
    stage_args.resume_from_checkpoint = None  # it changes no result
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = read_data(data_args, stage_args.seed)  # what is wrong with it is said before any work
    output = Path(data_args.output_dir)
    predictions = {}
    for direction in ["forward", "backward"][: 1 + model_args.bidirectional]:
        suffix = "" if direction == "forward" else "_backward"
        lm = pretrain(output / f"lm{suffix}", data, data_args, model_args, stage_args, bool(suffix))
        tuned = tune(output / f"lm_tuned{suffix}", lm, data, data_args, stage_args, bool(suffix))
        stage = ClassifierStage(tuned, data, data_args, model_args, stage_args)
        predictions[direction] = train_rounds(output / f"classifier{suffix}", stage)
    report(output, data, predictions, {**vars(data_args), **vars(model_args), **vars(stage_args)})


if __name__ == "__main__":
    try:
        main()
    except (TyingError, OSError) as error:  # also an output that cannot be written
        sys.exit(f"error: {error}")
