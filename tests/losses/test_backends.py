"""`tied_cross_entropy(backend=...)`: who computes it, what is refused, and what a library is asked for each option.

The libraries are not needed here. Two stand-ins have their names, arguments and habits, in plain torch; the last tests
are the same comparison with the real ones, where those and a GPU are found.
"""

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from hf_tying.losses import backends as backends_module
from hf_tying.losses import kernel_libraries, reference_cross_entropy, tied_cross_entropy, tied_embedding
from hf_tying.losses.autograd import tied_path
from hf_tying.losses.backends import choose_backend
from hf_tying.losses.options import CrossEntropyOptions

from ..processes import run_python

TOKENS, WIDTH, WORDS = 7, 5, 13
PIP_NAMES = {"liger": "liger-kernel", "cce": "cut-cross-entropy"}
MODULES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}
LIBRARIES = list(PIP_NAMES)


class Liger:
    """What `liger_fused_linear_cross_entropy` documents, and two habits of 0.8.5."""

    def __init__(self):
        self.calls = []

    def __call__(
        self, input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    ):  # fmt: skip
        self.calls.append({"reduction": reduction, "accum_dtype": accum_dtype, "input": input, "ce_weight": ce_weight})
        assert input.dim() == 2 and target.dim() == 1 and input.dtype == weight.dtype
        if not input.requires_grad:  # it looks at nothing else
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        logits = F.linear(input, weight, bias)
        if softcap is not None:
            assert isinstance(
                softcap, float
            )  # an int of 1 is compiled into the kernel, which then has no dtype to ask
            logits = softcap * torch.tanh(logits / softcap)
        loss = F.cross_entropy(
            logits.float(), target, ce_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            reduction=reduction,
        )  # fmt: skip
        return loss if input.requires_grad else loss.detach().requires_grad_(weight.requires_grad)


class Cce:
    """What `linear_cross_entropy` of 25.6.4 documents; a filtered gradient is one that is not there."""

    def __init__(self):
        self.calls = []

    def __call__(
        self, e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=0, return_lse=False,
        filter_eps="auto", accum_e_fp32=False, accum_c_fp32=False, impl="cce",
    ):  # fmt: skip
        self.calls.append({"reduction": reduction, "impl": impl})
        if impl != "cce_exact":
            e, c = e.detach(), c.detach()
        logits = F.linear(e, c)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction=reduction)


@pytest.fixture
def fresh():
    """Which library is found is asked again, before the test and after it."""
    kernel_libraries.library_function.cache_clear()
    yield
    kernel_libraries.library_function.cache_clear()


@pytest.fixture
def installed(monkeypatch, fresh):
    """The stand-ins by name of backend, importable; a call of `installed.version` gives them a version."""
    functions = {"liger": Liger(), "cce": Cce()}
    paths = {"liger": "liger_kernel.transformers.functional", "cce": "cut_cross_entropy"}
    for backend, path in paths.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, loader=None)
            monkeypatch.setitem(sys.modules, name, module)
        name = "liger_fused_linear_cross_entropy" if backend == "liger" else "linear_cross_entropy"
        setattr(module, name, functions[backend])
    set_version(monkeypatch, None)
    return functions


@pytest.fixture
def on_gpu(monkeypatch, installed):
    """As if the tensors were on a GPU."""
    monkeypatch.setattr(backends_module, "_require_gpu", lambda backend, device: None)
    return installed


def set_version(monkeypatch, version):
    """Of both packages; `None`: installed without metadata, as from a checkout."""

    def find(package):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)


