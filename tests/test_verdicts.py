"""Decisions are read strictly: one in the agreed form, or None, whatever the text."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qed_jax.records import Completion
from qed_jax.scaffolds import verdicts

TAGS = st.sampled_from(
  "<verdict> </verdict> <keep> </keep> <call> </call> <approach> </approach> </think> <think> "
  '0 0.5 1 7 12 yes equal , { } " [ ] NaN null \u0661 \u00bd \u2028 \ud800 \0 <VERDICT> '
  '{"tool":"solve"} ## Solution'.split(" ")
)
TEXT = st.text(max_size=30) | st.lists(TAGS | st.text(max_size=3), max_size=14).map("".join)
ALLOWED = "0", "0.5", "1", "7", "yes"
CODED = st.text(string.ascii_letters + " \n{}$\\", max_size=20)


def said(text: str, finish: str = "stop") -> Completion:
  return Completion(text=f"r</think>{text}", finish_reason=finish)


@given(TEXT, st.sampled_from(["stop", "length"]))
def test_any_text_has_a_verdict_or_none(text, finish):
  """Nothing crashes, nothing is out of range, and a reply that was cut decides nothing."""
  completion = Completion(text=text, finish_reason=finish)
  word = verdicts.verdict(completion, ALLOWED)
  kept = verdicts.keep(completion, 4)
  assert word is None or (word in ALLOWED and f"{word}" in text)
  assert kept is None or (kept == sorted(set(kept)) and set(kept) <= set(range(4)) and kept)
  if finish == "length" or "</think>" not in text:
    assert word is None and kept is None
  call = verdicts.tool_call(text)
  assert call is None or isinstance(call, dict)
  assert all(isinstance(a, str) and a for a in verdicts.approaches(text, 3))
  solution, score = verdicts.split_evaluation(text)
  assert score in (None, 0.0, 0.5, 1.0)
  assert all(line in text for line in solution.splitlines())


@given(CODED, st.sampled_from(ALLOWED), st.sampled_from(["", " ", "\n", "\t\r\n"]), CODED)
def test_one_verdict_in_the_agreed_form_is_read(before, word, blank, after):
  text = f"{before}<verdict>{blank}{word}{blank}</verdict>{after}"
  assert verdicts.verdict(said(text), ALLOWED) == word
  assert verdicts.verdict(said(text + text), ALLOWED) is None
  assert verdicts.verdict(said(verdicts.quote(text) + text), ALLOWED) == word


@pytest.mark.parametrize(
  "text",
  [
    "<verdict>2</verdict>",
    "<verdict>1 </verdict><verdict>",
    "<verdict>1</verdict></verdict>",
    "</verdict>1<verdict>",
    "<Verdict>1</Verdict>",
    "<verdict>1.0</verdict>",
    "<verdict>\u0661</verdict>",
    "<verdict>\u00a01</verdict>",
    "<verdict>1 out of 1</verdict>",
    "<verdict></verdict>",
    "verdict: 1",
    "\\boxed{1}",
    "",
  ],
)
def test_anything_else_is_no_verdict(text):
  assert verdicts.verdict(said(text), ALLOWED) is None


def test_a_verdict_inside_the_thinking_does_not_count():
  text = "I lean to <verdict>0</verdict></think>So: <verdict>1</verdict>"
  assert verdicts.verdict(Completion(text=text), ALLOWED) == "1"
  assert verdicts.verdict(Completion(text="<verdict>1</verdict></think>"), ALLOWED) is None
  assert verdicts.verdict(Completion(text="<verdict>1</verdict>"), ALLOWED) is None
  assert verdicts.verdict(None, ALLOWED) is None


@pytest.mark.parametrize(
  ("inside", "kept"),
  [
    ("1, 3", [0, 2]),
    ("4,1", [0, 3]),
    (" 2\n", [1]),
    ("", None),
    ("5", None),
    ("0", None),
    ("1, 1", None),
    ("1 3", None),
    ("1,", None),
    ("1, all", None),
    ("[1, 2]", None),
    ("-1", None),
    ("01", None),
  ],
)
def test_which_solutions_are_kept(inside, kept):
  assert verdicts.keep(said(f"<keep>{inside}</keep>"), 4) == kept


@pytest.mark.parametrize(
  ("text", "solution", "score"),
  [
    ("a\n\nb", "a\n\nb", None),
    ("## Solution\na\n## Self-evaluation\nx <verdict>0.5</verdict>", "a", 0.5),
    ("preface\n  ## Solution  \na\nb", "a\nb", None),
    ("a\n## Self-evaluation\n<verdict>1</verdict>", "a", 1.0),
    ("## Self-evaluation\nx\n## Solution\na", "a", None),
    ("## Solution\n## Self-evaluation\nx", "", None),
    ("a <verdict>1</verdict>", "a <verdict>1</verdict>", None),
    ("a\n## Self-evaluation\n<verdict>0</verdict> <verdict>1</verdict>", "a", None),
    ("the heading ## Solution within\na", "the heading ## Solution within\na", None),
  ],
)
def test_the_self_evaluation_is_no_part_of_the_solution(text, solution, score):
  assert verdicts.split_evaluation(text) == (solution, score)


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("<approach> a </approach>x<approach>b\nc</approach>", ["a", "b\nc"]),
    ("<approach>a</approach><approach>b</approach><approach>c</approach>", ["a", "b"]),
    ("<approach>a</approach><approach>b", []),
    ("<approach><approach>a</approach></approach>", []),
    ("<approach> </approach>", []),
    ("none", []),
  ],
)
def test_approaches(text, found):
  assert verdicts.approaches(text, 2) == found


@pytest.mark.parametrize(
  ("inside", "call"),
  [
    ('{"tool": "solve"}', {"tool": "solve"}),
    ("[]", None),
    ("3", None),
    ("{", None),
    ("", None),
    ('{"a": 1} {"b": 2}', None),
  ],
)
def test_tool_calls(inside, call):
  assert verdicts.tool_call(f"text <call>{inside}</call> text") == call
  assert verdicts.tool_call(f"<call>{inside}</call><call>{inside}</call>") is None
