"""Merity et al. 2017: AWD-LSTM, the tied LSTM with weight drop and averaged SGD that ULMFiT fine-tunes.

    python examples/papers/awd_lstm.py --data_dir DIR --output_dir runs/awd
    python examples/papers/awd_lstm.py --data_dir DIR --epochs 2 --hidden_size 200 --output_dir runs/quick
    python examples/papers/awd_lstm.py --data_dir DIR --without weight_dropout averaging --output_dir runs/ablation

DIR has train.txt, valid.txt and test.txt, as for `press_wolf.py`. `--without` takes parts of it away, as in the
paper's table 4, and `tying` too. Two things are simpler than in the released code: every piece has 70 words, where
that one draws the length anew each time, and there is no second run of fine-tuning. The published run takes 750 epochs
of a GPU.
"""

from dataclasses import dataclass, field

from lstm_training import FIGURES, LSTMArguments, run, train_and_report

from hf_tying.config import TyingError
from hf_tying.models import TiedLSTMConfig
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.recipes import RECIPES

#: Validation and test perplexity on WikiText-2 (table 4); the whole model without fine-tuning is 69.1 and 66.0.
PUBLISHED = {
    (): (69.1, 66.0),
    ("averaging",): (73.3, 69.7),
    ("embedding_dropout",): (71.1, 68.1),
    ("weight_dropout",): (78.4, 74.9),
}
PARTS = ("averaging", "embedding_dropout", "weight_dropout", "activation_regularization", "tying")


@dataclass
class Arguments(LSTMArguments):
    without: list[str] = field(default_factory=list, metadata={"help": f"Some of {', '.join(PARTS)}."})
    embedding_size: int = field(default=400, metadata={"help": "Width of the embedding, and of the last layer."})
    hidden_size: int = field(default=1150, metadata={"help": "Width of the layers before it."})
    batch_size: int = field(default=80, metadata={"help": "80 for WikiText-2, 20 for the Penn Treebank."})
    learning_rate: float = field(default=30.0, metadata={"help": "Of plain SGD, for a loss by word."})


def main():
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    without = set(arguments.without)
    if without - {*PARTS}:
        raise TyingError(f"--without {' '.join(sorted(without - {*PARTS}))}: expected some of {', '.join(PARTS)}.")
    rates = dict.fromkeys(without & {"embedding_dropout", "weight_dropout", "activation_regularization"}, 0.0)
    if "activation_regularization" in without:
        rates["temporal_activation_regularization"] = 0.0
    recipe = RECIPES["awd"] | {
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
    }
    if "averaging" in without:
        recipe["average_after"] = None

    def make_config(**of_the_text) -> TiedLSTMConfig:
        sizes = {"embedding_size": arguments.embedding_size, "hidden_size": arguments.hidden_size}
        tied = "tying" not in without
        return TiedLSTMConfig.named("awd", tie_word_embeddings=tied, **sizes | rates | of_the_text)

    figures = PUBLISHED.get(tuple(sorted(without)), (None, None))
    published = {name: value for name, value in zip(FIGURES[2:], figures, strict=True) if value is not None}
    variant = " without ".join(["awd", *[", ".join(sorted(without))] * bool(without)])
    train_and_report(arguments, make_config, recipe, published, variant=variant)


if __name__ == "__main__":
    run(main)
