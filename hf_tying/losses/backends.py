"""Backends of the loss: this package's own walk, or an installed kernel library that computes the same.

- `"torch"`: the own path (`autograd.tied_path`), on every device, with every option.
- `"auto"`: the own path too. What that rests on, to be changed with new measurements:

      CPU: only the own path runs there. Liger 0.8.5 and CCE 25.1.1 raise "0 active drivers"; the chunked
           `torch.nn.functional.linear_cross_entropy` of torch 2.13 took 3.3 to 6.6 times as long as whole logits, the
           own path 0.6 to 0.9 times.
      GPU: nothing has been measured by this project yet. The others are there to be chosen by name.

- `"liger"`: `liger-kernel` from 0.8.4 on (0.8.4 and 0.8.5 were compared). All options, not float64.
- `"cce"`: `cut-cross-entropy` from 25.6.4 on (25.6.4 was compared; PyPI has 25.1.1), without gradient filtering,
  gradients summed in float32. No bias, no label smoothing, a soft cap for some vocabularies only, not float64.

They were compared with `reference_cross_entropy` in Triton's interpreter on a CPU, in float32 and float16. That shows
which numbers come of which options, not how a GPU rounds, nor how fast it is. Where there is a GPU,
`tests/losses/test_backends.py` compares on it.

Both multiply in the dtype of the tensors, or that of autocast: in half precision Liger rounds logits and bias to it,
as a model's own head does. `memory_budget` is for the own path; they choose their blocks themselves.

Their gradient of the matrix goes through autograd like any other, and `gradient` does not know it: `tied_embedding`
then makes one of its own, and autograd adds the two up.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch

from .autograd import tied_path
from .cce import CCE
from .kernel_libraries import KernelLibrary, library_function
from .liger import LIGER
from .options import CrossEntropyOptions

BACKENDS = ("auto", "torch", "liger", "cce")
_LIBRARIES = {library.backend: library for library in (LIGER, CCE)}


def choose_backend(
    backend: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: CrossEntropyOptions
) -> Callable:
    """The function of (hidden, weight, labels, bias, options, memory_budget) that computes this loss.

    Args:
        backend: one of `BACKENDS`.
        hidden: hidden states of the loss, checked (`check_operands`), as are the following.
        weight: softmax matrix of the loss.
        bias: bias of the loss.
        options: options of the loss.

    Raises:
        ValueError: for an unknown name, and for options that a library lacks or computes otherwise than
            `reference_cross_entropy`.
        ImportError: when the library is not installed, or is too old.
        RuntimeError: for tensors that are not on a GPU.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: expected one of {BACKENDS}.")
    if backend in ("auto", "torch"):
        return tied_path
    if options.head_dtype is not None:
        raise ValueError(
            f"backend={backend!r} multiplies in the dtype of the tensors, and head_dtype={options.head_dtype}: use "
            "backend='torch'."
        )
    return _library_path(_LIBRARIES[backend], hidden, weight, bias, options)


def _library_path(
    library: KernelLibrary,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    options: CrossEntropyOptions,
) -> Callable:
    backend = library.backend
    if find_spec(library.module.partition(".")[0]) is None:
        raise ImportError(
            f"backend={backend!r} needs the package {library.package}, which is not installed: pip install "
            f"{library.install}. backend='torch' needs none."
        )
    _require_gpu(backend, hidden.device)
    for refusal in library.refusals(hidden, weight, bias, options):
        raise ValueError(f"backend={backend!r} does not compute the same with {refusal}: use backend='torch'.")
    library_function(library)  # refuses a version that is too old, before any work
    return library.compute


def _require_gpu(backend: str, device: torch.device) -> None:
    if device.type not in ("cuda", "xpu"):
        raise RuntimeError(
            f"backend={backend!r} needs a GPU, for which Triton compiles its kernels, and these tensors are on "
            f"{device.type!r}. backend='torch' runs anywhere."
        )
