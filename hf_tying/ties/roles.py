"""The roles of a model's embeddings: source, target and output; and the tables of what architectures do otherwise."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .slots import canonical, unwrap

#: The modules of the roles, below the base model, where the architecture does not answer by `get_encoder()`,
#: `get_input_embeddings()` and `get_output_embeddings()`: FSMT's encoder and decoder have no accessor, and its output
#: accessor returns the decoder's input embedding.
ROLE_MODULES = {
    "fsmt": {
        "source": "encoder.embed_tokens",
        "target": "decoder.embed_tokens",
        "output": "decoder.output_projection",
    },
}
#: Architectures with a second vocabulary: where their configs state the source's size and the target's.
TWO_SIZES = {"marian": ("vocab_size", "decoder_vocab_size"), "fsmt": ("src_vocab_size", "tgt_vocab_size")}
#: Architectures that scale their logits by the flag: `if config.tie_word_embeddings: hidden = hidden * d_model**-0.5`.
SCALED_BY_THE_FLAG = {"switch_transformers"}


@dataclass(frozen=True)
class Role:
    """The matrix of one role in a model.

    Args:
        name: the parameter that is used in this role.
        carriers: parameters that hold the same matrix and that no layer uses: BART's, T5's and Marian's `shared`.
    """

    name: str
    carriers: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The carriers, then the name that is used."""
        return (*self.carriers, self.name)


def find_roles(model: PreTrainedModel, declared: Iterable[list[str]]) -> dict[str, Role]:
    """The roles that `model` has, in the order `source`, `target`, `output`.

    A carrier goes with the source embedding, whatever the scheme, so that it is never left as a second, dead matrix
    that receives no gradient.

    Args:
        model: any `PreTrainedModel`, also under adapters.
        declared: chains of names that the architecture can tie, whatever its config says.
    """
    name_of = {id(module): name for name, module in reversed(list(model.named_modules()))}
    found: dict[str, Role] = {}
    for role, module in _role_modules(model).items():
        module = unwrap(module)
        prefix = canonical(name_of.get(id(module), ""))
        # Pruning and quantisation may have put something else in the place of the parameter: it has the role still.
        if prefix and hasattr(module, "weight"):
            found[role] = Role(f"{prefix}.weight")
    if found:
        holder = "source" if "source" in found else "target" if "target" in found else "output"
        known = {role.name for role in found.values()}
        for chain in declared:
            if known & set(chain):
                carriers = tuple(name for name in chain if name not in known)
                found[holder] = Role(found[holder].name, (*carriers, *found[holder].carriers))
    return {role: found[role] for role in ("source", "target", "output") if role in found}


def _role_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    if table := ROLE_MODULES.get(getattr(model.config, "model_type", None)):
        base = model.base_model
        found = {}
        for role, path in table.items():
            try:
                found[role] = base.get_submodule(path)
            except AttributeError:
                continue  # a base model without the head
        return found
    modules = {"output": _ask(model, "get_output_embeddings")}
    if getattr(model.config, "is_encoder_decoder", False):
        modules["source"] = _ask(_ask(model, "get_encoder"), "get_input_embeddings")
        modules["target"] = _ask(_ask(model, "get_decoder"), "get_input_embeddings")
    if modules.get("target") is None:
        modules["target"] = _ask(model, "get_input_embeddings")
    return {role: module for role, module in modules.items() if isinstance(module, nn.Module)}


def _ask(owner, accessor: str):
    """What an accessor answers; `None` where an architecture has none, which is no error here: it lacks the role, and
    a scheme that needs the role is refused by name.

    AttributeError: no such method, or no such owner (a model without an encoder). NotImplementedError: transformers'
    own `get_input_embeddings` where it finds nothing. TypeError: an accessor of custom code that wants an argument.
    """
    try:
        return getattr(owner, accessor)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
