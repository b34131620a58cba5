"""Scaffolds against a scripted model: what is asked, how often, in which order; what survives."""

import asyncio
import dataclasses
import json
import zlib

import pytest
from fake_endpoint import client, error, said, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_model import PROBLEM, SMALL, Killed, Model, block, decides, run, small, stages

from qed_jax import scaffolds
from qed_jax.chat import ChatError
from qed_jax.journal import Journal
from qed_jax.records import Completion
from qed_jax.scaffolds import calls


def content(solution):
  """All of a solution but how long things took and what was paid."""
  made = [(c.stage, c.messages, c.completion.text, c.depth, c.error) for c in solution.calls]
  return solution.proof, made, [(t.index, t.proof, t.summary_after) for t in solution.turns]


# --- the graphs, at the published values


@pytest.mark.parametrize(
  ("name", "answers", "expected", "depth"),
  [
    ("direct", {}, {"reason": 1}, 1),
    ("reasoning_cache", {}, {"reason": 3, "summarise": 2}, 5),
    ("reasoning_cache_paper", {}, {"reason": 12, "summarise": 11}, 23),
    (
      "deepseek_math",
      {"verify_template": decides("0", "0.5")},
      {"reason": 4, "verify": 48, "refine": 8},
      6,
    ),
    ("deepseek_math", {"verify_template": decides("1")}, {"reason": 4, "verify": 16}, 2),
    ("rsa", {}, {"reason": 8, "merge": 24, "select": 7}, 7),
    ("rsa_paper", {}, {"reason": 16, "merge": 160}, 11),
    (
      "selfcheck",
      {"classify_template": decides("yes")},
      {"reason": 1, "improve": 1, "verify": 5, "classify": 5},
      12,
    ),
    (
      "selfcheck",
      {"classify_template": decides("no")},
      {"reason": 1, "improve": 1, "verify": 10, "classify": 10, "correct": 9},
      31,
    ),
    (
      "selfcheck",
      {"classify_template": decides("perhaps")},
      {"reason": 1, "improve": 1, "verify": 30, "classify": 30},
      62,
    ),
    (
      "nomos",
      {"consolidate_template": "r</think>all of them"},
      {"reason": 16, "score": 16, "consolidate": 1, "select": 11},
      7,
    ),
    (
      "static_agent",
      {},
      {"reason": 8, "verify": 8, "improve": 8, "merge": 4, "select": 1},
      5,
    ),
    (
      "planner",
      {},
      {"plan": 7, "approaches": 1, "solve": 1, "reason": 1, "verify": 1, "improve": 1, "select": 1},
      13,
    ),
  ],
)
def test_calls_are_as_many_and_as_deep_as_published(tmp_path, name, answers, expected, depth):
  solution = run(block(name, tmp_path), Model(answers))
  assert stages(solution) == expected
  assert calls.depth(solution.calls) == depth
  assert solution.proof.startswith("proof ")
  total = calls.spent(solution.calls)
  count = sum(expected.values())
  assert (total.calls, total.input_tokens, total.output_tokens) == (count, 3 * count, 5 * count)
  assert total.seconds == pytest.approx(0.25 * count)


@pytest.mark.parametrize("name", SMALL)
def test_result_and_record_do_not_depend_on_which_answer_comes_first(tmp_path, name):
  """Every call has its place, its depth and its seed from the graph alone."""
  config = small(name, tmp_path)
  slow = run(config, Model(hurry=1))
  assert (
    len({str(content(run(config, Model(hurry=h)))) for h in (2, 3, 4)} | {str(content(slow))}) == 1
  )
  assert content(run(config, Model(), seed=4)) != content(slow)


@pytest.mark.parametrize("name", SMALL)
def test_no_call_is_the_same_as_another(tmp_path, name):
  """The same prompt twice has two seeds, so that the second answer is another sample."""
  model = Model({"prompt": "r</think>alike", "merge_template": "r</think>alike"})
  solution = run(small(name, tmp_path), model)
  seeds = [seed for _, seed, _ in model.asked]
  assert len(set(seeds)) == len(seeds) == len(solution.calls)


def test_each_kind_of_call_has_its_own_budget(tmp_path):
  config = block("deepseek_math", tmp_path)
  config.sampling.max_tokens, config.verify_sampling.max_tokens = 11, 12
  config.generate.reason.max_tokens = 13
  model = Model({"verify_template": decides("0")})
  run(config, model)
  budgets = {(kind, how["max_tokens"]) for kind, _, how in model.asked}
  assert budgets == {("prompt", 13), ("verify_template", 12), ("refine_template", 11)}


