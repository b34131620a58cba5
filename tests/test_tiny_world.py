"""The tiny world: problems, training rows and the exact grader agree with one another."""

import collections
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qed_jax.data import tiny_world as tw
from qed_jax.data.tokenizer import train_sentencepiece
from qed_jax.records import Problem
from qed_jax.rewards import exact

CHAIN = tw.parse("+3 a -2 b +3 c +1 d show b d start 4")
PROBLEM = tw.to_problem(CHAIN)
PROMPT = re.compile(
  r"(?:solve|list) (?P<statement>.*?start \d) (?P<known>[^t]*)(?:trace (?P<trace>.*))?"
)
HELDOUT = tw.problems(0, 300, "heldout")


def test_a_chain_worked_by_hand():
  assert CHAIN.results == {"a": 7, "b": 5, "c": 8, "d": 9}
  assert tw.trace(CHAIN) == "start 4 +3 a 7 -2 b 5 +3 c 8 +1 d 9"
  assert tw.trace(CHAIN, 1, 3, [1]) == "a 7 -2 b 5 check b 5 +3 c 8"
  assert tw.trace(CHAIN, 4) == ""
  assert tw.proof(CHAIN) == "b 5 d 9"
  assert [tw.summary(CHAIN, k) for k in range(5)] == [
    "",
    "a 7",
    "a 7 b 5",
    "a 7 b 5 c 8",
    "a 7 b 5 c 8 d 9",
  ]
  assert PROBLEM.answer == "9" and PROBLEM.level == "4"
  assert PROBLEM.rubric.splitlines()[:2] == ["3 points: b 5", "4 points: d 9"]


def test_same_seed_same_problems_and_rows():
  assert tw.problems(3, 20, "train") == tw.problems(3, 20, "train")
  assert tw.problems(3, 20, "train") != tw.problems(4, 20, "train")
  assert tw.sft_rows(3, 20) == tw.sft_rows(3, 20)


def test_splits_are_disjoint_and_sft_rows_show_no_heldout_problem():
  train = {p.statement for p in tw.problems(0, 3000, "train")}
  heldout = {p.statement for p in tw.problems(0, 1000, "heldout")}
  assert not train & heldout
  for row in tw.sft_rows(1, 1000):
    statement = PROMPT.fullmatch(row["messages"][0]["content"])["statement"]
    assert statement not in heldout


def test_lengths_cover_the_range_asked_for():
  assert {int(p.level) for p in HELDOUT} == set(range(tw.MIN_STEPS, tw.MAX_STEPS + 1))
  assert {p.level for p in tw.problems(0, 50, "heldout", 5, 6)} == {"5", "6"}
  with pytest.raises(ValueError, match="need 2 <= min <= max <= 12"):
    tw.problems(0, 1, "train", 1, 4)
  with pytest.raises(ValueError, match="use one of train, heldout"):
    tw.problems(0, 1, "test")


def test_reference_proof_scores_seven_and_a_prefix_of_it_less():
  for problem in HELDOUT:
    chain = tw.parse(problem.statement)
    scores = [exact.grade(problem, tw.proof(chain, k)).score for k in range(13)]
    assert scores == sorted(scores) and scores[0] == 0 and scores[-1] == 7
    assert exact.grade(problem, problem.solution.split("</think>")[1]).score == 7
    assert problem.answer == tw.proof(chain).split()[-1]


def test_results_follow_from_the_results_before():
  for problem in HELDOUT[:50]:
    chain = tw.parse(problem.statement)
    before = chain.start
    for letter, operation in zip(chain.letters, chain.operations, strict=True):
      assert (before + int(operation)) % 10 == chain.results[letter]
      before = chain.results[letter]


@pytest.mark.parametrize(
  ("proof", "score"),
  [
    ("b 5 d 9", 7),
    (" d 9\n b 5 ", 7),  # order and white space are free
    ("d 9", 4),
    ("b 5", 3),
    ("b 6 d 9", 4),  # false: no points
    ("b 5 b 5 d 9", 6),  # repeated
    ("b 5 b 6 d 9", 3),  # two values: none of them counts, and one off
    ("b 5 c 8 d 9", 6),  # true, but not asked for
    ("b 5 d 9 d", 6),  # a line without its digit
    ("b 5 check d 9", 2),  # reading stops
    ("b 5 d +2", 2),
    ("start 4 +3 a 7 -2 b 5 +3 c 8 +1 d 9", 0),  # reasoning is no proof
    ("b ٥ d 9", 0),  # a digit, but not one of ours
    ("B 5", 0),
    ("", 0),
    (" ".join(f"d {digit}" for digit in range(10)), 0),
  ],
)
def test_marks(proof, score):
  assert exact.grade(PROBLEM, proof).score == score


