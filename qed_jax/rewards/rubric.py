"""A language model marks a proof against the problem's rubric.

The policy is trained on these marks and will find any hole in them. So the judge sees a sanitised
copy of the submission between marks that its author cannot know, the task is stated again below it
(in the prompts), the reply is parsed strictly, and what cannot be parsed is no grade at all.

The marks are a hash of problem, submission and sample number. They differ from request to request,
and nobody can write a text that holds its own hash; yet the request is the same when a killed run
comes back, so that the chat's reply cache answers it and nothing is paid twice.

Departures from QED-Nano (training/pipelinerl, verifier_api.py): there a failed call or a missing
tag scores 0 and the first of several tags wins; here the former give None (`on_invalid="zero"`
brings the zeros back) and the latter is invalid. The style "parity" reads replies as it did.
"""

import asyncio
import dataclasses
import functools
import hashlib
import math
import re
import statistics
import unicodedata
from collections.abc import Callable, Collection
from typing import Any

from qed_jax import prompts, replies
from qed_jax.chat import ChatError, Unavailable
from qed_jax.records import Grade, Problem, Usage

# Tags of our own prompts and others that judges know: in a submission they can only deceive.
_TAGS = "score|points|think|thinking|grade|assessment|errors|submission|solution|system|task"
_TAG = re.compile(rf"(?:<|&lt;)(?=/?(?:{_TAGS})\b|\s{{0,9}}/?\s{{0,9}}(?:{_TAGS})\s{{0,9}}>)")
# <|im_start|>, <start_of_turn>, </s>, <<SYS>>, [INST]: what some chat template reads as a turn.
_TURN = re.compile(r"<(?=\||/?(?:start_of_turn|end_of_turn|bos|eos|s)>|</?sys>)|\[(?=/?inst\])")
# Invisible, though their Unicode category does not say so: fillers and variation selectors.
_FILLERS = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
_FILLERS |= {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
# Letters of other alphabets and brackets that look like those of a tag, where NFKC keeps them.
_ALIKE = str.maketrans(
  "\u0430\u0441\u0435\u043e\u0440\u0455\u0456\u0501\u03bf\u2039\u2329\u27e8\u3008\u276c\u2223\u01c0",
  "aceopsido<<<<<||",
)
_THINK_TAG = re.compile(r"<\s{0,9}/?\s{0,9}think\s{0,9}>", re.IGNORECASE)
_SCORE = re.compile(r"<score>[ \t\r\n]*([0-9])[ \t\r\n]*</score>")


@functools.lru_cache(maxsize=512)  # a proof is read several times
def sanitise(text: str) -> str:
  """A copy of a submission that is safe to show to a judge.

  Control, direction, zero-width and other invisible characters and lone surrogates are dropped.
  Then tags such as <score>, in look-alike characters too, become [score>, and the brackets of chat
  markers such as <|im_start|> are set apart by a space: `0 <|x|` stays readable mathematics.
  """
  text = text.replace("\r\n", "\n").replace("\r", "\n")
  odd = [char for char in set(text) if not " " <= char <= "~"]  # of which there are few
  text = text.translate({ord(char): None for char in odd if not _visible(char)})
  shadow = (
    text.lower()
    if text.isascii()
    else text.translate({ord(char): _plain(char) for char in set(text)})
  )
  marks = {match.start(): text[match.start()] + " " for match in _TURN.finditer(shadow)}
  marks |= {match.start(): "[" for match in _TAG.finditer(shadow)}
  pieces, start = [], 0
  for place in sorted(marks):
    pieces += [text[start:place], marks[place]]
    start = place + 1
  return "".join([*pieces, text[start:]])


def _visible(char: str) -> bool:
  if char in "\n\t":
    return True
  return unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Cn") and ord(char) not in _FILLERS


def _plain(char: str) -> str:
  """The one lower-case character that it stands for, or itself: positions stay as they are."""
  plain = unicodedata.normalize("NFKC", char).lower().translate(_ALIKE)
  return plain if len(plain) == 1 else char


def fence(problem: Problem, proof: str, sample: int) -> tuple[str, str]:
  """(marker, fenced copy of the proof) for the judge's `sample`-th reading of it."""
  copy = sanitise(proof)
  seen = "\0".join([problem.statement, copy, str(sample)])
  marker = hashlib.sha256(seen.encode("utf-8", "replace")).hexdigest()[:16]
  return marker, f"<submission-{marker}>\n{copy}\n</submission-{marker}>"


def parse_score(reply: str, scale: Collection[int]) -> int | None:
  """The score in a judge's reply, or None unless it says exactly one.

  Think blocks are dropped, also one whose opening is in the prompt. What is left must hold one
  <score> and one </score>, in lower case, with one ASCII digit out of `scale` between them; white
  space may stand around the digit. A thought that does not end makes the reply invalid.
  """
  if not isinstance(reply, str):
    return None
  kept, start = [], 0
  while (opened := reply.find("<think>", start)) >= 0:
    closed = reply.find(replies.END_THINK, opened)
    if closed < 0:
      return None
    kept.append(reply[start:opened])
    start = closed + len(replies.END_THINK)
  kept.append(reply[start:])
  text = "\n".join(kept).rpartition(replies.END_THINK)[2]
  if _THINK_TAG.search(text) or text.count("<score>") != 1 or text.count("</score>") != 1:
    return None
  match = _SCORE.search(text)
  return int(match[1]) if match and int(match[1]) in scale else None


def parse_as_original(reply: str, scale: Collection[int]) -> int | None:
  """What QED-Nano read in a reply: the first <score>digits</score> after the reasoning, and 0 where
  there is none (verifier_api.py:503-523). Its one change: a score over 7, a reward over 1 there,
  counts as 7. For comparison with the original only: a reply can be made to say anything."""
  match = re.search(r"<score>(\d+)</score>", reply.rpartition(replies.END_THINK)[2])
  digits = str(int(match[1][:9])) if match else "0"
  return min(int(digits), max(scale))


@dataclasses.dataclass(frozen=True)
class Style:
  """How a judge is asked and read.

  template: the name of a prompt. scale: the scores that it allows. parse: (reply, scale) -> score
  or None. reads_cut: also a reply that was cut counts.
  """

  template: str
  scale: tuple[int, ...]
  parse: Callable[[str, Collection[int]], int | None] = parse_score
  reads_cut: bool = False


POINTS = tuple(range(8))
STYLES = {
  "strict": Style("judge", POINTS),  # a rubric, no reference: best in QED-Nano's study of graders
  "reference": Style("judge_reference", POINTS),
  "imo": Style("judge_imo", (0, 1, 6, 7)),
  "parity": Style("judge", POINTS, parse_as_original, reads_cut=True),
}


def half_down(scores: Collection[int]) -> int:
  """The mean, rounded to an integer; a half goes down, as a strict examiner would have it."""
  return math.ceil(sum(scores) / len(scores) - 0.5)


AGGREGATES: dict[str, Callable[[Collection[int]], int]] = {
  "mean": half_down,
  "median": statistics.median_low,
  "min": min,
}


async def grade(
  problem: Problem,
  proof: str,
  chat: Any,
  *,
  template: str,
  style: Style,
  attempts: int,
  votes: int,
  aggregate: str,
  on_invalid: str,
  first: int = 0,
  **sampling: Any,
) -> Grade:
  """The judge's score of a proof.

  proof: what stands after the thinking; an empty one scores 0 with the reason "empty" and costs no
    call: that is a fact about the proof.
  chat: the Chat protocol, an HttpChat or the engine's.
  template: text with {problem}, {marker}, {submission} and, if it uses them, {rubric}, {reference}
    and {scale}. A problem that lacks the rubric or reference asked for cannot be graded.
  style: its scale, out of 0..7, and how replies are read.
  attempts: fresh samples to ask for while the reply is invalid.
  votes: independent readings. Their scores become one by `aggregate`, a name of AGGREGATES; there
    is a grade where more than half of them succeed.
  on_invalid: "mask" gives None when no attempt succeeds, "zero" gives 0 as QED-Nano did.
  first: the number of the first sample; another one asks for fresh readings of the same proof.
  sampling: goes to the chat: max_tokens, temperature, ...

  Raises ValueError in one line for a template or setting that cannot work, and Unavailable.
  """
  if on_invalid not in ("mask", "zero"):
    raise ValueError(f"on_invalid={on_invalid!r}: use 'mask' or 'zero'")
  if not style.scale or not set(style.scale) <= set(POINTS):
    raise ValueError(f"scale={tuple(style.scale)}: use scores from 0 to 7")
  wanted = prompts.fields(template)
  if lacking := sorted({"problem", "marker", "submission"} - wanted):
    raise ValueError(f"the judge's prompt has no {{{lacking[0]}}}: add it where it belongs")
  if not proof.strip():
    return Grade(0, "empty")
  for name, value in [("rubric", problem.rubric), ("reference", problem.solution)]:
    if name in wanted and not value.strip():
      return Grade(None, f"failed: problem {problem.id} has no {name}, which the prompt needs")
  readings = await asyncio.gather(*(
    _read(problem, proof, chat, template, style, range(start, start + attempts), sampling)
    for start in range(first, first + votes * attempts, attempts)
  ))  # fmt: skip
  valid = [reading for reading in readings if reading.score is not None]
  usage = Usage()
  for reading in readings:
    usage = _add(usage, reading.usage)
  if 2 * len(valid) <= votes:
    lost = next(reading for reading in readings if reading.score is None)
    score = 0 if on_invalid == "zero" else None
    return Grade(score, lost.reason, lost.feedback, usage)
  scores = tuple(reading.score for reading in valid)
  score = AGGREGATES[aggregate](scores)
  closest = min(valid, key=lambda reading: abs(reading.score - score))
  return Grade(score, "graded", closest.feedback, usage, scores if votes > 1 else ())


async def _read(
  problem: Problem,
  proof: str,
  chat: Any,
  template: str,
  style: Style,
  samples: Collection[int],
  sampling: dict[str, Any],
) -> Grade:
  """One reading: samples are asked for until one of them can be read."""
  usage, reason, feedback = Usage(), "", ""
  for sample in samples:
    marker, submission = fence(problem, proof, sample)
    content = prompts.render(
      template,
      problem=problem.statement,
      rubric=problem.rubric,
      reference=problem.solution,
      marker=marker,
      submission=submission,
      scale=", ".join(map(str, sorted(style.scale))),
    )
    try:
      messages = [{"role": "user", "content": content}]
      [completion] = await chat(messages, seed=sample, **sampling)
    except Unavailable:  # not this proof's misfortune: the run has to stop
      raise
    except (ChatError, TimeoutError) as error:  # the chat has retried: to ask again would be to nag
      reason = f"failed: {error or 'the chat timed out'}"
      break
    usage = _add(usage, completion.usage)
    feedback = completion.text.rpartition(replies.END_THINK)[2].strip()
    if completion.finish_reason != "stop" and not style.reads_cut:
      reason = "invalid: the reply was cut, raise the judge's max_tokens"
      continue
    score = style.parse(completion.text, style.scale)
    if score is not None:
      return Grade(score, "graded", feedback, usage)
    reason = "invalid: the reply does not hold exactly one score of the scale"
  return Grade(None, reason, feedback, usage)


def _add(a: Usage, b: Usage) -> Usage:
  return Usage(
    a.input_tokens + b.input_tokens,
    a.output_tokens + b.output_tokens,
    a.seconds + b.seconds,
    a.calls + b.calls,
  )
