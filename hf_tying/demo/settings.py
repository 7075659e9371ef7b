"""What the demo runs with. What a user can get wrong is refused here or while reading, before anything is written."""

from dataclasses import dataclass
from pathlib import Path

from ..config import TyingConfig, TyingError

#: The demo's own mark in its output folder, written first and completed last.
REPORT = "report.json"


@dataclass(frozen=True)
class DemoSettings:
    """Arguments of `run_demo`.

    Args:
        train_file (`tuple[Path, ...]`): UTF-8 text files; none means the text that CPython carries.
        model_type (`str`): a causal language model of transformers.
        scheme (`str`): what to tie in the second model.
        output_dir (`Path`): where models, report and picture go; made if absent.
        seed (`int`): of the weights, the order of the data and the sample.
        steps (`int`): optimizer steps of each model. 1,000 steps of 512 tokens take little more than a minute on one
            core, and are nearly one pass over the default corpus.
        vocab_size (`int`): entries of the byte-level BPE, at most.
        block_size (`int`): tokens in a training sequence.
        batch_size (`int`): sequences in a step. Small: so few tokens are better spent on many steps.
        learning_rate (`float`): peak of the cosine schedule, after a warm-up of a tenth of the steps. Between what is
            best for the untied model (0.002) and for the tied one (0.0045), each measured in 600 steps; the tied model
            at 0.003 is also better than the untied one at its best.
    """

    train_file: tuple[Path, ...] = ()
    model_type: str = "llama"
    scheme: str = "two_way"
    output_dir: Path = Path("runs/demo")
    seed: int = 0
    steps: int = 1000
    vocab_size: int = 4096
    block_size: int = 128
    batch_size: int = 4
    learning_rate: float = 3e-3

    def __post_init__(self):
        if TyingConfig(scheme=self.scheme).scheme == "none":
            raise TyingError("Scheme 'none' ties nothing, so there is nothing to compare: expected two_way.")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise TyingError(f"{name} is {getattr(self, name)}: expected at least 1.")
        self._check_output_dir()

    def _check_output_dir(self):
        """Refuse to write among files that are not the demo's: it replaces folders called `tied` and `untied`."""
        for folder in (self.output_dir, *self.output_dir.parents):
            if folder.exists() and not folder.is_dir():
                raise TyingError(
                    f"The output folder {str(self.output_dir)!r} cannot be made: {str(folder)!r} is a file."
                )
        if self.output_dir.exists() and any(self.output_dir.iterdir()) and not (self.output_dir / REPORT).exists():
            raise TyingError(
                f"The output folder {str(self.output_dir)!r} holds files that no demo wrote (it has no {REPORT}). "
                "Give an empty or a new folder with --output_dir."
            )
