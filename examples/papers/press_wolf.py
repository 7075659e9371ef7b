"""Press & Wolf 2016, tables 5 and 6: weight tying (WT) and projection regularisation (PR) of Zaremba's LSTMs.

    python examples/papers/press_wolf.py --data_dir DIR --variant small+wt+pr --output_dir runs/small+wt+pr
    python examples/papers/press_wolf.py --data_dir DIR --variant small --epochs 1 --output_dir runs/quick

DIR has train.txt, valid.txt and test.txt: one sentence on a line, words split by spaces (the Penn Treebank of Mikolov
et al., WikiText-2, ...). On the Penn Treebank a small variant takes 13 epochs, about half an hour on two cores.
`OUT/results.json` has the figures, and the published ones for the Penn Treebank beside them: the tables are without
dropout for the small model (table 6) and with it for the large one (table 5).
"""

from dataclasses import dataclass, field

from lstm_training import LSTMArguments, run, train_and_report

from hf_tying.config import ProjectionConfig, TyingConfig
from hf_tying.models import TiedLSTMConfig
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.recipes import RECIPES

#: Parameters, and perplexity in training, on the validation and on the test set.
PUBLISHED = {
    "small": ("4.65M", 38.0, 120.7, 114.5),
    "small+wt": ("2.65M", 36.4, 117.5, 112.4),
    "small+pr": ("4.69M", 50.8, 116.0, 111.7),
    "small+wt+pr": ("2.69M", 53.5, 104.9, 100.9),
    "large": ("66M", 37.8, 82.2, 78.4),
    "large+wt": ("51M", 48.5, 77.7, 74.3),
}


@dataclass
class Arguments(LSTMArguments):
    variant: str = field(default="small+wt+pr", metadata={"help": "A row of the tables.", "choices": [*PUBLISHED]})
    pr_norm: str = field(
        default="fro_squared_half",
        metadata={
            "help": "The penalty of PR: half the square, as in the released code, or the norm, as in the text.",
            "choices": ["fro_squared_half", "fro"],
        },
    )
    pr_strength: float | None = field(default=None, metadata={"help": "Default 1 / 6.5 (code), 0.15 (text)."})
    pr_bias: bool = field(default=True, metadata={"help": "The projection has a bias, as in the released code."})


def main():
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    size, *additions = arguments.variant.split("+")
    tying = TyingConfig(
        scheme="two_way" if "wt" in additions else "none",
        projection=ProjectionConfig(arguments.pr_bias, arguments.pr_norm, arguments.pr_strength)
        if "pr" in additions
        else None,
    )

    def make_config(**of_the_text) -> TiedLSTMConfig:
        return TiedLSTMConfig.named(f"zaremba_{size}", tying=tying.to_dict(), **of_the_text)

    published = dict(
        zip(
            ("parameters", "train_perplexity", "valid_perplexity", "test_perplexity"),
            PUBLISHED[arguments.variant],
            strict=True,
        )
    )
    train_and_report(arguments, make_config, RECIPES[f"zaremba_{size}"], published, variant=arguments.variant)


if __name__ == "__main__":
    run(main)
