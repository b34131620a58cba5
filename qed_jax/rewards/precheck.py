"""What can be said of a proof without asking a judge.

Each of these is a fact about the text that was handed in, so it earns 0, costs no call, and is
trained on like any other 0:

  empty                     nothing stands after the reasoning, or the reasoning did not end
  an unfinished thought     "<think>" is opened in the proof and not closed
  too short, no words       openers and punctuation alone: judges are known to pass ":" and
                            "Thought process:" (arXiv 2507.08794)
  repeats the problem       and adds next to nothing
  too long                  over what the judge can read; the limit is known beforehand

Whatever is not a fact about the text is no grade (None) and is not trained on: an outage, a reply
that cannot be read, a problem without the rubric or reference that the prompt needs, and a step
of the run that has been given up.
"""

from qed_jax.records import Grade, Problem

_LETTERS = 20  # fewer are no sentence, in any language


def verdict(problem: Problem, proof: str, *, min_chars: int, max_chars: int) -> Grade | None:
  """The 0 that the text earns by itself, or None where a judge has to read it.

  min_chars, max_chars: of a proof; 0 sets no limit.
  """
  text = " ".join(proof.split())
  if not text:
    return Grade(0, "empty")
  statement = " ".join(problem.statement.split())
  rest = text.replace(statement, "") if statement else text
  if proof.rfind("<think>") > proof.rfind("</think>"):
    fault = "the thought does not end"
  elif max_chars and len(proof) > max_chars:
    fault = f"{len(proof)} characters, {max_chars} are allowed"
  elif len(text) < min_chars:
    fault = f"{len(text)} characters, a proof has {min_chars} at least"
  elif sum(char.isalpha() for char in text[:2000]) < _LETTERS:
    fault = "it has no words"
  elif len(rest) < min_chars or text in statement:
    fault = "it repeats the problem"
  else:
    return None
  return Grade(0, f"precheck: {fault}")
