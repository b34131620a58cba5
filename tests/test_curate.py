"""The program itself: jobs chain, go on after a kill, and say mistakes in one line."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pyarrow.parquet
import pytest
from fake_endpoint import error, said, serve
from test_curation import SCHEME, VERDICT

from configs import common
from configs import curate as config_file
from qed_jax import curate, flags
from qed_jax.checkpoint import Checkpoints
from qed_jax.curation import dataset
from qed_jax.data import benchmarks, problems, rows, sft, tiny_world
from qed_jax.data import tokenizer as tokenizer_lib
from qed_jax.rollout import policy

ROOT = Path(__file__).parents[1]
STATEMENTS = [
  "Prove that there are infinitely many primes congruent to 3 modulo 4, without Dirichlet.",
  "Let ABC be a triangle with incentre I. Show that the circles AIB and AIC meet on the arc BC.",
  "A frog jumps on the integers by steps of 5 and 7. Show that it can reach every integer.",
  "Every vertex of a convex polygon is red or blue. Prove that some diagonal has two red ends.",
  "Find all polynomials P with real coefficients such that P(P(x)) = P(x) P(x) for all real x.",
  "Compute 12 times 13 with pen and paper and show all the steps of your work on the page.",
]
PUBLISHED_SFT = {"problem", "reasoning_content", "proof", "category", "competition", "source"}
PUBLISHED_RL = {"problem", "source", "rubrics", "scores", "rewards", "num_rewards"}
PUBLISHED_RL |= {"reward_mean", "reward_std"}


def config(job, source, **changes):
  """The job's config, small; changes: dotted__fields as keyword arguments."""
  c = config_file.get_config(job)
  c.data.source, c.data.revision = str(source), ""
  if "endpoint" in c:
    c.endpoint.update(model="m", stream=False, retries=1, timeout_s=20.0, deadline_s=20.0)
    c.concurrency = 3
  if "judge" in c:
    c.judge.update(model="judge", api="chat", retries=1, samples=1, deadline_s=20.0)
    c.judge.update(min_chars=0, canary_share=0.0, audit_share=0.0, patience_s=0.0)
  for name, value in changes.items():
    block, *path = c, *name.split("__")
    for part in path[:-1]:
      block = block[part]
    block[path[-1]] = value
  flags.check(c)
  return c


def write(path, found):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in found))
  return path


def asked(request):
  return request["body"]["messages"][-1]["content"]


def statement_in(request):
  [found] = [s for s in STATEMENTS if s in asked(request)]
  return found


def answer(number, request):
  """Teacher, filter, scheme writer, policy and judge, by what they are asked."""
  text = asked(request)
  if "marking schemes for a mathematics olympiad" in text:
    seen = [r for r in answer.log if r is not request and asked(r)[:400] == text[:400]]
    return said(SCHEME if seen else SCHEME.replace("[3 points]", "[2 points]"))
  if "preparing a collection" in text:
    return said(json.dumps(VERDICT | {"computational": "12 times 13" in text}))
  if request["body"]["model"] == "judge":
    return said(f"fine <score>{STATEMENTS.index(statement_in(request)) + 1}</score>")
  return said("PROOF of " + text[:20], reasoning="long thought")


@pytest.fixture
def endpoint(monkeypatch):
  """The served models; requests are kept."""

  def script(number, request):
    answer.log = server.requests
    return answer(number, request)

  with serve(script) as server:
    for name in ("TEACHER_BASE_URL", "OPENAI_BASE_URL"):
      monkeypatch.setenv(name, server.url)
    yield server


def run(job, source, folder, capsys, **changes):
  curate.main(config(job, source, **changes), str(folder))
  return json.loads(capsys.readouterr().out.splitlines()[-1])


def read(folder):
  return pyarrow.parquet.read_table(folder / "data" / "train-00000-of-00001.parquet").to_pylist()


