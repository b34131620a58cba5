"""The rollout engine beside transformers' `generate` and tunix's sampler, in one run.

The model is that of bench_cpu.py (Qwen3, 4 layers, width 256, 4,096 tokens, float32), written once
as a Hugging Face folder that every library opens with its own loader: the weights are the same in
all. Rope theta is 1e6, the only one that tunix 0.1.7 computes with. No token ends an attempt early:
every one has its limit of new tokens. What is counted is tokens that were asked for, in seconds
from the list of prompts to the list of tokens. Work:

  sample, greedy   8 prompts of 64 tokens, 64 new each, at temperature 1 and 0; greedy tokens must
                   be those of transformers
  ragged           64 requests, prompts of 8 to 64 tokens, 8 to 64 new, uniform; 8 slots
  straggler        64 requests of 64 tokens and 16 new, but for one with 160 new at a random place
                   in each 8 consecutive ones: a batch of 8 takes 160 steps for 272 tokens
  shared           16 attempts of 64 tokens at one prompt of 512, in 16 slots of one lane
  long             a decode step of 8 attempts with 128 tokens, max_length 2,048 over max_length 128
  sweep            a decode step over tokens of context x slots, 32 new tokens

The others serve batches of 8 (shared: 16) in the order of arrival, each until its longest attempt
is done; prompts shorter than the batch's longest are padded on the left. A row "this engine, ..."
is the engine itself, waiting for every batch as they do, or with 16 prompts that share nothing.

Fair to whom? To tunix: its cache is exactly as long as the batch needs, all those shapes are
compiled beforehand, and top_p is 1, or it would sort the vocabulary; with the cache of 1,024 tokens
that is its default it has a row of its own. To transformers: its default, a cache that grows; it
has nothing to compile. Against this engine: it alone also returns log-probs. All programs are
compiled before (engine.warm_up, and one round that is not timed), and set_params before each timed
call makes the engine forget the prompts of the calls before; long and sweep time decoding alone, so
there both sides keep the keys and values of the prompts from an earlier call.

Each library has a process of its own; they take turns, a second or one call each, in an order that
rotates, and what is printed is the median over the rounds of the ratio within a round. "slots
busy" are tokens over steps x slots of the decode loops that were dispatched while requests queued,
and of all. Pages are the most that were held at once; those of prompts are all but the pages that
the new tokens need by themselves: 16 attempts at one prompt cannot hold less than a sixth of all
that 16 prompts need. The last line is JSON; exits 1 when greedy tokens differ on CPUs. Runs on
whatever device JAX finds; a peer that has no such device, or is not installed, is left out with a
line that says so.

  python tools/bench_engine.py --repeats=9 --tunix-python=PYTHON
  python tools/bench_engine.py --work ragged straggler --lanes=1
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import bench_cpu
import engine_workers
import numpy as np
from bench_cpu import NEW, PROMPT, SIZES
from engine_workers import (
  ATTEMPTS,
  OURS,
  SLOTS,
  THETA,
  TORCH,
  TUNIX,
  Dials,
  decode_work,
  start_workers,
)

SHORT, STRAGGLER = 16, 160  # new tokens of the straggler mix
LONG_PROMPT = 512
LONG_MAXIMUM = 16 * (PROMPT + NEW)
SWEEP_NEW = 32
TUNIX_CACHE = 1024  # its RolloutConfig's default
BUSY_TARGET, LONG_TARGET, SHARED_TARGET = 0.95, 1.3, 8.0
WORK = ("sample", "greedy", "ragged", "straggler", "shared", "long", "sweep")
# work: (library, what it does of that work, its row, target of the ratio)
OTHERS = {
  "sample": (
    (TORCH, "sample", TORCH, 4.0),
    (TUNIX, "sample", TUNIX, 6.0),
    (TUNIX, f"sample:{TUNIX_CACHE}", f"tunix, cache of {TUNIX_CACHE}", 6.0),
  ),
  "greedy": (
    (TORCH, "greedy", TORCH, 4.0),
    (TUNIX, "greedy", TUNIX, 6.0),
    (TUNIX, f"greedy:{TUNIX_CACHE}", f"tunix, cache of {TUNIX_CACHE}", 6.0),
  ),
  "ragged": (
    (TORCH, "ragged", TORCH, None),
    (TUNIX, "ragged", TUNIX, None),
    (OURS, "ragged:batches", "this engine, batches of 8", None),
  ),
  "straggler": (
    (TORCH, "straggler", TORCH, 8.0),
    (TUNIX, "straggler", TUNIX, 8.0),
    (OURS, "straggler:batches", "this engine, batches of 8", None),
  ),
  "shared": (
    (TORCH, "shared", TORCH, None),
    (TUNIX, "shared", TUNIX, None),
    (OURS, "copies", "this engine, 16 prompts", None),
  ),
}


# --- what all libraries are given --------------------------------------------------------------


def make_requests(seed: int, count: int) -> dict[str, list]:
  """work -> [(prompt, new tokens)] in the order of arrival; `count` of them in the mixes."""
  rng = np.random.default_rng(seed)

  def request(prompt: int, new: int):
    return rng.integers(0, SIZES["vocab_size"], prompt).tolist(), int(new)

  uniform = [request(PROMPT, NEW) for _ in range(SLOTS)]
  ragged = [request(*rng.integers(8, (PROMPT + 1, NEW + 1))) for _ in range(count)]
  straggler = []
  for _ in range(count // SLOTS):
    late = rng.integers(SLOTS)
    straggler += [request(PROMPT, STRAGGLER if i == late else SHORT) for i in range(SLOTS)]
  return {
    "sample": uniform,
    "greedy": uniform,
    "ragged": ragged,
    "straggler": straggler,
    "shared": [request(LONG_PROMPT, NEW)] * ATTEMPTS,
    "copies": [request(LONG_PROMPT, NEW) for _ in range(ATTEMPTS)],
  }


def make_folder(folder: Path, seed: int, count: int, contexts: list[int], slots: list[int]) -> None:
  """A Hugging Face folder, and beside it requests.json and the prompts of the decode steps."""
  from safetensors.numpy import save_file

  longest = max(*contexts, LONG_PROMPT, PROMPT + STRAGGLER) + NEW
  bench_cpu.make_inputs(folder / "inputs.npz", seed)
  inputs = np.load(folder / "inputs.npz")
  weights = {name: inputs[name] for name in inputs if name.startswith("model.")}
  save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
  config = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": SIZES["vocab_size"],
    "hidden_size": SIZES["hidden_size"],
    "intermediate_size": SIZES["intermediate_size"],
    "num_hidden_layers": SIZES["num_layers"],
    "num_attention_heads": SIZES["num_heads"],
    "num_key_value_heads": SIZES["num_kv_heads"],
    "head_dim": SIZES["head_dim"],
    "max_position_embeddings": longest,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    "dtype": "float32",
  }
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "requests.json").write_text(json.dumps(make_requests(seed, count)))
  shape = (max(*slots, SLOTS), max(*contexts, PROMPT))
  prompts = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape)
  np.save(folder / "prompts.npy", prompts)


# --- taking turns ------------------------------------------------------------------------------


def rounds(workers: dict, contestants: list[tuple[str, str]], repeats: int) -> tuple[list, list]:
  """(first answers, seconds a call [contestant][round]); contestants are (library, work)."""
  first = [workers[library].do(work) for library, work in contestants]  # compiles, warms caches
  seconds = [[] for _ in contestants]
  for turn in range(repeats):
    for i in range(len(contestants)):
      who = (i + turn) % len(contestants)
      library, work = contestants[who]
      seconds[who].append(workers[library].do(work)["seconds"])
  return first, seconds


def ratio(seconds_them: list[float], seconds_us: list[float]) -> float:
  return statistics.median(t / u for t, u in zip(seconds_them, seconds_us, strict=True))


# --- the tables --------------------------------------------------------------------------------


def compare(workers: dict, args) -> tuple[dict, dict, bool | None]:
  """(speeds, counters, whether greedy tokens are the same) of the works that have rows."""
  speeds, counters, same = {}, {}, None
  head = f"{'work':<11}{'tokens/s':>9}   {'beside':<28}{'tokens/s':>9}{'ratio':>8}{'target':>8}"
  wanted = [work for work in OTHERS if work in args.work]
  if wanted:
    print(head, flush=True)
  for work in wanted:
    others = [other for other in OTHERS[work] if other[0] in workers]
    contestants = [(OURS, work), *((library, how) for library, how, _, _ in others)]
    first, seconds = rounds(workers, contestants, args.repeats)
    ours, sampled = first[0]["result"], first[0]["result"]["sampled"]
    rates = [sampled / statistics.median(times) for times in seconds]
    speeds[work] = {"tokens_per_s": round(rates[0], 1), "beside": {}}
    rows = zip(others, rates[1:], seconds[1:], first[1:], strict=True)
    for i, ((library, _, label, target), rate, times, answer) in enumerate(rows):
      assert answer["result"]["sampled"] == sampled, (work, label, answer["result"], sampled)
      times_faster = ratio(times, seconds[0])
      speeds[work]["beside"][label] = {
        "tokens_per_s": round(rate, 1),
        "ratio": round(times_faster, 3),
        "target": target,
      }
      start = f"{work:<11}{rates[0]:>9,.0f}" if i == 0 else " " * 20
      goal = f"{target:.1f}" if target else "-"
      print(f"{start}   {label:<28}{rate:>9,.0f}{times_faster:>8.2f}{goal:>8}", flush=True)
      if work == "greedy" and library == TORCH:
        same = answer["result"]["tokens"] == ours["tokens"]
    if not others:
      print(f"{work:<11}{rates[0]:>9,.0f}   -", flush=True)
    if work == "ragged":
      counters |= {name: ours[name] for name in ("busy_while_queued", "busy")}
    if work == "shared":
      counters |= shared_counters(ours, first[-1]["result"], args.page)
  return speeds, counters, same


def shared_counters(shared: dict, copies: dict, page: int) -> dict:
  """What 16 attempts at one prompt cost, and what they cost at 16 prompts of that length."""
  new = ATTEMPTS * math.ceil(NEW / page)
  return {
    "prefilled_tokens": (shared["prefilled"], copies["prefilled"]),
    "peak_pages": (shared["peak_pages"], copies["peak_pages"]),
    "pages_of_prompts": (shared["peak_pages"] - new, copies["peak_pages"] - new),
  }


def long_maximum(workers: dict, args) -> dict:
  """Decode time per token with a maximum 16 times what is used, over one of what is used."""
  used = PROMPT + NEW
  short, long = (decode_work(SLOTS, PROMPT, NEW, maximum) for maximum in (used, LONG_MAXIMUM))
  contestants = [(OURS, short), (OURS, long)]
  if TUNIX in workers:
    contestants += [(TUNIX, "sample"), (TUNIX, f"sample:{LONG_MAXIMUM}")]
  _, seconds = rounds(workers, contestants, args.repeats)
  figures = {"ratio": round(ratio(seconds[1], seconds[0]), 3), "target": LONG_TARGET}
  if TUNIX in workers:
    figures["tunix_ratio"] = round(ratio(seconds[3], seconds[2]), 3)
  line = f"long: time per token, max_length {LONG_MAXIMUM:,} over {used}: "
  theirs = f"; tunix's {figures['tunix_ratio']:.2f}" if "tunix_ratio" in figures else ""
  print(f"{line}{figures['ratio']:.2f} (target {LONG_TARGET}){theirs}", flush=True)
  return figures


def sweep(workers: dict, args) -> list[dict]:
  """Decode steps over context x slots."""
  head = f"{'context':>7}{'slots':>7}{'ms a step':>11}{'tokens/s':>10}{'ratio to transformers':>24}"
  print(head, flush=True)
  points = []
  for context in args.contexts:
    for slots in args.slots:
      work = decode_work(slots, context, SWEEP_NEW, context + SWEEP_NEW)
      contestants = [(name, work) for name in (OURS, TORCH) if name in workers]
      _, seconds = rounds(workers, contestants, args.repeats)
      step = statistics.median(seconds[0]) / SWEEP_NEW
      beside = ratio(seconds[1], seconds[0]) if len(contestants) > 1 else None
      point = {"context": context, "slots": slots, "ms_per_step": round(1e3 * step, 3)}
      point |= {"tokens_per_s": round(slots / step, 1), "ratio": beside and round(beside, 3)}
      points.append(point)
      faster = f"{beside:.2f}" if beside else "-"
      row = f"{context:>7,}{slots:>7}{1e3 * step:>11.2f}{slots / step:>10,.0f}{faster:>24}"
      print(row, flush=True)
  return points


def print_counters(counters: dict) -> None:
  if "busy" in counters:
    queued, whole = counters["busy_while_queued"], counters["busy"]
    during = "-" if queued is None else f"{queued:.3f}"
    print(
      f"ragged: slots busy while requests queue {during} (target {BUSY_TARGET}), all {whole:.3f}"
    )
  for name in ("prefilled_tokens", "peak_pages", "pages_of_prompts"):
    if name in counters:
      one, many = counters[name]
      what, goal = name.replace("_", " "), f"target {SHARED_TARGET:.1f}"
      print(f"shared: {what} {one:,}, 16 prompts {many:,}: {many / one:.2f} times less ({goal})")


# --- the program -------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--repeats", type=int, default=9, help="rounds of each work")
  add("--work", nargs="+", choices=WORK, default=list(WORK))
  add("--requests", type=int, default=64, help="in the ragged and the straggler mix: 8, 16, ...")
  add("--contexts", type=int, nargs="+", default=[128, 512, 2048], help="of the sweep")
  add("--slots", type=int, nargs="+", default=[1, 8, 32], help="of the sweep")
  add("--lanes", type=int, default=0, help="engines on the device; 0: 2 on a CPU, 1 elsewhere")
  add("--page", type=int, default=16, help="tokens of a page")
  add("--chunk", type=int, default=64, help="tokens decoded per host call")
  add("--prefill-rows", type=int, default=2, help="pieces of 64 prompt tokens computed at once")
  add("--tunix-python", default=sys.executable, help="an interpreter that has google-tunix 0.1.7")
  add("--seed", type=int, default=0, help="of weights, tokens and mixes")
  args = parser.parse_args()
  if args.requests < SLOTS or args.requests % SLOTS:
    parser.error(f"--requests={args.requests}: must be a multiple of {SLOTS}")
  if not shutil.which(args.tunix_python):
    parser.error(f"--tunix-python={args.tunix_python}: there is no such program")
  return args


def main() -> int:
  args = parse_args()
  dials = Dials(args.lanes, args.page, args.chunk, args.prefill_rows)
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    make_folder(folder, args.seed, args.requests, args.contexts, args.slots)
    described = json.dumps(dataclasses.asdict(dials))
    workers, about = start_workers(
      engine_workers.__file__, args.tunix_python, str(folder), described
    )
    speeds, counters, same = compare(workers, args)
    print_counters(counters)
    long = long_maximum(workers, args) if "long" in args.work else None
    points = sweep(workers, args) if "sweep" in args.work else []
    for worker in workers.values():
      worker.stop()
  print(f"greedy tokens equal: {same}")
  figures = {
    "speed": speeds,
    "counters": counters,
    "long_maximum": long,
    "sweep": points,
    "same_greedy_tokens": same,
    "device": about[OURS]["device"],
    "repeats": args.repeats,
    "requests": args.requests,
    "lanes": about[OURS]["lanes"],
    "page": args.page,
    "chunk": args.chunk,
    "cores": len(os.sched_getaffinity(0)),
    "date": datetime.date.today().isoformat(),
    "versions": {"python": platform.python_version()}
    | {package: version for one in about.values() for package, version in one["versions"].items()},
  }
  print(json.dumps(figures))
  return 1 if same is False and about[OURS]["device"] == "cpu" else 0


if __name__ == "__main__":
  sys.exit(main())
