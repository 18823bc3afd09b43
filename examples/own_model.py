"""One LeaP attention layer in a plain PyTorch model of one's own, trained on a toy task.

The task: repeat a random string after a mark. Only a layer that looks back can know the second half.

    python examples/own_model.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leapformer.nn import build_attention

LETTERS, HALF, MARK = 8, 6, 8


class OwnModel(nn.Module):
    """An ordinary small model: [B, T] int64 -> logits [B, T, LETTERS + 1]."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(LETTERS + 1, width)
        self.places = nn.Embedding(2 * HALF, width)
        self.norm = nn.LayerNorm(width)
        # The one line that is about leapformer.
        self.attention = build_attention("leap", hidden_size=width, num_heads=4)
        self.head = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, LETTERS + 1)
        )

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids) + self.places.weight[: ids.shape[1]]
        attended, _ = self.attention(self.norm(hidden), visible="causal")
        return self.head(hidden + attended)


def make_batch(size: int, generator: torch.Generator) -> Tensor:
    """[size, 2 HALF + 1] int64: a string, the mark, the string again."""
    string = torch.randint(LETTERS, (size, HALF), generator=generator)
    return torch.cat([string, torch.full((size, 1), MARK), string], dim=1)


def copying_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Nats per letter of the second half; a model that cannot look back stays at ln 8 = 2.08."""
    logits = model(batch[:, :-1])[:, HALF:]
    return F.cross_entropy(logits.flatten(0, 1), batch[:, HALF + 1 :].flatten())


def train(steps: int = 100, *, seed: int = 0) -> list[float]:
    """Train for `steps` steps; return the loss of each."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = OwnModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = copying_loss(model, make_batch(64, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    history = train()
    for step in range(0, len(history), 20):
        print(f"step {step:3d}  loss {history[step]:.3f}")
    print(f"step {len(history) - 1:3d}  loss {history[-1]:.3f} (guessing is 2.079)")