def test_the_chain_from_problems_to_training_sets(tmp_path, capsys, endpoint):
  """teacher -> filter -> rubrics -> difficulty -> select -> decontaminate -> deduplicate on made-up
  problems: each job drops what it should, and the last set opens in our loaders."""
  near = STATEMENTS[0].replace("Prove that", "Show that").replace("3 modulo 4", "3 (mod 4)")
  start = [{"problem": s, "source": "made up", "competition": "C"} for s in STATEMENTS]
  source = write(tmp_path / "start.jsonl", [*start, {"text": "no problem"}])
  more = {"data__max_bad_share": 0.5}
  told = run("teacher", source, tmp_path / "1", capsys, samples_per_problem=2, **more)
  assert (told["kept"], told["bad"], told["missing"]) == (12, 1, 0)
  assert PUBLISHED_SFT | {"messages"} <= read(tmp_path / "1")[0].keys() | {"category"}
  first = read(tmp_path / "1")[0]
  assert first["proof"].startswith("PROOF") and first["reasoning_content"] == "long thought"
  assert first["messages"][0]["content"].startswith("Generate a rigorous proof")
  assert len(sft.load(tmp_path / "1", revision=None, config="default", split="train",
                      max_bad_share=0)[0]) == 12  # fmt: skip

  assert run("filter", tmp_path / "1", tmp_path / "2", capsys)["kept"] == 10
  dropped = [json.loads(line) for line in (tmp_path / "2" / "dropped.jsonl").open()]
  assert {row["why"] for row in dropped} == {"computational"}
  told = run("rubrics", tmp_path / "2", tmp_path / "3", capsys)
  assert told["kept"] == 10 and told["wanted"] == 5
  assert {row["rubrics"] for row in read(tmp_path / "3")} == {SCHEME}
  told = run("difficulty", tmp_path / "3", tmp_path / "4", capsys, samples_per_problem=3)
  assert (told["kept"], told["wanted"], told["missing"]) == (10, 15, 0)
  for row in read(tmp_path / "4"):
    score = STATEMENTS.index(row["problem"]) + 1
    assert row["scores"] == [score] * 3 and row["reward_mean"] == pytest.approx(score / 7)
  told = run("select", tmp_path / "4", tmp_path / "5", capsys, select__min_grades=3)
  assert (told["kept"], told["dropped"]) == (8, 2)  # 5/7 is over 0.7

  bench = write(tmp_path / "bench.jsonl", [{"problem": near, "id": "B1"}])
  c = config("decontaminate", tmp_path / "5")
  for place in c.decontaminate.benchmarks.values():
    place.source = ""
  c.decontaminate.benchmarks.proofbench.source = str(bench)
  curate.main(c, str(tmp_path / "6"))
  capsys.readouterr()
  removed = [json.loads(line) for line in (tmp_path / "6" / "dropped.jsonl").open()]
  assert {row["problem"] for row in removed} == {STATEMENTS[0]}
  assert removed[0]["benchmark"] == "proofbench/B1" and removed[0]["why"] == "fuzzy match"
  assert "infinitely many primes congruent to" in removed[0]["passage"]
  told = run("deduplicate", tmp_path / "6", tmp_path / "7", capsys)
  assert (told["kept"], told["dropped"]) == (3, 3)

  final = read(tmp_path / "7")
  assert PUBLISHED_RL | PUBLISHED_SFT - {"category"} <= final[0].keys()
  kept, report = problems.load(
    tmp_path / "7", revision=None, config="default", split="train", require=("rubric",),
    reward_range=(0.0, 0.7), max_bad_share=0,
  )  # fmt: skip
  assert [p.statement for p in kept] == STATEMENTS[1:4] and report.filtered == 0
  header = huggingface_hub.metadata_load(tmp_path / "7" / "README.md")
  assert header["license"] == "unknown" and header["size_categories"] == "n<1K"
  card = (tmp_path / "7" / "README.md").read_text()
  jobs = re.findall(r"^\| \d \| (\w+) \|", card, re.M)
  assert jobs == ["teacher", "filter", "rubrics", "difficulty", "select", "decontaminate",
                  "deduplicate"]  # fmt: skip
  assert str(tmp_path) not in card and "settle it before this is published" in card


