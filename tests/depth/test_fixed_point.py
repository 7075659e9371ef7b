"""A block to its fixed point, beside the same block unrolled."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_tying.depth import FixedPoint, NoFixedPointError


class Block(nn.Module):
    """A contraction: the spectral norm of the weight is `scale`."""

    def __init__(self, scale=0.8, width=8):
        super().__init__()
        self.linear = nn.Linear(width, width)
        with torch.no_grad():
            self.linear.weight.mul_(scale / torch.linalg.matrix_norm(self.linear.weight, 2))

    def forward(self, z, x, shift=0.0):
        return torch.tanh(self.linear(z) + x + shift)


def unrolled(block, x, steps=400, **kwargs):
    """The control: so many steps that nothing changes, through autograd."""
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = block(z, x, **kwargs)
    return z


def gradients(output, inputs):
    return torch.autograd.grad((output * torch.arange(output.numel()).reshape(output.shape)).sum(), inputs)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 5, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_value_and_gradients_are_those_of_the_unrolled_block(shape, dtype):
    block, x = Block().to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    shift = torch.randn(8, dtype=dtype, requires_grad=True)
    inputs = [x, shift, *block.parameters()]
    equilibrium = FixedPoint(block)
    found, expected = equilibrium(x, shift=shift), unrolled(block, x, shift=shift)
    assert equilibrium.solution.converged and (found - block(found, x, shift)).abs().max() < 1e-5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)
    assert equilibrium.backward_solution.converged


def test_the_gradient_passes_the_check_by_finite_differences():
    block = Block(width=3).double()
    equilibrium = FixedPoint(block, tol=1e-12)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: equilibrium(x), (x, block.linear.weight))


def kept_for_backward(module, x):
    """Bytes that autograd keeps for the backward pass."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x).sum()
    return kept


def test_memory_does_not_grow_with_the_steps():
    x = torch.randn(4, 8, requires_grad=True)
    fast, slow = FixedPoint(Block(0.1)), FixedPoint(Block(0.99))
    assert kept_for_backward(fast, x) == kept_for_backward(slow, x)
    assert slow.solution.steps > 2 * fast.solution.steps
    grows = [kept_for_backward(lambda x, n=n: unrolled(slow.block, x, n), x) for n in (5, 10)]
    assert grows[1] > 1.5 * grows[0]


def test_a_fixed_point_is_found_where_plain_steps_move_away():
    equilibrium = FixedPoint(lambda z, x: 2 * z + x)
    torch.testing.assert_close(equilibrium(torch.ones(2, 3)), -torch.ones(2, 3))


@pytest.mark.parametrize(
    "block", [lambda z, x: z + 1 + 0 * x, lambda z, x: (3 * z).exp() + x], ids=["none", "overflow"]
)
def test_no_convergence_is_an_error_with_the_way_out(block):
    with pytest.raises(NoFixedPointError, match="no fixed point within .* `max_steps`"):
        FixedPoint(block, max_steps=20)(torch.ones(2, 3))


def test_more_steps_are_the_way_out():
    block, x = Block(0.99), torch.randn(3, 8)
    with pytest.raises(NoFixedPointError):
        FixedPoint(block, max_steps=3)(x)
    assert FixedPoint(block, max_steps=100)(x).isfinite().all()


def test_not_strict_the_result_is_flagged():
    equilibrium = FixedPoint(Block(0.99), max_steps=3, strict=False)
    equilibrium(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert not equilibrium.solution.converged and equilibrium.solution.steps == 3
    assert not equilibrium.backward_solution.converged


def test_a_backward_pass_that_does_not_converge_is_an_error():
    """The block is stopped where it starts, but its derivative there is one: u = u + g has no solution."""

    def block(z, x):
        return z + (z - x) ** 2 + (x - x.detach())

    x = torch.zeros(2, 3, requires_grad=True)
    output = FixedPoint(block, max_steps=10)(x)
    with pytest.raises(NoFixedPointError, match="derivative"):
        output.sum().backward()


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(FixedPoint(Block())(x).sum(), x, create_graph=True)


def test_a_block_that_ignores_z_is_itself():
    x = torch.randn(2, 3, requires_grad=True)
    output = FixedPoint(lambda z, x: x**2)(x)
    torch.testing.assert_close(output, x.detach() ** 2)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], 2 * x.detach())


def test_without_gradients_nothing_is_kept():
    equilibrium = FixedPoint(Block())
    with torch.no_grad():
        assert not equilibrium(torch.randn(2, 8)).requires_grad


def test_another_shape_needs_a_start():
    block = lambda z, x: 0.5 * z + x.sum(-1, keepdim=True)  # noqa: E731
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="Give `z0`"):
        FixedPoint(lambda z, x: block(z[..., :1], x))(x)
    torch.testing.assert_close(FixedPoint(block)(x, z0=torch.zeros(2, 1)), torch.full((2, 1), 6.0))


def test_half_precision_is_solved_to_its_own_precision():
    equilibrium = FixedPoint(Block().bfloat16())
    z = equilibrium(torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True))
    assert equilibrium.solution.converged and z.dtype == torch.bfloat16
    z.sum().backward()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_copies_and_state_dicts_are_those_of_a_module(copied):
    equilibrium, x = FixedPoint(Block()), torch.randn(2, 8)
    assert list(equilibrium.state_dict()) == ["block.linear.weight", "block.linear.bias"]
    assert torch.equal(copied(equilibrium)(x), equilibrium(x))


@pytest.mark.parametrize(
    "settings, error", [({"tol": 0}, ValueError), ({"tol": float("nan")}, ValueError), ({"max_steps": 0}, ValueError)]
)
def test_settings_are_checked(settings, error):
    with pytest.raises(error, match="expected"):
        FixedPoint(nn.Identity(), **settings)


def test_a_block_must_be_callable():
    with pytest.raises(TypeError, match="expected a module or a function"):
        FixedPoint(3)
