"""What a GPU does with this program: numbers against references, times against rooflines.

  python tools/gpu_check.py      # any CUDA device; the table goes to docs/benchmarks.md

Checks (a failed one makes the exit code 1): fp32 logits against float64 on the CPU; sampler
log-probs against the trainer's score in fp32; gradients finite. Measures: a large bf16 product and
a copy (the ceilings), attention forward and backward in plain XLA and cuDNN, a train step of
--train, a decode step of --decode at several batch sizes. Before all that tools/gpu_kernels.py
checks and times our kernels, in a process of its own that is ended when it hangs.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from qed_kernels.flash_attention import flash_attention, pack  # noqa: E402

from qed_jax import sharding  # noqa: E402
from qed_jax.model import flops, kv_cache, presets, qwen3  # noqa: E402
from qed_jax.records import Batch  # noqa: E402
from qed_jax.rollout import engine as engines  # noqa: E402
from qed_jax.rollout.device import Shapes  # noqa: E402

TOLERANCE_LOGITS, TOLERANCE_LOGP = 2e-4, 1e-4
KERNELS_WITHIN = 270  # seconds; a kernel that hangs must not hide what comes after it
HOW = {"dtype": "bfloat16", "remat": "layer", "attention": "auto"}
ENGINE = {
  "lanes": 1,
  "prefill_budget": 8192,
  "stop_ids": (),
  "truncated_logp": False,
  "keep_prefixes": False,
}


def shapes(slots: int, max_length: int) -> Shapes:
  """Pages of 64 tokens in the compute dtype, prompts in pieces of 256."""
  return Shapes(
    slots=slots,
    max_length=max_length,
    page=64,
    pages=0,
    chunk=64,
    prefill_rows=4,
    prefill_tokens=256,
    kv_dtype="",
  )


def seconds(function, *args, repeats: int = 5) -> float:
  """Median wall time of a call, its result waited for, after one to compile."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - began)
  return float(np.median(times))


def ceilings() -> dict:
  """bf16 matrix product (TFLOP/s) and device copy (TB/s, bytes read and written)."""
  n = 8192
  a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
  product = seconds(jax.jit(lambda x: x @ x), a)
  x = jnp.ones((2**31,), jnp.bfloat16)
  copy = seconds(jax.jit(lambda x: x + 1), x)
  return {"matmul_tflops": 2 * n**3 / product / 1e12, "copy_tb_s": 2 * x.nbytes / copy / 1e12}


def small(dtype: str) -> qwen3.Qwen3Config:
  sizes = {**presets.PRESETS["tiny"], "vocab_size": 1024, "hidden_size": 256, "num_layers": 4}
  return qwen3.Qwen3Config(**sizes, dtype=dtype, remat="none", attention="xla")


def batch_of(model, rows: int, length: int, seed: int) -> Batch:
  """Random tokens, two segments a row."""
  rng = np.random.default_rng(seed)
  half = length // 2
  positions = np.tile(np.concatenate([np.arange(half), np.arange(length - half)]), (rows, 1))
  segments = np.tile(np.where(np.arange(length) < half, 1, 2), (rows, 1))
  weight = np.full((rows, length), 1 / (rows * length), np.float32)
  tokens = rng.integers(0, model.vocab_size, (rows, length))
  return Batch(*map(jnp.asarray, (tokens, positions, segments, weight)))


