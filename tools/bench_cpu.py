"""Sampling, scoring and forward+backward on the CPU beside torch transformers, in one run.

The shape is small enough for two cores: a Qwen3 of 4 layers, width 256, 8 query and 4 key/value
heads of 32, MLP 768, 4,096 tokens, tied, float32, 4.2 M parameters. Work: 8 prompts of 64 tokens
and 64 new tokens each; log-probs of 8 x 128 tokens; loss and gradient of 8 x 128 tokens. Each
library lives in a process of its own, with the same weights and tokens; they take turns, a
second of one piece of work at a time, and what is printed is the median of the ratios of
neighbouring turns. Greedy tokens of the two must be equal. The last line is JSON; exits 1 when
tokens differ.

  python tools/bench_cpu.py --repeats=9
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SIZES = {
  "vocab_size": 4096,
  "hidden_size": 256,
  "intermediate_size": 768,
  "num_layers": 4,
  "num_heads": 8,
  "num_kv_heads": 4,
  "head_dim": 32,
}
ROWS, PROMPT, NEW, SCORED = 8, 64, 64, 128
TOKENS = {
  "sample": ROWS * NEW,
  "greedy": ROWS * NEW,
  "score": ROWS * SCORED,
  "train": ROWS * SCORED,
}
TARGETS = {"sample": 3.0, "greedy": 3.0, "score": 1.0, "train": 1.0}
WORK = tuple(TOKENS)
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # as in the Makefile, and for both
TURN = 1.0  # seconds that a library works before the other takes over: both run warm


def make_inputs(path: Path, seed: int) -> None:
  """Weights in Hugging Face's names and layout, and the tokens, for both workers."""
  rng = np.random.default_rng(seed)
  s = SIZES
  D, F, H = s["hidden_size"], s["intermediate_size"], s["head_dim"]
  queries, keys = s["num_heads"] * H, s["num_kv_heads"] * H
  shapes = {"model.embed_tokens.weight": (s["vocab_size"], D), "model.norm.weight": (D,)}
  for i in range(s["num_layers"]):
    layer = f"model.layers.{i}"
    shapes |= {
      f"{layer}.input_layernorm.weight": (D,),
      f"{layer}.self_attn.q_proj.weight": (queries, D),
      f"{layer}.self_attn.k_proj.weight": (keys, D),
      f"{layer}.self_attn.v_proj.weight": (keys, D),
      f"{layer}.self_attn.o_proj.weight": (D, queries),
      f"{layer}.self_attn.q_norm.weight": (H,),
      f"{layer}.self_attn.k_norm.weight": (H,),
      f"{layer}.post_attention_layernorm.weight": (D,),
      f"{layer}.mlp.gate_proj.weight": (F, D),
      f"{layer}.mlp.up_proj.weight": (F, D),
      f"{layer}.mlp.down_proj.weight": (D, F),
    }
  arrays = {}
  for name, shape in shapes.items():
    scale = 1.0 if len(shape) == 1 else 0.05
    noise = rng.standard_normal(shape) * (0.1 if len(shape) == 1 else scale)
    arrays[name] = (noise + (scale if len(shape) == 1 else 0)).astype(np.float32)
  arrays["prompts"] = rng.integers(0, s["vocab_size"], (ROWS, PROMPT)).astype(np.int64)
  arrays["scored"] = rng.integers(0, s["vocab_size"], (ROWS, SCORED)).astype(np.int64)
  np.savez(path, **arrays)


