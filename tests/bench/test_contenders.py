"""Every contender computes what it says, so that what is timed against each other is the same work."""

from dataclasses import replace

import pytest
import torch

from benchmarks.contenders import FLA, RESEARCH, contender, others
from leapformer.bench import contenders
from leapformer.bench.contenders import CAUSAL, FORMS, LEAP, LRA, SDPA, contenders_for, form, useful_flops
from leapformer.bench.worker import Worker

SMALL_CAUSAL, SMALL_LRA = replace(CAUSAL, heads=2, width=8), replace(LRA, batch=3, width=8, hidden=4)
N = 20


def same_inputs(name, shape):
    """The output [B, N, H, K] of a contender, its inputs drawn as for our own implementation."""
    output = contender(name).call(shape, N, backward=False)()
    if name == RESEARCH:  # rows are batch x heads
        return output.unflatten(0, (shape.batch, shape.heads)).transpose(1, 2)
    return output


class OneLayout(contenders.Inputs):
    """Draws [B, N, H, ...] whatever is asked for, so that all contenders get the same numbers."""

    shape = SMALL_CAUSAL

    def _moved(self, draw, size):
        B, H = self.shape.batch, self.shape.heads
        if size[0] == B * H and size[0] != B:
            drawn = draw(B, size[1], H, *size[2:])
            return drawn.transpose(1, 2).reshape(size)
        return draw(*size)

    def leaf(self, *size):
        return self._moved(super().leaf, size)

    def proportion(self, *size):
        return self._moved(super().proportion, size)


@pytest.mark.parametrize(("shape", "ours"), [(SMALL_CAUSAL, "torch"), (SMALL_LRA, "torch" + LEAP)])
def test_research_code_gives_our_result(shape, ours, monkeypatch):
    monkeypatch.setattr(contenders, "Inputs", OneLayout)
    monkeypatch.setattr(OneLayout, "shape", shape)
    torch.testing.assert_close(same_inputs(RESEARCH, shape), same_inputs(ours, shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [SMALL_CAUSAL, SMALL_LRA], ids=lambda shape: shape.name)
def test_every_contender_gives_an_output_and_all_gradients(shape):
    everyone = [each for each in (*contenders_for(shape), *others()) if not each.why_not]
    assert {SDPA, RESEARCH, "torch" + LEAP} <= {each.name for each in everyone}
    for each in everyone:
        output = each.call(shape, N, backward=False)()
        assert output.isfinite().all() and not output.requires_grad
        gradients = each.call(shape, N, backward=True)()
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert sum(bool(gradient.any()) for gradient in gradients) == len(gradients)


@pytest.mark.parametrize(
    "change", [{"masked": True}, {"groups": 1}, {"visible": "wait-k"}], ids=lambda change: next(iter(change))
)
def test_odd_shapes_run(change):
    output = contender("torch").call(replace(SMALL_CAUSAL, **change), N, backward=False)()
    assert output.shape == (1, N, 2, 8) and output.isfinite().all()


def test_forms_are_what_they_say():
    """Angles are their factors, and a decay that is seen from both sides is another attention than a causal one."""
    calls = {name: form("torch", name).call(SMALL_CAUSAL, N, backward=False)() for name in FORMS}
    torch.testing.assert_close(calls["angles"], calls["factors"], rtol=1e-4, atol=1e-5)
    different = [calls[name] for name in FORMS if name != "angles"]
    for i, one in enumerate(different):
        assert one.shape == (1, N, 2, 8) and one.isfinite().all()
        assert not any(torch.allclose(one, other, atol=1e-3) for other in different[:i])
    for name in FORMS:
        gradients = form("torch", name).call(SMALL_CAUSAL, N, backward=True)()
        assert len(gradients) == {"plain": 3, "factors": 5, "angles": 5}.get(name, 4)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_useful_operations():
    # Per token and head, forward: 2 (65/2 x 128 + 2 x 2 x 64 x 64) = 41,088.
    assert useful_flops(CAUSAL, 10, backward=False) == 41_088 * 8 * 10
    assert useful_flops(CAUSAL, 10, backward=True) == 3.5 * 41_088 * 8 * 10
    assert useful_flops(LRA, 1, backward=False) == 2 * 4 * 32 * 32 * 32 * 2


def test_only_implementations_of_the_processor(monkeypatch):
    monkeypatch.setattr(
        contenders.leapformer.ops, "available_impls", lambda: ("reference", "torch", "triton"), raising=False
    )
    assert contenders.cpu_impls() == ["torch"]


def test_a_gpu_library_is_named_as_not_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "fla" or None)
    found = {each.name: each.why_not for each in others()}
    assert found == {RESEARCH: "", FLA: "its kernels need a GPU"} and FLA == "flash-linear-attention"


def test_what_users_compare_with_is_on_every_machine():
    for shape in (CAUSAL, LRA):
        names = [each.name for each in contenders_for(shape)]
        assert names == [n + s for n in contenders.cpu_impls() for s in (("", LEAP), (LEAP,))[shape.leap]] + [SDPA]


def test_only_what_keeps_all_pairs_needs_much_memory():
    assert contender(RESEARCH).bytes_needed(CAUSAL, 1000, backward=False) == 8 * 1e6 * 4 * 3
    assert contender(RESEARCH).bytes_needed(CAUSAL, 1000, backward=True) == 8 * 1e6 * 4 * 5
    assert contender(RESEARCH).bytes_needed(LRA, 1000, backward=True) == 0
    assert contender(SDPA).bytes_needed(CAUSAL, 1000, backward=True) == 0


def test_a_worker_times_and_tells_its_memory():
    # 4 heads x 512 x 512 x 4 bytes are 4 MiB, and the quadratic form holds several of these at once.
    shape = replace(CAUSAL, heads=4, width=8)
    with Worker(contender(RESEARCH), shape, 512, backward=True, threads=1) as worker:
        memory = worker.memory_mib()
        sample = worker.time(2)
    assert memory is None or 8 < memory < 60
    assert sample.wall > 0 and sample.cpu > 0
    assert worker.process.poll() is not None


def test_a_dead_worker_is_told():
    with Worker(contender("torch"), replace(CAUSAL, heads=2, width=8), 64, backward=True, threads=1) as worker:
        worker.process.kill()
        with pytest.raises(RuntimeError, match="the measuring process was ended by signal 9"):
            worker.time(1)


def test_a_worker_that_fails_says_why():
    with (
        Worker(contender("no such implementation"), CAUSAL, 64, backward=False, threads=1) as worker,
        pytest.raises(
            RuntimeError, match=r"ended with code 1: ValueError: impl: expected one of .*no such implementation"
        ),
    ):
        worker.time(1)
