"""Who computes the loss: this package's own walk, or an installed kernel library where it computes the same.

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
`tests/test_backends.py` compares on it.

Both multiply in the dtype of the tensors, or that of autocast: in half precision Liger rounds logits and bias to it,
as a model's own head does. `memory_budget` is for the own path; they choose their blocks themselves.

Their gradient of the matrix goes through autograd like any other, and `gradient` does not know it: `tied_embedding`
then makes one of its own, and autograd adds the two up.
"""

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from .autograd import tied_path
from .options import Options

BACKENDS = ("auto", "torch", "liger", "cce")


def choose(backend: str, hidden: torch.Tensor, weight: torch.Tensor, bias, options: Options) -> Callable:
    """What computes this loss: a function of (hidden, weight, labels, bias, options, memory_budget).

    Args:
        backend: one of `BACKENDS`.
        hidden, weight, bias, options: as they will be given to it, checked (`options.check`).

    Raises:
        ValueError: for an unknown name, and for what a library cannot do, or does otherwise than
            `reference_cross_entropy`.
        ImportError: when the library is not installed, or is too old.
        RuntimeError: for tensors that are not on a GPU.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: expected one of {BACKENDS}.")
    if backend in ("auto", "torch"):
        return tied_path
    return _library_path(backend, hidden, weight, bias, options)


def _library_path(backend: str, hidden, weight, bias, options: Options) -> Callable:
    library = _LIBRARIES[backend]
    if find_spec(library.module.partition(".")[0]) is None:
        raise ImportError(
            f"backend={backend!r} needs the package {library.package}, which is not installed: pip install "
            f"{library.install}. backend='torch' needs none."
        )
    _require_gpu(backend, hidden.device)
    for refusal in library.refusals(hidden, weight, bias, options):
        raise ValueError(f"backend={backend!r} does not compute the same with {refusal}: use backend='torch'.")
    _function(backend)
    return library.compute


def _require_gpu(backend: str, device: torch.device) -> None:
    if device.type not in ("cuda", "xpu"):
        raise RuntimeError(
            f"backend={backend!r} needs a GPU, for which Triton compiles its kernels, and these tensors are on "
            f"{device.type!r}. backend='torch' runs anywhere."
        )


@cache
def _function(backend: str) -> Callable:
    """The library's function, imported now; not before, since that takes seconds and whatever the library needs."""
    library = _LIBRARIES[backend]
    try:
        version = importlib.metadata.version(library.package)
    except importlib.metadata.PackageNotFoundError:  # from a checkout, or under another name, as a nightly is
        version = library.least
    from packaging.version import Version

    if Version(version) < Version(library.least):
        raise ImportError(
            f"backend={backend!r} needs {library.package} {library.least} or newer, and {version} is installed: "
            f"{library.why_not_older}. pip install {library.install}, or use backend='torch'."
        )
    return getattr(importlib.import_module(library.module), library.function)


def _liger(hidden, weight, labels, bias, options: Options, memory_budget: int | None = None) -> torch.Tensor:
    """By Liger's fused linear cross entropy, which makes its gradients in the forward pass."""
    if not _any_counts(labels, options):
        return tied_path(hidden, weight, labels, bias, options, memory_budget)
    hidden, weight, bias = _operands(hidden, weight, bias, options)
    # It asks `hidden` alone whether gradients are wanted: without them a frozen body would leave the matrix untrained,
    # and with them an evaluation pays for a training step.
    trained = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    if not (trained and torch.is_grad_enabled()):
        hidden = hidden.detach()
    elif not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()
    reduction = options.reduction
    if reduction == "mean" and not _is_plain_mean(hidden, options):
        reduction = "sum"
    with torch.autocast(hidden.device.type, enabled=False):
        loss = _function("liger")(
            input=hidden,
            weight=weight,
            target=labels.reshape(-1),
            bias=bias,
            # Its sums over classes are in the dtype that comes in.
            ce_weight=None if options.class_weight is None else options.class_weight.float(),
            ignore_index=options.ignore_index,
            label_smoothing=float(options.label_smoothing),
            reduction=reduction,
            softcap=None if options.logit_softcap is None else float(options.logit_softcap),
            accum_dtype=torch.float32,
        )
    # Each backward pass multiplies the one gradient it has made in place: a second one would be wrong.
    loss = _guarded(loss, "liger", once=reduction != "none")
    if options.reduction == "none":
        return loss.view(labels.shape)
    return _divided(loss, labels, options) if reduction != options.reduction else loss


def _is_plain_mean(hidden: torch.Tensor, options: Options) -> bool:
    """Whether Liger's own mean will do. It divides the gradient of each logit, which is too small for float16 then."""
    return options.num_items_in_batch is None and options.class_weight is None and hidden.dtype != torch.float16


def _liger_refusals(hidden, weight, bias, options: Options) -> Iterator[str]:
    return _float64(hidden, weight)


