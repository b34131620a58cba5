"""Every scaffold for real: a tiny model, sampled by the in-process engine, through the journal."""

import asyncio
import collections
import zlib

import pytest
from engines import STOP, assert_nothing_is_left, make_engine
from ml_collections import ConfigDict
from scripted_model import PLAN, SMALL, small

from qed_jax import scaffolds
from qed_jax.chat import ChatError
from qed_jax.journal import Journal
from qed_jax.records import Problem
from qed_jax.rollout.engine_chat import EngineChat
from qed_jax.scaffolds import calls

# What the 64 tokens of a random model say: thoughts end, decisions are made, many in a wrong form.
PIECES = [
  *["</think>"] * 24,
  *[f"<verdict>{word}</verdict>" for word in ("0", "1", "0.5", "yes", "no", "2", "7")],
  *PLAN,
  "<keep>1, 2</keep>",
  "<approach>a</approach>",
]


class Words:
  """A tokenizer: a prompt is nine ids that depend on all of it, an id is one of the PIECES."""

  stop_ids = (STOP,)

  def chat(self, messages, thinking=True):
    text = repr([(m["role"], m["content"]) for m in messages])
    return [zlib.crc32(f"{i}{text}".encode()) % 60 + 4 for i in range(8)] + [1 if thinking else 2]

  def decode(self, ids):
    return " ".join(PIECES[i] if i < len(PIECES) else f"w{i}" for i in ids if i != STOP)


@pytest.fixture(scope="module")
def engine(tiny):
  return make_engine(tiny)


def configure(name, folder) -> ConfigDict:
  config = small(name, folder)
  _shorten(config)
  return config


def _shorten(block) -> None:
  for key, part in block.items():
    if isinstance(part, ConfigDict) and "max_tokens" in part:
      block[key].max_tokens = 6
    elif isinstance(part, ConfigDict):
      _shorten(part)


def solve_all(engine, configs, path, seeds=(0, 1)):
  """Each config with each seed on a problem of its own, all at once: (name, seed) -> solution."""

  async def one(chat, name, seed):
    problem = Problem(id=f"{seed}", statement=f"problem {seed}")
    return await scaffolds.prepare(configs[name])(problem, chat, seed=seed)

  async def main():
    journal = Journal(EngineChat(engine, Words(), seed=0).chat, path, "tiny")
    pairs = [(name, seed) for name in configs for seed in seeds]
    done = await asyncio.gather(*(one(journal, *pair) for pair in pairs))
    await journal.close()
    return dict(zip(pairs, done, strict=True)), journal.paid

  return asyncio.run(main())


def content(solution):
  return solution.proof, [(c.stage, c.messages, c.completion.text, c.depth) for c in solution.calls]


def test_every_scaffold_on_the_engine(engine, tmp_path):
  """All at once they find what each finds alone; told again, all of it comes from the journal."""
  configs = {name: configure(name, tmp_path) for name in SMALL}
  together, paid = solve_all(engine, configs, str(tmp_path / "together"))
  assert 0 < paid <= sum(len(solution.calls) for solution in together.values())
  stages = collections.Counter(c.stage for s in together.values() for c in s.calls)
  assert {"reason", "summarise", "verify", "refine", "merge", "select", "score"} <= set(stages)
  assert sum(bool(solution.proof) for solution in together.values()) > len(together) / 2
  for solution in together.values():
    spent = calls.spent(solution.calls)
    assert spent.input_tokens == 9 * len(solution.calls)
    assert 0 < spent.output_tokens <= 6 * len(solution.calls)
  for name in ("rsa_cache", "planner"):
    alone, _ = solve_all(engine, {name: configs[name]}, str(tmp_path / name), seeds=(1,))
    assert content(alone[name, 1]) == content(together[name, 1])
  again, paid = solve_all(engine, configs, str(tmp_path / "together"))
  assert paid == 0
  assert {key: content(s) for key, s in again.items()} == {
    key: content(s) for key, s in together.items()
  }
  assert_nothing_is_left(engine)


def test_a_prompt_that_is_too_long_for_the_engine_fails_its_call_alone(engine, tmp_path):
  """The population goes on without the merges; a run with nothing else has no solution."""

  class Long(Words):
    def chat(self, messages, thinking=True):
      ids = super().chat(messages, thinking)
      return ids * 9 if "@merge_template" in messages[-1]["content"] else ids

  async def main(name, tokenizer, seed):
    chat = EngineChat(engine, tokenizer, seed=0).chat
    problem = Problem(id="p", statement="problem")
    return await scaffolds.prepare(configure(name, tmp_path))(problem, chat, seed=seed)

  solution = asyncio.run(main("rsa", Long(), 1))
  errors = [call.error for call in solution.calls if call.stage == "merge"]
  assert errors and all("the prompt has 81 tokens" in error for error in errors)
  assert solution.proof

  class TooLong(Words):
    def chat(self, messages, thinking=True):
      return super().chat(messages, thinking) * 9

  with pytest.raises(ChatError, match="the prompt has 81 tokens"):
    asyncio.run(main("nomos", TooLong(), 0))
