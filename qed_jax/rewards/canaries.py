"""Proofs whose score is known, to be slipped in among the others: what a judge says of them shows
whether it still reads.

Our own are in canaries.jsonl: school problems with a complete proof (7), a wrong one (0), and texts
that hold no proof at all but speak to the judge (0).
"""

import json
import pathlib

from qed_jax.records import GradedProof, Problem

OURS = pathlib.Path(__file__).with_name("canaries.jsonl")


def load(path: str) -> list[GradedProof]:
  """The rows of a JSONL file, or ours where path is "".

  A row: {"statement", "rubric", "proof", "score", and, where they are known, "solution", "id"}.
  Raises ValueError, one line, for a row that cannot serve.
  """
  found = []
  try:
    text = (pathlib.Path(path) if path else OURS).read_text(encoding="utf-8")
  except OSError as error:
    raise ValueError(f"judge.canaries={path!r} cannot be read: {error.strerror}") from None
  for number, line in enumerate(text.split("\n"), start=1):
    if line.strip():
      found.append(_read(line, f"{path or OURS.name}, line {number}"))
  if not found:
    raise ValueError(f"judge.canaries={path!r} holds no row: add some, or leave it empty for ours")
  return found


def _read(line: str, where: str) -> GradedProof:
  try:
    row = json.loads(line)
    texts = {name: row[name] for name in ("statement", "rubric", "proof")}
    texts["solution"] = row.get("solution", "")
    score = row["score"]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    cause = f"{type(error).__name__}: {error}"
    raise ValueError(f"{where}: {cause}; a canary is {{statement, rubric, proof, score}}") from None
  if not all(isinstance(text, str) for text in texts.values()):
    raise ValueError(f"{where}: statement, rubric, proof and solution must be texts")
  if type(score) is not int or not 0 <= score <= 7:
    raise ValueError(f"{where}: score is {score!r}: give one from 0 to 7")
  proof = texts.pop("proof")
  return GradedProof(Problem(id=str(row.get("id", where)), **texts), proof, score, "canary")