def _cce(hidden, weight, labels, bias, options: Options, memory_budget: int | None = None) -> torch.Tensor:
    """By Apple's cut cross entropy, in the version that leaves nothing out."""
    if not _any_counts(labels, options):
        return tied_path(hidden, weight, labels, bias, options, memory_budget)
    hidden, weight, _ = _operands(hidden, weight, None, options)
    flat, classes = labels.reshape(-1), options.class_weight
    with torch.autocast(hidden.device.type, enabled=False):
        loss = _function("cce")(
            hidden,
            weight,
            flat,
            ignore_index=options.ignore_index,
            softcap=None if options.logit_softcap is None else float(options.logit_softcap),
            # Never its mean: that is NaN or not the one that is asked for, and the division costs nothing here.
            reduction="sum" if options.reduction != "none" and classes is None else "none",
            # No gradient is filtered out by its size, and both gradients are summed in float32.
            impl="cce_exact",
        )
        loss = _guarded(loss, "cce", once=False)
        if classes is not None:
            loss = loss * classes.float()[flat.masked_fill(flat == options.ignore_index, 0)]
        if options.reduction == "none":
            return loss.view(labels.shape)
        loss = loss.sum()
    return _divided(loss, labels, options) if options.reduction == "mean" else loss


# The most words that one block of its kernels takes.
_CCE_WORDS = 256


def _cce_refusals(hidden, weight, bias, options: Options) -> Iterator[str]:
    yield from _float64(hidden, weight)
    if bias is not None:
        yield "bias (25.6.4 counts it once for every 256 columns of the matrix)"
    if options.label_smoothing:
        yield "label_smoothing (it has none)"
    if options.logit_softcap is not None and len(weight) % _CCE_WORDS:
        yield (
            f"logit_softcap and {len(weight)} words, no multiple of {_CCE_WORDS} (where the last block ends after the "
            "vocabulary, its kernel caps the absent logits from minus infinity to -logit_softcap, and counts them)"
        )


def _float64(hidden, weight) -> Iterator[str]:
    if torch.float64 in (hidden.dtype, weight.dtype):
        yield "float64 tensors (its losses are in float32)"


def _any_counts(labels: torch.Tensor, options: Options) -> bool:
    """Without a label that counts there is nothing to launch a kernel on; the own path has the zeros for that."""
    return bool((labels != options.ignore_index).any())


def _operands(hidden, weight, bias, options: Options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(N, D), (V, D) and (V,) in the dtype of the products, the scale of the logits multiplied in."""
    device, products = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        products = torch.get_autocast_dtype(device)
    hidden, scale = hidden.reshape(-1, hidden.shape[-1]), options.logit_scale
    if scale is not None:  # before the conversion, so that what is converted is rounded once
        hidden, bias = hidden * scale, None if bias is None else bias * scale
    bias = None if bias is None else bias.to(products)
    return hidden.to(products).contiguous(), weight.to(products).contiguous(), bias


def _guarded(loss: torch.Tensor, backend: str, once: bool) -> torch.Tensor:
    """`loss`, whose backward pass refuses what the library would do wrong without a word."""
    passes = []

    def check(upstream: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"tied_cross_entropy with backend={backend!r} has no gradient of its gradient (create_graph=True): "
                "use hf_tying.losses.reference_cross_entropy for that."
            )
        if once and passes:
            raise RuntimeError(
                f"Trying to go backward through tied_cross_entropy with backend={backend!r} a second time: its "
                "gradients were made in the forward pass, and given out. Compute the loss again."
            )
        passes.append(True)

    if loss.requires_grad:
        loss.register_hook(check)
    return loss


def _divided(total: torch.Tensor, labels: torch.Tensor, options: Options) -> torch.Tensor:
    """The mean, from the sum over labels that count."""
    count = options.num_items_in_batch
    if count is None:
        counted = labels != options.ignore_index
        count = counted.sum() if options.class_weight is None else options.class_weight.float()[labels[counted]].sum()
    count = torch.as_tensor(count, device=total.device)
    return total / count.masked_fill(count == 0, 1)


@dataclass(frozen=True)
class _Library:
    """An optional package.

    Attributes:
        package, install: its name on PyPI, and what pip is to be given.
        module, function: what is called.
        least, why_not_older: the oldest version that computes the same.
        refusals: what it does not do, in words, for a call's arguments.
        compute: the call, by the options of this package.
    """

    package: str
    install: str
    module: str
    function: str
    least: str
    why_not_older: str
    refusals: Callable[..., Iterator[str]]
    compute: Callable[..., torch.Tensor]


_LIBRARIES = {
    "liger": _Library(
        package="liger-kernel",
        install="'liger-kernel>=0.8.4'",
        module="liger_kernel.transformers.functional",
        function="liger_fused_linear_cross_entropy",
        least="0.8.4",
        # In the same interpreter, 37 words and a cap of 2: the loss of 0.8.2 and of 0.8.3 is off by 1 %, of 0.8.4 not.
        # 0.8.1 (read) multiplies the gradients of all tokens by what comes back for the first.
        why_not_older=(
            "older ones count words that are not there where logits are capped, and give wrong gradients for "
            "reduction='none'"
        ),
        refusals=_liger_refusals,
        compute=_liger,
    ),
    "cce": _Library(
        package="cut-cross-entropy",
        install="'cut-cross-entropy @ git+https://github.com/apple/ml-cross-entropy.git'",
        module="cut_cross_entropy",
        function="linear_cross_entropy",
        least="25.6.4",
        # Measured with the 25.1.1 of PyPI in Triton's interpreter, float16, D 64, V 20,000: the gradient of hidden
        # is off by 10 times the rounding of its dtype (2.0e-3 of its norm), growing with V; 25.6.4: 1.04 times.
        why_not_older="older ones sum gradients in half precision, or make none in float32",
        refusals=_cce_refusals,
        compute=_cce,
    ),
}

# As `tied_path`: torch.compile runs these as they are, between two graphs.
for _path in (_library_path, _liger, _cce):
    _path._torchdynamo_disable = True
