"""Each scaffold's own rules: what it refines, what it keeps, what an unreadable reply means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_model import PLAN, Model, block, calls_tools, decides, run, stages

from qed_jax.chat import ChatError
from qed_jax.scaffolds import rsa
from qed_jax.scaffolds.reasoning_cache import turn_seed


def test_deepseek_math_refines_the_best_proofs_by_their_lowest_reviews(tmp_path):
  """A proof's text says how its reviewers score it; the worse reports go into the refinement."""
  scores = {"A": ["1", "1", "0.5", "0"], "B": ["0", "0", "0", "0"]}
  made, reviewed = iter("AB"), []

  def verify(_, messages):
    name = messages[0]["content"].partition("proof=[")[2][0]
    reviewed.append(name)
    score = scores.get(name, ["1"] * 4)[reviewed.count(name) - 1]
    return f"r</think>{name} gets {score}: <verdict>{score}</verdict>"

  config = block("deepseek_math", tmp_path, pool_size=2, iterations=3, best=1)
  model = Model({
    "prompt": lambda *_: f"r</think>## Solution\n{next(made)}\n## Self-evaluation\nnone",
    "verify_template": verify,
    "refine_template": "r</think>C",
  })  # fmt: skip
  solution = run(config, model)
  assert solution.proof == "C"
  [refinement] = [c for c in solution.calls if c.stage == "refine"]
  asked = refinement.messages[0]["content"]
  assert "proof=[A]" in asked and "A gets 0:" in asked and "A gets 0.5:" in asked
  assert "A gets 1:" not in asked and "B gets" not in asked


def test_an_unreadable_verification_is_no_zero(tmp_path):
  """With 1, 1 and two that cannot be read the mean is 1; but half is not enough to stop at."""
  replies = iter(["<verdict>1</verdict>", "?", "<verdict>1</verdict>", "<verdict>2</verdict>"] * 9)
  config = block("deepseek_math", tmp_path, pool_size=1, iterations=1, best=1)
  model = Model({
    "prompt": "r</think>first",
    "verify_template": lambda *_: f"r</think>{next(replies)}",
    "refine_template": "r</think>second",
  })  # fmt: skip
  solution = run(config, model)
  assert solution.proof == "first"  # the means are equal: the older one
  assert stages(solution) == {"reason": 1, "verify": 8, "refine": 1}


def test_an_unreadable_verification_leaves_the_mean_alone(tmp_path):
  """One 1 and three that cannot be read are better than four times 0.5."""
  made, scores = iter("AB"), {"A": ["1", "x", "x", "x"], "B": ["0.5"] * 4}

  def verify(_, messages):
    name = messages[0]["content"].partition("proof=[")[2][0]
    return f"r</think><verdict>{scores[name].pop()}</verdict>"

  config = block("deepseek_math", tmp_path, pool_size=2, iterations=0)
  model = Model({"prompt": lambda *_: f"r</think>{next(made)}", "verify_template": verify})
  assert run(config, model).proof == "A"


def test_a_report_that_the_meta_verifiers_reject_does_not_count(tmp_path):
  config = block(
    "deepseek_math", tmp_path, pool_size=1, verifications=3, meta_verifications=3, iterations=1
  )
  scores = iter(["0", "1", "1"])
  model = Model({
    "verify_template": lambda *_: f"r</think><verdict>{next(scores)}</verdict>",
    "meta_template": decides("0"),
  })  # fmt: skip
  assert stages(run(config, model)) == {"reason": 1, "verify": 3, "meta_verify": 3}


