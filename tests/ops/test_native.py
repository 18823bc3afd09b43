"""What only the native kernels have: instruction sets, the threads of another library, a fork."""

import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from leapformer.ops import LinearState, Staircase, linear_attention
from leapformer.ops.native import library
from tests.ops.oracle import check_low, make_case

pytestmark = pytest.mark.requires_tool("native library")

PREAMBLE = """
import os, torch
from leapformer.ops import linear_attention
from leapformer.ops.native.library import openmp_runtimes

q, k, v = (torch.rand(2, 200, 4, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))

def attend():
    return linear_attention(q, k, v, visible="causal", impl="native").output

def threads():
    return len(os.listdir("/proc/self/task"))
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and forks")


def run(body: str) -> str:
    """What a fresh process prints; its failure is the test's."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(params=("baseline", "avx2", "avx512"))
def instructions(request):
    """Each instruction set that this machine runs."""
    before = library.instruction_set()
    try:
        library.use_instruction_set(request.param)
    except ValueError as error:
        assert request.param != "baseline" and request.param in str(error)  # every machine runs that one
        pytest.skip(str(error))
    yield request.param
    library.use_instruction_set(before)
    assert library.instruction_set() == before


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_instruction_set_of_this_machine(dtype, instructions):
    for visible in ("all", "causal", "wait-k"):
        check_low(make_case(visible, T=70, K=20, V=17, R=2, relu=True).away_from_zero().to(dtype), "native")
    for rank in ({}, {"R": 2}, {"R": 3}, {"angles": 1, "mask": True}):
        case = make_case("all", T=70, K=20, V=17, H=1, decay=True, state=True, **rank)
        check_low(case.away_from_zero().to(dtype), "native")


# ---- angles ----------------------------------------------------------------------------------------------------------

ANGLE_ERROR = 2.0**-22  # what csrc/angles.h promises
SIZES = {
    "of a few turns": lambda x: 20 * (x - 0.5),
    "of hundreds": lambda x: 600 * (x - 0.5),
    "up to 2^24": lambda x: 2.0**24 * (2 * x - 1),
    "of any size": lambda x: (2 * x - 1) * 10.0 ** (38 * x.roll(1)),
    "tiny": lambda x: (2 * x - 1) * 10.0 ** (-40 * x.roll(1)),
    "near multiples of pi/2": lambda x: (1e5 * (x - 0.5)).round() * (math.pi / 2) * (1 + 1e-7 * (x.roll(1) - 0.5)),
}


