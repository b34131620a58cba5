"""Evaluation: python -m qed_jax.evaluate --config=configs/evaluate.py:tiny --workdir=runs/eval

A benchmark's problems run through a scaffold on a model, and a judge grades every proof. Rows go to
eval.jsonl as attempts finish; what is there already is not asked for again, and more samples or
problems of the same config add to it. eval_summary.json holds the scores with their errors. A proof
that could not be graded is counted, never a zero.

  python -m qed_jax.evaluate --config=configs/evaluate.py:judge --workdir=runs/judge
  python -m qed_jax.evaluate compare RUN_A RUN_B
  python -m qed_jax.evaluate export RUN OUT.jsonl

The first of these has the judge mark proofs that people have marked (judge_summary.json).
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from etils import epath

from qed_jax import flags, scaffolds, sharding, workdir
from qed_jax.chat import ChatError, Endpoint, HttpChat
from qed_jax.data import tokenizer as tokenizers
from qed_jax.evaluation import attempts, comparison, export, judges, results, sources, summary
from qed_jax.evaluation.rows import Labels, Prices, judge_name
from qed_jax.journal import Journal
from qed_jax.rollout import jobs, judging, policy
from qed_jax.rollout.engine_chat import EngineChat

# Fields that say how and how much, not what: rows that are there stay good when they change. The
# judge of each row is in the row.
FREE = ("label", "prices", "pass_score", "judge", "samples_per_problem", "data.problems")
FREE += ("data.max_bad_share", "problems_at_once", "failures_in_a_row")
FREE += tuple(f"endpoint.{x}" for x in ("base_url_env", "api_key_env", "concurrency", "retries"))
FREE += ("endpoint.timeout_s", "endpoint.deadline_s", "endpoint.cache")


def main(config, folder: str) -> None:
  root = epath.Path(folder)
  workdir.check_same_config(root, config.to_dict(), ignore=FREE)
  if config.study == "judge":
    return study_judge(config, root)
  problems = sources.problems(config.data, config.judge, config.seed)
  samples, prices = config.samples_per_problem, Prices(**config.prices)
  with results.Results(root / results.ROWS) as rows:
    check_judge(rows.rows, config, root / results.ROWS)
    done = {(row["problem_id"], row["sample"]) for row in rows.rows}
    missing = [(p, s) for s in range(samples) for p in problems if (p.id, s) not in done]
    outages = [row for row in rows.rows if attempts.is_outage(row)]
    grade = chat = summariser = None
    if missing or outages:
      grade = jobs.grader(config.judge, root)
      judging.check(grade)
    if missing:
      chat, summariser = open_chats(config, root)
    workdir.write_run_files(root, config.to_dict())
    failed = asyncio.run(finish(config, rows, missing, outages, chat, summariser, grade))
    found = summary.summarise(
      rows.rows,
      problems,
      samples,
      label=config.label or model_name(config),
      prices=prices,
      pass_score=config.pass_score,
      seed=config.seed,
    )
  report(root / results.SUMMARY, found, summary.table(found), failed)


def study_judge(config, root: epath.Path) -> None:
  """The judge marks proofs that people have marked."""
  proofs = judges.by_id(sources.graded(config.data))
  prices, name = Prices(**config.prices), judge_name(config.judge)
  with results.Results(root / judges.ROWS) as rows:
    check_judge(rows.rows, config, root / judges.ROWS)
    done = {row["sample"] for row in rows.rows}
    missing = [(proof.problem, key) for key, proof in proofs.items() if key not in done]
    failed = []
    if missing:
      grade = jobs.grader(config.judge, root)
      judging.check(grade)
      workdir.write_run_files(root, config.to_dict())
      benchmark = config.data.name or config.data.source
      one = judges.marker(proofs, grade, benchmark=benchmark, judge=name, prices=prices)
      failed = asyncio.run(closing(run(config, missing, one, rows, len(proofs)), grade))
    known = [row for row in rows.rows if row["sample"] in proofs]
    found = judges.summarise(
      known, len(proofs), label=config.label or name, prices=prices, seed=config.seed
    )
  report(root / judges.SUMMARY, found, judges.table(found), failed)


async def finish(config, rows: results.Results, missing, outages, chat, summariser, grade):
  """Grades what an outage left, runs what is missing -> lines about attempts that failed."""
  prices, label = Prices(**config.prices), config.label or model_name(config)

  async def work() -> list[str]:
    if outages:
      new, mended = await attempts.grade_again(
        rows.rows, grade, prices, at_once=config.problems_at_once
      )
      rows.replace(new)
      print(f"{label}: {mended} proofs have the grade that an outage had left out", flush=True)
    if not missing:
      return []
    one = attempts.attempt(
      scaffolds.prepare(config.scaffold),
      chat,
      grade,
      seed=config.seed,
      labels=Labels(
        config.data.name or config.data.source,
        config.scaffold.name,
        label,
        judge_name(config.judge),
      ),
      prices=prices,
      summariser=summariser,
    )
    return await run(config, missing, one, rows, len(missing))

  try:
    return await closing(work(), chat, summariser, grade)
  except ValueError as error:
    if isinstance(error.__cause__, ChatError) and config.endpoint.model:
      where = f"address in {config.endpoint.base_url_env}, key in {config.endpoint.api_key_env}"
      raise ValueError(f"{error} ({where})") from error
    raise


async def closing(work, *opened):
  """The result of `work`; then connections and caches are closed, where there are any."""
  try:
    return await work
  finally:
    for one in opened:
      if hasattr(one, "close"):
        await one.close()


async def run(config, missing, one, rows: results.Results, total: int) -> list[str]:
  """attempts.run into the file of rows, with a line at every tenth."""
  every = max(1, total // 10)
  done = total - len(missing)

  def write(new: list[dict]) -> None:
    nonlocal done
    rows.append(new)
    done += 1
    if done % every == 0:
      print(f"{config.label or model_name(config)}: {done} of {total} done", flush=True)

  return await attempts.run(
    missing,
    one,
    write,
    at_once=config.problems_at_once,
    failures_in_a_row=config.failures_in_a_row,
  )


def check_judge(rows: list[dict], config, path: epath.Path) -> None:
  """Raises ValueError when the rows that are there are another judge's."""
  others = {row["judge"] for row in rows} - {judge_name(config.judge)}
  if others:
    raise ValueError(
      f"{path} holds grades of {min(others)!r}, this config asks {judge_name(config.judge)!r}, and "
      "grades of two judges do not mix: use another --workdir"
    )