def test_a_licence_is_inherited(tmp_path, capsys):
  """The card takes the source's licence unless the config gives one."""
  source = tmp_path / "source"
  write(source / "data" / "train-0.jsonl", [{"problem": s} for s in STATEMENTS[:2]])
  (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
  for changes, expected in [({}, "apache-2.0"), ({"output__license": "mit"}, "mit")]:
    run("deduplicate", source, tmp_path / "out", capsys, output__format="jsonl", **changes)
    assert huggingface_hub.metadata_load(tmp_path / "out" / "README.md")["license"] == expected
  assert benchmarks.load(tmp_path / "out", revision=None, split="train", max_bad_share=0)[0]


def test_the_other_format_replaces_the_first(tmp_path, capsys):
  source = write(tmp_path / "x.jsonl", [{"problem": s} for s in STATEMENTS])
  for format in ("parquet", "jsonl", "parquet"):
    run("deduplicate", source, tmp_path / "out", capsys, output__format=format)
    kept, _ = dataset.read(config("deduplicate", tmp_path / "out").data)
    assert len(kept) == len(STATEMENTS)


def test_failures_are_missing_and_only_they_are_asked_again(tmp_path, capsys, endpoint):
  """Over max_missing_share nothing is written and a line says so; the next run asks for it."""
  source = write(tmp_path / "x.jsonl", [{"problem": s} for s in STATEMENTS])
  works = endpoint.script
  endpoint.script = lambda i, r: error(400) if STATEMENTS[2] in asked(r) else works(i, r)
  with pytest.raises(ValueError, match="1 of 6 are missing.* run the same command again"):
    run("teacher", source, tmp_path / "out", capsys)
  assert not (tmp_path / "out" / "data").exists()
  assert "traces: 1 failed" in capsys.readouterr().out
  endpoint.script, before = works, len(endpoint.requests)
  assert run("teacher", source, tmp_path / "out", capsys)["kept"] == 6
  assert [statement_in(r) for r in endpoint.requests[before:]] == [STATEMENTS[2]]
  before = len(endpoint.requests)
  told = run("teacher", source, tmp_path / "out", capsys, samples_per_problem=2)
  assert told["kept"] == 12 and len(endpoint.requests) == before + 6
  with pytest.raises(ValueError, match="belongs to a run with another config"):
    run("teacher", source, tmp_path / "out", capsys, rollout__temperature=0.5)


def test_a_failed_judge_costs_no_attempt_twice(tmp_path, capsys, endpoint):
  """Attempts stay when grades fail, an outage is no zero, and the next run grades only."""
  source = write(tmp_path / "x.jsonl", [{"problem": s, "rubrics": "7 for it"} for s in STATEMENTS])
  works = endpoint.script
  endpoint.script = lambda i, r: (
    error(503) if r["body"]["model"] == "judge" and i % 2 else works(i, r)
  )
  how = {"samples_per_problem": 2, "max_failures": 100}
  with pytest.raises(ValueError, match="are missing"):
    run("difficulty", source, tmp_path / "out", capsys, **how)
  endpoint.script = works
  run("difficulty", source, tmp_path / "out", capsys, **how)
  assert sum(r["body"]["model"] == "m" for r in endpoint.requests) == 12
  scores = [row["scores"] for row in read(tmp_path / "out")]
  assert scores == [[i + 1] * 2 for i in range(6)]


def test_cut_traces_are_dropped_not_asked_again(tmp_path, capsys, endpoint):
  source = write(tmp_path / "x.jsonl", [{"problem": s} for s in STATEMENTS])
  works = endpoint.script
  endpoint.script = lambda i, r: (
    said("", "length", reasoning="and so") if STATEMENTS[1] in asked(r) else works(i, r)
  )
  told = run("teacher", source, tmp_path / "out", capsys)
  assert (told["kept"], told["dropped"], told["missing"]) == (5, 1, 0)
  [row] = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").open()]
  assert row["why"] == "cut at max_tokens" and row["reasoning_content"] == "and so"
  run("teacher", source, tmp_path / "out", capsys)
  assert len(endpoint.requests) == 6


@pytest.mark.parametrize(
  ("job", "row", "changes", "message"),
  [
    ("teacher", {"problem": "p"}, {"endpoint__model": ""}, "no model to ask: set config.endpoint"),
    ("teacher", {"problem": "p"}, {"endpoint__base_url_env": "NOWHERE"}, "but NOWHERE is not"),
    ("teacher", {"problem": "p"}, {"policy": "x"}, "are both set"),
    ("teacher", {"text": "p"}, {}, "among its columns (text)"),
    ("teacher", None, {}, "no row of"),
    ("filter", {"problem": "p"}, {"filter__reject": ("bad",)}, "names 'bad': use incomplete"),
    ("select", {"problem": "p"}, {}, "run the job `difficulty` on these rows first"),
    ("select", {"problem": "p"}, {"select__min_reward_mean": 0.9}, "no row can lie between"),
    ("deduplicate", {"problem": "p"}, {"deduplicate__threshold": 1.5}, "threshold is 1.5"),
    ("decontaminate", {"problem": "p"}, {"decontaminate__ngram": 3}, "needs a revision"),
    ("rubrics", {"problem": "p"}, {}, "no row is left of 1: see the first reason, 'no solution"),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, monkeypatch, endpoint, job, row, changes, message):
  source = write(tmp_path / "x.jsonl", [row] if row else [])
  c = config(job, source, **changes)
  if job == "decontaminate":
    c.decontaminate.benchmarks.fine_proofs_test.revision = ""
  with pytest.raises(ValueError) as told:
    curate.main(c, str(tmp_path / "out"))
  assert message in str(told.value) and "\n" not in str(told.value)


def test_columns_of_mixed_types_are_named(tmp_path, capsys):
  source = write(
    tmp_path / "x.jsonl", [{"problem": STATEMENTS[0], "n": 1}, {"problem": "b", "n": "x"}]
  )
  with pytest.raises(ValueError, match="column 'n' mixes types.*format=jsonl") as told:
    run("deduplicate", source, tmp_path / "out", capsys)
  assert "\n" not in str(told.value)
  run("deduplicate", source, tmp_path / "out", capsys, output__format="jsonl")


def test_every_job_has_a_config_and_the_other_way_round():
  assert set(config_file.JOBS) == curate.JOBS.keys()
  for job in config_file.JOBS:
    flags.check(config_file.get_config(job))
  with pytest.raises(ValueError, match="no job '': use one of teacher"):
    config_file.get_config()
  c = config_file.get_config("difficulty")
  assert (c.samples_per_problem, c.rollout.temperature, c.judge.model) == (
    128, 0.8, common.rubric_judge().model,
  )  # fmt: skip
  teacher = config_file.get_config("teacher")
  assert (teacher.rollout.max_tokens, teacher.concurrency) == (124_928, 256)


@pytest.fixture(scope="module")
def tiny_policy(tmp_path_factory, tiny):
  """A workdir of a random tiny model that speaks the tiny world's words."""
  model, params = tiny
  folder = tmp_path_factory.mktemp("runs") / "policy"
  words = tokenizer_lib.train_sentencepiece(
    tiny_world.corpus(), tmp_path_factory.mktemp("words"), vocab_size=64, vocab_multiple=64
  )
  policy.save_description(folder / "model", model, words)
  checkpoints = Checkpoints(folder / "checkpoints", keep=1)
  checkpoints.save(1, {"params": params}, {})
  checkpoints.close()
  return folder


@pytest.mark.slow
def test_the_in_process_engine_estimates_difficulty(tmp_path, capsys, tiny_policy):
  """A policy of this program under the exact grader, without any server; twice the same."""
  found = tiny_world.problems(0, 3, "heldout")
  source = write(
    tmp_path / "x.jsonl", [{"problem": p.statement, "rubrics": p.rubric} for p in found]
  )
  how = {"endpoint__model": "", "policy": str(tiny_policy), "judge__reward": "exact"}
  how |= {"prompt": "tiny_reason", "samples_per_problem": 4, "model__dtype": "float32"}
  scores = []
  for folder in (tmp_path / "a", tmp_path / "b"):
    c = config("difficulty", source, **how)
    c.rollout.update(common.tiny_engine() | {"slots": 8, "lanes": 1, "pages": 0})
    c.rollout.max_tokens = 12
    curate.main(c, str(folder))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["kept"], told["missing"], told["wanted"]) == (3, 0, 12)
    scores.append([(row["scores"], row["num_rewards"]) for row in read(folder)])
  assert scores[0] == scores[1] and all(n == 4 for _, n in scores[0])


def test_kill_9_asks_nothing_twice_but_what_was_in_flight(tmp_path, endpoint):
  """A teacher run killed after some traces goes on: finished ones are not asked again."""
  source = write(
    tmp_path / "x.jsonl", [{"problem": f"{s} Part {i}."} for s in STATEMENTS[:5] for i in range(4)]
  )
  command = [
    sys.executable, "-m", "qed_jax.curate", "--config=configs/curate.py:teacher",
    f"--workdir={tmp_path / 'out'}", f"--config.data.source={source}", "--config.endpoint.model=m",
    "--config.concurrency=2", "--config.endpoint.stream=False",
  ]  # fmt: skip
  works, enough, hold = endpoint.script, threading.Event(), threading.Event()

  def slow(i, request):
    if i >= 7 and not hold.is_set():
      enough.set()
      hold.wait(60)
    return works(i, request)

  endpoint.script = slow
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
  assert enough.wait(120)
  process.send_signal(signal.SIGKILL)
  process.wait()
  hold.set()
  ledger = (tmp_path / "out" / "traces.jsonl").read_bytes()
  finished = ledger.count(b"\n")
  assert finished >= 5
  first = len(endpoint.requests)
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
  assert json.loads(done.stdout.splitlines()[-1])["kept"] == 20
  assert len(endpoint.requests) - first == 20 - finished
  assert (tmp_path / "out" / "traces.jsonl").read_bytes().startswith(ledger)
  assert len(rows.find(tmp_path / "out", revision=None, config="default", split="train")) == 1