def inputs(words=WORDS, dtype=torch.float32, device="cpu", tokens=TOKENS, width=WIDTH):
    """Hidden states, matrix, bias, class weights and labels, one of them ignored."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    labels = torch.randint(words, (tokens,), generator=generator).to(device)
    labels[2] = -100
    hidden, weight = randn(tokens, width).requires_grad_(), (randn(words, width) / width**0.5).requires_grad_()
    return hidden, weight, randn(words).requires_grad_(), randn(words).abs(), labels


def compared(backend, words=WORDS, dtype=torch.float32, device="cpu", most=1e-5, size=None, **options):
    """Loss and gradients of one call are the reference's; what they are off by is `most` of their norm."""
    results = []
    for function, extra in ((tied_cross_entropy, {"backend": backend}), (reference_cross_entropy, {})):
        hidden, weight, bias, classes, labels = inputs(words, dtype, device, **(size or {}))
        given = dict(options)
        if given.pop("bias", False):
            given["bias"] = bias
        if given.pop("class_weight", False):
            given["class_weight"] = classes
        if given.get("ignore_index") == 4:
            labels[labels == -100] = 4
        loss = function(hidden, weight, labels, **given, **extra)
        (loss * torch.linspace(0.5, 2, loss.numel(), device=device).view(loss.shape)).sum().backward()
        results.append([loss, hidden.grad, weight.grad, bias.grad])
    for found, expected in zip(*results, strict=True):
        if expected is None:
            assert found is None
            continue
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        off = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
        assert off < most, f"{options}: off by {off}"


EVERY_LIBRARY = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"ignore_index": 4},
    {"num_items_in_batch": 11},
    {"num_items_in_batch": 0},
    {"num_items_in_batch": torch.tensor(3)},
    {"logit_scale": 0.25},
    {"class_weight": True},
    {"class_weight": True, "reduction": "none"},
    {"class_weight": True, "reduction": "sum", "logit_scale": 2.0},
    {"class_weight": True, "num_items_in_batch": 11},
]
LIGER_ALONE = [
    {"bias": True},
    {"bias": True, "logit_scale": 0.25},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "class_weight": True, "reduction": "sum"},
    {"logit_softcap": 2},
    {"bias": True, "label_smoothing": 0.2, "class_weight": True, "logit_scale": 3.0, "logit_softcap": 1},
]
CAPPED_BY_CCE = [{"logit_softcap": 2}, {"logit_softcap": 2.5, "logit_scale": 3.0, "reduction": "none"}]
CASES = [
    *[(backend, options, WORDS) for backend in LIBRARIES for options in EVERY_LIBRARY],
    *[("liger", options, WORDS) for options in LIGER_ALONE],
    *[("cce", options, 256) for options in CAPPED_BY_CCE],
]


def named(case):
    backend, options, _ = case
    return f"{backend}: {', '.join(options) or 'plain'} {options.get('reduction', '')}".strip()


def test_an_unknown_backend_is_refused_by_name():
    hidden, weight, _, _, labels = inputs()
    with pytest.raises(ValueError, match="Unknown backend 'apex'.*'auto', 'torch', 'liger', 'cce'"):
        tied_cross_entropy(hidden, weight, labels, backend="apex")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_auto_and_torch_are_the_own_path(backend):
    hidden, weight, bias, _, _ = inputs()
    assert choose_backend(backend, hidden, weight, bias, CrossEntropyOptions()) is tied_path
    compared(backend, bias=True, logit_softcap=2.0, label_smoothing=0.1)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_library_that_is_not_installed_is_named_as_pip_knows_it(backend, monkeypatch, fresh):
    monkeypatch.setattr(backends_module, "find_spec", lambda name: None)
    hidden, weight, _, _, labels = inputs()
    with pytest.raises(ImportError, match=f"{PIP_NAMES[backend]}.*not installed.*backend='torch'"):
        tied_cross_entropy(hidden, weight, labels, backend=backend)


@pytest.mark.parametrize("backend,version", [("liger", "0.8.3"), ("cce", "25.1.1")])
def test_a_version_that_computes_something_else_is_refused(backend, version, monkeypatch, on_gpu):
    set_version(monkeypatch, version)
    hidden, weight, _, _, labels = inputs()
    with pytest.raises(ImportError, match=f"{PIP_NAMES[backend]}.*or newer, and {version} is installed"):
        tied_cross_entropy(hidden, weight, labels, backend=backend)
    assert not on_gpu[backend].calls


