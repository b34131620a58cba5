"""Long traces of a teacher model: n completions a problem, as rows of FineProofs-SFT's columns.

The original (data/scripts/generate_sglang.py) opened its output anew with each start and kept the
reasoning only in the raw replies; here every trace is on disk when it is done, reasoning apart.
"""

import pathlib

from qed_jax import prompts
from qed_jax.curation import asking, chats
from qed_jax.curation.dataset import Item, Outcome, key
from qed_jax.curation.ledger import Ledger
from qed_jax.rollout.experience import sampling
from qed_jax.scaffolds.proof import split_proof
from qed_jax.scaffolds.reasoning_cache import turn_seed


async def run(config, root: pathlib.Path, items: list[Item]) -> Outcome:
  """A row for every finished trace; one that was cut at max_tokens, or has no proof, is dropped."""
  template, shown = prompts.load(config.prompt), prompts.load(config.train_prompt)
  different = {item.problem.id: item for item in items}
  wanted = {
    key(item.problem.statement, str(i)): (item, i)
    for item in different.values()
    for i in range(config.samples_per_problem)
  }
  chat = chats.open_chat(config, root)

  async def ask(pair: tuple[Item, int]) -> dict:
    item, i = pair
    content = prompts.render(template, problem=item.problem.statement, summary="")
    [completion] = await chat(
      [{"role": "user", "content": content}],
      n=1,
      seed=turn_seed(config.seed, item.problem.id, i),
      **sampling(config.rollout),
    )
    reasoning, proof = split_proof(completion.text)
    return {
      "reasoning_content": reasoning,
      "proof": proof,
      "finish_reason": completion.finish_reason,
      "input_tokens": completion.usage.input_tokens,
      "output_tokens": completion.usage.output_tokens,
    }

  kept, dropped, tokens = [], [], 0
  try:
    with Ledger(root / "traces.jsonl") as ledger:
      missing = await asking.fill(
        ledger,
        wanted,
        ask,
        concurrency=config.concurrency,
        max_failures=config.max_failures,
        label="traces",
      )
      for name, (item, i) in wanted.items():
        if name not in ledger:
          continue
        record = ledger[name]
        tokens += record["output_tokens"]
        row = _row(item, i, record, shown, chats.told(config))
        if record["finish_reason"] == "stop" and record["proof"]:
          kept.append(row)
        else:
          why = "cut at max_tokens" if record["finish_reason"] != "stop" else "no proof"
          dropped.append({"why": why} | row)
  finally:
    await chats.close(chat)
  details = {"teacher": chats.told(config), "prompt": config.prompt, "output tokens": tokens}
  details |= {"sampling": sampling(config.rollout), "traces a problem": config.samples_per_problem}
  details["cut or without proof"] = len(dropped)
  return Outcome(kept, dropped, missing, len(wanted), details)


def _row(item: Item, i: int, record: dict, shown: str, teacher: str) -> dict:
  problem = item.problem
  question = prompts.render(shown, problem=problem.statement, summary="")
  answer = f"<think>\n{record['reasoning_content']}\n</think>\n\n{record['proof']}"
  row = {
    "problem": problem.statement,
    "reasoning_content": record["reasoning_content"],
    "proof": record["proof"],
    "category": problem.category,
    "competition": str(item.row.get("competition") or ""),
    "source": problem.source,
    "messages": [
      {"role": "user", "content": question},
      {"role": "assistant", "content": answer},
    ],
  }
  row |= {"answer": problem.answer, "solution": problem.solution, "rubrics": problem.rubric}
  row = {name: value for name, value in row.items() if value != ""}
  return row | {
    "teacher": teacher,
    "sample": i,
    "finish_reason": record["finish_reason"],
    "output_tokens": record["output_tokens"],
  }