def numerics(mesh) -> dict:
  """Differences from float64 on the host, and of the sampler from the trainer."""
  cpu = jax.devices("cpu")[0]
  model = small("float32")
  params = qwen3.init_params(model, jax.random.key(1), jnp.float32)
  batch = batch_of(model, 2, 128, 0)

  def all_logits(config, params, batch):
    args = (batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    return qwen3.logits(config, params, qwen3.hidden(config, params, *args))

  here = {
    dtype: np.asarray(
      jax.jit(functools.partial(all_logits, dataclasses.replace(model, dtype=dtype)))(params, batch)
    )
    for dtype in ("float32", "bfloat16")
  }
  with jax.enable_x64(True), jax.default_device(cpu):
    exact = all_logits(
      dataclasses.replace(model, dtype="float64"),
      jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), params),
      jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), batch),
    )
    exact = np.asarray(exact)
  values = {f"logits_{k}_vs_float64": float(np.abs(v - exact).max()) for k, v in here.items()}

  for dtype in ("float32", "bfloat16"):
    config = dataclasses.replace(model, dtype=dtype)
    engine = engines.Engine(
      config, mesh=mesh, shapes=shapes(slots=8, max_length=128), **ENGINE | {"stop_ids": (0,)}
    )
    engine.set_params(params, 0)
    prompt = list(range(5, 25))
    requests = [engines.Request(prompt, 1, a, 64, 1.0) for a in range(8)]
    worst = 0.0
    for done in engine.generate(requests):
      tokens = np.concatenate([done.prompt_tokens, done.tokens])[None]
      ones = np.ones_like(tokens)
      row = Batch(*map(jnp.asarray, (tokens, np.arange(tokens.size)[None], ones, ones)))
      logp, _ = qwen3.score(config, params, row, 1.0, 64)
      worst = max(worst, float(np.abs(np.asarray(logp)[0, len(prompt) :] - done.logprobs).max()))
    values[f"sampler_vs_score_{dtype}"] = worst
  grads = jax.jit(jax.grad(lambda p: qwen3.score(model, p, batch, 0.8, 64)[0].mean()))(params)
  values["gradients_finite"] = bool(all(np.isfinite(g).all() for g in jax.tree.leaves(grads)))
  return values


def attention_times(length: int) -> dict:
  """TFLOP/s of causal attention at Qwen3-4B's heads, forward and forward + backward."""
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (1, length, 32, 128), jnp.bfloat16)
  k, v = (jax.random.normal(key, (1, length, 8, 128), jnp.bfloat16) for key in keys[1:])
  rows = pack(jnp.ones((1, length), jnp.int32), 32, 8, 128, "xla")
  work = 2 * 2 * length**2 * 32 * 128 / 2
  implementations = {
    "xla": lambda q, k, v: flash_attention(q, k, v, rows, implementation="xla")[0],
    "cudnn": lambda q, k, v: jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation="cudnn"
    ),
  }
  values = {}
  for name, attend in implementations.items():
    forward = seconds(jax.jit(attend), q, k, v)

    def loss(q, k, v, attend=attend):
      return attend(q, k, v).astype(jnp.float32).sum()

    both = seconds(jax.jit(jax.grad(loss, argnums=(0, 1, 2))), q, k, v)
    values[f"attention_{name}_{length}_forward_tflops"] = work / forward / 1e12
    values[f"attention_{name}_{length}_both_tflops"] = 3.5 * work / both / 1e12
  return values


def kernels() -> tuple[dict, list[str]]:
  """What tools/gpu_kernels.py finds, and what failed in it; its rows are printed as they come.

  Call it before anything here touches the GPU, of which a process takes most of the memory.
  """
  command = [sys.executable, str(Path(__file__).with_name("gpu_kernels.py"))]
  last = "nothing was said"
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    limit = threading.Timer(KERNELS_WITHIN, process.kill)
    limit.start()
    for line in process.stdout:
      last = line.strip()
      if not last.startswith("{"):
        print(last, flush=True)
    process.wait()
    limit.cancel()
  if process.returncode == 2:
    return {}, []  # no Hopper GPU, and it has said so
  if not last.startswith("{"):
    return {}, [f"gpu_kernels.py ended with {process.returncode}, after {last!r}"]
  found = json.loads(last)
  return found, found.pop("failed")


def train_step(preset: str, rows: int, length: int) -> dict:
  """Score, gradient and AdamW of random tokens; parameters and moments in bf16 to fit."""
  import optax

  model = presets.from_preset(preset, **HOW)
  params = qwen3.init_params(model, jax.random.key(0), jnp.bfloat16)
  optimizer = optax.adamw(1e-6)
  batch = batch_of(model, rows, length, 1)

  def loss(params, batch):
    logp, _ = qwen3.score(model, params, batch, 1.0, 1024)
    return -jnp.sum(logp * batch.weight_BT)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, batch):
    params, opt_state = state
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value

  state = (params, jax.jit(optimizer.init)(params))
  del params
  began = time.perf_counter()
  state, value = update(state, batch)
  jax.block_until_ready(value)
  compiling = time.perf_counter() - began
  times = []
  for _ in range(4):
    began = time.perf_counter()
    state, value = update(state, batch)
    jax.block_until_ready(value)
    times.append(time.perf_counter() - began)
  took = float(np.median(times))
  done = flops.training(model, batch.positions_BT, batch.segments_BT)
  return {
    f"train_{preset}_tokens_per_s": rows * length / took,
    f"train_{preset}_tflops": done / took / 1e12,
    f"train_{preset}_first_call_s": compiling,
    f"train_{preset}_loss": float(value),
  }


