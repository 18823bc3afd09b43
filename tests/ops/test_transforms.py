"""torch.func and other derivatives: the reference takes all of them, the others say in one line that they don't."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from leapformer.ops import LeapWeights, leap_attention, linear_attention
from tests.ops.oracle import takes

x, many = torch.rand(1, 5, 1, 2), torch.rand(3, 1, 5, 1, 2)
keys, values = torch.rand(2, 1, 5, 1, 2).unbind()


def attention(impl):
    return lambda q: linear_attention(q, keys, values, visible="causal", impl=impl).output


def forward_mode(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, keys))).tangent


def second(f):
    q = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(q).square().sum(), q, create_graph=True)
    return torch.autograd.grad(first.square().sum(), q)[0]


def in_batches(f):
    q = x.clone().requires_grad_()
    return torch.autograd.grad(f(q), q, grad_outputs=many, is_grads_batched=True)[0]


TRANSFORMS = {
    "vmap": lambda f: vmap(f)(many),
    "grad": lambda f: grad(lambda q: f(q).square().sum())(x),
    "vjp": lambda f: vjp(f, x)[1](torch.ones_like(x))[0],
    "jvp": lambda f: jvp(f, (x,), (keys,))[1],
    "jacrev": lambda f: jacrev(f)(x),
    "jacfwd": lambda f: jacfwd(f)(x),
    "hessian": lambda f: hessian(lambda q: f(q).square().sum())(x),
    "gradients of samples": lambda f: vmap(grad(lambda q: f(q).square().sum()))(many),
    "without gradients": lambda f: vmap(torch.no_grad()(f))(many),
    "forward mode": forward_mode,
    "second derivatives": second,
    "gradients in batches": in_batches,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_reference_takes_all(name):
    found = TRANSFORMS[name](attention("reference"))
    assert found.isfinite().all() and found.ne(0).any()


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    "impl", ("torch", pytest.param("native", marks=pytest.mark.requires_tool("native library")), "auto")
)
def test_the_others_refuse_in_one_line(name, impl):
    """With native, a tangent was left out unsaid."""
    with (
        pytest.raises(RuntimeError, match='no autograd formula.*impl="reference"') as caught,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", UserWarning)
        TRANSFORMS[name](attention(impl))
    assert "\n" not in str(caught.value)


def test_transforms_of_modules_inside(impl):
    """LeaP modules in the kernels, under grad of a weight."""

    def loss(bias):
        leap = LeapWeights(None, None, torch.ones(1, 2), bias)
        return leap_attention(x, keys, values, leap, leap, impl=impl).output.sum()

    if impl == "reference":
        assert grad(loss)(torch.zeros(1)).isfinite().all()
    else:
        with pytest.raises(RuntimeError, match='impl="reference"'):
            grad(loss)(torch.zeros(1))


def test_attention_beside_a_transform(impl):
    """A transform of something else changes nothing, and functional_call is none."""
    expected = attention(impl)(x)
    assert torch.equal(vmap(lambda scale: scale * attention(impl)(x))(torch.ones(2))[1], expected)
    with forward_ad.dual_level():
        assert torch.equal(attention(impl)(x), expected)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(2))

        def forward(self, q):
            return attention(impl)(q @ self.weight)

    layer, weight = Layer(), (2 * torch.eye(2)).requires_grad_()
    functional_call(layer, {"weight": weight}, (x,)).square().sum().backward()
    assert takes(impl, torch.float32) and weight.grad.isfinite().all() and layer.weight.grad is None
