"""Scaffolds: how a proof is looked for with many model calls. A file each, all with one verb:

  solution = await solve(problem, chat, seed=seed, **parameters)

`prepare` makes such a verb out of a block of configs/scaffolds.py. A step of a scaffold can be
another one: where a block has a block with a `solve` of its own (`generate`, `refine`), the outer
scaffold gets that one ready to call, and its calls count as calls of the run.
"""

import functools
import importlib
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from qed_jax import prompts
from qed_jax.records import Problem, Solution
from qed_jax.scaffolds.calls import Calls

NAMES = (
  "deepseek_math",
  "direct",
  "nomos",
  "planner",
  "reasoning_cache",
  "rsa",
  "selfcheck",
  "static_agent",
)


def prepare(config) -> Callable[..., Awaitable[Solution]]:
  """`solve(problem, chat, *, seed, summariser=None)` with the parameters and prompts of `config`.

  config: a block as configs/scaffolds.get makes them, a ConfigDict or dict. summariser: another
  chat that writes the summaries of a reasoning cache, wherever it is in the scaffold.
  Raises ValueError in one line for a block that cannot work.
  """
  ready = _ready(config, "config.scaffold")

  async def solve(problem: Problem, chat: Any, *, seed: int, summariser: Any = None) -> Solution:
    return await ready(problem, Calls.of(chat, summariser), seed=seed)

  return solve


def _ready(config, field: str) -> Callable[..., Awaitable[Solution]]:
  if config.get("solve") not in NAMES:
    raise ValueError(f"{field}.solve is {config.get('solve')!r}: use one of {', '.join(NAMES)}")
  module = importlib.import_module(f"qed_jax.scaffolds.{config['solve']}")
  given = {}
  for name, value in config.items():
    if name == "prompts":
      given |= {key: _template(module, key, value[key], f"{field}.prompts.{key}") for key in value}
    elif hasattr(value, "items") and "solve" in value:
      given[name] = _ready(value, f"{field}.{name}")
    elif hasattr(value, "items"):
      given[name] = dict(value.items()) or None  # sampling; an empty block is a step left out
    elif name not in ("name", "solve"):
      given[name] = value
  parameters = inspect.signature(module.solve).parameters.values()
  own = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"seed"}
  needed = {p.name for p in parameters if p.name in own and p.default is p.empty}
  if extra := sorted(given.keys() - own):
    raise ValueError(f"{field}.{extra[0]}: {config['solve']} has no such parameter")
  if missing := sorted(needed - given.keys()):
    raise ValueError(f"{field} lacks {missing[0]}, which {config['solve']} needs")
  return functools.partial(module.solve, **given)


def _template(module, key: str, name: str, field: str) -> str:
  """The text of a prompt. What it can ask for is in the FIELDS of its scaffold."""
  text = prompts.load(name)
  known = module.FIELDS.get(key, set())
  if wrong := sorted(prompts.fields(text) - known):
    there = ", ".join(f"{{{one}}}" for one in sorted(known)) or "nothing"
    raise ValueError(f"{field}={name!r} asks for {{{wrong[0]}}}: what it can have is {there}")
  return text