def factors_of(angles):
    """What the kernels make of angles [n]: 16 tokens to a sample, each alone in its column of the state."""
    angles = angles.view(-1, 16, 1, 1)
    B = angles.shape[0]
    k = torch.eye(16).view(1, 16, 1, 16).expand(B, 16, 1, 16)
    none, v = torch.zeros(B, 0, 1, 16), torch.zeros(B, 16, 1, 1)
    keywords = {"q_angles": torch.zeros(B, 0, 1, 1), "k_angles": angles, "return_state": True, "impl": "native"}
    return linear_attention(none, k, v, **keywords).state.z[:, 0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("size", SIZES)
def test_cosines_and_sines(size, instructions):
    x = torch.rand(2**15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = SIZES[size](x).to(torch.float32)
    cosines, sines = factors_of(angles)
    for found, exact in ((cosines, angles.double().cos()), (sines, angles.double().sin())):
        assert (found.double() - exact).abs().max() <= ANGLE_ERROR


def test_angles_that_are_no_angles(instructions):
    angles = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    cosines, sines = (t.view(5, 16) for t in factors_of(angles.repeat_interleave(16)))
    assert (cosines[:2] - 1).abs().max() <= ANGLE_ERROR and sines[:2].eq(0).all()
    assert cosines[2:].isnan().all() and sines[2:].isnan().all()


def test_precise_angles_lose_their_turns_first():
    """Of float64 angles float32 holds what is left of a turn, not the turns."""
    x = torch.rand(2**10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e6
    cosines, sines = factors_of(x)
    # Rounding an angle below 2 pi to float32 costs half of 2^-21.
    assert (cosines.double() - x.cos()).abs().max() <= ANGLE_ERROR + 2.0**-22
    assert (sines.double() - x.sin()).abs().max() <= ANGLE_ERROR + 2.0**-22


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="sse9"):
        library.use_instruction_set("sse9")


@linux
def test_no_second_thread_pool():
    """The kernels run on the pool that torch has mapped: no other runtime, and no threads beside those."""
    printed = run("""
        torch.set_num_threads(2)
        before = openmp_runtimes()
        x = torch.rand(512, 512) @ torch.rand(512, 512)  # torch's own pool is up
        x.exp_(), torch.rand(2**20).exp_()
        own = threads()
        attend()
        assert openmp_runtimes() == before, (before, openmp_runtimes())
        assert threads() == own, (own, threads())
        print(len(before))
    """)
    assert printed.strip() == "1"


@linux
def test_one_thread_enters_no_pool():
    printed = run("""
        torch.set_num_threads(1)
        before = threads()
        attend()
        print(threads() - before)
    """)
    assert printed.strip() == "0"


@linux
def test_fork_after_a_parallel_region():
    printed = run("""
        torch.set_num_threads(2)
        expected = attend()
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(attend(), expected) else 3)
        print(os.waitpid(child, 0)[1], torch.equal(attend(), expected))
    """)
    assert printed.split() == ["0", "True"]


@linux
def test_workers_of_a_data_loader():
    printed = run("""
        torch.set_num_threads(2)
        expected = attend()

        class Data(torch.utils.data.Dataset):
            def __len__(self):
                return 4

            def __getitem__(self, i):
                return attend()

        loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context="fork")
        print(all(torch.equal(found, expected) for found in loader))
    """)
    assert printed.strip() == "True"


@pytest.mark.parametrize("form", ({"R": 2, "relu": True}, {"angles": 1}, {"R": 2, "decay": True}))
@pytest.mark.parametrize("visible", ("causal", "all"))
def test_any_number_of_threads_gives_the_same_bits(visible, form):
    case = make_case(visible, T=150, B=2, H=4, **form).to(torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            leaves = {name: None if t is None else t.clone().requires_grad_() for name, t in case.leaves.items()}
            output = replace(case, leaves=leaves).call("native").output
            output.square().sum().backward()
            results.append([output, *(t.grad for t in leaves.values() if t is not None)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("visible", ("all", "causal", Staircase.wait_k(3, 2)))
def test_queries_keys_and_values_that_share_memory(visible):
    """One tensor for all three, and one row for all tokens: read, never written."""
    x = torch.rand(1, 70, 2, 16, generator=torch.Generator().manual_seed(0))
    for shared in (x, x[:, :1].expand(1, 70, 2, 16)):
        kept = shared.clone()
        found = linear_attention(shared, shared, shared, visible=visible, impl="native").output
        expected = linear_attention(*(kept.double() for _ in range(3)), visible=visible, impl="reference").output
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(shared, kept)


# ---- memory ----------------------------------------------------------------------------------------------------------

NO_MEMORY = "no memory for the kernels' own buffers"


@pytest.fixture
def limited_memory():
    """Allocations of the kernels fail beyond a size; those that threads already have stay."""
    yield library.limit_memory
    library.limit_memory(0)


@pytest.mark.parametrize("visible", ("causal", Staircase.wait_k(3, 2)))
def test_without_memory_there_is_an_exception(visible, limited_memory):
    """Of a width that no other test has, so that no thread has the memory yet."""
    x = torch.rand(1, 70, 1, 333)
    limited_memory(1)
    with pytest.raises(MemoryError, match=NO_MEMORY) as caught:
        linear_attention(x, x, x, visible=visible, impl="native")
    assert "\n" not in str(caught.value) and "K=333" in str(caught.value)
    limited_memory(0)
    q = x.clone().requires_grad_()
    output = linear_attention(q, x, x, visible=visible, impl="native").output
    limited_memory(1)
    with pytest.raises(MemoryError, match=NO_MEMORY):  # backward needs more
        output.sum().backward()
    limited_memory(0)
    assert torch.equal(linear_attention(x, x, x, visible=visible, impl="native").output, output)


def test_a_state_is_not_touched_without_memory(limited_memory):
    x, state = torch.rand(1, 1, 2, 345), LinearState.zeros(1, 2, 1, 345, 345)
    limited_memory(1)
    with torch.no_grad(), pytest.raises(MemoryError, match="step"):
        linear_attention(x, x, x, visible="causal", initial_state=state, update_state=True, impl="native")
    assert state.kv.eq(0).all() and state.z.eq(0).all()


def test_without_memory_where_later_keys_are_seen(limited_memory):
    """The sweeps keep something of every token: a longer sequence needs more."""
    x, decay = torch.rand(1, 1000, 1, 9), -torch.rand(1, 1000, 1)
    expected = linear_attention(x, x, x, log_decay=decay, impl="native").output
    limited_memory(1)
    with pytest.raises(MemoryError, match=NO_MEMORY):
        linear_attention(*[x.repeat(1, 9, 1, 1)] * 3, log_decay=decay.repeat(1, 9, 1), impl="native")
    limited_memory(0)
    assert torch.equal(linear_attention(x, x, x, log_decay=decay, impl="native").output, expected)


def test_without_memory_in_other_threads():
    """A thread without memory leaves its share to the others; the process lives in any case."""
    printed = run("""
        from leapformer.ops import Staircase
        from leapformer.ops.native import library
        torch.set_num_threads(2)
        x = torch.rand(4, 1300, 1, 64)
        expected = linear_attention(x[:1, :64], x[:1, :64], x[:1, :64], visible="causal", impl="native").output
        for limit in (1, 1000, 20000):  # the plan, the states on their way, the threads' own
            for visible in ("causal", Staircase.wait_k(3, 2)):
                for given in (x, x[:1]):
                    library.limit_memory(limit)
                    try:
                        linear_attention(given, given, given, visible=visible, impl="native")
                        print("done")
                    except MemoryError as error:
                        print("MemoryError")
        library.limit_memory(0)
        assert torch.equal(linear_attention(x, x, x, visible="causal", impl="native").output[:1, :64], expected)
    """)
    # The caller has memory from the first call; without pieces and plan that is enough.
    assert set(printed.split()) == {"done", "MemoryError"}


@linux
def test_a_full_address_space_is_an_exception():
    printed = run("""
        import resource
        torch.set_num_threads(2)
        attend()  # everything is loaded, and the threads are there
        x = torch.rand(2, 8, 2, 3000)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, -1))
        try:
            linear_attention(x, x, x, visible="causal", impl="native")
        except (MemoryError, RuntimeError) as error:
            print(type(error).__name__, "\\n" in str(error))
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        print(attend().isfinite().all().item())
    """)
    assert printed.split()[0] in ("MemoryError", "RuntimeError") and printed.split()[-1] == "True"
