"""The share of the matmul peak: FLOPs against closed formulas, and nothing left behind by counting them; memory that is kept."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lmssl
from lmssl import machine, output, packing
from lmssl.errors import out_of_memory
from lmssl.objectives import NextToken
from lmssl.objectives.cross_entropy import token_loss
from tests.helpers import arguments, small_model, token_set


class Chain(nn.Module):
    """Two linear layers, the first of which needs no gradient of its input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 10)

    def forward(self, x):
        return {"logits": self.second(self.first(x))}


def test_the_peak_of_memory_is_asked_anew():
    assert machine.most_memory() > 2**20
    assert not hasattr(machine.most_memory, "cache_info")
    assert hasattr(machine.native_bf16, "cache_info"), "asked in every step"


def test_flops_of_linear_layers_are_the_closed_formula():
    batch = {"x": torch.randn(7, 16), "labels": torch.randint(0, 10, (7,))}
    assert machine.step_flops(Chain(), batch, token_loss) == 2 * 7 * (2 * 16 * 32 + 3 * 32 * 10)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = x * self.scale
        return {"logits": F.scaled_dot_product_attention(x, x, x).flatten(0, 2)}


def test_flops_of_attention_are_counted_on_the_cpu():
    """Forward two products of L x L x d a head; backward five, one of them forward's again."""
    batch = {"x": torch.randn(2, 3, 8, 4), "labels": torch.randint(0, 4, (48,))}
    assert machine.step_flops(Attention(), batch, token_loss) == (2 + 5) * 2 * (2 * 3) * 8 * 8 * 4


def test_flops_of_documents_are_the_closed_formula():
    """Each document for itself, half of it where a token sees only what stands before it; as the kernel's own arguments stand."""
    query, starts = torch.randn(10, 2, 8), torch.tensor([0, 4, 10, 10, 10], dtype=torch.int32)
    for causal in (False, True):
        forward = packing._forward_flops(query, query, query, starts, starts, 6, 6, causal, None, [-1, -1], out_val=None)
        backward = packing._backward_flops(query, query, query, query, query, query[:, :, 0], starts, starts, 6, 6, causal, starts, None, None, out_val=None)
        assert forward == 2 * 2 * 2 * 8 * (16 + 36) // (2 if causal else 1)
        assert backward == forward * 5 // 2


def test_a_rows_flops_are_linear_in_rows_and_leave_no_gradient(shared_dir, tmp_path):
    tokens = token_set(shared_dir)
    trainer = lmssl.PretrainTrainer(small_model("llama", tokens.vocab()), NextToken(), tokens, arguments(tmp_path), 32, quiet=True)
    one, four = (machine.step_flops(trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(n)]), token_loss) for n in (1, 4))
    assert 0 < 4 * one == four
    assert all(p.grad is None for p in trainer.model.parameters())


def test_peak_share(shared_dir, tmp_path):
    """Bounded, the same in progress and metrics, absent where nobody looks."""
    tokens = token_set(shared_dir)
    for quiet in (False, True):
        trainer = lmssl.PretrainTrainer(small_model("llama", tokens.vocab()), NextToken(), tokens, arguments(tmp_path), 32, quiet=quiet)
        trainer.run()
        share = trainer.metrics()["matmul_share"]
        assert share is None if quiet else 0 < share < 1.2
        trainer.flops, trainer.peak = 100.0, 50.0
        assert trainer.peak_share(4, 2.0) == pytest.approx(100 * trainer.global_batch * 4 / 2 / 50)
        assert all(point["bits_per_byte"] > 0 for point in trainer.curve)


FAULTS = """
import resource, sys, torch
from lmssl import machine, packing
kept = machine.keep_memory('cpu') if sys.argv[1] == "keep" else False
def touch():
    torch.empty(2**24).fill_(1.0)
for _ in range(24):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    touch()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[int, int]:
    """(whether memory is kept, page faults of eight more blocks of 64 MB, after 24)."""
    plain = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FAULTS, how], env=plain | environment, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return int(kept), int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone")
def test_a_step_finds_the_memory_of_the_one_before():
    kept, count = faults("keep")
    assert kept
    assert count < 1000
    assert faults("leave")[1] >= 8 * 2**26 / 2**21  # pages of 2 MB at the most


@pytest.mark.skipif(sys.platform != "linux", reason="an allocator of Linux")
def test_an_allocation_that_the_environment_chose_is_left_alone():
    assert faults("keep", MALLOC_ARENA_MAX="2")[0] == 0


@pytest.mark.parametrize("modern", [False, True])
def test_a_gpu_too_old_for_triton_is_not_compiled_for(modern, monkeypatch):
    monkeypatch.setattr(machine, "has_triton", lambda: modern)
    monkeypatch.setenv("CC", "sh")
    assert machine.compiles("cuda") is modern


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"), RuntimeError("MPS backend out of memory (MPS")]
)
def test_full_memory_is_known_on_every_device(error):
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shape"))


def test_the_evidence_names_the_device_of_the_run():
    assert output.environment("mps")["device"].startswith("mps of ")
    assert output.environment("cpu")["device"] == output.environment(torch.device("cpu"))["device"]


def test_dropout_draws_what_torch_would_draw():
    torch.manual_seed(2**40 + 3)
    expected = torch.rand(5)
    machine.draw_from(2**40 + 3, torch.device("cpu"))
    assert torch.equal(torch.rand(5), expected)


def test_half_built_libraries_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for name in ("killed", "living", "whole"):
        (tmp_path / "ab" / f"{name}.main.so").parent.mkdir(exist_ok=True)
        (tmp_path / "ab" / f"{name}.main.so").write_bytes(b"" if name == "killed" else b"code")
        (tmp_path / "ab" / f"{name}.main.cpp").write_text("int x;")
    for name in ("killed", "living", "own"):
        (tmp_path / "ab" / f"{name}.main_CxxBuild").mkdir()
    (tmp_path / "locks").mkdir()
    code = "import sys, time; from torch.utils._filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "locks" / "living.lock")], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        machine.clear_half_built()
        other.kill()
    left = sorted(p.name for p in (tmp_path / "ab").iterdir())
    assert left == ["killed.main.cpp", "living.main.cpp", "living.main.so", "living.main_CxxBuild", "whole.main.cpp", "whole.main.so"]


@pytest.mark.skipif(not machine.compiles("cpu"), reason="needs a C++ compiler")
def test_a_run_after_one_that_was_killed_while_it_compiled(tmp_path):
    """As torch leaves it: the library is cut short, the folder of its build is there. Without the removal every later run ends with "file too short"."""
    code = """if True:
        import sys
        from torch._inductor.codecache import CppCodeCache
        from lmssl import machine

        if "clear" in sys.argv:
            machine.clear_half_built()
        print(CppCodeCache.load('extern "C" int three() { return 3; }').three())
    """

    def run(*args):
        return subprocess.run([sys.executable, "-c", code, *args], env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True)

    assert run().stdout.strip() == "3"
    libraries = list(tmp_path.glob("*/*.main.so"))
    assert libraries
    for library in libraries:
        library.write_bytes(b"")
        library.with_name(f"{library.name.removesuffix('.so')}_CxxBuild").mkdir()
    assert run("clear").stdout.strip() == "3"
