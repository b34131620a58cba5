"""The tiny world: chains of steps mod 10, small enough for a model of under a million parameters.

A statement gives the operations, the results to show, and the start digit:

  +3 a -2 b +3 c +1 d show b d start 4

Reasoning says where it starts and walks the chain, three words a step: operation, letter, result
(`start 4 +3 a 7 -2 b 5 ...`). The proof, after </think>, says only the named results (`b 5 d 9`),
which are far enough apart that they have to be reasoned out. A summary lists all results reached so
far, and the next turn goes on from the last of them (`b 5 +3 c 8 ...`). Every word is one token,
and a result reads `b 5` wherever it stands, so that a small model learns to look it up.

The SFT rows are as uneven as distilled data: lines checked twice, reasoning that breaks off,
continuations that ignore the summary, traces that are longer than a turn's budget.

The two splits are disjoint by construction: a checksum of the statement says which one it is in.
"""

import dataclasses
import itertools
import zlib

import numpy as np

from qed_jax import prompts
from qed_jax.records import Problem

LETTERS = "abcdefghijkl"
OPERATIONS = {f"{sign}{d}": int(f"{sign}{d}") for sign in "+-" for d in range(1, 4)}
MIN_STEPS, MAX_STEPS = 2, len(LETTERS)
GAPS = (2, 3, 4)  # steps from one named result to the next
MAX_SCORE = 7
SPLITS = {"train": range(1, 10), "heldout": range(1)}  # checksum mod 10
SPLIT_STREAMS = {"train": 1, "heldout": 2, "sft": 3}

KINDS = {"solve": 0.35, "continue": 0.35, "summarise": 0.3}
EARLY_STOP = 0.3  # of the traces: break off after STAMINA steps; the proof says what was reached
STAMINA = (4, 5, 6, 7)
CHECKER = 0.5  # of the traces: repeat lines after the word "check"
CHECK = 0.4  # of the lines of such a trace, at most MAX_CHECKS of them
MAX_CHECKS = 4
RESTART = 0.4  # of the continuations: ignore the summary and begin again
MAX_TRACE = 30  # words of a trace to summarise, as a turn's budget allows
CUT = 0.5  # of these traces: end inside a line, as when the budget runs out


@dataclasses.dataclass(frozen=True)
class Chain:
  """A problem in parts. goals: the letters whose results are to be shown; the last step is one."""

  start: int
  operations: tuple[str, ...]
  goals: tuple[str, ...]

  @property
  def letters(self) -> str:
    return LETTERS[: len(self.operations)]

  @property
  def results(self) -> dict[str, int]:
    """Letter -> digit after that step."""
    steps = itertools.accumulate((OPERATIONS[o] for o in self.operations), initial=self.start)
    digits = [x % 10 for x in steps][1:]
    return dict(zip(self.letters, digits, strict=True))


def problems(
  seed: int, n: int, split: str, min_steps: int = MIN_STEPS, max_steps: int = MAX_STEPS
) -> list[Problem]:
  """n problems of a split ("train" or "heldout"), lengths uniform in min_steps..max_steps.

  The same arguments give the same problems. `level` is the number of steps. Problems may repeat
  when n comes near the number that exists, which for two steps is a few hundred.
  """
  if split not in SPLITS:
    raise ValueError(f"split is {split!r}: use one of {', '.join(SPLITS)}")
  if not MIN_STEPS <= min_steps <= max_steps <= MAX_STEPS:
    raise ValueError(
      f"steps from {min_steps} to {max_steps}: need {MIN_STEPS} <= min <= max <= {MAX_STEPS}"
    )
  rng = np.random.default_rng([seed, SPLIT_STREAMS[split]])
  return [to_problem(_draw(rng, split, min_steps, max_steps)) for _ in range(n)]


def sft_rows(seed: int, n: int) -> list[dict]:
  """n rows {"messages": [user, assistant], "kind": one of KINDS} on problems of the train split."""
  rng = np.random.default_rng([seed, SPLIT_STREAMS["sft"]])
  kinds = rng.choice(list(KINDS), size=n, p=list(KINDS.values()))
  return [_row(rng, str(kind), _draw(rng, "train", MIN_STEPS, MAX_STEPS)) for kind in kinds]


def corpus() -> list[str]:
  """Lines that hold every word of the world, for training its tokenizer."""
  templates = [prompts.load("tiny_reason"), prompts.load("tiny_summarise")]
  words = [w for t in templates for w in t.split() if not prompts.fields(w)]
  digits = [str(d) for d in range(10)]
  return [" ".join([*words, "show", "start", "check"]), " ".join([*LETTERS, *OPERATIONS, *digits])]


def to_problem(chain: Chain) -> Problem:
  text = statement(chain)
  return Problem(
    id=f"tiny-{zlib.crc32(text.encode()):08x}",
    statement=text,
    rubric=rubric(chain),
    answer=str(chain.results[chain.letters[-1]]),
    solution=f"<think> {trace(chain)} </think> {proof(chain)}",
    source="tiny_world",
    level=str(len(chain.operations)),
  )


