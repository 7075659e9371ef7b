"""Flags that choose what a model is trained by: cross entropy, the augmented loss, contrastive weight tying."""

from dataclasses import dataclass, field

from ..losses.contrastive import NEGATIVES
from ..objectives.objective import AugmentedObjective, ContrastiveObjective, Objective


@dataclass
class ObjectiveArguments:
    """For `HfArgumentParser`, beside `TrainingArguments`.

    Example:
        >>> (arguments,) = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses()
        >>> use_tied_loss(model, objective=arguments.to_objective())
    """

    objective: str = field(
        default="ce",
        metadata={
            "help": "What is trained by: ce is cross entropy, al the augmented loss (Inan et al. 2016), cwt "
            "contrastive weight tying (Godey et al. 2023), which leaves the head untrained.",
            "choices": ["ce", "al", "cwt"],
        },
    )
    al_temperature: float = field(default=20.0, metadata={"help": "AL: tau, of both distributions."})
    al_alpha: float | None = field(default=None, metadata={"help": "AL: what the divergence is multiplied by."})
    al_gamma: float | None = field(default=None, metadata={"help": "AL: alpha as gamma * tau, in place of al_alpha."})
    al_detach_target: bool = field(
        default=False, metadata={"help": "AL: no gradient into the embedding through the target distribution."}
    )
    cwt_negatives: str = field(
        default="batch",
        metadata={
            "help": "CWT: what a word is told from: all words of the batch as often as they stand there (batch), each "
            "of them once (unique), or those and cwt_num_sampled more of the vocabulary (sampled).",
            "choices": list(NEGATIVES),
        },
    )
    cwt_num_sampled: int | None = field(default=None, metadata={"help": "CWT: how many more words, for sampled."})
    cwt_temperature: float = field(default=1.0, metadata={"help": "CWT: products are divided by it."})
    cwt_stop_gradient: bool = field(
        default=False, metadata={"help": "CWT: no gradient into the embeddings of the words to tell apart."}
    )
    cwt_gather: bool = field(default=False, metadata={"help": "CWT: the words of all processes, not of each alone."})

    def to_objective(self) -> Objective | None:
        """For `use_tied_loss(model, objective=...)`; `None` for cross entropy.

        Raises:
            TyingError: for options that the chosen objective refuses. Those of the other one are not looked at.
        """
        if self.objective == "al":
            return AugmentedObjective(self.al_temperature, self.al_alpha, self.al_gamma, self.al_detach_target)
        if self.objective == "cwt":
            return ContrastiveObjective(
                self.cwt_negatives, self.cwt_num_sampled, self.cwt_temperature, self.cwt_stop_gradient, self.cwt_gather
            )
        return None
