"""The exact grader of the tiny world: a proof is read word by word against the rubric.

The rubric (data/tiny_world.py) has one line for each named result, `2 points: d 1`. A proof is a
sequence of lines, each a letter and a digit. The first true line for a named result earns its
points; every other line costs one: a false value, a repetition, a result that was not asked for,
and the first word that does not fit, where reading stops. A result given two values earns nothing.
So guessing does not pay: one guess in ten is right, and nine cost a point.
"""

import re

from qed_jax.records import Grade, Problem

MAX_SCORE = 7
NAMED = re.compile(r"(\d+) points?: ([a-z]) ([0-9])", re.ASCII)
LETTERS, DIGITS = frozenset("abcdefghijklmnopqrstuvwxyz"), frozenset("0123456789")


def grade(problem: Problem, proof: str) -> Grade:
  """Scores any text, 0 to 7. None only for a problem whose rubric is not of this form."""
  named = [match for line in problem.rubric.splitlines() if (match := NAMED.fullmatch(line))]
  points = {letter: int(n) for n, letter, _ in (match.groups() for match in named)}
  truth = {match[2]: match[3] for match in named}
  if sum(points.values()) != MAX_SCORE:
    return Grade(None, f"problem {problem.id}: its rubric does not name results worth 7 points")

  lines, malformed = _read(proof)
  values: dict[str, set[str]] = {}
  for letter, digit in lines:
    values.setdefault(letter, set()).add(digit)
  right = [letter for letter in truth if values.get(letter) == {truth[letter]}]
  wrong = len(lines) - len(right) + malformed
  score = max(0, sum(points[letter] for letter in right) - wrong)
  verdicts = [
    f"{letter} {'right' if letter in right else 'wrong' if letter in values else 'missing'}"
    for letter in truth
  ]
  verdicts += [f"{wrong} off"] * (wrong > 0) + ["malformed"] * malformed
  return Grade(score, ", ".join(verdicts))


def _read(proof: str) -> tuple[list[tuple[str, str]], bool]:
  """The lines up to the first word that does not fit, and whether there is such a word."""
  words = proof.split()
  lines = []
  for letter, digit in zip(words[::2], words[1::2], strict=False):
    if letter not in LETTERS or digit not in DIGITS:
      return lines, True
    lines.append((letter, digit))
  return lines, len(words) % 2 == 1
