"""Marking schemes: what adds up passes, what does not is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.data import marking_scheme

GOOD = """## 1. Checkpoints (7 points total)
- [1 point] Restates the claim for $n$.
  - a remark
- [2 points] Proves the base case.
### Chain A: induction
- [4 points] The step.
### Chain B: descent
- [1 point] Picks a minimal counterexample.
- [3 pts] Reaches a contradiction.
Total (max 7)

## 2. Zero-credit items
- Examples only.

## 3. Deductions
- [-1] A slip.
- [\u22122] A gap.
- [cap 5] Contradictory claims.
"""


def test_the_parts_of_a_scheme():
  """Points outside of chains count with each chain; the other sections are counted."""
  scheme = marking_scheme.check(GOOD)
  assert scheme == marking_scheme.Scheme((1, 2), {"A": (4,), "B": (1, 3)}, 1, 3)


@pytest.mark.parametrize(
  ("old", "new", "why"),
  [
    ("[2 points]", "[1 point]", "checkpoints with chain A add up to 6 points, not 7"),
    ("[3 pts]", "[4 pts]", "chain B add up to 8 points"),
    ("[1 point] Restates", "[0 points] Restates", "0 points belongs to the zero-credit"),
    ("- [4 points]", "- ", "a checkpoint has no [N points]"),
    ("Chain B", "Chain A", "chain A comes twice"),
    ("Total (max 7)", "Total (max 8)", "no line 'Total (max 7)'"),
    ("Total (max 7)", "", "no line 'Total (max 7)'"),
    ("- Examples only.", "", "zero-credit items is empty"),
    ("[-1] A slip", "[-3] A slip", "a deduction is not [-1], [-2] or [cap N]"),
    ("## 2. Zero-credit items", "", "a checkpoint has no [N points]"),
    ("## 2. Zero-credit items", "## 3. Deductions", "stands where section 2 should"),
    ("## 3. Deductions", "", "has 2 of the three sections"),
    ("## 1. Checkpoints", "Sure, here it is:\n## 1. Checkpoints", "text stands before section 1"),
  ],
)
def test_faults_are_named(old, new, why):
  assert GOOD.count(old)
  with pytest.raises(ValueError) as error:
    marking_scheme.check(GOOD.replace(old, new))
  assert why in str(error.value) and "\n" not in str(error.value)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), max_size=6))
def test_only_seven_points_pass(points):
  """Checkpoints of positive points pass exactly when their sum is 7."""
  items = "".join(f"- [{p} points] x\n" for p in points)
  start = GOOD.index("- [1 point]")
  text = GOOD[:start] + items + GOOD[GOOD.index("Total") :]
  good = sum(points) == 7 and min(points, default=0) > 0
  try:
    assert marking_scheme.check(text).common == tuple(points) and good
  except ValueError:
    assert not good


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="#123. Chekpoints[]-*\nTotal(max7)\u0662", max_size=200) | st.text())
def test_any_text_is_parsed_or_refused(text):
  """Nothing but a ValueError of one line."""
  try:
    marking_scheme.check(text)
  except ValueError as error:
    assert "\n" not in str(error)


def test_items_are_written_out():
  items = [{"title": "A", "desc": "d", "points": 6.0}, {"desc": "e", "points": 1}]
  assert marking_scheme.from_items(items) == "- [6 points] A: d\n- [1 point] e"
  for bad in ([{"points": 6}], [{"points": "7"}], [{"points": 7.5}], [{"points": True}], [{}]):
    with pytest.raises(ValueError):
      marking_scheme.from_items(bad)