def statement(chain: Chain) -> str:
  steps = [f"{o} {a}" for a, o in zip(chain.letters, chain.operations, strict=True)]
  return " ".join([*steps, "show", *chain.goals, "start", str(chain.start)])


def parse(text: str) -> Chain:
  """The inverse of `statement`. Raises ValueError on any other text."""
  words = text.split()
  try:
    show, start = words.index("show"), words.index("start")
    chain = Chain(int(words[start + 1]), tuple(words[:show:2]), tuple(words[show + 1 : start]))
    goals = [a for a in chain.letters if a in chain.goals]
    known = set(chain.operations) <= set(OPERATIONS) and chain.start in range(10)
    if known and statement(chain) == text and list(chain.goals) == goals:
      if goals[-1:] == [chain.letters[-1]]:
        return chain
  except (ValueError, IndexError):
    pass
  raise ValueError(f"not a statement of the tiny world: {text[:80]!r}")


def rubric(chain: Chain) -> str:
  """7 points over the named results, the later ones first to get one more.

  With more than seven results the first ones carry none.
  """
  n = len(chain.goals)
  lines = []
  for i, letter in enumerate(chain.goals):
    points = MAX_SCORE // n + (n - i <= MAX_SCORE % n)
    lines.append(
      f"{points} {'point' if points == 1 else 'points'}: {letter} {chain.results[letter]}"
    )
  return "\n".join([*lines, "1 point off: every line that is repeated or not asked for"])


def trace(chain: Chain, first: int = 0, last: int = MAX_STEPS, checked=()) -> str:
  """Reasoning from step `first` up to step `last`; `checked`: steps whose result is said again."""
  results = chain.results
  before = f"start {chain.start}"
  if first:
    before = f"{chain.letters[first - 1]} {results[chain.letters[first - 1]]}"
  words = []
  for i, letter in list(enumerate(chain.letters))[first:last]:
    result = [letter, str(results[letter])]
    words += [chain.operations[i], *result, *(["check", *result] if i in checked else [])]
  return " ".join([before, *words] if words else [])


def proof(chain: Chain, last: int = MAX_STEPS) -> str:
  """The named results of the first `last` steps."""
  reached = chain.letters[:last]
  return " ".join(f"{a} {chain.results[a]}" for a in chain.goals if a in reached)


def summary(chain: Chain, last: int) -> str:
  """The results of the first `last` steps."""
  return " ".join(f"{a} {chain.results[a]}" for a in chain.letters[:last])


def _draw(rng, split: str, min_steps: int, max_steps: int) -> Chain:
  while True:
    n = int(rng.integers(min_steps, max_steps + 1))
    goals, step = [], int(rng.choice(GAPS))
    while step < n:
      goals.append(LETTERS[step - 1])
      step += int(rng.choice(GAPS))
    operations = tuple(str(o) for o in rng.choice(list(OPERATIONS), size=n))
    chain = Chain(int(rng.integers(10)), operations, (*goals, LETTERS[n - 1]))
    if zlib.crc32(statement(chain).encode()) % 10 in SPLITS[split]:
      return chain


def _row(rng, kind: str, chain: Chain) -> dict:
  n, text = len(chain.operations), statement(chain)
  # 0: nothing known yet; n: all known, and only the proof is left to write.
  known = 0 if kind == "solve" else int(rng.integers(0 if kind == "summarise" else 1, n + 1))
  first = 0 if rng.random() < RESTART else known
  last = min(n, first + int(rng.choice(STAMINA))) if rng.random() < EARLY_STOP else n
  checker = rng.random() < CHECKER
  checked = [i for i in range(first, n) if checker and rng.random() < CHECK][:MAX_CHECKS]
  if kind == "summarise":
    reasoning, last = _cut(rng, trace(chain, first, n, checked), first)
    prompt = prompts.render(
      prompts.load("tiny_summarise"),
      problem=text,
      existing_summary=summary(chain, known),
      reasoning=reasoning,
    )
    answer = summary(chain, max(known, last))
  else:
    prompt = prompts.render(
      prompts.load("tiny_reason"), problem=text, summary=summary(chain, known)
    )
    reasoning = trace(chain, first, last, checked)
    answer = " ".join(f"<think> {reasoning} </think> {proof(chain, last)}".split())
  messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
  return {"messages": messages, "kind": kind}


def _cut(rng, reasoning: str, first: int) -> tuple[str, int]:
  """A beginning of the trace, and the number of steps known at its end."""
  words = reasoning.split()
  end = int(rng.integers(0, min(len(words), MAX_TRACE) + 1))
  if rng.random() >= CUT:
    while end < len(words) and words[end] not in OPERATIONS:
      end += 1
  kept = words[:end]
  # A step is known once a letter and a digit follow its operation.
  steps = sum(word in OPERATIONS for word in kept[:-2])
  return " ".join(kept), first + steps if steps else 0