def test_equal_means_are_ranked_by_the_authors_own_score(tmp_path):
  own = iter(["0", "1", "0.5"])
  text = "r</think>## Solution\nproof {0}\n## Self-evaluation\n<verdict>{0}</verdict>"
  config = block("deepseek_math", tmp_path, pool_size=3, iterations=0)
  model = Model({
    "prompt": lambda *_: text.format(next(own)),
    "verify_template": decides("0.5"),
  })  # fmt: skip
  assert run(config, model).proof == "proof 1"


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 2**31))
def test_circulant_subsets_use_every_member_equally_often(count, size, seed):
  for kind in ("circulant", "random"):
    blocks = rsa.subsets(count, size, kind, seed)
    assert len(blocks) == count
    assert all(len(set(b)) == len(b) == min(size, count) for b in blocks)
    if kind == "circulant":
      used = [i for b in blocks for i in b]
      assert {used.count(i) for i in range(count)} == {min(size, count)}


@pytest.mark.parametrize("choice", ["<verdict>equal</verdict>", "<verdict>3</verdict>", "the last"])
def test_a_choice_that_cannot_be_read_is_a_coin_and_not_the_last(tmp_path, choice):
  """Over many seeds each of two proofs wins about half of the time."""
  config = block("static_agent", tmp_path, slots=2, per_slot=1, verifications=0)
  wins = []
  for seed in range(60):
    model = Model({"select_template": f"r</think>{choice}"})
    solution = run(config, model, seed=seed)
    first = solution.calls[0].completion.text
    wins.append(solution.proof in first)
  assert 15 < sum(wins) < 45


def test_a_readable_choice_is_taken(tmp_path):
  config = block("static_agent", tmp_path, slots=3, per_slot=1, verifications=0)
  solution = run(config, Model({"select_template": decides("2")}))
  assert solution.proof in solution.calls[1].completion.text


def test_an_improvement_without_a_proof_keeps_the_proof(tmp_path):
  config = block("static_agent", tmp_path, slots=1, per_slot=1)
  solution = run(config, Model({"improve_template": "a thought without end"}))
  assert solution.proof in solution.calls[0].completion.text and solution.proof


def test_slots_with_an_approach_follow_it(tmp_path):
  config = block("static_agent", tmp_path, slots=0, approaches=3, per_slot=1, verifications=0)
  solution = run(config, Model())
  assert stages(solution) == {"approaches": 1, "solve": 2, "reason": 1, "select": 1}
  asked = [c.messages[0]["content"] for c in solution.calls if c.stage == "solve"]
  assert "approach=[a]" in asked[0] and "approach=[b]" in asked[1]


def test_selfcheck_starts_to_count_again_after_a_failure(tmp_path):
  verdicts = iter(["yes", "yes", "no", "?", "yes", "yes", "yes"])
  config = block("selfcheck", tmp_path, correct_count=3, error_count=3, max_iterations=9)
  model = Model({
    "classify_template": lambda *_: f"r</think><verdict>{next(verdicts)}</verdict>",
    "correct_template": "r</think>corrected",
  })  # fmt: skip
  solution = run(config, model)
  assert solution.proof == "corrected" and stages(solution)["verify"] == 7
  [correction] = [c for c in solution.calls if c.stage == "correct"]
  assert [m["role"] for m in correction.messages] == ["user", "assistant", "user"]


def test_selfcheck_that_gives_up_returns_the_last_proof_or_none(tmp_path):
  never = Model({"classify_template": decides("no")})
  assert run(block("selfcheck", tmp_path), never).proof
  assert run(block("selfcheck", tmp_path, return_if_not_found=False), never).proof == ""


def test_nomos_keeps_the_perfect_ones_where_there_are_enough(tmp_path):
  points = iter("77373")
  numbers = iter("abcde")
  config = block("nomos", tmp_path, solutions=5, target_perfect=3, max_kept=4)
  model = Model({
    "prompt": lambda *_: f"r</think>proof {next(numbers)}",
    "score_template": lambda *_: f"r</think><verdict>{next(points)}</verdict>",
  })  # fmt: skip
  solution = run(config, model)
  [consolidation] = [c for c in solution.calls if c.stage == "consolidate"]
  assert consolidation.messages[0]["content"].count("### Solution") == 3


