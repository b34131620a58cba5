"""What a model decided, read strictly: exactly one decision in the agreed form, or None.

None is no decision. It is never read as a failed proof, nor as the first or last of the choices.
The thinking is dropped first; a reply that was cut decides nothing.
"""

import json
import re
from collections.abc import Collection

from qed_jax.records import Completion
from qed_jax.scaffolds.calls import answer_of

_BLANK = " \t\r\n"
_TAG = re.compile(r"<(?=/?(?:verdict|keep|call|approach)\b)", re.IGNORECASE)
SECTIONS = "## Solution", "## Self-evaluation"


def quote(text: str) -> str:
  """A text that is shown to be decided on: its own tags must not be taken for the decision."""
  return _TAG.sub("[", text)


def numbered(texts: Collection[str]) -> str:
  """Several texts in one prompt, counted from 1."""
  parts = [f"### Solution {i}\n\n{quote(text)}" for i, text in enumerate(texts, 1)]
  return "\n\n".join(parts)


def verdict(completion: Completion | None, allowed: Collection[str]) -> str | None:
  """What stands between the only <verdict> and the only </verdict>, if it is one of `allowed`."""
  return _allowed(_inside(_finished(completion), "verdict"), allowed)


def keep(completion: Completion | None, count: int) -> list[int] | None:
  """The numbers in `<keep>1, 3</keep>`, from 0: different ones of 1..count, at least one."""
  inside = _inside(_finished(completion), "keep")
  known = {str(i + 1): i for i in range(count)}
  words = [word.strip(_BLANK) for word in (inside or "").split(",")]
  kept = [known[word] for word in words if word in known]
  return sorted(kept) if len(set(kept)) == len(words) else None


def approaches(text: str, most: int) -> list[str]:
  """The texts in <approach>...</approach>, as many as asked for; none if the tags do not pair."""
  found = re.findall(r"<approach>(.*?)</approach>", text, re.DOTALL)
  if not len(found) == text.count("<approach>") == text.count("</approach>"):
    return []
  return [stripped for one in found if (stripped := one.strip())][:most]


def tool_call(text: str) -> dict | None:
  """The JSON object in the only <call>...</call>, or None."""
  try:
    value = json.loads(_inside(text, "call") or "")
  except (ValueError, RecursionError):
    return None
  return value if isinstance(value, dict) else None


def split_evaluation(text: str) -> tuple[str, float | None]:
  """(solution, score that its author gave it) of an answer in SECTIONS.

  A line that is the heading of the evaluation ends the solution, one that is the heading of the
  solution begins it; an answer without headings is all solution. The score is the only <verdict>
  of the evaluation, 0, 0.5 or 1, or None.
  """
  lines = text.splitlines()
  heads = [line.strip() for line in lines]
  begin = heads.index(SECTIONS[0]) + 1 if SECTIONS[0] in heads else 0
  end = heads.index(SECTIONS[1], begin) if SECTIONS[1] in heads[begin:] else len(lines)
  score = _allowed(_inside("\n".join(lines[end:]), "verdict"), ("0", "0.5", "1"))
  return "\n".join(lines[begin:end]).strip(), None if score is None else float(score)


def _finished(completion: Completion | None) -> str:
  if completion is None or completion.finish_reason != "stop":
    return ""
  return answer_of(completion)


def _inside(text: str, tag: str) -> str | None:
  if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
    return None
  _, _, rest = text.partition(f"<{tag}>")
  inside, found, _ = rest.partition(f"</{tag}>")
  return inside if found else None


def _allowed(inside: str | None, allowed: Collection[str]) -> str | None:
  word = None if inside is None else inside.strip(_BLANK)
  return word if word in allowed else None
