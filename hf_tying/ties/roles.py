"""The roles of a model's embeddings (source, target and output), and tables of architectures with exceptions."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from .slots import find_slot, unwrap

#: The modules of the roles, below the base model, where the architecture does not answer by `get_encoder()`,
#: `get_input_embeddings()` and `get_output_embeddings()`: FSMT's encoder and decoder have no accessor, and its output
#: accessor returns the decoder's input embedding.
ROLE_MODULES = {
    "fsmt": {
        "source": "encoder.embed_tokens",
        "target": "decoder.embed_tokens",
        "output": "decoder.output_projection",
    },
    # Its encoder gets words that are looked up outside of it, in the module that other architectures only carry.
    "florence2": {"source": "language_model.shared", "target": "language_model.decoder.embed_tokens"},
}
#: Architectures with a second vocabulary: where their configs state the source's size and the target's.
TWO_SIZES = {"marian": ("vocab_size", "decoder_vocab_size"), "fsmt": ("src_vocab_size", "tgt_vocab_size")}
#: Architectures that scale their logits by the flag: `if config.tie_word_embeddings: hidden = hidden * d_model**-0.5`.
SCALED_BY_THE_FLAG = {"switch_transformers"}


#: Modules that only carry a matrix which other lookups use, where that is not the module `shared`, as in the families
#: of BART, T5, M2M100 and Marian. Found by a forward pass of every class that transformers has.
IDLE_MODULES = {
    "prophetnet": ("prophetnet.word_embeddings", "word_embeddings"),
    "florence2": ("model.language_model.encoder.embed_tokens", "language_model.encoder.embed_tokens"),
}
#: Architectures whose model writes `tie_word_embeddings=False` into its own config, whatever the file says.
FLAG_SET_BY_THE_CLASS = {"speech-encoder-decoder", "vision-encoder-decoder"}

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


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


def find_roles(
    model: PreTrainedModel, declared: Iterable[list[str]], places: list[tuple[str, nn.Module]]
) -> dict[str, Role]:
    """The roles that `model` has, in the order `source`, `target`, `output`.

    A role is defined by use: source and target are looked up by words, the output is multiplied to make logits. The
    accessors of the architecture name candidates, which are checked. A convolution over sound (Whisper) or a
    projection of patches (Pix2Struct) is not a source.

    A carrier is tied with the source embedding under any scheme, so that it is never a second matrix without gradient.
    Any other name that the architecture ties is used, and its values count.

    Args:
        model: any `PreTrainedModel`, also under adapters.
        declared: chains of names that the architecture can tie, whatever its config says.
        places: modules of the model, see `slots.places_of`.
    """
    chains = [list(chain) for chain in declared]
    name_of = {id(module): place for place, module in reversed(places)}

    def module_at(name: str) -> nn.Module | None:
        slot = find_slot(model, name)
        return slot[0] if slot and slot[1] == "weight" else None

    found: dict[str, str] = {}
    modules = _role_modules(model)
    for role, module in modules.items():
        module = unwrap(module)
        place = name_of.get(id(module), "")
        if place and (is_lookup(module) if role != "output" else is_product(module)):
            found[role] = f"{place}.weight"
    idle = {
        name
        for chain in chains
        for name in chain
        if _is_carrier(model, name)
        and any(isinstance(module_at(other), nn.Embedding) for other in chain if not _is_carrier(model, other))
    }
    for role, name in found.items():
        if name in idle:  # the accessor of a whole BART or T5 returns the carrier
            used = [other for chain in chains if name in chain for other in chain if other not in idle]
            lookups = [other for other in used if isinstance(module_at(other), nn.Embedding)]
            side = "decoder" if role == "target" else "encoder"
            found[role] = next((other for other in lookups if side in other.split(".")), lookups[0])
    if found.get("source") == found.get("target") and "source" in modules and not _has_decoder(model):
        found.pop("target", None)  # an encoder alone has an accessor, too
    if found and "output" not in found:  # BLIP's decoder has a head, but its model lacks an accessor for it
        met = [chain for chain in chains if set(found.values()) & set(chain)]
        heads = [name for chain in met for name in chain if type(module_at(name)) is nn.Linear]
        found |= {"output": heads[0]} if heads else {}
    roles = {role: Role(found[role]) for role in ("source", "target", "output") if role in found}
    if roles:
        holder = next(iter(roles))
        known = set(found.values())
        carriers = [name for chain in chains if known & set(chain) for name in chain if name in idle]
        roles[holder] = Role(roles[holder].name, tuple(dict.fromkeys(carriers)))
    return roles


def is_lookup(module: nn.Module | None) -> bool:
    """Whether rows of the matrix of `module` are looked up: `nn.Embedding`, or a replacement of it.

    Quantisation and pruning may have replaced the parameter; the module is still a lookup.
    """
    return isinstance(module, nn.Embedding) or (_has_matrix(module) and not isinstance(module, nn.Linear | _Conv))


def is_product(module: nn.Module | None) -> bool:
    """Whether `module` has a matrix that can make logits: `nn.Linear`, or an embedding that is multiplied by."""
    return isinstance(module, nn.Linear | nn.Embedding) or _has_matrix(module)


def _has_matrix(module: nn.Module | None) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and getattr(weight, "ndim", 2) <= 2


def _is_carrier(model: PreTrainedModel, name: str) -> bool:
    """Whether `name` is a matrix that its architecture only carries, beside the lookups that use it."""
    place = name.removesuffix(".weight")
    known = IDLE_MODULES.get(getattr(model.config, "model_type", ""))
    return place in known if known else place.rpartition(".")[2] == "shared"


def _role_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    modules = {"output": ask(model, "get_output_embeddings")}
    if table := ROLE_MODULES.get(getattr(model.config, "model_type", "")):
        for role, path in table.items():
            try:
                modules[role] = model.base_model.get_submodule(path)
            except AttributeError:
                modules.pop(role, None)  # a base model without the head, an encoder without the decoder
    elif getattr(model.config, "is_encoder_decoder", False):
        modules["source"] = ask(ask(model, "get_encoder"), "get_input_embeddings")
        modules["target"] = ask(ask(model, "get_decoder"), "get_input_embeddings")
    if modules.get("target") is None:
        modules["target"] = ask(model, "get_input_embeddings")
    return {role: module for role, module in modules.items() if isinstance(module, nn.Module)}


def _has_decoder(model: PreTrainedModel) -> bool:
    decoder = ask(model, "get_decoder")
    return decoder is not None and decoder is not model and decoder is not ask(model, "get_encoder")


def ask(owner: object, accessor: str) -> Any:
    """Call an accessor. `None` where an architecture has none: it lacks the role.

    That is not an error here: a scheme that needs the role is refused by name.

    AttributeError: no such method, or no such owner (a model without an encoder). NotImplementedError: transformers'
    own `get_input_embeddings` where it finds nothing. TypeError: an accessor of custom code that wants an argument.
    """
    try:
        return getattr(owner, accessor)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
