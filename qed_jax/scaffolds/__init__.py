"""Scaffolds: how model calls make a proof."""

import dataclasses

from qed_jax import prompts
from qed_jax.records import Call
from qed_jax.scaffolds import direct, reasoning_cache


def prepare(config):
  """async (problem, chat, *, seed, summariser=None) -> Solution, as `config.name` says."""
  template, reason = prompts.load(config.prompt), dict(config.reason)
  if config.name == "direct":

    async def once(problem, chat, *, seed, summariser=None):
      solution = await direct.solve(problem, chat, prompt=template, reason=reason, seed=seed)
      [turn] = solution.turns
      return dataclasses.replace(solution, calls=(Call("reason", (), turn.completion, 1),))

    return once
  summarise, sampling = prompts.load(config.summarise), dict(config.summary)

  async def turns(problem, chat, *, seed, summariser=None):
    solution = await reasoning_cache.solve(
      problem,
      chat,
      turns=config.turns,
      reason_template=template,
      summarise_template=summarise,
      reason=reason,
      summarise_sampling=sampling,
      seed=seed,
      summariser=summariser,
    )
    calls = []
    for turn in solution.turns:
      calls.append(Call("reason", (), turn.completion, len(calls) + 1))
      if turn.summary_completion:
        calls.append(Call("summarise", (), turn.summary_completion, len(calls) + 1))
    return dataclasses.replace(solution, calls=tuple(calls))

  return turns