def report(path: epath.Path, found: dict, table: str, failed: list[str]) -> None:
  path.write_text(json.dumps({"rows": [found]}, indent=2) + "\n")
  print(table, flush=True)
  for line in failed[:3]:
    print(f"failed: {line}", flush=True)
  if failed:
    print(f"{len(failed)} attempts failed; the same command asks for them again", flush=True)


def model_name(config) -> str:
  return config.endpoint.model or config.policy


def open_chats(config, root: epath.Path):
  """(the policy's chat, the summariser's or None)."""
  chat, summariser = open_chat(config, root), None
  if config.summariser:
    asked = config.summariser, config.summariser_revision, "config.summariser"
    summariser = journaled(config, root, load_chat(config, *asked), config.summariser)
  return chat, summariser


def journaled(config, root: epath.Path, chat, model: str):
  """The chat with what it has answered on disk: a stopped attempt asks nothing twice."""
  if not config.journal or "://" in str(root):
    return chat
  return Journal(chat, str(root / config.journal), model)


def open_chat(config, root: epath.Path):
  """The policy as a chat: a server's, or an engine in this process."""
  block = config.endpoint
  if block.model:
    base_url = os.environ.get(block.base_url_env)
    if not base_url:
      raise ValueError(
        f"config.endpoint.model is set, but {block.base_url_env} is not: export it with the "
        "address, such as http://localhost:8000/v1"
      )
    local = block.cache and "://" not in str(root)
    return HttpChat(
      Endpoint(
        base_url, block.model, key_env=block.api_key_env if block.api_key_env in os.environ else ""
      ),
      concurrency=block.concurrency,
      timeout=block.timeout_s,
      deadline=block.deadline_s,
      attempts=block.retries,
      cache=str(root / block.cache) if local else "",
    )
  if not config.policy:
    raise ValueError("config.policy is empty: name a workdir, a Hugging Face folder or a hub id")
  chat = load_chat(config, config.policy, config.policy_revision, "config.policy", config.untrained)
  return journaled(config, root, chat, config.policy)


def load_chat(config, name: str, revision: str, field: str, untrained: bool = False):
  """The chat of an engine with the parameters that `name`, the value of `field`, stands for."""
  start = policy.locate(name, revision, field)
  model = policy.sizes(start, config.model)
  mesh = sharding.make_mesh(**config.mesh.to_dict())
  tokenizer = tokenizers.load(start.folder)
  if untrained:
    start = policy.Start("random", "untrained")
  abstract = policy.abstract_params(model, mesh, config.model.dtype)
  engine = jobs.make_engine(model, mesh, config.rollout, tokenizer)
  engine.set_params(policy.load_params(start, model, abstract, config.seed), 0)
  return EngineChat(engine, tokenizer, config.seed).chat


def compare(words: list[str]) -> None:
  """evaluate compare A B: a table of paired differences, and one line of JSON."""
  parser = argparse.ArgumentParser(
    prog="python -m qed_jax.evaluate compare", description=comparison.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("a", help="workdir of an evaluation, or its eval.jsonl")
  parser.add_argument("b", help="the other one")
  parser.add_argument("--turn", type=int, default=0, help="compare this turn; 0 is the last")
  parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
  args = parser.parse_args(words)
  found = comparison.compare(
    results.load(args.a), results.load(args.b), turn=args.turn, seed=args.seed
  )
  print(comparison.table(found))
  print(json.dumps(found))


def export_rows(words: list[str]) -> None:
  """evaluate export RUN OUT: the original's columns."""
  parser = argparse.ArgumentParser(
    prog="python -m qed_jax.evaluate export", description=export.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument("run", help="workdir of an evaluation, or its eval.jsonl")
  parser.add_argument("out", type=Path, help="JSONL file to write")
  parser.add_argument("--sample", type=int, help="only this sample of each problem, from 0")
  args = parser.parse_args(words)
  found = export.columns(results.load(args.run), args.sample)
  if not found:
    raise ValueError(f"{args.run} has no sample {args.sample}")
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text("".join(json.dumps(row) + "\n" for row in found))
  print(json.dumps({"rows": len(found), "out": str(args.out)}))


if __name__ == "__main__":
  command = {"compare": compare, "export": export_rows}.get("".join(sys.argv[1:2]))
  if command is None:
    flags.run(main)
  else:
    try:
      command(sys.argv[2:])
    except (ValueError, OSError) as error:
      flags.fail(error)