@pytest.mark.parametrize("backend,version", [("liger", "0.8.4"), ("liger", "0.10.0"), ("cce", "25.6.4")])
def test_a_version_that_computes_the_same_is_taken(backend, version, monkeypatch, on_gpu):
    set_version(monkeypatch, version)
    compared(backend)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_tensors_on_a_cpu_are_refused_before_anything_is_imported(backend, installed):
    hidden, weight, _, _, labels = inputs()
    with pytest.raises(RuntimeError, match="needs a GPU.*on 'cpu'.*backend='torch' runs anywhere"):
        tied_cross_entropy(hidden, weight, labels, backend=backend)
    assert not installed[backend].calls


@pytest.mark.slow
def test_importing_the_losses_imports_no_library():
    code = (
        "import sys, hf_tying.losses.cross_entropy; print([m for m in sys.modules if m.startswith(('liger', 'cut_'))])"
    )
    assert run_python("-c", code).stdout == "[]\n"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_each_option_gives_the_numbers_of_the_reference(case, on_gpu):
    backend, options, words = case
    compared(backend, words, **options)
    assert len(on_gpu[backend].calls) == 1


@pytest.mark.parametrize(
    "backend,options,words,reason",
    [
        ("cce", {"bias": torch.zeros(WORDS)}, WORDS, "bias"),
        ("cce", {"label_smoothing": 0.1}, WORDS, "label_smoothing"),
        ("cce", {"logit_softcap": 30.0}, WORDS, "logit_softcap and 13 words, not a multiple of 256"),
        ("cce", {"logit_softcap": 30.0}, 300, "logit_softcap and 300 words, not a multiple of 256"),
    ],
)
def test_an_option_that_a_library_computes_otherwise_is_refused_before_it_is_called(
    backend, options, words, reason, on_gpu
):
    hidden, weight, _, _, labels = inputs(words)
    with pytest.raises(ValueError, match=f"backend='{backend}'.*{reason}.*use backend='torch'"):
        tied_cross_entropy(hidden, weight, labels, backend=backend, **options)
    assert not on_gpu[backend].calls


@pytest.mark.parametrize("backend", LIBRARIES)
def test_float64_is_refused_since_losses_would_be_float32(backend, on_gpu):
    hidden, weight, _, _, labels = inputs(dtype=torch.float64)
    with pytest.raises(ValueError, match="float64.*use backend='torch'"):
        tied_cross_entropy(hidden, weight, labels, backend=backend)
    assert not on_gpu[backend].calls


def test_gradients_are_asked_for_unfiltered_and_summed_in_float32(on_gpu):
    compared("liger")
    compared("cce")
    assert on_gpu["liger"].calls[0]["accum_dtype"] == torch.float32
    assert on_gpu["cce"].calls[0]["impl"] == "cce_exact"


def test_liger_takes_its_own_mean_where_it_is_the_one_asked_for(on_gpu):
    for options in ({}, {"num_items_in_batch": 3}, {"class_weight": True}):
        compared("liger", **options)
    compared("liger", dtype=torch.float16, most=2e-3)  # whose gradients are too small when divided early
    assert [call["reduction"] for call in on_gpu["liger"].calls] == ["mean", "sum", "sum", "sum"]


def test_liger_gets_class_weights_that_it_can_sum_up_exactly(on_gpu):
    hidden, weight, _, classes, labels = inputs()
    tied_cross_entropy(hidden, weight, labels, class_weight=classes.bfloat16(), backend="liger")
    assert on_gpu["liger"].calls[0]["ce_weight"].dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", LIBRARIES)
def test_where_no_label_counts_the_loss_is_0_and_no_kernel_runs(backend, reduction, on_gpu):
    hidden, weight, _, _, labels = inputs()
    loss = tied_cross_entropy(hidden, weight, torch.full_like(labels, -100), reduction=reduction, backend=backend)
    assert torch.equal(loss.detach(), torch.zeros([] if reduction == "mean" else [TOKENS]))
    loss.sum().backward()
    assert not hidden.grad.any() and not weight.grad.any() and not on_gpu[backend].calls


@pytest.mark.parametrize("backend", LIBRARIES)
def test_labels_that_count_with_a_class_weight_of_0_give_0(backend, on_gpu):
    hidden, weight, _, classes, labels = inputs()
    assert tied_cross_entropy(hidden, weight, labels, class_weight=classes * 0, backend=backend).item() == 0


