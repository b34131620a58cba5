"""An evaluation that is killed again and again: python tests/evaluation_to_kill.py FOLDER

Forks lives of the same `evaluate` run. Twenty are ended by SIGKILL: when a model call is sent, when
a proof is graded, in the middle of a write to eval.jsonl, before the repaired file replaces the
torn one, before an fsync. Each life resumes what the one before left; the last one ends by itself.
Prints what is wrong, a line of JSON each, and last what happened.
"""

import asyncio
import collections
import json
import os
import signal
import sys
from pathlib import Path

from configs import evaluate as evaluate_config
from qed_jax import evaluate
from qed_jax.evaluation import results
from qed_jax.records import Completion, Grade, Usage

# (event, at which time in a life), four times; a write that is torn comes before a repair.
KILLS = [("call", 9), ("grade", 6), ("write", 2), ("replace", 1), ("fsync", 4)] * 4
FOLDER = Path(sys.argv[1])
ROWS = FOLDER / "eval.jsonl"


def config():
  c = evaluate_config.get_config("tiny")
  c.data.problems, c.samples_per_problem, c.problems_at_once = 12, 2, 3
  c.scaffold.turns = 2
  c.policy = "nobody"
  return c


class Life:
  """Counts events by kind, and ends the process at one of them."""

  def __init__(self, number: int):
    self.seen = collections.Counter()
    self.last = KILLS[number] if number < len(KILLS) else None
    self.log = os.open(FOLDER / f"life_{number}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

  def event(self, kind: str, before=lambda: None) -> None:
    self.seen[kind] += 1
    if (kind, self.seen[kind]) == self.last:
      before()
      os.kill(os.getpid(), signal.SIGKILL)

  async def chat(self, messages, *, n, seed, thinking=True, **sampling):
    os.write(self.log, (json.dumps([messages[0]["content"], seed]) + "\n").encode())
    self.event("call")
    await asyncio.sleep(0)
    return [Completion(text="r</think>p" if thinking else "s", usage=Usage(1, 2, 0.0, 1))]

  async def grade(self, problem, proof):
    self.event("grade")
    await asyncio.sleep(0)
    return Grade(5, "graded")

  def run(self) -> None:
    write = os.write

    def torn_write(file, data):
      if file != self.log and len(data) > 100:
        self.event("write", before=lambda: write(file, data[: len(data) // 2]))
      return write(file, data)

    def event_and(kind, call):
      def wrapped(*arguments):
        self.event(kind)
        return call(*arguments)

      return wrapped

    os.write, os.fsync = torn_write, event_and("fsync", os.fsync)
    os.replace = event_and("replace", os.replace)
    evaluate.open_chats = lambda config, root: (self.chat, None)
    evaluate.jobs.grader = lambda judge, root: self.grade
    evaluate.workdir.write_run_files = lambda root, config: None
    evaluate.main(config(), str(FOLDER))


def finished() -> list[tuple]:
  rows, _ = results.read(ROWS.read_text() if ROWS.exists() else "")
  return [(r["problem_id"], r["sample"], r["turn"]) for r in rows]


def main() -> None:
  FOLDER.mkdir(parents=True)
  problems = {p.statement: p.id for p in evaluate.sources.problems(
    config().data, config().judge, config().seed)}  # fmt: skip
  paid, killed, grown = collections.Counter(), [], []
  number = 0
  while True:
    before = set(finished())
    child = os.fork()
    if child == 0:
      sys.stdout = open(os.devnull, "w")  # noqa: SIM115
      try:
        Life(number).run()
      except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
      os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
      killed.append(KILLS[number][0])
    after = finished()
    calls = [json.loads(x) for x in (FOLDER / f"life_{number}.log").read_text().splitlines()]
    done_problems = collections.Counter(key[0] for key in before)
    for text, _ in calls:
      [problem] = [p for statement, p in problems.items() if statement in text]
      if done_problems[problem] == 4:  # two samples of two turns
        print(json.dumps({"life": number, "paid twice": problem}))
    if len({tuple(c) for c in calls}) < len(calls):
      print(json.dumps({"life": number, "asked twice in a life": len(calls)}))
    if not before <= set(after):
      print(json.dumps({"life": number, "lost": sorted(before - set(after))}))
    if len(set(after)) < len(after):
      print(json.dumps({"life": number, "doubled": len(after) - len(set(after))}))
    paid.update(map(tuple, calls))
    grown.append(len(after) - len(before))
    number += 1
    if not os.WIFSIGNALED(status):
      break
  lines = [json.loads(line) for line in ROWS.read_text().splitlines()]
  again = sum(paid.values()) - len(paid)
  print(json.dumps({"lives": number, "killed": killed, "status": status, "rows": len(lines),
                    "distinct": len(paid), "paid_again": again, "grown": grown}))  # fmt: skip


if __name__ == "__main__":
  main()
