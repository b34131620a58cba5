"""Marking schemes that a model writes from the reference solution, asked for until they add up."""

import pathlib
import re

from qed_jax import prompts
from qed_jax.curation import asking, chats
from qed_jax.curation.dataset import Item, Outcome, key
from qed_jax.curation.ledger import Ledger
from qed_jax.data import marking_scheme
from qed_jax.rewards import rubric
from qed_jax.rollout.experience import sampling

_FENCE = re.compile(r"^```\w*\s*$", re.MULTILINE)
_FIRST = re.compile(r"^\s{0,3}#{1,6}\s*\**\s*1[.)]\s*Checkpoints", re.MULTILINE | re.IGNORECASE)


def scheme_of(reply: str) -> str:
  """The checked scheme in a reply, from its first section on. Raises ValueError(why)."""
  text = _FENCE.sub("", reply)
  first = _FIRST.search(text)
  if not first:
    raise ValueError("it has no section '1. Checkpoints'")
  text = text[first.start() :].strip()
  marking_scheme.check(text)
  return text


async def run(config, root: pathlib.Path, items: list[Item]) -> Outcome:
  """All rows with a solution, with the scheme in the column `rubrics`; the others are dropped."""
  template = prompts.load(config.prompt)
  kept, dropped = [], []
  wanted: dict[str, Item] = {}
  for item in items:
    if item.solution:
      wanted.setdefault(key(item.problem.statement), item)  # one scheme for all of its rows
  chat = chats.open_chat(config, root)

  async def ask(item: Item) -> dict:
    why = "no reply was asked for"
    for attempt in range(config.attempts):
      marker, fenced = rubric.fence(item.problem, item.solution, attempt)
      content = prompts.render(
        template, problem=item.problem.statement, marker=marker, solution=fenced
      )
      messages = [{"role": "user", "content": content}]
      [completion] = await chat(messages, n=1, seed=attempt, **sampling(config.rollout))
      try:
        return {"rubrics": scheme_of(chats.answer_of(completion)), "attempts": attempt + 1}
      except ValueError as error:
        why = str(error)
    raise asking.Unusable(f"no scheme in {config.attempts} replies that adds up: {why}")

  retried = 0
  try:
    with Ledger(root / "schemes.jsonl") as ledger:
      missing = await asking.fill(
        ledger,
        wanted,
        ask,
        concurrency=config.concurrency,
        max_failures=config.max_failures,
        label="schemes",
      )
      found = {name: ledger[name] for name in wanted if name in ledger}
      retried = sum(record["attempts"] > 1 for record in found.values())
      for item in items:
        if not item.solution:
          dropped.append({"why": "no solution to write a scheme from"} | item.row)
        elif record := found.get(key(item.problem.statement)):
          kept.append(item.row | {"rubrics": record["rubrics"]})
  finally:
    await chats.close(chat)
  details = {"model": chats.told(config), "prompt": config.prompt}
  details["schemes that needed another reply"] = retried
  return Outcome(kept, dropped, missing, len(wanted), details)