def test_depth_is_that_of_the_longest_branch_wherever_it_is():
  """Four calls, three of them in the first branch, then one that waits for all."""

  async def chain(asked, length):
    for i in range(length):
      await asked.answer("link", "@link", 0, length, i, sampling={})
    return length

  async def main():
    asked = calls.Calls.of(Model())
    lengths = await calls.together(
      [chain(asked, 3), calls.together([chain(asked, 1)]), chain(asked, 0)]
    )
    await asked.answer("end", "@end", 0, sampling={})
    return lengths, asked.solution(PROBLEM, "p").calls

  lengths, made = asyncio.run(main())
  assert lengths == [3, [1], 0]
  assert [(c.stage, c.depth) for c in made] == [
    ("link", 1), ("link", 2), ("link", 3), ("link", 1), ("end", 4)
  ]  # fmt: skip


def test_a_branch_that_raises_ends_the_others():
  """They are cancelled and waited for, so that nothing is paid for a run that is over."""
  log = []

  async def slow():
    try:
      await asyncio.sleep(60)
    finally:
      log.append("ended")

  async def fails():
    await asyncio.sleep(0)
    raise Killed

  async def main():
    with pytest.raises(Killed):
      await calls.together([slow(), fails(), slow()])
    assert log == ["ended", "ended"]

  asyncio.run(asyncio.wait_for(main(), 30))


# --- what is paid, and what survives


@pytest.mark.parametrize("name", SMALL)
def test_a_run_that_was_killed_after_any_call_pays_the_rest_only(tmp_path, name):
  config = small(name, tmp_path)
  whole = Model()
  expected = run(config, Journal(whole, str(tmp_path / "whole"), "m"))
  assert whole.paid == len(expected.calls)
  for lives in range(whole.paid):
    path = str(tmp_path / f"{lives}")
    first, second = Model(lives=lives, hurry=lives), Model(hurry=lives + 1)
    with pytest.raises(Killed):
      run(config, Journal(first, path, "m"))
    again = run(config, Journal(second, path, "m"))
    assert first.paid == lives and second.paid == whole.paid - lives
    assert content(again) == content(expected)
    spent, before = calls.spent(again.calls), calls.spent(expected.calls)
    assert spent.calls == second.paid
    assert dataclasses.replace(spent, calls=before.calls) == before


@pytest.mark.parametrize("name", SMALL)
def test_one_failed_call_does_not_end_the_run(tmp_path, name):
  """Whichever it is. Its error is on record, and a run without a proof raises it."""
  config = small(name, tmp_path)
  total = len(run(config, Model()).calls)
  for fails in range(total):

    class Outage(Model):
      async def __call__(self, messages, fails=fails, **how):
        if len(self.asked) == fails:
          self.asked.append(("failed", 0, {}))
          raise ChatError("no\nanswer")
        return await super().__call__(messages, **how)

    if fails == 0 and name in ("direct", "reasoning_cache", "selfcheck"):
      with pytest.raises(ChatError, match="no\nanswer"):
        run(config, Outage())
      continue
    solution = run(config, Outage())
    assert solution.proof.startswith("proof ")
    assert [c.error for c in solution.calls if c.error] == ["no answer"]
    assert [c.completion.text for c in solution.calls if c.error] == [""]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("error", [ChatError("down"), TimeoutError()])
def test_nothing_but_failures_is_an_error_and_no_empty_proof(tmp_path, name, error):
  class Down(Model):
    async def __call__(self, messages, **how):
      raise error

  with pytest.raises(type(error)):
    run(small(name, tmp_path), Down())


@pytest.mark.parametrize("name", SMALL)
def test_nothing_but_unfinished_thoughts_is_an_empty_proof(tmp_path, name):
  """That is a fact about the model, and every call of it is on record."""
  cut = Completion(text="thinking on and on", finish_reason="length")

  class Rambling(Model):
    async def __call__(self, messages, **how):
      return [cut]

  solution = run(small(name, tmp_path), Rambling())
  assert solution.proof == "" and solution.calls
  assert all(call.completion is cut for call in solution.calls)


@pytest.mark.parametrize("name", SMALL)
def test_other_exceptions_are_not_swallowed(tmp_path, name):
  """A bug or a full disk ends the run, and nothing of it goes on in the background."""
  config = small(name, tmp_path)

  async def main():
    with pytest.raises(Killed):
      await scaffolds.prepare(config)(PROBLEM, Model(lives=0 if name == "direct" else 1), seed=0)
    return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

  assert asyncio.run(main()) == []