def test_nomos_ranks_what_it_could_not_score_in_the_middle(tmp_path):
  points = {"a": "3", "b": "4", "c": "none"}
  numbers = iter(points)

  def score(_, messages):
    name = messages[0]["content"].partition("proof=[proof ")[2][0]
    return f"r</think><verdict>{points[name]}</verdict>"

  config = block("nomos", tmp_path, solutions=3, target_perfect=1, max_kept=2)
  model = Model({
    "prompt": lambda *_: f"r</think>proof {next(numbers)}",
    "score_template": score,
  })  # fmt: skip
  [consolidation] = [c for c in run(config, model).calls if c.stage == "consolidate"]
  shown = consolidation.messages[0]["content"]
  assert shown.index("proof b") < shown.index("proof c") and "proof a" not in shown


def test_planner_that_never_submits_gives_its_youngest_solution(tmp_path):
  """After its calls there is one reminder."""
  config = block("planner", tmp_path, max_calls=3)
  solution = run(config, Model({"plan_template": calls_tools(*PLAN[:3], "I am done.")}))
  plans = [c for c in solution.calls if c.stage == "plan"]
  fresh = [c for c in solution.calls if c.stage == "reason"]
  assert len(plans) == 4 and solution.proof in fresh[-1].completion.text
  assert "Submit now" in plans[-1].messages[-1]["content"]


def test_planner_without_a_solution_makes_one(tmp_path):
  solution = run(block("planner", tmp_path), Model({"plan_template": "r</think>What a problem!"}))
  assert stages(solution) == {"plan": 16, "reason": 1} and solution.proof.startswith("proof ")


@pytest.mark.parametrize(
  ("said", "told"),
  [
    ("no call", "one call of a tool is needed: approaches, solve"),
    ('<call>{"tool": "rm"}</call>', "one call of a tool is needed"),
    ('<call>{"tool": "solve"}</call> <call>{"tool": "solve"}</call>', "one call of a tool"),
    ('<call>{"tool": "verify", "solution": "S9"}</call>', "there are: none yet"),
    ('<call>{"tool": "solve", "approach": "A1"}</call>', "no such approach"),
    ('<call>{"tool": "merge", "solutions": ["S1"]}</call>', "two names or more"),
  ],
)
def test_planner_is_told_of_a_call_that_cannot_be_made(tmp_path, said, told):
  config = block("planner", tmp_path, max_calls=2)
  solution = run(config, Model({"plan_template": calls_tools(said, PLAN[2])}))
  plans = [c for c in solution.calls if c.stage == "plan"]
  assert told in plans[1].messages[-1]["content"]
  assert stages(solution)["reason"] == 1


def test_planner_has_a_limit_of_fresh_solutions(tmp_path):
  config = block("planner", tmp_path, max_solutions=1)
  solution = run(config, Model({"plan_template": calls_tools(*[PLAN[2]] * 9)}))
  assert stages(solution)["reason"] == 1


def test_cache_returns_the_last_proof_there_is(tmp_path):
  """A last turn that was cut does not lose the proof of the one before."""
  replies = iter(["r</think>first", "r</think>second", "cut"])
  solution = run(
    block("reasoning_cache", tmp_path), Model({"reason_template": lambda *_: next(replies)})
  )
  assert solution.proof == "second" and [t.proof for t in solution.turns] == ["first", "second", ""]


def test_a_failed_summary_keeps_the_one_before(tmp_path):
  summaries = iter(["s1", ChatError("down")])
  config = block("reasoning_cache", tmp_path)
  solution = run(config, Model({"summarise_template": lambda *_: next(summaries)}))
  assert [t.summary_before for t in solution.turns] == ["", "s1", "s1"]
  assert [c.error for c in solution.calls] == ["", "", "", "down", ""]


def test_a_single_pass_is_the_first_turn_of_a_cache(tmp_path):
  """Same prompt, same seed: their samples are the same."""
  direct, cache = Model(), Model()
  run(block("direct", tmp_path), direct, seed=5)
  run(block("reasoning_cache", tmp_path), cache, seed=5)
  assert direct.asked[0][1] == cache.asked[0][1] == turn_seed(5, "reason", 1)
