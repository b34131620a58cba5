"""Runs the judge's parser on recorded replies.

FILE holds one JSON object a line: {"reply": text, "score": int or null}, null where the reply is to
be refused. Each mismatch is printed; the last line is {"lines": , "mismatches": , "accepted": }.
Exits 1 on a mismatch, 2 when the file cannot be read.
"""

import argparse
import json
import pathlib
import sys

from qed_jax.rewards import rubric


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("file", metavar="FILE", help="JSONL of replies and the scores they hold")
  parser.add_argument(
    "--scale", default="0,1,2,3,4,5,6,7", help="scores that the prompt allows (default 0 to 7)"
  )
  arguments = parser.parse_args()
  try:
    scale = [int(score) for score in arguments.scale.split(",")]
    text = pathlib.Path(arguments.file).read_text(encoding="utf-8")
    # Not splitlines(): a JSON string may hold U+2028 and its like as they are.
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    pairs = [(row["reply"], row["score"]) for row in rows]
  except (OSError, ValueError, KeyError, TypeError) as error:
    problem = f"{type(error).__name__}: {error}"
    parser.error(f'{arguments.file}: {problem}; lines must be {{"reply": text, "score": int}}')
  mismatches = accepted = 0
  for number, (reply, expected) in enumerate(pairs, start=1):
    score = rubric.parse_score(reply, scale)
    accepted += score is not None
    if score != expected:
      mismatches += 1
      print(f"line {number}: expected {expected}, got {score}: {reply!r:.200}")
  print(json.dumps({"lines": len(pairs), "mismatches": mismatches, "accepted": accepted}))
  sys.exit(1 if mismatches else 0)


if __name__ == "__main__":
  main()