def decode_steps(preset: str, work: list[str], mesh, copy_tb_s: float) -> dict:
  """Milliseconds a decode step with `context` tokens in each of `slots` slots, and the share of the
  roofline: weights and live cache read once at the copy bandwidth measured here. No two prompts
  share a page."""
  model = dataclasses.replace(presets.from_preset(preset, **HOW), remat="none")
  params = qwen3.init_params(model, jax.random.key(0), jnp.bfloat16)
  weight_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  rng, values = np.random.default_rng(0), {}
  for slots, context in (map(int, item.split("x")) for item in work):
    name = f"decode_{preset}_b{slots}_ctx{context}"
    try:
      engine = engines.Engine(
        model, mesh=mesh, shapes=shapes(slots=slots, max_length=context + 512), **ENGINE
      )
      engine.set_params(params, 0)
      for attempt in range(slots):
        prompt = rng.integers(0, model.vocab_size, context).tolist()
        engine.submit(engines.Request(prompt, 0, attempt, 500, 1.0))
      began = time.perf_counter()
      while not engine.counters.sampled_tokens:  # prefill, compilation, the first chunk
        engine.step()
      values[f"{name}_first_token_s"] = time.perf_counter() - began
      before, began = engine.counters.decode_steps, time.perf_counter()
      for _ in range(4):
        engine.step()
      took = (time.perf_counter() - began) / (engine.counters.decode_steps - before)
    except Exception as error:  # a cache that a chip cannot hold must not hide the others
      values[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
      continue
    finally:
      engine = None
    live = slots * context * kv_cache.bytes_per_token(model, model.dtype)
    floor = (weight_bytes + live) / (copy_tb_s * 1e12)
    values |= {f"{name}_ms": 1e3 * took, f"{name}_tokens_per_s": slots / took}
    values[f"{name}_share_of_roofline"] = floor / took
  return values


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--train", default="qwen3-0.6b", help="preset of the train step")
  parser.add_argument("--rows", type=int, default=2)
  parser.add_argument("--length", type=int, default=8192)
  parser.add_argument("--decode", default="qwen3-4b", help="preset of the decode step")
  parser.add_argument(
    "--work",
    nargs="+",
    default=["1x4096", "16x4096", "64x4096", "16x32768"],
    help="slots x context tokens of the decode steps",
  )
  args = parser.parse_args()
  found, failed = kernels()
  device = jax.devices()[0]
  if device.platform != "gpu":
    print(f"error: the default device is {device.platform}: this needs a CUDA GPU", file=sys.stderr)
    return 2
  mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
  found |= {"device": device.device_kind, "jax": jax.__version__}
  steps = [
    ("numerics", lambda: numerics(mesh)),
    ("ceilings", ceilings),
    ("attention", lambda: attention_times(4096) | attention_times(16_384)),
    ("train", lambda: train_step(args.train, args.rows, args.length)),
    ("decode", lambda: decode_steps(
      args.decode, args.work, mesh, found.get("copy_tb_s", 3.0))),
  ]  # fmt: skip
  for name, step in steps:
    try:
      values = step()
    except Exception as error:  # one part that a chip cannot do must not hide the others
      failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
      print(f"{name}: failed: {failed[-1]}", flush=True)
      continue
    for key, value in values.items():
      print(f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |")
    sys.stdout.flush()
    found |= values
  limits = {
    "logits_float32_vs_float64": TOLERANCE_LOGITS,
    "sampler_vs_score_float32": TOLERANCE_LOGP,
  }
  failed += [f"{k} is {found[k]}" for k, limit in limits.items() if not found.get(k, 9e9) <= limit]
  if not found.get("gradients_finite"):
    failed.append("gradients are not finite")
  print(json.dumps(found | {"failed": failed}))
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
