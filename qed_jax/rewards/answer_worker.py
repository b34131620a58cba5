"""The process in which answers are compared; answer.py says why. Imports nothing of qed_jax.

Reads one request a line, {"answer": , "gold": , "seconds": }, and writes one JSON string a line:
"equal", "different", "no gold" or "failed: ...". A comparison that takes longer than its seconds
ends the process by SIGALRM, which stops even arithmetic that Python cannot interrupt.
"""

import json
import resource
import signal
import sys

import math_verify
import sympy

_MEMORY = 4 << 30  # bytes


def read(text: str) -> list:
  """What LaTeX says: SymPy objects, then the text itself; without the former it is no mathematics.

  Only the LaTeX reader is used: math-verify's other one evaluates its text as Python.
  """
  plain = text.replace(r"\$", "").replace("$", "").strip().removesuffix(".")
  return math_verify.parse(
    r"\boxed{" + plain + "}",
    extraction_config=[math_verify.LatexExtractionConfig()],
    parsing_timeout=None,
  )


def compare(answer: str, gold: str) -> str:
  known = read(gold)
  if not any(isinstance(value, sympy.Basic | sympy.MatrixBase) for value in known):
    return "no gold"
  equal = math_verify.verify(known, read(answer), timeout_seconds=None)
  return "equal" if equal else "different"


def main() -> None:
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
  print("ready", flush=True)
  for line in sys.stdin:
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, request["seconds"])
    try:
      verdict = compare(request["answer"], request["gold"])
    except Exception as error:
      verdict = f"failed: {type(error).__name__} in the comparison"
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
  main()