def torch_work(inputs: dict) -> dict:
  """The work in torch transformers: name -> function of no arguments."""
  import torch
  from transformers import Qwen3Config, Qwen3ForCausalLM

  config = Qwen3Config(
    vocab_size=SIZES["vocab_size"],
    hidden_size=SIZES["hidden_size"],
    intermediate_size=SIZES["intermediate_size"],
    num_hidden_layers=SIZES["num_layers"],
    num_attention_heads=SIZES["num_heads"],
    num_key_value_heads=SIZES["num_kv_heads"],
    head_dim=SIZES["head_dim"],
    max_position_embeddings=512,
    tie_word_embeddings=True,
    eos_token_id=None,
    pad_token_id=0,
    bos_token_id=None,
  )
  model = Qwen3ForCausalLM(config).eval()
  weights = {k: torch.from_numpy(v) for k, v in inputs.items() if k.startswith("model.")}
  missing, extra = model.load_state_dict(weights, strict=False)
  assert missing == ["lm_head.weight"] and not extra, (missing, extra)
  model.tie_weights()
  prompts, scored = torch.from_numpy(inputs["prompts"]), torch.from_numpy(inputs["scored"])
  every = torch.ones_like(prompts)

  def generate(**how):
    out = model.generate(prompts, attention_mask=every, max_new_tokens=NEW, pad_token_id=0, **how)
    assert out.shape == (ROWS, PROMPT + NEW)
    return out[:, PROMPT:].tolist()

  def logprobs():
    logp = torch.log_softmax(model(scored).logits[:, :-1].float(), dim=-1)
    return logp.gather(-1, scored[:, 1:, None])[..., 0]

  def score():
    with torch.inference_mode():
      return float(logprobs().sum())

  def train():
    model.zero_grad(set_to_none=True)
    loss = -logprobs().mean()
    loss.backward()
    return float(loss)

  return {
    "sample": lambda: generate(do_sample=True, temperature=1.0, top_k=0, top_p=1.0),
    "greedy": lambda: generate(do_sample=False),
    "score": score,
    "train": train,
  }


def our_work(inputs: dict) -> dict:
  """The same work here, through the engine and through `score`."""
  import jax
  import jax.numpy as jnp

  from qed_jax import host_memory
  from qed_jax.model import qwen3
  from qed_jax.records import Batch
  from qed_jax.rollout.device import Shapes
  from qed_jax.rollout.engine import Engine, Request
  from qed_jax.sharding import make_mesh

  host_memory.share_one_arena()  # as the programs do
  config = qwen3.Qwen3Config(
    **SIZES,
    rope_theta=1e4,
    max_position=512,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    dtype="float32",
    remat="dots",
    attention="auto",
  )
  leaves = {}
  for path, shape in qwen3.shapes(config).items():
    if path.startswith("layers."):
      names = (f"model.layers.{i}.{path[7:]}.weight" for i in range(config.num_layers))
      weight = np.stack([inputs[name] for name in names])
    else:
      weight = inputs[f"model.{path}.weight"]
    leaves[path] = jnp.asarray(weight.reshape(shape))
  params = qwen3.unflatten(leaves)
  engine = Engine(
    config,
    mesh=make_mesh(1, 1, 1, jax.devices()[:1]),
    shapes=Shapes(
      slots=ROWS,
      max_length=PROMPT + NEW,
      page=16,
      pages=0,
      chunk=NEW,
      prefill_rows=ROWS // 2,
      prefill_tokens=PROMPT,
      kv_dtype="",
    ),
    lanes=2,
    prefill_budget=ROWS * PROMPT,
    stop_ids=(),
    truncated_logp=False,
    keep_prefixes=False,
  )
  engine.set_params(params, 0)

  def generate(temperature):
    prompts = inputs["prompts"].tolist()
    requests = [Request(p, 0, 0, NEW, temperature) for p in prompts]
    return [c.tokens.tolist() for c in engine.generate(requests)]

  tokens_BT = jnp.asarray(inputs["scored"], jnp.int32)
  positions_BT = jnp.broadcast_to(jnp.arange(SCORED, dtype=jnp.int32), tokens_BT.shape)
  weight_BT = (positions_BT > 0) / (ROWS * (SCORED - 1))
  batch = Batch(tokens_BT, positions_BT, jnp.ones_like(tokens_BT), weight_BT)

  @jax.jit
  def logprobs(params):
    return qwen3.score(config, params, batch, 1.0, SCORED)[0]

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    return -jnp.sum(qwen3.score(config, params, batch, 1.0, SCORED)[0] * batch.weight_BT)

  return {
    "sample": lambda: generate(1.0),
    "greedy": lambda: generate(0.0),
    "score": lambda: float(jax.block_until_ready(logprobs(params)).sum()),
    "train": lambda: float(jax.block_until_ready(loss(params))[0]),
  }


