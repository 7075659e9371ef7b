"""Tensors of `pytorch_model.bin`: loaded by torch with `weights_only`, so that nothing in the file is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TyingError
from ..ties.headers import LARGEST_INDEX, files_of_index
from .dtypes import file_dtype
from .sources import Folder, Source

if TYPE_CHECKING:
    import torch

_INDEX, _WHOLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_ENDINGS = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a pickle: shape, dtype as safetensors spells it, file, bytes, and a number for its storage."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    size: int
    storage: int


class Pickled:
    """The opened `.bin` files of a model. Their tensors are mapped from the disk, not copied.

    Args:
        held: tensors by name.
        file_of: the file of each.
    """

    def __init__(self, held: "dict[str, torch.Tensor]", file_of: dict[str, str]) -> None:
        self._held = held
        self.tensors = {
            name: PickledTensor(
                tuple(tensor.shape),
                file_dtype(str(tensor.dtype).removeprefix("torch.")),
                file_of[name],
                tensor.numel() * tensor.element_size(),
                tensor.untyped_storage()._cdata,
            )
            for name, tensor in held.items()
        }

    @classmethod
    def of(cls, source: Source) -> "Pickled | None":
        """Open the `.bin` files of a folder of this machine; `None` where there are none.

        Raises:
            TyingError: one of them is no state dict that `weights_only` loads; or they are on the Hub, where a pickle
                cannot be read in part.
        """
        names = _files(source)
        if not names:
            return None
        if not isinstance(source, Folder):
            raise TyingError(
                f"{source.name} has its weights in {names[0]}, a pickle, which can only be read whole: download it, "
                "or have it converted to safetensors."
            )
        import torch

        held: dict[str, Any] = {}
        file_of: dict[str, str] = {}
        for name in names:
            source.size(name)  # a regular file
            state = _loaded(torch, source.folder / name)
            tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            held |= tensors
            file_of |= dict.fromkeys(tensors, name)
        return cls(held, file_of)

    def read(self, name: str, start: int, count: int) -> bytes:
        """Read bytes of a tensor."""
        import torch

        flat = self._held[name].detach().contiguous().view(-1).view(torch.uint8)
        return flat[start : start + count].numpy().tobytes()

    def aliases(self) -> list[list[str]]:
        """The names that are one storage in the file."""
        names: dict[tuple[str, int], list[str]] = {}
        for name, tensor in self.tensors.items():
            names.setdefault((tensor.file, tensor.storage), []).append(name)
        return [found for found in names.values() if len(found) > 1]


def _files(source: Source) -> list[str]:
    if source.only:
        return [source.only] if source.only.endswith(_ENDINGS) else []
    if source.has(_INDEX):
        return files_of_index(source.json(_INDEX, LARGEST_INDEX), f"{_INDEX} in {source.name}")
    return [_WHOLE] if source.has(_WHOLE) else []


def _loaded(torch: Any, path: Path) -> dict[str, Any]:
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the form of torch before 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile, torch and Python's own, by what is wrong
        # Without torch's own words, which advise to load it without weights_only.
        raise TyingError(
            f"{path.name} in {path.parent} cannot be read as a state dict with weights_only ({type(error).__name__}): "
            "it is truncated, corrupted, or holds objects other than tensors, which are not loaded. "
            "model.safetensors is read without that risk."
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise TyingError(f"{path.name} in {path.parent} holds a {type(state).__name__}: expected a state dict.")
    return state
