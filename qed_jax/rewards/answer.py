r"""The final answer of a solution, compared with the known one: 7 if they are equal, else 0.

math-verify compares. It bounds its time by SIGALRM, which only the main thread may use, and SymPy
can be made to compute for ever or to fill the memory (\boxed{9^{9^{9^9}}}). So it runs in a process
of its own (answer_worker.py) that has no environment, hence no keys, and that the system ends when
an answer takes too long. Its expression parser, which evaluates text as Python, stays off: answers
are read as LaTeX.
"""

import asyncio
import contextlib
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading

from qed_jax.records import Grade, Problem

_WORKER = pathlib.Path(__file__).with_name("answer_worker.py")
_LONGEST = 2000  # characters of an answer
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> str | None:
  r"""What stands in the last \boxed{...} whose braces are balanced, or None. Linear in the text."""
  opened, found = [], None
  for match in _BRACES.finditer(text):
    if match[0].endswith("{") and match[0] != r"\{":
      opened.append((match.end(), match[0] != "{"))
    elif match[0] == "}" and opened:
      start, is_box = opened.pop()
      if is_box and (found is None or start > found[0]):
        found = (start, match.start())
  return text[slice(*found)].strip() if found else None


class Checker:
  """Holds the process that compares answers; started when first needed and after each timeout.

  seconds: for one comparison. Threads may share a Checker; they take turns.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._turn = threading.Lock()
    self._process: subprocess.Popen | None = None

  def compare(self, answer: str, gold: str) -> str:
    """ "equal", "different", "no gold" (it cannot be read), or "failed: ..." with the cause.

    Raises RuntimeError when the process cannot be started.
    """
    with self._turn:
      if self._process is None:
        self._process = _start()
      request = {"answer": answer, "gold": gold, "seconds": self._seconds}
      try:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
      except BrokenPipeError:
        reply = ""
      if reply.endswith("\n"):
        return json.loads(reply)
      code = self._stop()
    if code == -signal.SIGALRM:
      return f"failed: the comparison took more than {self._seconds:g} s"
    return f"failed: the comparing process ended with code {code}"

  def close(self) -> None:
    with self._turn:
      if self._process is not None:
        self._stop()

  def _stop(self) -> int:
    process, self._process = self._process, None
    # Closing the pipes ends it; what a dead one has not read is flushed, and fails, once more.
    with contextlib.suppress(BrokenPipeError), process:
      pass
    return process.returncode


def _start() -> subprocess.Popen:
  process = subprocess.Popen(  # noqa: S603 (our own file)
    [sys.executable, "-I", str(_WORKER)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    env={},
    start_new_session=True,  # Ctrl-C is for us
  )
  if process.stdout.readline() != "ready\n":
    with process:
      pass
    raise RuntimeError("the answer checker does not start: pip install math-verify")
  return process


async def grade(problem: Problem, proof: str, checker: Checker) -> Grade:
  """7 if the proof's boxed answer equals `problem.answer`, 0 if it does not or there is none.

  None when that cannot be told: the known answer cannot be read as mathematics, or the comparison
  fails or takes too long.
  """
  if not problem.answer.strip():
    return Grade(None, f"failed: problem {problem.id} has no answer to compare with")
  answer = boxed(proof)
  if not answer:
    return Grade(0, r"empty: no \boxed answer")
  if len(answer) > _LONGEST:
    return Grade(0, f"graded: an answer of {len(answer)} characters is not read", answer[:200])
  verdict = await asyncio.to_thread(checker.compare, answer, problem.answer)
  if verdict == "no gold":
    return Grade(None, f"failed: the answer of problem {problem.id} cannot be read", answer)
  score = {"equal": 7, "different": 0}.get(verdict)
  return Grade(score, verdict if score is None else f"graded: {verdict}", answer)