@pytest.mark.parametrize("backend", LIBRARIES)
def test_hidden_states_of_any_shape_are_taken(backend, on_gpu):
    hidden, weight, _, _, labels = inputs(tokens=6)
    hidden, labels = hidden.view(2, 3, WIDTH), labels.view(2, 3)
    for reduction in ("none", "mean"):
        found = tied_cross_entropy(hidden, weight, labels, reduction=reduction, backend=backend)
        torch.testing.assert_close(found, reference_cross_entropy(hidden, weight, labels, reduction=reduction))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", LIBRARIES)
def test_the_matrix_is_trained_over_frozen_hidden_states(backend, reduction, on_gpu):
    hidden, weight, _, _, labels = inputs()
    found, expected = (
        torch.autograd.grad(function(hidden.detach(), weight, labels, reduction=reduction, **extra).sum(), weight)[0]
        for function, extra in ((tied_cross_entropy, {"backend": backend}), (reference_cross_entropy, {}))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_without_gradients_none_are_asked_for(backend, on_gpu):
    hidden, weight, _, _, labels = inputs()
    with torch.no_grad():
        loss = tied_cross_entropy(hidden, weight, labels, backend=backend)
    torch.testing.assert_close(loss, reference_cross_entropy(hidden, weight, labels).detach())
    assert not loss.requires_grad
    if backend == "liger":
        assert not on_gpu["liger"].calls[0]["input"].requires_grad


@pytest.mark.parametrize("backend", LIBRARIES)
def test_under_autocast_the_products_are_in_its_dtype_and_gradients_in_that_of_the_parameters(backend, on_gpu):
    hidden, weight, _, _, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = tied_cross_entropy(hidden, weight, labels, backend=backend)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, [hidden, weight])
    expected = torch.autograd.grad(reference_cross_entropy(hidden, weight, labels), [hidden, weight])
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)


def test_a_second_backward_pass_through_gradients_that_are_given_out_is_refused(on_gpu):
    hidden, weight, _, _, labels = inputs()
    loss = tied_cross_entropy(hidden, weight, labels, backend="liger")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time.*Compute the loss again"):
        loss.backward()


@pytest.mark.parametrize("backend,options", [("cce", {}), ("liger", {"reduction": "none"})])
def test_a_second_backward_pass_that_makes_its_gradients_anew_is_right(backend, options, on_gpu):
    hidden, weight, _, _, labels = inputs()
    loss = tied_cross_entropy(hidden, weight, labels, backend=backend, **options).sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_gradient_of_the_gradient_is_refused(backend, on_gpu):
    hidden, weight, _, _, labels = inputs()
    loss = tied_cross_entropy(hidden, weight, labels, backend=backend)
    with pytest.raises(RuntimeError, match="create_graph=True.*reference_cross_entropy"):
        torch.autograd.grad(loss, weight, create_graph=True)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_tied_embedding_adds_its_gradient_to_the_librarys(backend, on_gpu):
    results = []
    for embed, function, extra in (
        (tied_embedding, tied_cross_entropy, {"backend": backend}),
        (F.embedding, reference_cross_entropy, {}),
    ):
        hidden, weight, _, _, labels = inputs()
        ids = labels.clamp_min(0)
        function(embed(ids, weight) * hidden, weight, labels, **extra).backward()
        results.append(weight.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", LIBRARIES)
def test_the_real_library_gives_the_numbers_of_the_reference_on_a_gpu(backend, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: the kernels of these libraries run nowhere else")
    if importlib.util.find_spec(MODULES[backend]) is None:
        pytest.skip(f"needs {PIP_NAMES[backend]}, which is an optional package")
    compare_all(backend, dtype, "cuda")


def compare_all(backend, dtype, device):
    """More than one block of words, of tokens and of columns; a soft cap at a size that CCE takes."""
    most = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for name, options, words in CASES:
        if name == backend:
            compared(backend, 20 * words, dtype, device, most, size={"tokens": 300, "width": 320}, **options)
