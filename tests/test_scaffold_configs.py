"""Every scaffold by its name, at published and tiny values; what is wrong is said in one line."""

import asyncio
import importlib
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import common
from configs import scaffolds as blocks
from qed_jax import flags, prompts, scaffolds
from qed_jax.data import tiny_world
from qed_jax.records import Completion

FOLDER = Path(scaffolds.__file__).parent


def prompts_of(block, field="scaffold"):
  """(scaffold, parameter, prompt) of a block and of those in it."""
  for key, name in block.prompts.items():
    yield block.solve, key, name
  for part in block.values():
    if isinstance(part, ConfigDict) and "solve" in part:
      yield from prompts_of(part)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_every_block_is_ready_to_run(name, tiny):
  block = blocks.get(name, tiny)
  assert block.name == name
  flags.check(block)
  assert callable(scaffolds.prepare(block))
  assert callable(scaffolds.prepare(block.to_dict()))


@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_prompts_ask_for_all_that_they_can_have(name):
  """A reviewer who is not shown the proof would be a bad one."""
  for scaffold, key, prompt in prompts_of(blocks.get(name)):
    fields = importlib.import_module(f"qed_jax.scaffolds.{scaffold}").FIELDS[key]
    optional = {"summary"} if key == "prompt" else set()
    assert prompts.fields(prompts.load(prompt)) == fields - optional


def test_names_are_the_files():
  """A file with a `solve` is a scaffold, and the other way round."""
  found = {p.stem for p in FOLDER.glob("*.py") if "\nasync def solve(" in p.read_text()}
  assert found == set(scaffolds.NAMES) <= set(blocks.BLOCKS)


@pytest.mark.parametrize("name", scaffolds.NAMES)
def test_every_scaffold_states_its_source(name):
  text = importlib.import_module(f"qed_jax.scaffolds.{name}").__doc__
  assert "Source: " in text


def test_unknown_names_are_answered_with_the_known_ones():
  with pytest.raises(ValueError, match="no scaffold 'rsaa': use one of direct, .*rsa") as caught:
    blocks.get("rsaa")
  assert "\n" not in str(caught.value)
  with pytest.raises(ValueError, match=r"config\.scaffold\.solve is 'rsaa': use one of .*rsa"):
    scaffolds.prepare(ConfigDict({"solve": "rsaa"}))
  with pytest.raises(ValueError, match=r"config\.scaffold\.solve is None"):
    scaffolds.prepare({})


def test_a_block_that_cannot_work_is_named_in_one_line(tmp_path):
  wrong = tmp_path / "wrong.md"
  wrong.write_text("{problem} {answer}")
  block = blocks.get("deepseek_math").to_dict()
  for change, message in [
    ({"pool": 3}, r"config\.scaffold\.pool: deepseek_math has no such parameter"),
    ({"generate": {"solve": "x"}}, r"config\.scaffold\.generate\.solve is 'x'"),
    (
      {"prompts": block["prompts"] | {"verify_template": str(wrong)}},
      r"config\.scaffold\.prompts\.verify_template=.* asks for \{answer\}: .*\{proof\}",
    ),
    (
      {"prompts": {"verify_template": "dsm_verify"}},
      "config.scaffold lacks meta_template, which deepseek_math needs",
    ),
    ({"prompts": block["prompts"] | {"verify_template": "nope"}}, "no prompt template 'nope'"),
  ]:
    with pytest.raises(ValueError, match=message) as caught:
      scaffolds.prepare(block | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "field", "value"),
  [("rsa", "subsets_by", "ring"), ("rsa", "select", "vote"), ("nomos", "solutions", 0)],
)
def test_impossible_values_are_found_with_the_config(name, field, value):
  block = blocks.get(name)
  block[field] = value
  with pytest.raises(ValueError, match=field):
    flags.check(block)


def test_published_values():
  """A few figures of the sources, so that a slip of the hand is seen."""
  released, paper = blocks.get("deepseek_math_released"), blocks.get("rsa_paper")
  assert (released.pool_size, released.verifications, released.iterations) == (128, 64, 16)
  assert released.best * released.refinements == 128
  assert (paper.population, paper.subset, paper.rounds) == (16, 4, 10)
  assert (paper.generate.reason.max_tokens, paper.sampling.temperature) == (8_192, 1.0)
  cache = blocks.get("rsa_cache")
  assert (cache.generate.turns, cache.refine.turns, cache.subset) == (8, 8, 2)
  assert blocks.get("reasoning_cache").turns == 3
  assert blocks.get("direct").reason.to_dict() == {
    "max_tokens": 229_376, "temperature": 0.8, "top_p": 1.0, "top_k": 0
  }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in blocks.BLOCKS if name != "planner"])
def test_tiny_conversations_fit_the_tiny_engine(name):
  """A word is a token there, a message has two marks; the longest problems and answers."""
  longest = []

  async def chat(messages, *, n, seed, max_tokens, **how):
    words = sum(len(m["content"].split()) + 2 for m in messages) + 2
    longest.append(words + max_tokens)
    answer = "</think> " + " ".join(["a"] * (max_tokens - 1))
    return [Completion(text=answer if how.get("thinking") else answer.split(" ", 1)[1])]

  problem = max(tiny_world.problems(0, 300, "heldout"), key=lambda p: len(p.statement.split()))
  solve = scaffolds.prepare(blocks.get(name, tiny=True))
  asyncio.run(solve(problem, chat, seed=0))
  assert max(longest) <= common.tiny_engine()["max_length"]
