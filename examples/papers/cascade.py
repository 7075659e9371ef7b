"""Zhang et al. 2021, "Train your classifier first": upper layers are trained, frozen, and lower layers begin again.

    python examples/papers/cascade.py --data_dir DIR --output_dir runs/cascade

DIR has train.txt, valid.txt and test.txt, as for `press_wolf.py`. Two small tied LSTMs are trained for the same number
of steps: all layers to the end, and `TyingCallback(cascade=--stages)`. The rate is constant, so that the layers that
begin again can learn. In OUT are `plain`, `cascade` and `cascade.png`, the validation perplexity by epoch. The paper
trains AWD-LSTM on WikiText-2 to the end in each stage, for many more epochs.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from lstm_training import LSTMArguments, run, train_and_report

from hf_tying.config import TyingError
from hf_tying.models import TiedLSTMConfig
from hf_tying.parallel import last_complete_checkpoint
from hf_tying.training.command_line import ScriptParser
from hf_tying.training.recipes import RECIPES
from hf_tying.training.resuming import go_on_by_oneself


@dataclass
class Arguments(LSTMArguments):
    stages: int = field(
        default=3, metadata={"help": "Stages of equal length: the small LSTM has three layers of them."}
    )
    hidden_size: int = field(default=200, metadata={"help": "Width of both layers and of the embedding."})
    dropout: float = field(default=0.3, metadata={"help": "Rate of what comes into, between and out of the layers."})


def main():
    (arguments,) = ScriptParser((Arguments,), description=__doc__).parse()
    if (size := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise TyingError(f"Started as {size} processes: expected one, because layers are frozen on the way.")
    recipe = RECIPES["zaremba_small"] | {"decay": 1.0}

    def make_config(**of_the_text) -> TiedLSTMConfig:
        rates = {f"{place}_dropout": arguments.dropout for place in ("input", "hidden", "output")}
        sizes = {"embedding_size": arguments.hidden_size, "hidden_size": arguments.hidden_size}
        return TiedLSTMConfig.named("zaremba_small", **sizes | rates | of_the_text)

    curves, output = {}, Path(arguments.output_dir)
    asked = arguments.resume_from_checkpoint or arguments.resume
    go_on_by_oneself(asked, output)
    for variant, cascade in (("plain", None), ("cascade", arguments.stages)):
        folder = output / variant
        last = last_complete_checkpoint(folder) if asked else None
        flags = replace(arguments, output_dir=str(folder), resume_from_checkpoint=last, resume=False)
        results = train_and_report(flags, make_config, recipe, {}, cascade=cascade, variant=variant)
        measured = [log["eval_perplexity"] for log in results["epoch_perplexities"] if "eval_perplexity" in log]
        curves[variant] = measured[:-2]  # the last two are of the whole training
    draw(curves, arguments.stages, output / "cascade.png")


def draw(curves: dict[str, list[float]], stages: int, path: Path) -> None:
    """Draw the validation perplexity after each epoch, and the beginnings of the stages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for (name, values), color in zip(curves.items(), ("#e69f00", "#0072b2"), strict=True):
        axes.plot(range(1, len(values) + 1), values, marker="o", color=color, label=name)
    for stage in range(1, stages):
        axes.axvline(stage * len(curves["plain"]) / stages + 0.5, color="#bbbbbb", linestyle=":")
    axes.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    run(main)
