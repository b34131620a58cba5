"""Config files, `--config.x.y=` overrides, and one-line errors before any device work."""

import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from qed_jax import host_memory, hosts

# What a number may be; a field is looked up by its last name.
POSITIVE = {
  "lr", "steps", "row_length", "rows", "problems", "attempts", "turns", "states", "slots",
  "max_tokens", "score_chunk", "every", "keep", "clip_norm", "eps", "max_length", "chunk",
  "page", "lanes", "prefill_rows", "prefill_tokens", "prefill_budget", "max_skipped_steps",
  "deadline_s", "concurrency", "samples_per_problem", "retries", "timeout_s", "problems_at_once",
  "votes", "outage_after", "canary_window",
  "choices", "prompt_tokens", "body_bytes", "body_s", "step_s", "data", "sequence", "tensor",
  "pool_size", "best", "refinements", "analyses", "population", "subset", "solutions", "max_kept",
  "correct_count", "error_count", "max_iterations", "per_slot", "max_calls", "max_solutions",
  "max_approaches",
  "failures_in_a_row", "pass_score",
  "ngram", "idle_s", "max_failures",
  "alpha",
}  # fmt: skip
CHOICES = {
  "job": ("sft", "rl", "cache_rl"),
  "schedule": ("constant", "cosine"),
  "dtype": ("bfloat16", "float32"),
  "kv_dtype": ("", "int8", "bfloat16", "float32"),
  "param_dtype": ("bfloat16", "float32"),
  "mu_dtype": ("bfloat16", "float32"),
  "second_moment": ("float32", "bfloat16", "factored"),
  "remat": ("none", "dots", "attention", "layer", "offload"),
  "reward": ("rubric", "answer", "exact"),
  "policy_loss": ("ppo", "reinforce"),
  "baseline": ("mean", "leave_one_out"),
  "normalizer": ("rollouts", "group_tokens", "tokens"),
  "on_invalid": ("mask", "zero"),
  "order": ("admission", "arrival"),
  "placement": ("colocated", "split"),
  "sampler": ("unmerged", "merged"),
  "api": ("chat", "responses"),
  "aggregate": ("median", "mean", "min"),
  "subsets_by": ("circulant", "random"),
  "select": ("knockout", "random"),
  "study": ("proofs", "judge"),
  "format": ("parquet", "jsonl"),
}  # fmt: skip
SIGNED = {"fsdp"}


def check(config: ConfigDict, prefix: str = "config") -> None:
  """Raises ValueError, one line naming field, value and fix, on the first impossible field."""
  for name, value in config.items():
    field = f"{prefix}.{name}"
    if isinstance(value, ConfigDict):
      check(value, field)
    elif isinstance(value, int | float) and not isinstance(value, bool):
      if not math.isfinite(value):
        raise ValueError(f"{field} is {value}: give a finite number")
      if name in POSITIVE and value <= 0:
        raise ValueError(f"{field} is {value}: give a number above 0")
      if value < 0 and name not in SIGNED:
        raise ValueError(f"{field} is {value}: give 0 or more")
    elif name in CHOICES and value not in CHOICES[name]:
      raise ValueError(f"{field} is {value!r}: choose one of {', '.join(CHOICES[name])}")


def run(
  main: Callable[[ConfigDict, str], None], needs_workdir: bool = True, on_hosts: bool = False
) -> None:
  """Parse `--config=FILE[:variant] [--config.x.y=...] --workdir=DIR`, check, and call main.

  on_hosts: join the other hosts first, where there are any; see hosts.settings.

  Whatever is wrong with the command line or the config is printed as one line, exit code 2; so is a
  ValueError or FileNotFoundError out of main, which is how the parts report what a user can mend.
  """
  host_memory.share_one_arena()
  compilations = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qed_jax"
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(compilations))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  logging.set_verbosity(logging.WARNING)  # --verbosity=0 brings back what Orbax has to say
  sys.path.insert(0, str(Path(__file__).parents[1]))  # `from configs import common` in configs
  config = config_flags.DEFINE_config_file("config", lock_config=True, help_string="config file")
  workdir = flags.DEFINE_string("workdir", None, "folder of the run; run again to resume")

  given = hosts_flags() if on_hosts else {}

  def parse(argv):
    try:
      rest = flags.FLAGS(argv)
      if config.value is None:
        raise ValueError("--config is missing: name a file such as configs/sft.py:tiny")
      if needs_workdir and not workdir.value:
        raise ValueError("--workdir is missing: name a folder for checkpoints and metrics")
      if rest[1:]:
        raise ValueError(f"unknown argument {rest[1]!r}: fields are set as --config.field=value")
      check(config.value)
    except Exception as error:  # whatever a flag parser or a config file raises is the user's line
      fail(error)
    return rest

  def start(_):
    try:
      if on_hosts:
        heartbeat_s = given["heartbeat_s"].value
        others = {name: flag.value for name, flag in given.items() if name != "heartbeat_s"}
        hosts.join(others, heartbeat_s)
      main(config.value, workdir.value)
    except Exception as error:
      if isinstance(error, ValueError | FileNotFoundError | hosts.Lost):
        fail(error)
      if hosts.count() > 1:
        traceback.print_exc()
        hosts.fail(one_line(error), 1)
      raise

  app.run(start, flags_parser=parse)


def hosts_flags() -> dict[str, flags.FlagHolder]:
  """The flags by which a host finds the others, where neither Slurm nor a TPU's metadata does."""
  return {
    "coordinator": flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0"),
    "processes": flags.DEFINE_integer("processes", None, "processes of the run, one a host"),
    "process_id": flags.DEFINE_integer("process_id", None, "which of them this is, from 0"),
    "heartbeat_s": flags.DEFINE_integer(
      "heartbeat_s", 100, "a host unheard of for so long ends the run", lower_bound=1
    ),
  }


def fail(error: Exception) -> None:
  """One line on stderr, exit code 2; 1 where it is another host's doing."""
  gone = hosts.lost(error)
  line = one_line(gone or error)
  print(f"error: {line}", file=sys.stderr)
  if hosts.count() > 1:
    hosts.fail(line, 1 if gone else 2)
  sys.exit(2)


def one_line(error: Exception) -> str:
  """What a user needs of an error: ml_collections gives a repr, or a traceback as the message."""
  text = str(error)
  if isinstance(error, KeyError | AttributeError):
    while error.args and isinstance(error.args[0], Exception):
      error = error.args[0]
    text = f"the config has no field {error.args[0]}"
  elif "Traceback (most recent call last)" in text or "Failed loading config file" in text:
    text = f"--config: {text.strip().splitlines()[-1].removeprefix('ValueError: ')}"
  return " ".join(text.split()) or type(error).__name__
