"""The delta rule in chunks against the recurrence, token by token in float64: values, gradients, states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from leapformer.ops import LinearState, delta_attention

B, H, G, K, V = 2, 4, 2, 5, 3


DECAYS = [None, "head", "channel"]


def inputs(T: int, *, rows: int = B, decay: str | None = "head", seed: int = 0, most: float = 2.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    found = {
        "q": numbers(rows, T, H, K),
        "k": F.normalize(numbers(rows, T, G, K), dim=-1),
        "v": numbers(rows, T, G, V),
        "beta": most * torch.sigmoid(2 * numbers(rows, T, H)),
    }
    if decay is not None:
        found["log_decay"] = F.logsigmoid(1 + 2 * numbers(rows, T, H, *([K] if decay == "channel" else [])))
    return {name: x.requires_grad_() for name, x in found.items()}


def recurrence(q, k, v, beta, log_decay=None, state=None, mask=None) -> tuple[Tensor, Tensor]:
    """The definition, one row and one token after the other; padding is left out."""
    rows, T = q.shape[:2]
    k, v = (x.repeat_interleave(H // G, 2) for x in (k, v))
    outputs, states = [], []
    for b in range(rows):
        S, row = q.new_zeros(H, K, V) if state is None else state[b], []
        for t in range(T):
            if mask is None or mask[b, t]:
                S = S if log_decay is None else S * log_decay[b, t].exp().reshape(H, -1, 1)
                held = torch.einsum("hkv,hk->hv", S, k[b, t])
                S = S + beta[b, t][:, None, None] * torch.einsum("hk,hv->hkv", k[b, t], v[b, t] - held)
            row.append(torch.einsum("hkv,hk->hv", S, q[b, t]))
        outputs.append(torch.stack(row) if row else q.new_zeros(0, H, V))
        states.append(S)
    return torch.stack(outputs), torch.stack(states)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def compare(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], leaves: list[Tensor]) -> None:
    """Outputs, states, and the gradients of a function of both."""
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    gradients = [torch.autograd.grad((y.sin().sum() + s.cos().sum()), leaves) for y, s in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        close(a, b)


def of_states(output) -> tuple[Tensor, Tensor]:
    return output.output, output.state.kv[:, :, 0]


def some_state(rows: int) -> LinearState:
    kv = torch.randn(rows, H, 1, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return LinearState(kv.requires_grad_(), torch.zeros(rows, H, 1, K, dtype=torch.float64))


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_equal_the_recurrence(T, decay):
    given, state = inputs(T, decay=decay), some_state(B)
    found = of_states(delta_attention(**given, initial_state=state, return_state=True))
    compare(found, recurrence(**given, state=state.kv[:, :, 0]), [*given.values(), state.kv])


@pytest.mark.parametrize("decay", DECAYS)
def test_padding_neither_writes_nor_decays(decay):
    given = inputs(90, decay=decay)
    mask = torch.rand(B, 90, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[1, :40] = False
    y, last = of_states(delta_attention(**given, key_mask=mask, return_state=True))
    wanted, wanted_last = recurrence(**given, mask=mask)
    leaves = list(given.values())
    compare((y[mask], last), (wanted[mask], wanted_last), leaves)
    loud = {name: x.masked_fill(~mask.reshape(B, 90, *[1] * (x.dim() - 2)), torch.nan) for name, x in given.items()}
    y = delta_attention(**loud, key_mask=mask).output
    close(y[mask], wanted[mask])
    assert all(g.isfinite().all() for g in torch.autograd.grad(y[mask].sum(), leaves))


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_sequences_are_as_if_alone(decay):
    lengths = [3, 0, 70, 64, 1, 130]
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    given, state = inputs(sum(lengths), rows=1, decay=decay), some_state(len(lengths))
    found = of_states(delta_attention(**given, cu_seqlens=bounds, initial_state=state, return_state=True))
    parts = [
        recurrence(**{name: x[:, a:b] for name, x in given.items()}, state=state.kv[n : n + 1, :, 0])
        for n, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    ]
    wanted = torch.cat([y for y, _ in parts], 1), torch.cat([s for _, s in parts])
    compare(found, wanted, [*given.values(), state.kv])


def test_a_split_goes_on_where_it_was():
    given = inputs(130)
    whole = delta_attention(**given, return_state=True)
    state, parts = None, []
    for start, end in ((0, 1), (1, 70), (70, 71), (71, 130)):
        piece = {name: x[:, start:end] for name, x in given.items()}
        y, state = delta_attention(**piece, initial_state=state, return_state=True)
        parts.append(y)
    close(torch.cat(parts, 1), whole.output)
    close(state.kv, whole.state.kv)
    close(state.log_decay, given["log_decay"].sum(1))


def test_no_token_at_all_leaves_the_state():
    given, state = inputs(0), some_state(B)
    y, last = delta_attention(**given, initial_state=state, return_state=True)
    assert y.shape == (B, 0, H, V)
    close(last.kv, state.kv)


def test_a_key_written_twice_is_replaced():
    """With beta 1 the state answers a key with what was last written under it."""
    q = k = F.normalize(torch.ones(1, 2, 1, K), dim=-1)
    v = torch.tensor([[[[1.0]], [[5.0]]]])
    y = delta_attention(q, k, v, torch.ones(1, 2, 1)).output
    torch.testing.assert_close(y, v)


def test_resets_and_strong_decays_leave_numbers():
    given = {name: x.detach() for name, x in inputs(70).items()}
    given["log_decay"][:, 10] = -torch.inf
    given["log_decay"][:, 20:30] = -1e30
    leaves = [x.requires_grad_() for x in given.values()]
    found = of_states(delta_attention(**given, return_state=True))
    wanted = recurrence(**given)
    close(found[0], wanted[0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(found[0].sum(), leaves))


def test_half_precision_is_computed_in_float32():
    small = {name: x.detach().to(torch.bfloat16) for name, x in inputs(100).items()}
    y, state = delta_attention(**small, return_state=True)
    assert y.dtype == torch.bfloat16 and state.kv.dtype == torch.float32
    exact = delta_attention(**{name: x.double() for name, x in small.items()}).output
    # bfloat16 rounds the output once, to 2^-8 of each number.
    torch.testing.assert_close(y.double(), exact, atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(B, 4, G, K + 1)}, r"k: expected \[2, 4, G, 5\], got \(2, 4, 2, 6\)"),
        ({"k": torch.zeros(B, 4, 3, K)}, "k: expected a number of heads that divides 4, got 3"),
        ({"v": torch.zeros(B, 4, 1, V)}, r"v: expected \[2, 4, 2, V\], got \(2, 4, 1, 3\)"),
        ({"beta": torch.zeros(B, 4, G)}, r"beta: expected \[2, 4, 4\], got \(2, 4, 2\)"),
        ({"log_decay": torch.zeros(B, 4, G)}, r"log_decay: expected \[2, 4, 4\] or \[2, 4, 4, 5\], got \(2, 4, 2\)"),
        ({"key_mask": torch.ones(B, 4)}, r"key_mask: expected bool \[2, 4\], got torch.float32 \[2, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: expected a batch of 1, got 2"),
        ({"initial_state": LinearState.zeros(B, G, 1, K, V)}, r"initial_state.kv: expected \[2, 4, R, 5 / R, 3\], got"),
        ({"q": torch.zeros(B, 4, K)}, "q: expected a floating .batch, tokens, heads, width., got"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {name: x.detach() for name, x in inputs(4).items()}
    with pytest.raises(ValueError, match=message) as error:
        delta_attention(**(given | change))
    assert "\n" not in str(error.value)
