"""How quickly report.py's page opens, scrolls and shows a problem, with 5,000 attempts in it.

Writes two made-up runs over the same problems, with proofs full of formulas and of words that
compress badly, makes the page with report.py, and opens it in headless Chromium, from the disk as a
reader would. Printed at the end, as one line of JSON: seconds to make the page, megabytes of the
runs and of the page, milliseconds from the navigation to the first paint, to the list of problems,
and to the first problem shown with its proof; frames a second of the list while it is scrolled from
end to end, and the longest frame; and milliseconds to show another problem. The medians of
--repeats openings.

  python tools/bench_report.py --attempts=5000
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from chromium import PROGRAM, Browser

from qed_jax import report

BENCHMARKS = ("ProofBench", "IMO-ProofBench", "tiny world")
AREAS = ("algebra", "combinatorics", "geometry", "number theory")
SENTENCES = (
  r"Let $n = \sum_{k=1}^{m} \binom{m}{k} x_k$ and suppose that $n \ge 2$.",
  r"By the inequality of Cauchy, \[ \left(\sum a_i b_i\right)^2 \le \sum a_i^2 \sum b_i^2 . \]",
  "Consider the case in which two of the points coincide; then there is nothing to prove.",
  r"Hence $\frac{a+b}{2} \ge \sqrt{ab}$, with equality only for $a = b$.",
  "Wait, that is not enough: the step before used what is to be shown. Try induction instead.",
  r"Modulo $p$ the polynomial $f(x) = x^p - x$ vanishes at all of $\{0, 1, \dots, p-1\}$.",
)
SCROLL = """(async () => {
  const list = document.getElementById("list");
  const frames = [];
  const steps = 120;
  let last = performance.now();
  for (let i = 0; i <= steps; i++) {
    list.scrollTop = (list.scrollHeight - list.clientHeight) * i / steps;
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - last);
    last = now;
  }
  frames.shift();
  const sum = frames.reduce((a, b) => a + b, 0);
  return { fps: 1000 * frames.length / sum, longest: Math.max(...frames) };
})()"""
SHOW = """(async () => {
  const begun = performance.now();
  await show(found.at(-1));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return performance.now() - begun;
})()"""


def vocabulary(rng: random.Random) -> list[str]:
  """Words that no two runs of zlib would call the same, the first ones the most frequent."""
  letters = "etaoinshrdlucmfwypvbgk"
  return ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5_000)]


def prose(rng: random.Random, words: list[str], characters: int) -> str:
  """Paragraphs of about that many characters: a formula, then made-up words, many of them rare."""
  parts, size = [], 0
  while size < characters:
    frequent = [words[int(len(words) * rng.random() ** 3)] for _ in range(rng.randint(20, 60))]
    parts.append(f"{rng.choice(SENTENCES)} {' '.join(frequent)} $x_{{{rng.randrange(999)}}}$.")
    size += len(parts[-1]) + 2
  return "\n\n".join(parts)


def make_runs(folder: Path, attempts: int, samples: int, reasoning: int, proof: int) -> None:
  """Two evaluations of attempts / 2 each. reasoning, proof: characters of a text."""
  rng = random.Random(0)  # noqa: S311
  words = vocabulary(rng)
  problems = max(1, attempts // (2 * samples))
  for run in ("first", "second"):
    (folder / run).mkdir(parents=True)
    with (folder / run / "eval.jsonl").open("w") as file:
      for p in range(problems):
        for sample in range(samples):
          score = rng.choice([None, 0, 0, 1, 3, 6, 7, 7])
          row = {
            "problem_id": f"made-{p:05d}",
            "problem": f"Problem {p}. {SENTENCES[p % len(SENTENCES)]} Prove it.",
            "rubric": prose(rng, words, 1_500),
            "reference": prose(rng, words, 2_000),
            "benchmark": BENCHMARKS[p % len(BENCHMARKS)],
            "category": AREAS[p % len(AREAS)],
            "level": str(p % 5),
            "scaffold": "direct",
            "model": run,
            "judge": "made up",
            "sample": sample,
            "turn": 1,
            "reasoning": prose(rng, words, reasoning),
            "proof": prose(rng, words, proof),
            "score": score,
            "feedback": prose(rng, words, 400),
            "finish_reason": rng.choice(["stop", "stop", "stop", "length"]),
            "tokens": (reasoning + proof) // 3,
          }
          file.write(json.dumps(row) + "\n")


def measure(page: Path) -> dict[str, float]:
  """One opening in a browser of its own."""
  browser = Browser((1500, 1000))
  try:
    browser.open(page.as_uri(), "performance.getEntriesByName('problems-ready').length")
    paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    browser.until("performance.getEntriesByName('first-contentful-paint').length")
    found = {
      "first_paint_ms": browser.value(paint),
      "list_ms": browser.value("performance.getEntriesByName('list-ready')[0].startTime"),
      "ready_ms": browser.value("performance.getEntriesByName('problems-ready')[0].startTime"),
    }
    scrolled = browser.value(SCROLL)
    found |= {"frames_per_s": scrolled["fps"], "longest_frame_ms": scrolled["longest"]}
    found["show_ms"] = browser.value(SHOW)
    assert browser.complaints() == [], browser.complaints()
    return found
  finally:
    browser.close()


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--attempts", type=int, default=5_000)
  parser.add_argument("--samples", type=int, default=4, help="attempts of a run at a problem")
  parser.add_argument("--reasoning", type=int, default=24_000, help="characters of a reasoning")
  parser.add_argument("--proof", type=int, default=4_000, help="characters of a proof")
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  if PROGRAM is None:
    sys.exit("no chromium is on the path: install one to open the page with")
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    make_runs(folder / "runs", args.attempts, args.samples, args.reasoning, args.proof)
    begun = time.monotonic()
    report.main([f"--workdir={folder / 'runs'}"])
    page = folder / "runs" / "report.html"
    figures = {
      "attempts": args.attempts,
      "make_s": round(time.monotonic() - begun, 1),
      "text_megabytes": round(sum(f.stat().st_size for f in page.parent.rglob("*.jsonl")) / 1e6, 1),
      "megabytes": round(page.stat().st_size / 1e6, 1),
    }
    rounds = [measure(page) for _ in range(args.repeats)]
  medians = {k: round(statistics.median(r[k] for r in rounds), 1) for k in rounds[0]}
  print(json.dumps(figures | medians))
  return 0


if __name__ == "__main__":
  sys.exit(main())
