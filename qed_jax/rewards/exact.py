"""The exact grader of the tiny world: a proof is read word by word against the rubric.

The rubric (data/tiny_world.py) has one line for each named result, `2 points: d 1`. A proof is a
sequence of lines, each a letter and a digit. A true line for a named result earns its points, a
false one nothing; a repetition, a result that was not asked for, and the first word that does not
fit, where reading stops, cost one point each. A result given two values earns nothing, so that
listing all digits does not pay. A false line has no price of its own: with one, the policy learns
to stop as soon as the summary might hold an error, and several turns bring nothing.
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
  idle = len(lines) - len(truth.keys() & values.keys()) + malformed
  score = max(0, sum(points[letter] for letter in right) - idle)
  verdicts = [
    f"{letter} {'right' if letter in right else 'wrong' if letter in values else 'missing'}"
    for letter in truth
  ]
  verdicts += [f"{idle} off"] * (idle > 0) + ["malformed"] * malformed
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
