"""The reasoning-cache scaffold against a scripted chat: what is asked, in which order."""

import asyncio

import pytest

from qed_jax import prompts
from qed_jax.records import Completion, Problem
from qed_jax.scaffolds import direct
from qed_jax.scaffolds.proof import split_proof
from qed_jax.scaffolds.reasoning_cache import solve, states, turn_seed

PROBLEM = Problem(id="p", statement=r"Show that $\{x\} < 1$ and {summary} is no placeholder.")
REASON, SUMMARISE = "P {problem} S {summary} .", "P {problem} E {existing_summary} R {reasoning} ."


class Script:
  """A chat that answers from a list and writes down what it was asked."""

  def __init__(self, *answers):
    self.answers, self.calls = list(answers), []

  async def __call__(self, messages, **kwargs):
    self.calls.append((messages[-1]["content"], kwargs))
    answer = self.answers.pop(0)
    return [Completion(text=answer, finish_reason="stop" if "</think>" in answer else "length")]


def run(chat, turns, **kwargs):
  return asyncio.run(
    solve(
      PROBLEM,
      chat,
      turns=turns,
      reason_template=REASON,
      summarise_template=SUMMARISE,
      reason={"max_tokens": 9, "temperature": 0.8, "top_p": 1.0, "top_k": 0},
      summarise_sampling={"max_tokens": 5, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
      seed=3,
      **kwargs,
    )
  )


def test_each_turn_reasons_from_the_last_summary_and_never_from_the_trace():
  """T turns make T reasoning and T - 1 summary calls, each with its own budget."""
  chat = Script("r1</think>p1", "s1", "r2</think>p2", "s2", "r3</think>p3")
  solution = run(chat, 3)
  asked = [content for content, _ in chat.calls]
  statement = PROBLEM.statement
  assert asked == [
    f"P {statement} S  .",
    f"P {statement} E  R r1 .",
    f"P {statement} S s1 .",
    f"P {statement} E s1 R r2 .",
    f"P {statement} S s2 .",
  ]
  assert [k["max_tokens"] for _, k in chat.calls] == [9, 5, 9, 5, 9]
  assert [k.get("thinking", True) for _, k in chat.calls] == [True, False, True, False, True]
  assert solution.proof == "p3" and [t.proof for t in solution.turns] == ["p1", "p2", "p3"]
  assert [t.summary_before for t in solution.turns] == ["", "s1", "s2"]


def test_a_trace_that_was_cut_is_still_summarised():
  """Without </think> all of the trace is reasoning: the summariser sees it, the proof is empty."""
  chat = Script("half a thought", "s1", "more</think>done")
  solution = run(chat, 2)
  assert "R half a thought ." in chat.calls[1][0]
  assert solution.turns[0].proof == "" and solution.proof == "done"


def test_an_empty_summary_keeps_the_one_before():
  chat = Script("r1</think>p1", "s1", "r2</think>p2", "  ", "r3</think>p3")
  assert run(chat, 3).turns[2].summary_before == "s1"


def test_states_are_what_the_turns_started_from():
  """summarise_last adds the state after the last turn, QED-Nano's fourth of three turns."""
  chat = Script("r1</think>p1", "s1", "r2</think>p2", "s2")
  passed = states(run(chat, 2, summarise_last=True))
  assert [(s.turn, s.summary) for s in passed] == [(1, ""), (2, "s1"), (3, "s2")]
  chat = Script("r1</think>p1", "s1", "r2</think>p2")
  assert [s.turn for s in states(run(chat, 2))] == [1, 2]


def test_a_frozen_summariser_writes_all_summaries():
  policy, frozen = Script("r1</think>p1", "r2</think>p2"), Script("s1")
  solution = run(policy, 2, summariser=frozen)
  assert len(policy.calls) == 2 and len(frozen.calls) == 1
  assert solution.turns[1].summary_before == "s1"


def test_starting_from_a_stored_summary_and_nesting():
  """A run may go on from any summary, so that it nests in other scaffolds."""
  chat = Script("r</think>p")
  solution = run(chat, 1, summary="what we know")
  assert chat.calls[0][0].endswith("S what we know .")
  assert states(solution)[0].summary == "what we know"


def test_calls_have_seeds_of_their_own_that_do_not_depend_on_order():
  """Same problem, same summary in two turns: other seeds, so that the second try differs."""
  chat = Script("r</think>", "", "r</think>", "", "r</think>p")
  run(chat, 3)
  seeds = [k["seed"] for _, k in chat.calls]
  assert len(set(seeds)) == len(seeds)
  assert seeds[2] == turn_seed(3, "reason", 2) and all(0 <= s < 2**31 for s in seeds)


def test_a_failing_call_fails_the_run_and_asks_nothing_more():
  chat = Script("r1</think>p1")
  with pytest.raises(IndexError):
    run(chat, 3)
  assert len(chat.calls) == 2


def test_direct_asks_once():
  chat = Script("r</think>p")
  sampling = {"max_tokens": 9, "temperature": 0.8}
  solution = asyncio.run(direct.solve(PROBLEM, chat, prompt=REASON, reason=sampling, seed=1))
  assert solution.proof == "p" and len(chat.calls) == 1


@pytest.mark.parametrize(
  ("text", "reasoning", "proof"),
  [
    ("a</think>b", "a", "b"),
    ("a", "a", ""),
    ("a</think>b</think>c", "a", "c"),
    ("<think>\na\n</think>\n\nb\n", "a", "b"),
    ("a</think>", "a", ""),
    ("", "", ""),
  ],
)
def test_the_proof_is_what_follows_the_last_delimiter(text, reasoning, proof):
  assert split_proof(text) == (reasoning, proof)


@pytest.mark.parametrize("name", ["reason", "tiny_reason"])
def test_reasoning_prompts_take_problem_and_summary(name):
  assert prompts.fields(prompts.load(name)) == {"problem", "summary"}


@pytest.mark.parametrize("name", ["summarise", "tiny_summarise"])
def test_summary_prompts_take_problem_summary_and_reasoning(name):
  assert prompts.fields(prompts.load(name)) == {"problem", "existing_summary", "reasoning"}
