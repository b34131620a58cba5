"""The processes of bench_engine.py: transformers, tunix and this engine, one library in each.

A process opens the folder that bench_engine.py wrote (the model, requests.json, prompts.npy), then
reads one name of work a line, does it for a turn and answers with a line of JSON. Names of work:

  NAME                              a list of requests.json: sample, greedy, ragged, ...
  NAME:CACHE                        the same in tunix, with a cache of so many tokens
  NAME:batches                      the same in this engine, waiting for every batch
  decode:SLOTS,CONTEXT,NEW,MAXIMUM  new tokens after prompts whose keys and values are there already
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import bench_cpu
import numpy as np
from bench_cpu import PROMPT, ROOT, SIZES

OURS, TORCH, TUNIX = "qed_jax", "transformers", "tunix"
SLOTS, ATTEMPTS = bench_cpu.ROWS, 16  # of a batch; at one prompt, which are a batch too
THETA = 1e6  # the only one that tunix 0.1.7 computes with


@dataclasses.dataclass(frozen=True)
class Dials:
  """Of this engine; the other libraries have none."""

  lanes: int  # 0: 2 on a CPU, 1 elsewhere
  page: int
  chunk: int
  prefill_rows: int


# --- what a process is asked for ---------------------------------------------------------------


def in_batches(requests: list) -> list[list]:
  """As they arrive, SLOTS at a time; attempts at one prompt are one batch."""
  size = ATTEMPTS if len({tuple(prompt) for prompt, _ in requests}) == 1 else SLOTS
  return [requests[i : i + size] for i in range(0, len(requests), size)]


def decode_work(slots: int, context: int, new: int, maximum: int) -> str:
  return f"decode:{slots},{context},{new},{maximum}"


# --- the libraries -----------------------------------------------------------------------------


class Static:
  """A library that serves whole batches; `generate` is its own."""

  def __init__(self, folder: Path):
    self.requests = json.loads((folder / "requests.json").read_text())
    self.prompts = np.load(folder / "prompts.npy")

  def prepare(self, work: str) -> None:
    """What comes before the clock starts."""

  def run(self, work: str) -> dict:
    """Does it once."""
    name, _, cache = work.partition(":")
    tokens = []
    for batch in in_batches(self.requests[name]):
      prompts, limits = zip(*batch, strict=True)
      sampled = self.generate(prompts, max(limits), name == "greedy", int(cache or 0))
      tokens += [row[:limit] for row, limit in zip(sampled, limits, strict=True)]
    return {"sampled": sum(map(len, tokens)), "tokens": tokens if name == "greedy" else None}


class Transformers(Static):
  """torch, with the cache that grows; eager."""

  packages = ("torch", "transformers")

  def __init__(self, folder: Path, dials: Dials):
    super().__init__(folder)
    import torch
    import transformers

    self.torch, self.transformers = torch, transformers
    transformers.utils.logging.disable_progress_bar()
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    self.model = model.to(self.device).eval()
    self.caches = {}

  def generate(self, prompts, new: int, greedy: bool, cache: int) -> list[list[int]]:
    width = max(map(len, prompts))
    padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return self._generate(padded, mask, new, greedy)[:, width:].tolist()

  def _generate(self, prompts, mask, new: int, greedy: bool, **cache):
    sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return self.model.generate(
      self.torch.tensor(prompts, device=self.device),
      attention_mask=self.torch.tensor(mask, device=self.device),
      max_new_tokens=new,
      do_sample=not greedy,
      pad_token_id=0,
      **sampling,
      **cache,
    )

  def prepare(self, work: str) -> None:
    if not work.startswith("decode:"):
      return
    slots, context, _, _ = map(int, work.partition(":")[2].split(","))
    if work not in self.caches:
      self.caches = {work: self.transformers.DynamicCache()}  # one at a time: they are large
      with self.torch.inference_mode():
        before = self.torch.tensor(self.prompts[:slots, : context - 1], device=self.device)
        self.model(before, past_key_values=self.caches[work], logits_to_keep=1)
    new = self.caches[work].get_seq_length() - (context - 1)
    if new:
      self.caches[work].crop(-new)

  def run(self, work: str) -> dict:
    if not work.startswith("decode:"):
      return super().run(work)
    slots, context, new, _ = map(int, work.partition(":")[2].split(","))
    prompts, cache = self.prompts[:slots, :context], self.caches[work]
    out = self._generate(prompts, np.ones_like(prompts), new, False, past_key_values=cache)
    return {"sampled": len(out[:, context:].tolist()) * new, "tokens": None}


class Ids:
  """A tokenizer whose text is the ids; none begins, ends or pads a sequence by accident."""

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int]) -> str:
    return " ".join(map(str, ids))

  def bos_id(self) -> int:
    return 0  # which its sampler takes for "none"

  def eos_id(self) -> int:
    return -2

  def pad_id(self) -> int:
    return -1  # what the mask is made of: a token of the vocabulary would be masked where sampled


class Tunix(Static):
  """The vanilla sampler of google-tunix, a cache of `cache` tokens or just as many as it needs."""

  packages = ("google-tunix", "jax")

  def __init__(self, folder: Path, dials: Dials):
    super().__init__(folder)
    import jax
    from tunix.generate import sampler
    from tunix.models.qwen3 import model, params

    self.sampler, self.samplers, self.device = sampler, {}, jax.devices()[0].platform
    config = model.ModelConfig(
      num_layers=SIZES["num_layers"],
      vocab_size=SIZES["vocab_size"],
      embed_dim=SIZES["hidden_size"],
      hidden_dim=SIZES["intermediate_size"],
      num_heads=SIZES["num_heads"],
      head_dim=SIZES["head_dim"],
      num_kv_heads=SIZES["num_kv_heads"],
      rope_theta=int(THETA),
      norm_eps=1e-6,
      use_tied_embedding=True,
    )
    self.model = params.create_model_from_safe_tensors(str(folder), config)

  def generate(self, prompts, new: int, greedy: bool, cache: int) -> list[list[int]]:
    width = max(map(len, prompts))
    cache = cache or width + new
    if cache not in self.samplers:
      shape = {name: SIZES[name] for name in ("num_layers", "num_kv_heads", "head_dim")}
      cache_config = self.sampler.CacheConfig(cache_size=cache, **shape)
      self.samplers[cache] = self.sampler.Sampler(self.model, Ids(), cache_config)
    out = self.samplers[cache](
      [Ids().decode(prompt) for prompt in prompts],
      max_generation_steps=new,
      max_prompt_length=width,
      eos_tokens=[Ids().eos_id()],
      **({} if greedy else {"temperature": 1.0, "top_p": 1.0}),
    )
    return [row.tolist() for row in out.tokens]


class Ours:
  """The engine, one for each kind of work, with max_length just what that needs."""

  packages = ("jax", "flax")

  def __init__(self, folder: Path, dials: Dials):
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import jax

    from qed_jax import host_memory
    from qed_jax.model import hf_weights, presets
    from qed_jax.rollout.device import Shapes
    from qed_jax.rollout.engine import Engine, Request
    from qed_jax.sharding import make_mesh

    host_memory.share_one_arena()  # as the programs do
    self.dials, self.Engine, self.Request, self.Shapes = dials, Engine, Request, Shapes
    self.requests = json.loads((folder / "requests.json").read_text())
    self.prompts = np.load(folder / "prompts.npy")
    device = jax.devices()[0]
    self.device, self.engines = device.platform, {}
    self.lanes = dials.lanes or (2 if self.device == "cpu" else 1)
    self.mesh = make_mesh(1, 1, 1, [device])
    described = hf_weights.read_config(folder)
    self.config = presets.from_hf(described, dtype="float32", remat="none", attention="auto")
    whole = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    self.params = hf_weights.load(folder, self.config, whole, "float32")

  def _engine(self, key: str, slots: int, maximum: int, spare: int = 0):
    """spare: pages for each slot beside those that `maximum` tokens need."""
    if key in self.engines:
      return self.engines[key]
    dials = self.dials
    # Every lane has pages of its own and would compute the shared prompt once more.
    lanes = 1 if key in ("shared", "copies") or slots % self.lanes else self.lanes
    pages = slots * (math.ceil(maximum / dials.page) + spare) if spare else 0
    engine = self.Engine(
      self.config,
      mesh=self.mesh,
      shapes=self.Shapes(
        slots=slots,
        max_length=maximum,
        page=dials.page,
        pages=pages,
        chunk=dials.chunk,
        prefill_rows=dials.prefill_rows,
        prefill_tokens=PROMPT,
        kv_dtype="",
      ),
      lanes=lanes,
      prefill_budget=SLOTS * PROMPT,
      stop_ids=(),
      truncated_logp=False,
      keep_prefixes=False,
    )
    engine.set_params(self.params, 0)
    engine.warm_up()
    self.engines[key] = engine
    return engine

  def _for(self, work: str):
    """(engine, batches of requests) of a work."""
    name, _, how = work.partition(":")
    if name == "decode":
      slots, context, new, maximum = map(int, how.split(","))
      requests = [(prompt, new) for prompt in self.prompts[:slots, :context].tolist()]
      if work not in self.engines:  # two of them are compared, and they are large
        for old in [key for key in self.engines if key.startswith("decode:")][:-1]:
          del self.engines[old]
      return self._engine(work, slots, maximum, spare=2), [requests]
    requests = self.requests[name]
    slots = ATTEMPTS if name in ("shared", "copies") else SLOTS
    engine = self._engine(name, slots, max(len(prompt) + new for prompt, new in requests))
    return engine, in_batches(requests) if how == "batches" else [requests]

  def prepare(self, work: str) -> None:
    import jax

    engine, batches = self._for(work)
    if not work.startswith("decode:"):
      engine.set_params(self.params, 0)  # forgets every prompt
    elif not engine.counters.prefilled_tokens:
      self._generate(engine, [(prompt, 1) for prompt, _ in batches[0]], 1.0)
    jax.block_until_ready(jax.live_arrays())

  def _generate(self, engine, requests: list, temperature: float, progress=None) -> list:
    asked = [
      self.Request(prompt, 0, i, new, temperature) for i, (prompt, new) in enumerate(requests)
    ]
    return engine.generate(asked, progress)

  def run(self, work: str) -> dict:
    engine, batches = self._for(work)
    before, queued = engine.counters, engine.counters
    waiting = 0

    def progress(finished: int, sampled: int) -> None:
      # A step reads the chunk that the step before it dispatched.
      nonlocal queued, waiting
      if waiting:
        queued = engine.counters
      waiting = engine.waiting

    temperature = 0.0 if work == "greedy" else 1.0
    completions = []
    for batch in batches:
      completions += self._generate(engine, batch, temperature, progress)
    after = engine.counters
    prefilled = after.prefilled_tokens - before.prefilled_tokens
    if work.startswith("decode:") and prefilled:
      raise RuntimeError(f"{work}: {prefilled} tokens of prompts were computed on the clock")
    return {
      "sampled": sum(len(c.tokens) for c in completions),
      "tokens": [c.tokens.tolist() for c in completions] if work == "greedy" else None,
      "prefilled": prefilled,
      "peak_pages": after.peak_pages,
      "busy_while_queued": busy(before, queued),
      "busy": busy(before, after),
    }


def busy(before, after) -> float | None:
  """Tokens over steps x slots between two states of the counters."""
  steps = after.slot_steps - before.slot_steps
  return (after.sampled_tokens - before.sampled_tokens) / steps if steps else None


LIBRARIES = {OURS: Ours, TORCH: Transformers, TUNIX: Tunix}


# --- processes ---------------------------------------------------------------------------------


def work_for_parent(open_library) -> None:
  """A worker: reads a name of work a line, does it for a turn, answers with seconds a call.

  open_library() gives an object with `packages`, `device`, prepare(work) and run(work).
  """

  def answer(**fields) -> None:
    print("ANSWER " + json.dumps(fields), flush=True)

  if not sys.stdin.readline():  # "hello"
    return
  try:
    opened = open_library()
  except ImportError as error:
    answer(absent=str(error))
    return
  versions = {package: version(package) for package in opened.packages}
  lanes = getattr(opened, "lanes", None)
  answer(absent=None, device=opened.device, versions=versions, lanes=lanes)
  for line in sys.stdin:
    work, calls = line.strip(), []
    while sum(calls) < bench_cpu.TURN:
      opened.prepare(work)
      start = time.perf_counter()
      result = opened.run(work)
      calls.append(time.perf_counter() - start)
    answer(first=calls[0], seconds=sum(calls) / len(calls), result=result)


def start(python: str, script: str, *arguments: str) -> bench_cpu.Worker:
  """A process of `script`, a program that calls work_for_parent."""
  env = dict(os.environ, TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
  env["GLIBC_TUNABLES"] = bench_cpu.HUGE_PAGES
  env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two of them may share an accelerator
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  return bench_cpu.Worker(subprocess.Popen([python, script, *arguments], env=env, **pipes))


def start_workers(
  script: str, tunix_python: str, *arguments: str
) -> tuple[dict[str, bench_cpu.Worker], dict[str, dict]]:
  """The libraries that are here, by name, and what they say of themselves; a line on the others.

  script: is run as `script LIBRARY *arguments`.
  """
  pythons = {OURS: sys.executable, TORCH: sys.executable, TUNIX: tunix_python}
  workers = {name: start(python, script, name, *arguments) for name, python in pythons.items()}
  about = {name: worker.do("hello") for name, worker in workers.items()}
  hints = {TORCH: "install torch", TUNIX: "--tunix-python names an interpreter that has it"}
  platforms = {"cuda": "gpu"}
  ours = about[OURS].get("device")
  if about[OURS]["absent"]:
    raise ImportError(about[OURS]["absent"])
  for name in (TORCH, TUNIX):
    absent, device = about[name]["absent"], about[name].get("device")
    if absent:
      print(f"{name} is left out, {absent}: {hints[name]}")
    elif platforms.get(device, device) != ours:
      print(f"{name} is left out: it runs on {device}, qed_jax on {ours}")
    else:
      continue
    workers.pop(name).stop()
    del about[name]
  return workers, about


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("library", choices=tuple(LIBRARIES))
  parser.add_argument("folder", type=Path)
  parser.add_argument("dials", type=json.loads, help="of this engine, in JSON")
  args = parser.parse_args()
  work_for_parent(lambda: LIBRARIES[args.library](args.folder, Dials(**args.dials)))


if __name__ == "__main__":
  main()