HOSTILE = st.one_of(
  st.text(max_size=40),
  st.builds(
    "{}</think>{}<verdict>{}</verdict>{}".format,
    st.sampled_from(["", "r", "</think>"]),
    st.sampled_from(["", "<verdict>", "## Solution\n", "\ud800", "## Self-evaluation\n"]),
    st.sampled_from(["0", "1", "2", "7", "yes", "no", "equal", "٣", "1e0", "-1", " 1 ", ""]),
    st.sampled_from(["", "<verdict>1</verdict>", "</verdict>", "<keep>1</keep>"]),
  ),
  st.builds(
    '</think><call>{{"tool": {}, "solution": {}, "solutions": {}, "approach": {}}}</call>'.format,
    st.sampled_from(['"solve"', '"verify"', '"improve"', '"merge"', '"select"', '"submit"', "[]"]),
    st.sampled_from(['"S1"', '"S9"', "3", "null", "[]"]),
    st.sampled_from(['["S1", "S1"]', '["S1", "S2"]', '"S1S2"', "[[], {}]", "null"]),
    st.sampled_from(["null", '"A1"', "[1]"]),
  ),
  st.sampled_from(
    [
      "</think><keep>1,2,9</keep>",
      "</think><keep>2</keep>",
      "</think><approach>x</approach><approach>",
      "</think>" + "<call>" + "[" * 1_500 + "</call>",
      "</think><call>9" + "9" * 5_000 + "</call>",
    ]
  ),
)


@pytest.mark.parametrize("name", SMALL)
@settings(
  max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(replies=st.lists(HOSTILE, min_size=1, max_size=8), cut=st.booleans())
def test_no_reply_breaks_a_run(tmp_path, name, replies, cut):
  """Whatever the model says, the run ends, within its budget, with a proof that the model wrote."""
  said = []

  class Hostile(Model):
    async def __call__(self, messages, **how):
      said.append(replies[len(said) % len(replies)])
      return [Completion(text=said[-1], finish_reason="length" if cut else "stop")]

  solution = run(small(name, tmp_path), Hostile())
  assert solution.proof in "\n".join(said)
  assert len(solution.calls) == len(said) <= MOST[name]


MOST = {
  "direct": 1,
  "reasoning_cache": 5,
  "deepseek_math": 4 * (1 + 2 * 2),
  "rsa": 3 + 3 + 2,
  "selfcheck": 2 + 3 * 3,
  "nomos": 8 + 1 + 2,
  "static_agent": 1 + 4 * 3 + 2 + 1,
  "planner": 2 * 6 + 1 + 1,
  "deepseek_math_cache": 2 * 3 + 2 + 2,
  "rsa_cache": 2 * 3 + 2 * (1 + 3) + 1,
}


def test_an_endpoint_that_was_down_for_a_while_is_asked_only_for_the_rest(tmp_path):
  """Over HTTP the client's own cache does what the journal does for the engine."""
  config, down, answered = small("rsa", tmp_path), {2, 3}, []

  def script(number, request):
    if number in down:
      return error(503)
    answered.append(json.dumps(request["body"], sort_keys=True))
    return said(f"proof {zlib.crc32(answered[-1].encode())}", reasoning="r")

  async def once(server):
    chat = client(server, cache=tmp_path / "c", attempts=1)
    try:
      return await scaffolds.prepare(config)(PROBLEM, chat, seed=3)
    finally:
      await chat.close()

  with serve(script) as server:
    first = asyncio.run(once(server))
    assert sum(bool(call.error) for call in first.calls) == 2
    again = asyncio.run(once(server))
    assert not any(call.error for call in again.calls)
    assert len(server.requests) > len(again.calls)
    assert len(set(answered)) == len(answered) == len(server.requests) - 2
    assert calls.spent(again.calls).calls == len(server.requests) - len(first.calls)


# --- nesting


def test_a_cache_inside_rsa_goes_on_from_each_merged_proof(tmp_path):
  """Solutions and refinements are runs of the cache; its summaries are the summariser's."""
  config = small("rsa_cache", tmp_path)
  policy, summariser = Model({"merge_template": "r</think>merged"}), Model()
  solution = run(config, policy, summariser=summariser)
  assert stages(solution) == {"reason": 8, "summarise": 4, "merge": 2, "select": 1}
  assert calls.depth(solution.calls) == 3 + 1 + 3 + 1
  assert set(summariser.kinds()) == {"summarise_template"} and len(summariser.asked) == 4
  assert "summarise_template" not in policy.kinds()
  starts = [c.messages[0]["content"] for c in solution.calls if c.stage == "reason"]
  assert sum("summary=[]" in text for text in starts) == 2
  assert sum("summary=[merged]" in text for text in starts) == 2


def test_a_cache_inside_deepseek_math_makes_the_pool_only(tmp_path):
  config = small("deepseek_math_cache", tmp_path)
  solution = run(config, Model({"verify_template": decides("0")}))
  assert stages(solution) == {"reason": 4, "summarise": 2, "verify": 3, "refine": 1}
  assert calls.depth(solution.calls) == 3 + 1 + 1 + 1


def test_any_scaffold_makes_the_first_proofs_of_another(tmp_path):
  config = small("nomos", tmp_path)
  inner = small("static_agent", tmp_path)
  plain = config.to_dict() | {"generate": inner.to_dict()}
  solution = run(plain, Model())
  assert stages(solution)["approaches"] == 4 and stages(solution)["consolidate"] == 1
  assert calls.depth(solution.calls) == 1 + 5 + 1 + 1 + 1
