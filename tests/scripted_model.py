"""A chat for scaffolds that answers by the prompt's kind, and scaffolds whose prompts show it."""

import asyncio
import importlib
import random
import zlib

from ml_collections import ConfigDict

from configs import scaffolds as blocks
from qed_jax import scaffolds
from qed_jax.records import Completion, Problem, Usage

PROBLEM = Problem(id="p", statement=r"Show that $\{x\} < 1$; {proof} is no placeholder.")


class Killed(Exception):
  """The process is gone."""


# Small enough to be killed after every call; each has all its kinds of calls.
SMALL = {
  "direct": {},
  "reasoning_cache": {"turns": 3},
  "deepseek_math": {
    "pool_size": 2,
    "verifications": 2,
    "meta_verifications": 1,
    "iterations": 1,
    "best": 2,
  },
  "rsa": {"population": 3, "subset": 2, "rounds": 1},
  "selfcheck": {"correct_count": 2, "error_count": 2, "max_iterations": 3},
  "nomos": {"solutions": 4, "target_perfect": 2, "max_kept": 3},
  "static_agent": {"slots": 1, "approaches": 1},
  "planner": {"max_calls": 6, "max_solutions": 2, "max_approaches": 2},
  "deepseek_math_cache": {"pool_size": 2, "verifications": 1, "iterations": 1, "best": 1},
  "rsa_cache": {"population": 2, "rounds": 1, "select": "knockout"},
}


def block(name: str, folder, **changes) -> ConfigDict:
  """A block whose prompts begin with "@" and what they are for, and hold all they can ask for."""
  config = blocks.get(name)
  config.update(changes)
  _mark(config, folder)
  return config


def small(name: str, folder, **changes) -> ConfigDict:
  config = block(name, folder, **(SMALL[name] | changes))
  for part in ("generate", "refine"):
    if part in config and "turns" in config[part]:
      config[part].turns = 2
  return config


def _mark(config, folder) -> None:
  fields = importlib.import_module(f"qed_jax.scaffolds.{config.solve}").FIELDS
  for key in config.prompts:
    path = folder / f"{config.solve}-{key}"
    asked = "".join(f" {one}=[{{{one}}}]" for one in sorted(fields[key]))
    path.write_text(f"@{key}{asked}")
    config.prompts[key] = str(path)
  for part in config.values():
    if isinstance(part, ConfigDict) and "solve" in part:
      _mark(part, folder)


def kind(messages) -> str:
  """What it asks for: the last message says so, but for a planner's it is the first."""
  last = messages[-1]["content"]
  return (last if last.startswith("@") else messages[0]["content"]).split()[0].removeprefix("@")


class Model:
  """answers: kind of prompt -> text, or a function of (random.Random, messages) that gives it, or
  an exception to raise. lives: answers before it is Killed. hurry: seeds how long each one takes.
  """

  def __init__(self, answers=None, *, lives=10**9, hurry=0):
    self.answers = ANSWERS | (answers or {})
    self.lives, self.hurry = lives, random.Random(hurry)
    self.asked: list[tuple[str, int, dict]] = []
    self.paid = 0

  async def __call__(self, messages, *, n, seed, **how):
    assert n == 1
    self.asked.append((kind(messages), seed, how))
    for _ in range(self.hurry.randrange(9)):
      await asyncio.sleep(0)
    if self.paid >= self.lives:
      raise Killed
    number = zlib.crc32(repr((messages, seed, how)).encode())
    answer = self.answers.get(kind(messages), proof)
    if callable(answer):
      answer = answer(random.Random(number), messages)
    self.paid += 1
    if isinstance(answer, Exception):
      raise answer
    if isinstance(answer, Completion):
      return [answer]
    return [Completion(text=answer, usage=Usage(3, 5, 0.25, 1))]

  def kinds(self) -> list[str]:
    return [kind for kind, *_ in self.asked]


def proof(rng, messages) -> str:
  return f"r</think>proof {rng.randrange(10**9)}"


def decides(*choices: str):
  return lambda rng, _: f"r</think>because <verdict>{rng.choice(choices)}</verdict>"


def calls_tools(*said: str):
  """A planner that says these things in turn."""
  return lambda _, messages: f"r</think>{said[min(len(messages) // 2, len(said) - 1)]}"


PLAN = (
  '<call>{"tool": "approaches"}</call>',
  '<call>{"tool": "solve", "approach": "A2"}</call>',
  '<call>{"tool": "solve"}</call>',
  '<call>{"tool": "verify", "solution": "S1"}</call>',
  '<call>{"tool": "improve", "solution": "S1"}</call>',
  '<call>{"tool": "select", "solutions": ["S3", "S2"]}</call>',
  '<call>{"tool": "submit", "solution": "S3"}</call>',
)


def checks(rng, messages) -> str:
  """A report, with a score for the scaffold that wants one with it."""
  return f"r</think>report {rng.random()} <verdict>{rng.choice(['0', '0.5', '1'])}</verdict>"


ANSWERS = {
  "summarise_template": lambda rng, _: f"summary {rng.random()}",
  "verify_template": checks,
  "meta_template": checks,
  "classify_template": decides("yes", "no"),
  "score_template": decides(*"01234567"),
  "select_template": decides("1", "2", "equal"),
  "consolidate_template": lambda *_: "r</think><keep>1, 2</keep>",
  "approaches_template": lambda *_: "r</think><approach>a</approach> <approach>b</approach>",
  "plan_template": calls_tools(*PLAN),
}


def run(config, chat, seed=3, **how):
  """The solution of PROBLEM."""
  return asyncio.run(scaffolds.prepare(config)(PROBLEM, chat, seed=seed, **how))


def stages(solution) -> dict[str, int]:
  """How many calls of each kind."""
  names = [call.stage for call in solution.calls]
  return {name: names.count(name) for name in dict.fromkeys(names)}
