"""Convolutional subsampling: the formula written out, padding, and frame by frame = as a whole for every length."""

from __future__ import annotations

import pytest
import torch

from leapformer.nn.subsampling import ConvSubsampling, SubsamplingCache, subsampled_length

M, C, D = 6, 3, 4


def layer(dtype: torch.dtype = torch.float64) -> ConvSubsampling:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvSubsampling(M, D, channels=C).to(dtype)


def frames(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv_by_hand(x: torch.Tensor, conv: torch.nn.Conv2d) -> torch.Tensor:
    """relu of kernel 3, stride 2, over x [channels, time, width], zero outside."""
    (_, time, width), (out, _, _, _) = x.shape, conv.weight.shape
    y = x.new_zeros(out, -(-time // 2), -(-width // 2))
    for t in range(y.shape[1]):
        for w in range(y.shape[2]):
            total = conv.bias.clone()
            for a in range(3):
                for b in range(3):
                    place = (2 * t + a - 1, 2 * w + b - 1)
                    if 0 <= place[0] < time and 0 <= place[1] < width:
                        total = total + conv.weight[:, :, a, b] @ x[:, place[0], place[1]]
            y[:, t, w] = total.clamp(min=0)
    return y


@torch.no_grad()
def by_hand(module: ConvSubsampling, x: torch.Tensor) -> torch.Tensor:
    """x [F, M] -> [T, D]."""
    hidden = x[None]
    for conv in module.convs:
        hidden = conv_by_hand(hidden, conv)
    flat = torch.stack([hidden[:, t].reshape(-1) for t in range(hidden.shape[1])])
    return flat @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 11])
def test_it_is_the_formula(length):
    module, x = layer(), frames(length, M)
    states = module(x[None])
    assert states.shape == (1, subsampled_length(length), D)
    torch.testing.assert_close(states[0], by_hand(module, x), atol=1e-12, rtol=1e-12)


def test_the_sizes_of_the_paper():
    module = ConvSubsampling(80, 256)
    assert module.proj.in_features == 5120
    assert module(torch.zeros(1, 36, 80)).shape == (1, 9, 256)


@torch.no_grad()
@pytest.mark.parametrize("length", range(18))
def test_pushes_of_any_size_give_what_the_whole_gives(length):
    module, x = layer(), frames(2, length, M)
    whole = module(x)
    for seed in range(4):
        sizes = torch.randint(0, 6, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
        cache, states, start = module.empty_cache(2), [], 0
        for size in sizes:
            new, cache = module.push(x[:, start : start + size], cache)
            states.append(new)
            start = min(start + size, length)
            assert sum(s.shape[1] for s in states) == start // 4
        states.append(module.finish(cache))
        torch.testing.assert_close(torch.cat(states, 1), whole, atol=1e-12, rtol=1e-12)


def test_state_j_uses_frames_4j_minus_3_to_4j_plus_3():
    module = layer()
    for conv in module.convs:  # nothing below the ReLU
        conv.weight.data.abs_()
        conv.bias.data.fill_(1)
    x = frames(1, 20, M).abs().requires_grad_()
    states = module(x)
    for j in range(5):
        (grad,) = torch.autograd.grad(states[0, j].sum(), x, retain_graph=True)
        used = grad[0].abs().sum(1).nonzero().flatten().tolist()
        assert used == [f for f in range(4 * j - 3, 4 * j + 4) if 0 <= f < 20]


def test_padding_never_leaks_whatever_it_holds():
    module, lengths = layer(), [13, 12, 6, 1, 0]
    x = frames(5, 13, M)
    for row, length in enumerate(lengths):
        x[row, length:] = (torch.nan, 1e9)[row % 2]
    states = module(x, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        real = subsampled_length(length)
        torch.testing.assert_close(states[row, :real], module(x[row : row + 1, :length])[0], atol=1e-12, rtol=1e-12)
        assert torch.equal(states[row, real:], torch.zeros_like(states[row, real:]))
    states.sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in module.parameters())


def test_gradients_of_a_padded_batch_are_those_of_its_utterances():
    module, lengths = layer(), [13, 12, 6, 1, 0]
    x, weights = frames(5, 13, M).requires_grad_(), frames(5, 4, D, seed=2)
    (module(x, torch.tensor(lengths)) * weights).sum().backward()
    got = [x.grad.clone(), *(weight.grad.clone() for weight in module.parameters())]
    module.zero_grad()
    x.grad = None
    for row, length in enumerate(lengths):
        real = subsampled_length(length)
        (module(x[row : row + 1, :length])[0] * weights[row, :real]).sum().backward()
    for one, other in zip(got, [x.grad, *(weight.grad for weight in module.parameters())], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_caches_are_small_and_can_be_picked_and_joined():
    module, x = layer(), frames(3, 60, M)
    sizes = set()
    cache = module.empty_cache(3)
    for start in range(0, 60, 4):
        _, cache = module.push(x[:, start : start + 4], cache)
        sizes.add(cache.nbytes)
    assert sizes == {8 * 3 * (M + C * M // 2)}
    early, more = module.push(x[:, :8], module.empty_cache(3))[1], frames(6, 8, M, seed=2)
    index = torch.tensor([2, 0, 1])
    joined = SubsamplingCache.join([early, cache.reorder(index)])
    expected = torch.cat([module.push(more[:3], early)[0], module.push(more[3:], cache.reorder(index))[0]])
    torch.testing.assert_close(module.push(more, joined)[0], expected, atol=1e-12, rtol=1e-12)
    past = torch.cat([x[index], more[3:]], 1)
    torch.testing.assert_close(expected[3:], module(past)[:, 15:], atol=1e-12, rtol=1e-12)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"features: expected shape \[batch, frames, 6\], got \[1, 4, 5\]"):
        layer()(frames(1, 4, 5))
