"""A model's verdict on (problem, solution): labels, and which rows they let through.

The labels are those of the original (eval/scripts/filtering.py). Which of them rejected a problem
was not published: `reject`, `min_difficulty` and `max_difficulty` of the config are ours to set.
"""

import json
import pathlib
import re

from qed_jax import prompts
from qed_jax.curation import asking, chats
from qed_jax.curation.dataset import Item, Outcome, key
from qed_jax.curation.ledger import Ledger
from qed_jax.rewards import rubric
from qed_jax.rollout.experience import sampling

FLAGS = ("incomplete", "gaps", "wrong", "disagreement", "computational")
_BLOCK = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


def parse(reply: str) -> dict:
  """The labels in a reply: its one fenced block, or all of it, as a JSON object.

  {"difficulty": 1..10, each of FLAGS: bool}; other fields are passed over. Raises ValueError(why).
  """
  blocks = _BLOCK.findall(reply)
  if len(blocks) > 1:
    raise ValueError("the verdict has several blocks")
  try:
    found = json.loads(blocks[0] if blocks else reply)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"the verdict is not JSON ({str(error)[:60]})") from error
  if not isinstance(found, dict):
    raise ValueError("the verdict is not an object")
  for name in FLAGS:
    if not isinstance(found.get(name), bool):
      raise ValueError(f"{name} is {found.get(name)!r}, not true or false"[:120])
  difficulty = found.get("difficulty")
  if type(difficulty) is not int or not 1 <= difficulty <= 10:
    raise ValueError(f"difficulty is {difficulty!r}, not 1 to 10"[:120])
  return {"difficulty": difficulty} | {name: found[name] for name in FLAGS}


def reason_against(labels: dict, block) -> str:
  """Why a row is left out by config.filter, "" when it stays."""
  for name in block.reject:
    if labels[name]:
      return name
  if not block.min_difficulty <= labels["difficulty"] <= block.max_difficulty:
    return f"difficulty {labels['difficulty']}"
  return ""


async def run(config, root: pathlib.Path, items: list[Item]) -> Outcome:
  """Rows that pass, with the labels in columns quality_*."""
  unknown = sorted(set(config.filter.reject) - set(FLAGS))
  if unknown:
    raise ValueError(f"config.filter.reject names {unknown[0]!r}: use {', '.join(FLAGS)}")
  template = prompts.load(config.prompt)
  comments = [_comments(item) for item in items]
  keys = [
    key(item.problem.statement, item.solution, text)
    for item, text in zip(items, comments, strict=True)
  ]
  wanted = dict(zip(keys, zip(items, comments, strict=True), strict=True))
  chat = chats.open_chat(config, root)

  async def ask(pair: tuple[Item, str]) -> dict:
    item, text = pair
    why = "no reply was asked for"
    for attempt in range(config.attempts):
      marker, fenced = rubric.fence(item.problem, item.solution or "(none was given)", attempt)
      content = prompts.render(
        template,
        problem=item.problem.statement,
        marker=marker,
        solution=fenced,
        comments=rubric.sanitise(text) or "(none)",
      )
      messages = [{"role": "user", "content": content}]
      [completion] = await chat(messages, n=1, seed=attempt, **sampling(config.rollout))
      try:
        return parse(chats.answer_of(completion))
      except ValueError as error:
        why = str(error)
    raise asking.Unusable(f"no verdict in {config.attempts} replies: {why}")

  kept, dropped = [], []
  try:
    with Ledger(root / "verdicts.jsonl") as ledger:
      missing = await asking.fill(
        ledger,
        wanted,
        ask,
        concurrency=config.concurrency,
        max_failures=config.max_failures,
        label="verdicts",
      )
      for name, item in zip(keys, items, strict=True):
        if name not in ledger:
          continue
        labels = ledger[name]
        row = item.row | {f"quality_{label}": value for label, value in labels.items()}
        if why := reason_against(labels, config.filter):
          dropped.append({"why": why} | row)
        else:
          kept.append(row)
  finally:
    await chats.close(chat)
  details = {"model": chats.told(config), "prompt": config.prompt}
  details["rule"] = config.filter.to_dict()
  return Outcome(kept, dropped, missing, len(wanted), details)


def _comments(item: Item) -> str:
  """Other solutions and remarks of a forum, as AI-MO/aops has them in `candidates`."""
  value = item.row.get("candidates", item.row.get("comments"))
  if isinstance(value, list):
    return "\n\nComment:\n".join(text for text in value if isinstance(text, str))
  return value if isinstance(value, str) else ""
