"""Inan et al. 2016, table 3: the augmented loss (AL) and the reused embedding (RE) of variational LSTMs.

    python examples/papers/inan.py --data_dir DIR --size small --variant real --output_dir runs/real
    python examples/papers/inan.py --data_dir DIR --size small --variant base --epochs 1 --output_dir runs/quick

DIR has train.txt, valid.txt and test.txt, as for `press_wolf.py`. `base` is the LSTM with variational dropout; `al`
adds the augmented loss; `re` makes the softmax matrix the embedding, without a bias (section 4); `real` does both. The
theory behind it is checked by `inan_theory.py`.

What the text at hand does not tell is taken from a third party's implementation: the decay of the learning rate, and
the dropout rates, which that one gives as 0.7, 0.5 and 0.35 (Penn Treebank) and 0.8, 0.6 and 0.6 (WikiText-2) for
small, medium and large. They are read as shares to keep. `alpha` is `gamma * tau`, with tau = 20 and gamma from 0.5 to
0.8 on the Penn Treebank, from 1.0 to 1.5 on WikiText-2. The number of epochs is this project's choice.
"""

from dataclasses import dataclass, field

from lstm_training import FIGURES, LSTMArguments, run, train_and_report

from hf_tying.models import TiedLSTMConfig
from hf_tying.objectives.objective import AugmentedObjective
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.recipes import RECIPES

#: Validation and test perplexity on the Penn Treebank, and on WikiText-2 where there are figures.
PUBLISHED = {
    "small": {"base": (92.6, 87.3), "al": (86.3, 82.9), "re": (89.9, 85.1), "real": (86.3, 82.7)},
    "medium": {"base": (82.0, 77.7), "al": (77.4, 74.7), "re": (77.1, 73.9), "real": (75.7, 73.2)},
    "large": {"base": (76.8, 72.6), "al": (74.5, 71.2), "re": (72.5, 69.0), "real": (71.1, 68.5)},
}
PUBLISHED_WIKITEXT_2 = {
    "small": {"base": (112.2, 105.9), "al": (110.3, 103.8), "re": (106.1, 100.5), "real": (105.6, 98.9)},
    "medium": {"base": (100.2, 95.3), "al": (98.8, 93.1), "re": (92.3, 87.7), "real": (91.5, 87.0)},
}


@dataclass
class Arguments(LSTMArguments):
    size: str = field(default="small", metadata={"help": "Of the table.", "choices": [*PUBLISHED]})
    variant: str = field(default="real", metadata={"help": "A column of it.", "choices": [*PUBLISHED["small"]]})
    temperature: float = field(default=20.0, metadata={"help": "tau of the augmented loss."})
    gamma: float = field(default=0.65, metadata={"help": "Its weight is gamma * tau."})
    detach_target: bool = field(default=False, metadata={"help": "No gradient through the target distribution."})
    dropout: float | None = field(default=None, metadata={"help": "Default 0.3 (small), 0.5, 0.65 (large)."})


def main():
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    reused = arguments.variant in ("re", "real")
    rates = {} if arguments.dropout is None else dict.fromkeys(_RATES, arguments.dropout)

    def make_config(**of_the_text) -> TiedLSTMConfig:
        changes = {"tie_word_embeddings": reused, "output_bias": not reused} | rates | of_the_text
        return TiedLSTMConfig.named(f"inan_{arguments.size}", **changes)

    objective = None
    if arguments.variant in ("al", "real"):
        objective = AugmentedObjective(
            temperature=arguments.temperature, gamma=arguments.gamma, detach_target=arguments.detach_target
        )
    figures = PUBLISHED[arguments.size][arguments.variant]
    wikitext = PUBLISHED_WIKITEXT_2.get(arguments.size, {}).get(arguments.variant)
    published = dict(zip(FIGURES[2:], figures, strict=True)) | {"wikitext-2 (valid, test)": wikitext}
    variant = f"{arguments.size} {arguments.variant}"
    train_and_report(
        arguments, make_config, RECIPES[f"inan_{arguments.size}"], published, objective=objective, variant=variant
    )


_RATES = ("input_dropout", "hidden_dropout", "output_dropout")

if __name__ == "__main__":
    run(main)