def work_for_parent(library: str, path: str) -> None:
  """A worker: reads a name of work a line, does it for a turn, answers with seconds a call."""
  inputs = dict(np.load(path))
  work = {"torch": torch_work, "qed_jax": our_work}[library](inputs)
  for line in sys.stdin:
    calls = []
    while sum(calls) < TURN:
      start = time.perf_counter()
      result = work[line.strip()]()
      calls.append(time.perf_counter() - start)
    answer = {"first": calls[0], "seconds": sum(calls) / len(calls), "result": result}
    answer["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("ANSWER " + json.dumps(answer), flush=True)


@dataclasses.dataclass
class Worker:
  """A library in a process of its own."""

  process: subprocess.Popen

  @classmethod
  def start(cls, library: str, path: Path):
    env = dict(os.environ, JAX_PLATFORMS="cpu", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    env["GLIBC_TUNABLES"] = HUGE_PAGES
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    command = [sys.executable, __file__, f"--worker={library}", f"--inputs={path}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return cls(subprocess.Popen(command, env=env, **pipes))

  def do(self, name: str) -> dict:
    self.process.stdin.write(name + "\n")
    self.process.stdin.flush()
    for line in self.process.stdout:
      if line.startswith("ANSWER "):
        return json.loads(line[7:])
    raise RuntimeError(f"the worker ended with status {self.process.wait()}: see its error above")

  def stop(self) -> None:
    self.process.stdin.close()
    self.process.wait(timeout=60)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=9, help="turns of each library at each work")
  parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
  parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
  parser.add_argument("--worker", choices=("qed_jax", "torch"), help=argparse.SUPPRESS)
  parser.add_argument("--inputs", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    work_for_parent(args.worker, args.inputs)
    return 0

  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "inputs.npz"
    make_inputs(path, args.seed)
    ours, theirs = Worker.start("qed_jax", path), Worker.start("torch", path)
    print(f"{'work':<8}{'qed_jax tok/s':>15}{'torch tok/s':>13}{'ratio':>7}{'target':>8}")
    speed, same_tokens = {}, None
    for name in args.work:
      first = ours.do(name), theirs.do(name)  # compiles, warms caches
      if name == "greedy":
        same_tokens = first[0]["result"] == first[1]["result"]
      pairs = []
      for turn in range(args.repeats):
        order = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
        seconds = {id(w): w.do(name)["seconds"] for w in order}
        pairs.append((seconds[id(ours)], seconds[id(theirs)]))
      rates = [TOKENS[name] / statistics.median(times) for times in zip(*pairs, strict=True)]
      ratio = statistics.median(them / us for us, them in pairs)
      speed[name] = {
        "qed_jax_tokens_per_s": round(rates[0], 1),
        "torch_tokens_per_s": round(rates[1], 1),
        "ratio": round(ratio, 3),
        "target": TARGETS[name],
        "first_call_s": round(first[0]["first"], 2),
      }
      print(f"{name:<8}{rates[0]:>15,.0f}{rates[1]:>13,.0f}{ratio:>7.2f}{TARGETS[name]:>8.1f}")
    workers = {"qed_jax": ours, "torch": theirs}
    peak = {library: w.do(args.work[0])["peak_mb"] for library, w in workers.items()}
    ours.stop()
    theirs.stop()
  print(f"peak MB {peak['qed_jax']:>15,.0f}{peak['torch']:>13,.0f}")
  print(f"greedy tokens equal: {same_tokens}")
  versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "torch", "transformers")}
  figures = {
    "speed": speed,
    "peak_mb": {k: round(v) for k, v in peak.items()},
    "same_greedy_tokens": same_tokens,
    "repeats": args.repeats,
    "cores": len(os.sched_getaffinity(0)),
    "date": datetime.date.today().isoformat(),
    "versions": {"python": platform.python_version(), **versions},
  }
  print(json.dumps(figures))
  return 1 if same_tokens is False else 0


if __name__ == "__main__":
  sys.exit(main())
