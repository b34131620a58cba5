"""Eight CPU devices, strict shapes, a compilation cache that outlives the run, a tiny model."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
  os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
# A collective holds a thread of XLA's pool until all eight devices are there, and a device can be
# in two at once: with eight threads, as many as there are by default, two half-met ones hang.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dataclasses  # noqa: E402
import gc  # noqa: E402
import importlib.util  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from qed_jax.model import qwen3  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

TINY = qwen3.Qwen3Config(
  vocab_size=64,
  hidden_size=32,
  intermediate_size=48,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  rope_theta=1e4,
  max_position=512,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
  dtype="float32",
  remat="none",
  attention="xla",
)


# Regions of memory, at 100 KB or so each; a process may have 65,530, and there may be four of them.
MAPS = 15_000


@pytest.fixture(scope="module", autouse=True)
def programs_of_many_files():
  """Lets go of compiled programs, for each of which XLA maps several regions of memory, before they
  are too many. A run that kept them all died of it, "Aborted"."""
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_text().count("\n") > MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def tiny():
  """A Qwen3 of two layers, and its random float32 parameters: (config, params)."""
  return TINY, qwen3.init_params(TINY, jax.random.key(0), jnp.float32)


@pytest.fixture(scope="session")
def tiny_with():
  """tiny_with(num_heads=8, ...) -> config; sizes as in `tiny` unless given."""
  return lambda **changes: dataclasses.replace(TINY, **changes)


# Whole files that make their models with torch, which only the main lane installs.
WITH_TORCH = ["test_convert.py", "test_hf_weights.py", "test_parity.py", "test_peft.py"]
HAS_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore = [] if HAS_TORCH else WITH_TORCH


def pytest_report_header(config):
  return [] if HAS_TORCH else f"no torch here: {', '.join(WITH_TORCH)} are left out"
