"""A decay per key channel against the recurrence, token by token in float64: values, gradients, states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops import LinearState, channel_decay_attention, linear_attention

B, H, G, K, V = 2, 4, 2, 5, 3


def inputs(T: int, *, rows: int = B, seed: int = 0, spread: float = 2.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    found = {
        "q": numbers(rows, T, H, K).exp(),
        "k": numbers(rows, T, G, K).exp(),
        "v": numbers(rows, T, G, V),
        "log_decay": F.logsigmoid(1 + spread * numbers(rows, T, H, K)),
    }
    return {name: x.requires_grad_() for name, x in found.items()}


def recurrence(q, k, v, log_decay, kv=None, z=None, mask=None, *, normalize: bool = True) -> tuple[Tensor, ...]:
    """The definition, one row and one token after the other; padding is left out."""
    rows, T = q.shape[:2]
    k, v = (x.repeat_interleave(H // G, 2) for x in (k, v))
    outputs, kvs, zs = [], [], []
    for b in range(rows):
        S, s = (q.new_zeros(H, K, V), q.new_zeros(H, K)) if kv is None else (kv[b, :, 0], z[b, :, 0])
        row = []
        for t in range(T):
            if mask is None or mask[b, t]:
                kept = log_decay[b, t].exp()
                S = S * kept[..., None] + torch.einsum("hk,hv->hkv", k[b, t], v[b, t])
                s = s * kept + k[b, t]
            y = torch.einsum("hkv,hk->hv", S, q[b, t])
            total = torch.einsum("hk,hk->h", s, q[b, t]).clamp(min=1e-6)
            row.append(y / total[:, None] if normalize else y)
        outputs.append(torch.stack(row) if row else q.new_zeros(0, H, V))
        kvs.append(S), zs.append(s)
    return torch.stack(outputs), torch.stack(kvs)[:, :, None], torch.stack(zs)[:, :, None]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def compare(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    """Outputs, states, and the gradients of a function of all."""
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    losses = [sum(x.sin().sum() for x in parts) for parts in (found, wanted)]
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        close(a, b)


def parts_of(output) -> tuple[Tensor, ...]:
    return output.output, output.state.kv, output.state.z


def some_state(rows: int) -> LinearState:
    draw = torch.Generator().manual_seed(9)
    kv = torch.randn(rows, H, 1, K, V, dtype=torch.float64, generator=draw)
    z = torch.rand(rows, H, 1, K, dtype=torch.float64, generator=draw)
    return LinearState(kv.requires_grad_(), z.requires_grad_())


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 70])
@pytest.mark.parametrize("normalize", [False, True])
def test_chunks_equal_the_recurrence(T, normalize):
    given, state = inputs(T), some_state(B)
    output = channel_decay_attention(**given, initial_state=state, return_state=True, normalize=normalize)
    wanted = recurrence(**given, kv=state.kv, z=state.z, normalize=normalize)
    compare(parts_of(output), wanted, [*given.values(), state.kv, state.z])


def test_padding_neither_writes_nor_decays():
    given = inputs(50)
    mask = torch.rand(B, 50, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[1, :20] = False
    y, *state = parts_of(channel_decay_attention(**given, key_mask=mask, return_state=True))
    wanted, *wanted_state = recurrence(**given, mask=mask)
    compare((y[mask], *state), (wanted[mask], *wanted_state), list(given.values()))


def test_packed_sequences_are_as_if_alone():
    lengths = [3, 0, 17, 16, 1, 40]
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    given, state = inputs(sum(lengths), rows=1), some_state(len(lengths))
    found = parts_of(channel_decay_attention(**given, cu_seqlens=bounds, initial_state=state, return_state=True))
    parts = [
        recurrence(**{name: x[:, a:b] for name, x in given.items()}, kv=state.kv[n : n + 1], z=state.z[n : n + 1])
        for n, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    ]
    outputs, kvs, zs = zip(*parts, strict=True)
    compare(found, (torch.cat(outputs, 1), torch.cat(kvs), torch.cat(zs)), [*given.values(), state.kv, state.z])


def test_a_split_goes_on_where_it_was():
    given = inputs(60)
    whole = channel_decay_attention(**given, return_state=True)
    state, parts = None, []
    for start, end in ((0, 1), (1, 30), (30, 31), (31, 60)):
        piece = {name: x[:, start:end] for name, x in given.items()}
        y, state = channel_decay_attention(**piece, initial_state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), whole.output)
    close(state.kv, whole.state.kv)
    close(state.z, whole.state.z)


def test_the_same_decay_in_all_channels_is_a_decay_per_head():
    given = inputs(40)
    of_heads = given.pop("log_decay")[..., 0]
    y = channel_decay_attention(**given, log_decay=of_heads[..., None].expand(-1, -1, -1, K)).output
    close(y, linear_attention(**given, log_decay=of_heads, visible="causal").output)


def test_strong_decays_are_as_exact_as_weak_ones():
    """Decays from none to e^-39 a token side by side: a chunk's factors reach e^624, and their products are right."""
    given = {name: x.detach() for name, x in inputs(40).items()}
    given["log_decay"] = -39 * torch.rand(B, 40, H, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given["log_decay"][:, ::3] = 0
    leaves = [x.requires_grad_() for x in given.values()]
    compare(parts_of(channel_decay_attention(**given, return_state=True)), recurrence(**given), leaves)


def test_a_reset_leaves_numbers():
    given = {name: x.detach() for name, x in inputs(40).items()}
    given["log_decay"][:, 10] = -torch.inf
    y = channel_decay_attention(**given).output
    alone = channel_decay_attention(**{name: x[:, 10:] for name, x in given.items()}).output
    close(y[:, 10:], alone)  # of the past exp(-40) is left


def test_half_precision_is_computed_in_float32():
    small = {name: x.detach().to(torch.bfloat16) for name, x in inputs(40).items()}
    y, state = channel_decay_attention(**small, return_state=True)
    assert y.dtype == torch.bfloat16 and state.kv.dtype == torch.float32
    exact = channel_decay_attention(**{name: x.double() for name, x in small.items()}).output
    torch.testing.assert_close(y.double(), exact, atol=1e-4, rtol=2**-8)  # rounded once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_decay": torch.zeros(B, 4, H)}, r"log_decay: expected \[2, 4, 4, 5\], got \(2, 4, 4\)"),
        ({"k": torch.zeros(B, 4, G, K + 1)}, r"k: expected \[2, 4, G, 5\], got \(2, 4, 2, 6\)"),
        ({"initial_state": LinearState.zeros(B, G, 1, K, V)}, r"initial_state.kv: expected \[2, 4, R, 5 / R, 3\], got"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {name: x.detach() for name, x in inputs(4).items()}
    with pytest.raises(ValueError, match=message):
        channel_decay_attention(**(given | change))