@given(
  st.text() | st.lists(st.sampled_from("a b c d 5 9 8 </think> +3 check".split())).map(" ".join)
)
def test_any_text_gets_a_mark(proof):
  grade = exact.grade(PROBLEM, proof)
  assert 0 <= grade.score <= 7 and grade.reason
  if grade.score == 7:
    assert sorted(zip(proof.split()[::2], proof.split()[1::2], strict=True)) == [
      ("b", "5"),
      ("d", "9"),
    ]


def test_more_than_one_guess_does_not_pay():
  """Two values for a result earn less than none at all."""
  for first in range(10):
    for second in range(10):
      score = exact.grade(PROBLEM, f"b 5 d {first} d {second}").score
      assert score < exact.grade(PROBLEM, "b 5").score or first == second == 9


def test_a_problem_of_another_kind_is_not_graded():
  grade = exact.grade(Problem("p", "Prove it.", rubric="7 points: a proof"), "b 5")
  assert grade.score is None and "p" in grade.reason


def test_parse_inverts_statement_and_refuses_anything_else():
  for problem in HELDOUT:
    assert tw.statement(tw.parse(problem.statement)) == problem.statement
  for text in (
    "",
    "show start 4",
    "+3 a show a",
    "+9 a show a start 4",
    "+3 b show b start 4",
    "+3 a +3 b show a start 4",
    "+3 a show a start 14",
  ):
    with pytest.raises(ValueError, match="not a statement"):
      tw.parse(text)


def test_rows_are_true_but_uneven():
  """Every line of every row is right; what varies is how much of it there is."""
  seen = collections.Counter()
  for row in tw.sft_rows(0, 2000):
    prompt, answer = (message["content"] for message in row["messages"])
    parts = PROMPT.fullmatch(prompt)
    chain, known = tw.parse(parts["statement"]), parts["known"].split()
    true = {(a, str(d)) for a, d in chain.results.items()}
    assert set(zip(known[::2], known[1::2], strict=True)) <= true
    seen[row["kind"]] += 1
    if row["kind"] == "summarise":
      assert prompt.startswith("list ") and "think" not in answer
      lines = set(zip(answer.split()[::2], answer.split()[1::2], strict=True))
      assert set(zip(known[::2], known[1::2], strict=True)) <= lines <= true
      reasoning = parts["trace"].split()
      told = set(zip(reasoning, reasoning[1:], strict=False))
      assert told & true <= lines
      if answer:
        assert answer.split()[::2] == list(tw.LETTERS[: len(lines)])
      seen["cut"] += reasoning[-1:] != [] and not reasoning[-1].isdigit()
    else:
      assert prompt.startswith("solve ") and answer.startswith("<think>")
      reasoning, proof = answer.removeprefix("<think>").split("</think>")
      words = re.sub(r"(. \d) check \1", r"\1", reasoning).split()
      names = ["start", *chain.letters]
      digits = [str(chain.start), *map(str, chain.results.values())]
      if words:
        before = names.index(words[3]) - 1
        assert words[:2] == [names[before], digits[before]]
      words = words[2:]
      for operation, letter, result in zip(words[::3], words[1::3], words[2::3], strict=True):
        assert chain.operations[tw.LETTERS.index(letter)] == operation
        assert str(chain.results[letter]) == result
      score = exact.grade(tw.to_problem(chain), proof).score
      assert "off" not in exact.grade(tw.to_problem(chain), proof).reason
      seen["checks"] += "check" in reasoning
      seen["stops early"] += score < 7
      seen["restarts"] += row["kind"] == "continue" and words[1:2] == ["a"]
      seen["continues"] += row["kind"] == "continue" and words[1:2] != ["a"]
  assert min(seen[kind] for kind in tw.KINDS) > 500
  for kind in ("cut", "checks", "stops early", "restarts", "continues"):
    assert seen[kind] > 80, (kind, seen)


def test_every_word_is_one_token(tmp_path):
  tokenizer = train_sentencepiece(tw.corpus(), tmp_path, vocab_size=64, vocab_multiple=64)
  assert tokenizer.vocab_size == 64
  for row in tw.sft_rows(2, 200):
    tokens, is_target = tokenizer.example(row["messages"])
    words = [message["content"].split() for message in row["messages"]]
    thinking = 0 if row["kind"] == "summarise" else 1
    # <|user|> ... <|end|> <|assistant|> <think> (</think>), and the stop token.
    assert len(tokens) == len(words[0]) + len(words[1]) + 6 - 2 * thinking
    assert is_target.sum() == len(words[1]) - thinking + 1
    decoded = tokenizer.decode(tokens[is_target])
    assert decoded == " ".join(words[1][thinking:])
