"""Evaluation: rows survive kills, nothing is asked twice, a missing grade is never a zero."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fake_endpoint import error, said, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import evaluate as evaluate_config
from qed_jax import evaluate, flags
from qed_jax.chat import ChatError, Unavailable
from qed_jax.evaluation import attempts, comparison, export, judges, results, rows, summary
from qed_jax.records import Call, Completion, Grade, Problem, Solution, Usage
from qed_jax.rollout.requests import RequestError

ROOT = Path(__file__).parents[1]
PRICES = rows.Prices(1.0, 10.0, 2.0, 20.0)
LABELS = rows.Labels("bench", "rsa", "model", "exact")


def tiny(problems=6, samples=1, turns=2, at_once=4):
  c = evaluate_config.get_config("tiny")
  c.data.problems, c.samples_per_problem, c.problems_at_once = problems, samples, at_once
  c.scaffold.turns = turns
  c.label = "model"
  flags.check(c)
  return c


@pytest.fixture
def config():
  return tiny()


class Scripted:
  """A chat that counts its calls; after `lives` of them it raises."""

  def __init__(self, lives=10**9, error=None):
    self.lives, self.calls = lives, 0
    self.error = error or ConnectionError("killed")

  async def __call__(self, messages, *, n, seed, thinking=True, **sampling):
    self.calls += 1
    if self.calls > self.lives:
      raise self.error
    await asyncio.sleep(0)
    return [Completion(text="r</think>p" if thinking else "s", usage=Usage(10, 2, 0.5, 1))]


def graded_by(scores):
  """A grader that gives the scores in turn; a text among them is an outage with this reason."""
  remaining = iter(scores)

  async def grade(problem, proof):
    score = next(remaining)
    if isinstance(score, str):
      return Grade(None, score)
    return Grade(score, "scripted", "words", Usage(100, 1, 0.25, 1))

  return grade


def run(config, folder, chat, monkeypatch, scores=None):
  monkeypatch.setattr(evaluate, "open_chats", lambda *_: (chat, None))
  grade = graded_by(scores if scores is not None else [7] * 1000)
  monkeypatch.setattr(evaluate.jobs, "grader", lambda *_: grade)
  evaluate.main(config, str(folder))
  return json.loads((folder / results.SUMMARY).read_text())["rows"][0]


def lines(folder, name=results.ROWS) -> list[dict]:
  return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- rows


def test_every_turn_of_every_problem_is_a_row(config, tmp_path, monkeypatch):
  found = run(config, tmp_path, Scripted(), monkeypatch)
  written = lines(tmp_path)
  assert len(written) == 6 * 2 and len({(r["problem_id"], r["turn"]) for r in written}) == 12
  assert [p["score"] for p in found["by_turn"]] == [7.0, 7.0]
  assert found["n"] == 6 and found["missing"] == 0 and found["invalid"] == 0
  assert sum(p["n"] for p in found["by_length"]) == 6
  wanted = "problem_id problem rubric level sample turn summary reasoning proof score reason "
  wanted += "feedback finish_reason tokens summary_tokens benchmark category reference answer "
  wanted += "scaffold model judge input_tokens calls depth seconds cost stages"
  assert all(set(wanted.split()) <= row.keys() for row in written)
  first, second = sorted(written, key=lambda r: (r["problem_id"], r["turn"]))[:2]
  assert (first["calls"], second["calls"], second["depth"]) == (2, 1, 3)
  assert first["stages"].keys() == {"reason", "summarise"} and second["stages"].keys() == {"reason"}
  assert first["tokens"] + first["summary_tokens"] == 4 and first["input_tokens"] == 20


def test_a_scaffold_without_turns_is_one_row():
  """Its tokens are all calls', its reasoning that of the call that wrote the proof."""
  made = [("solve", "a</think>bad", "stop"), ("merge", "why</think>good proof", "length"),
          ("select", "x</think>1", "stop")]  # fmt: skip
  calls = [
    Call(stage, (), Completion(text, finish_reason=end, usage=Usage(100, 10, 1.0, 1)), depth)
    for depth, (stage, text, end) in enumerate(made, 1)
  ]
  problem = Problem("p", "Prove.", "rubric", "4", "reference", level="hard", category="Algebra")
  solution = Solution(problem, "good proof", calls=tuple(calls))
  [row] = rows.rows_of(1, solution, [Grade(6, "graded", "", Usage(50, 5, 1.0, 2))], LABELS, PRICES)
  assert (row["reasoning"], row["proof"], row["finish_reason"]) == ("why", "good proof", "length")
  assert (row["tokens"], row["input_tokens"], row["calls"], row["depth"]) == (30, 300, 3, 3)
  assert row["cost"] == pytest.approx((300 * 1 + 30 * 10) / 1e6)
  assert row["judge_cost"] == pytest.approx((50 * 2 + 5 * 20) / 1e6)
  assert row["stages"]["merge"] == {"calls": 1, "input_tokens": 100, "tokens": 10, "cut": 1}
  assert (row["category"], row["reference"], row["turn"], row["turns"]) == (
    "Algebra", "reference", 1, 1)  # fmt: skip


def test_calls_of_no_turn_are_the_last_rows():
  """Sums over rows count every call once, also those that a scaffold makes beside its turns."""
  from qed_jax.records import Turn

  done = [Completion(f"r{i}</think>p{i}", usage=Usage(1, 2, 1.0, 1)) for i in range(3)]
  turns = tuple(Turn(i + 1, "", done[i], f"p{i}") for i in range(2))
  calls = tuple(Call("reason", (), c, i + 1) for i, c in enumerate(done))
  solution = Solution(Problem("p", "s"), "p1", turns, calls)
  made = rows.rows_of(0, solution, [Grade(1), Grade(2)], LABELS, PRICES)
  assert [row["calls"] for row in made] == [1, 2] and made[1]["depth"] == 3


# --- stops and resumes


def test_finished_rows_are_not_asked_for_again(config, tmp_path, monkeypatch):
  """Stopped in the second wave: the first is on disk, and the rerun asks for the rest only."""
  with pytest.raises(ConnectionError):
    run(config, tmp_path, Scripted(lives=14), monkeypatch)
  kept = len({r["problem_id"] for r in lines(tmp_path)})
  assert kept == 4
  with (tmp_path / results.ROWS).open("a") as file:
    file.write('{"problem_id": "torn')
  chat = Scripted()
  found = run(config, tmp_path, chat, monkeypatch)
  assert chat.calls == (6 - kept) * (2 + 1)  # two turns and one summary each
  assert found["n"] == 6 and found["missing"] == 0
  assert "torn" in (tmp_path / "eval.jsonl.removed").read_text()
  again = Scripted()
  assert run(config, tmp_path, again, monkeypatch) == found
  assert again.calls == 0


def test_twenty_kills_lose_and_double_nothing(tmp_path):
  """SIGKILL at 20 places, calls, grades, torn writes, repairs and fsyncs among them: every finished
  row stays, once; an attempt that was done is never asked for; what is paid again was in flight."""
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run(
    [sys.executable, str(ROOT / "tests" / "evaluation_to_kill.py"), str(tmp_path / "run")],
    capture_output=True, text=True, env=environment, cwd=ROOT, timeout=120, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  *wrong, last = map(json.loads, done.stdout.splitlines())
  assert wrong == []
  assert last["killed"] == ["call", "grade", "write", "replace", "fsync"] * 4
  assert last["rows"] == 12 * 2 * 2 and last["status"] == 0
  assert last["distinct"] == 12 * 2 * 3  # model calls that one whole run makes
  assert 0 < last["paid_again"] <= 20 * 3 * 3  # kills x attempts in flight x calls of one


def test_each_attempt_is_written_when_it_is_done(tmp_path):
  """One that hangs holds up nobody, and no more than `at_once` are in flight."""
  problems = [Problem(str(i), "s") for i in range(20)]
  let_go, flying, most = asyncio.Event(), 0, 0
  done = []

  async def one(problem, sample):
    nonlocal flying, most
    flying += 1
    most = max(most, flying)
    await (let_go.wait() if problem.id == "0" else asyncio.sleep(0))
    flying -= 1
    return [row(problem.id)]

  def write(rows):
    done.append(rows[0]["problem_id"])
    if len(done) == 19:
      let_go.set()

  pairs = [(p, 0) for p in problems]
  asyncio.run(attempts.run(pairs, one, write, at_once=3, failures_in_a_row=1))
  assert done[-1] == "0" and len(done) == 20 and most == 3


def test_a_failed_attempt_is_missing_and_asked_for_again(config, tmp_path, monkeypatch, capsys):
  """A model call that fails for good costs its attempt; the run goes on, counts it and says so."""
  bad = {"left": 1}

  class Sometimes(Scripted):
    async def __call__(self, messages, **options):
      if bad["left"]:
        bad["left"] -= 1
        raise ChatError("m at host: gave up after 5 requests: HTTP 503")
      return await super().__call__(messages, **options)

  found = run(config, tmp_path, Sometimes(), monkeypatch)
  assert (found["missing"], found["n"], found["invalid"]) == (1, 5, 0)
  said = capsys.readouterr().out
  assert "HTTP 503" in said and "1 attempts failed" in said and "missing=1" in said
  chat = Scripted()
  assert run(config, tmp_path, chat, monkeypatch)["missing"] == 0 and chat.calls == 3


def test_a_prompt_that_the_engine_cannot_take_is_one_missing_attempt(config, tmp_path, monkeypatch):
  class Small(Scripted):
    async def __call__(self, messages, **options):
      if self.calls == 0:
        self.calls += 1
        raise RequestError("the prompt has 99 tokens, this engine takes 9")
      return await super().__call__(messages, **options)

  found = run(config, tmp_path, Small(), monkeypatch)
  assert (found["missing"], found["n"]) == (1, 5)


def test_failures_in_a_row_stop_the_run_in_one_line(config, tmp_path, monkeypatch):
  config.failures_in_a_row = 3
  chat = Scripted(lives=6, error=ChatError("m at host: no connection"))
  config.problems_at_once = 1
  with pytest.raises(ValueError, match="3 attempts failed .* no connection.*same command") as e:
    run(config, tmp_path, chat, monkeypatch)
  assert "\n" not in str(e.value)
  assert len({r["problem_id"] for r in lines(tmp_path)}) == 2


def test_an_outage_of_the_judge_is_mended_without_solving_again(config, tmp_path, monkeypatch):
  scores = ["failed: gave up", 5, None] * 4
  found = run(config, tmp_path, Scripted(), monkeypatch, scores=scores)
  assert found["invalid"] + found["single_pass"]["invalid"] == 8
  chat = Scripted()
  found = run(config, tmp_path, chat, monkeypatch, scores=[6] * 4)
  assert chat.calls == 0 and len(lines(tmp_path)) == 12
  scores = [row["score"] for row in lines(tmp_path)]
  assert (scores.count(6), scores.count(5), scores.count(None)) == (4, 4, 4)
  assert sum(row["judge_calls"] for row in lines(tmp_path)) == 12  # outages cost none here


def test_more_samples_and_problems_add_to_what_is_there(tmp_path, monkeypatch):
  """The seeds are the samples' own: a run that grew is the run that was large from the start."""
  seen = []

  class Remembers(Scripted):
    async def __call__(self, messages, *, seed, **options):
      seen.append((messages[0]["content"], seed))
      return await super().__call__(messages, seed=seed, **options)

  run(tiny(3, 1), tmp_path / "a", Remembers(), monkeypatch)
  chat = Remembers()
  found = run(tiny(5, 2), tmp_path / "a", chat, monkeypatch)
  assert chat.calls == (5 * 2 - 3) * 3 and found["samples"] == 2 and found["missing"] == 0
  grown, seen[:] = set(seen), []
  run(tiny(5, 2), tmp_path / "b", Remembers(), monkeypatch)
  assert set(seen) == grown
  fewer = Scripted()
  found = run(tiny(3, 1), tmp_path / "a", fewer, monkeypatch)
  assert fewer.calls == 0 and found["n"] == 3 and found["graded"] == 3


def test_another_judge_or_config_in_the_same_workdir_is_refused(config, tmp_path, monkeypatch):
  run(config, tmp_path, Scripted(), monkeypatch)
  other = tiny()
  other.judge.reward = "rubric"
  with pytest.raises(ValueError, match="grades of two judges do not mix"):
    run(other, tmp_path, Scripted(), monkeypatch)
  other = tiny()
  other.scaffold.turns = 3
  with pytest.raises(ValueError, match=r"scaffold\.turns: 2 there, 3 here"):
    run(other, tmp_path, Scripted(), monkeypatch)


def row(problem="p", sample=0, turn=1, turns=1, score=7, **more):
  return {
    "problem_id": problem, "sample": sample, "turn": turn, "turns": turns, "score": score,
    "level": "", "category": "", "tokens": 10, "summary_tokens": 0, "input_tokens": 5, "calls": 1,
    "depth": 1, "seconds": 1.0, "judge_input_tokens": 0, "judge_tokens": 0, "finish_reason": "stop",
    "proof": "p", "stages": {}, "benchmark": "b", "scaffold": "s", "model": "m", "judge": "j",
    **more,
  }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_a_cut_anywhere_leaves_whole_attempts(turns, data):
  """Of a file cut after any byte, the attempts before the cut are kept whole, the rest is set
  aside, and what is appended then is read back."""
  made = [[row(str(i), 0, t + 1, n) for t in range(n)] for i, n in enumerate(turns)]
  text = "".join(json.dumps(r) + "\n" for attempt in made for r in attempt)
  cut = data.draw(st.integers(0, len(text)))
  ends, end = [], 0
  for attempt in made:
    end += sum(len(json.dumps(r)) + 1 for r in attempt)
    ends.append(end - 1)  # the last line feed is no loss
  whole = [r for attempt in made[: sum(end <= cut for end in ends)] for r in attempt]
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "eval.jsonl"
    path.write_text(text[:cut])
    with results.Results(path) as opened:
      assert opened.rows == whole
      opened.append([row("new")])
    assert lines(Path(folder)) == [*whole, row("new")]
    aside = path.with_name("eval.jsonl.removed")
    removed = aside.read_text().splitlines() if aside.exists() else []
  kept = [json.dumps(r) for r in whole]
  assert sorted(kept + removed) == sorted(x for x in text[:cut].split("\n") if x)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet='{}[]":,0a\n\x85\u2028', max_size=60))
def test_any_text_can_stand_in_the_file(text):
  kept, removed = results.read(text)
  assert kept == [] and removed == [line for line in text.split("\n") if line.strip()]


def test_one_process_at_a_time(tmp_path):
  with results.Results(tmp_path / "eval.jsonl") as opened:
    opened.append([row()])
    with pytest.raises(ValueError, match="another process is writing"):
      results.Results(tmp_path / "eval.jsonl")
  with results.Results(tmp_path / "eval.jsonl") as opened:
    assert opened.rows == [row()]


# --- what the rows say


def test_a_missing_grade_is_counted_and_left_out(config, tmp_path, monkeypatch):
  """None of twelve grades is a zero: the mean is over those that are there."""
  found = run(config, tmp_path, Scripted(), monkeypatch, scores=[None, 6] * 6)
  assert {p["score"] for p in found["by_turn"]} <= {6.0, None}
  assert sum(p["n"] for p in found["by_turn"]) == sum(p["invalid"] for p in found["by_turn"]) == 6
  assert all({"invalid", "missing"} <= e.keys() for e in found["by_level"] + found["by_budget"])


def test_nothing_graded_is_said_not_invented(config, tmp_path, monkeypatch):
  found = run(config, tmp_path, Scripted(), monkeypatch, scores=[None] * 12)
  assert found["score"] is None and found["invalid"] == 6 and found["percent"] is None
  assert "no grade" in summary.table(found)


def summarised(made, problems, samples, **options):
  options = {"label": "m", "prices": PRICES, "pass_score": 6, "seed": 0} | options
  return summary.summarise(made, problems, samples, **options)


def test_samples_of_a_problem_are_averaged_before_the_interval():
  """Alike samples of a problem are not so many more independent values."""
  problems = [Problem(str(i), "s") for i in range(20)]
  made = [row(str(i), s, score=7 * (i % 2)) for i in range(20) for s in range(4)]
  one, four = summarised(made, problems, 1), summarised(made, problems, 4)
  assert (one["low"], one["high"], one["n"]) == (four["low"], four["high"], four["n"])
  assert four["stderr"] == one["stderr"] and four["stderr_runs"] == 0
  assert four["run_std"] == 0 and one["run_std"] is None


def test_figures_by_hand():
  """Two problems, two samples, three grades: mean of means, runs, pass@k, counts, cost."""
  problems = [Problem("a", "s", level="1", category="X"), Problem("b", "s", level="2")]
  made = [
    row("a", 0, score=7, level="1", category="X"),
    row("a", 1, score=0, level="1"),
    row("b", 0, score=6, level="2"),
    row("b", 1, score=None, finish_reason="length"),
  ]
  found = summarised(made, problems, 3)
  assert found["score"] == pytest.approx((3.5 + 6) / 2)
  assert found["percent"] == pytest.approx(100 * 4.75 / 7)
  assert found["run_means"] == [6.5, 0.0]
  assert found["run_std"] == pytest.approx(6.5 / 2**0.5)
  assert (found["n"], found["graded"], found["invalid"], found["missing"]) == (2, 3, 1, 2)
  passed = {e["k"]: (e["score"], e["n"], e["left_out"]) for e in found["pass_at_k"]}
  assert passed == {1: (0.75, 2, 0), 2: (1.0, 1, 1), 3: (None, 0, 2)}
  assert found["truncated"] == 0.25
  assert found["cost_sum"] == pytest.approx(4 * (5 * 1 + 10 * 10) / 1e6)
  first, second = found["by_level"]
  assert (first["level"], first["score"], first["missing"]) == ("1", 3.5, 1)
  assert (second["level"], second["score"], second["invalid"], second["missing"]) == (
    "2", 6.0, 1, 1)  # fmt: skip
  text = summary.table(found)
  assert text.count("invalid=") == text.count("missing=") == 5


def test_score_by_tokens_takes_the_last_proof_that_was_there():
  """Turns of 10 tokens with summaries of 5: the second proof is there after 25."""
  problems = [Problem("a", "s"), Problem("b", "s")]
  made = []
  for problem, tokens in (("a", 10), ("b", 40)):
    made += [row(problem, 0, 1, 2, score=2, tokens=tokens, summary_tokens=5),
             row(problem, 0, 2, 2, score=6, tokens=tokens)]  # fmt: skip
  found = summarised(made, problems, 1)
  curve = {e["tokens"]: (e["score"], e["unfinished"]) for e in found["by_budget"]}
  assert curve[10] == (1.0, 1) and curve[85] == (6.0, 0)
  assert all(score in (1.0, 3.0, 4.0, 6.0) for score, _ in curve.values())
  assert [e["tokens"] for e in found["by_turn"]] == [25.0, 55.0]
  assert found["tokens"] == (25 + 85) / 2


# --- two runs


def test_the_difference_is_paired_and_what_is_not_shared_is_counted():
  """B is 1 better everywhere: the interval is a point, however far the problems are apart."""
  a = [row(str(i), s, score=i % 7, level="x") for i in range(30) for s in range(2)]
  b = [row(str(i), 0, score=i % 7 + 1, level="x", model="n") for i in range(5, 33)]
  b[0]["score"] = None
  found = comparison.compare(a, b, turn=0, seed=0)
  assert (found["difference"], found["low"], found["high"]) == (1.0, 1.0, 1.0)
  assert (found["n"], found["better"], found["worse"]) == (24, 24, 0)
  assert (found["only_a"], found["only_b"], found["invalid_b"]) == (5, 3, 1)
  assert found["b"] - found["a"] == pytest.approx(1.0)
  assert "careful" not in comparison.table(found)
  other = [r | {"judge": "another"} for r in b]
  assert "careful: the judges differ" in comparison.table(
    comparison.compare(a, other, turn=0, seed=0)
  )
  back = comparison.compare(b, a, turn=0, seed=0)
  assert back["difference"] == -1.0 and back["only_a"] == 3


def test_compare_and_export_on_the_command_line(tmp_path, capsys, config, monkeypatch):
  for name, scores in (("a", [3, 5] * 6), ("b", [4, 6] * 6)):
    run(config, tmp_path / name, Scripted(), monkeypatch, scores=scores)
  capsys.readouterr()
  evaluate.compare([str(tmp_path / "a"), str(tmp_path / "b")])
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found["n"] == 6 and found["difference"] == pytest.approx(1.0) and found["turn"] == "last"
  with pytest.raises(ValueError, match="no row has turn 9"):
    evaluate.compare([str(tmp_path / "a"), str(tmp_path / "b"), "--turn=9"])
  with pytest.raises(ValueError, match="is not there: name the workdir"):
    evaluate.compare([str(tmp_path / "a"), str(tmp_path / "nowhere")])
  evaluate.export_rows([str(tmp_path / "a"), str(tmp_path / "out" / "a.jsonl"), "--sample=0"])
  assert json.loads(capsys.readouterr().out) == {
    "rows": 6, "out": str(tmp_path / "out" / "a.jsonl")}  # fmt: skip
  with pytest.raises(ValueError, match="has no sample 4"):
    evaluate.export_rows([str(tmp_path / "a"), str(tmp_path / "x.jsonl"), "--sample=4"])


def test_runs_of_other_benchmarks_share_nothing():
  with pytest.raises(ValueError, match="share no problem"):
    comparison.compare([row("a")], [row("b")], turn=0, seed=0)


def test_export_has_the_originals_columns(config, tmp_path, monkeypatch):
  run(config, tmp_path, Scripted(), monkeypatch, scores=[1, None] + [4] * 10)
  columns = export.columns(lines(tmp_path), None)
  assert len(columns) == 6
  wanted = {"problem", "solution", "grading_guidelines", "model_solution", "history", "cost_run"}
  wanted |= {"schema_0", "grade", "grade_cost", "score"}
  assert all(wanted <= c.keys() for c in columns)
  for c in columns:
    assert c["cost_run"]["output_tokens"] == 6 and c["cost_run"]["input_tokens"] == 30
    assert c["cost_run"]["time"] == pytest.approx(1.5)
    assert (c["grade"] is None) == (c["score"] is None)
    assert len(c["history"]) == 1 + 2 * 2 and c["model_solution"] == "p"


# --- grader studies


def study(tmp_path, made, **judge):
  path = tmp_path / "graded.jsonl"
  path.write_text("".join(json.dumps(r) + "\n" for r in made))
  c = evaluate_config.get_config("judge")
  c.data.update(source=str(path), max_bad_share=0.5)
  c.problems_at_once, c.failures_in_a_row = 2, 50
  c.judge.update(judge)
  flags.check(c)
  return c


def human(i, score, problem="p"):
  return {"problem_id": problem, "problem": "Prove it.", "grading_scheme": "7 points",
          "model_solution": f"proof {i}", "expert_rating": score}  # fmt: skip


def test_a_judge_is_compared_with_people(tmp_path, monkeypatch, capsys):
  """An outage leaves proofs missing, and the next run asks for those alone; rows with a wrong scale
  are counted; a judge that always says 7 is called so."""
  made = [human(i, i % 8, f"p{i % 3}") for i in range(12)] + [human(99, 8), human(98, 2.5)]
  asked, down = [], {"p1"}

  async def grade(problem, proof):
    asked.append(proof)
    if problem.id in down:
      return Grade(None, "failed: HTTP 503")
    return Grade(None, "invalid: no tag") if proof == "proof 0" else Grade(7, "graded")

  monkeypatch.setattr(evaluate.jobs, "grader", lambda *_: grade)
  config = study(tmp_path, made)
  evaluate.main(config, str(tmp_path / "run"))
  out = capsys.readouterr().out
  assert "expert_rating is 8" in out and "2 of 14 rows are bad" in out and "HTTP 503" in out
  read = lambda: json.loads((tmp_path / "run" / judges.SUMMARY).read_text())["rows"][0]  # noqa: E731
  found = read()
  assert (found["missing"], found["invalid"], found["proofs"]) == (4, 1, 7)
  assert found["constant"] == 7 and "careful: the judge gave 7 to every proof" in out
  asked.clear()
  down.clear()
  evaluate.main(config, str(tmp_path / "run"))
  found = read()
  assert len(asked) == 4 and (found["missing"], found["proofs"]) == (0, 11)
  expected = [i % 8 for i in range(1, 12)]
  assert found["bias"]["value"] == pytest.approx(7 - sum(expected) / 11)
  assert found["confusion"][3][7] == 2 and sum(map(sum, found["confusion"])) == 11
  assert [e["source"] for e in found["by_source"]] == [""]


def test_a_study_without_proofs_is_one_line(tmp_path, monkeypatch):
  config = study(tmp_path, [{"problem": "Prove it.", "score": 3}])
  with pytest.raises(ValueError, match="bad") as e:
    evaluate.main(config, str(tmp_path / "run"))
  assert "\n" not in str(e.value)


# --- bad input


def of_file(tmp_path, made, text=None):
  path = tmp_path / "bench.jsonl"
  path.write_text(text if text is not None else "".join(json.dumps(r) + "\n" for r in made))
  c = evaluate_config.get_config("direct")
  c.data.update(source=str(path), problems=3)
  c.samples_per_problem = 1
  c.failures_in_a_row = 2
  return c


@pytest.mark.parametrize(
  "made, text, says",
  [
    ([], "", "no row of .* is left"),
    ([{"question_text": "x"}], None, "are bad"),
    ([{"problem": "Prove."}], None, "no problem of .* has a rubric"),
  ],
)
def test_a_bad_benchmark_is_one_line(made, text, says, tmp_path):
  with pytest.raises(ValueError, match=says) as e:
    evaluate.main(of_file(tmp_path, made, text), str(tmp_path / "run"))
  assert "\n" not in str(e.value)


def test_an_unknown_benchmark_is_one_line(tmp_path):
  config = of_file(tmp_path, [])
  config.data.source = "nowhere/at/all.jsonl"
  with pytest.raises(ValueError, match="does not exist"):
    evaluate.main(config, str(tmp_path / "run"))


def test_problems_that_the_judge_cannot_mark_are_left_out_and_named(tmp_path, monkeypatch, capsys):
  made = [{"problem": "Prove 1.", "rubric": "7 points"}, {"problem": "Prove 2.", "id": "bare"}]
  found = run(of_file(tmp_path, made), tmp_path / "run", Scripted(), monkeypatch)
  assert found["n"] == 1 and "left out 1 problems without a rubric, the first bare" in (
    capsys.readouterr().out)  # fmt: skip


def test_a_judge_that_gives_up_loses_no_proof(config, tmp_path, monkeypatch):
  """Its error is an outage of that proof; after some in a row the run stops, and nothing is solved
  again when the judge is back."""
  config.problems_at_once, config.failures_in_a_row = 1, 3

  async def gone(problem, proof):
    raise ChatError("judge at host: no connection")

  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "open_chats", lambda *_: (Scripted(), None))
    patch.setattr(evaluate.jobs, "grader", lambda *_: gone)
    with pytest.raises(ValueError, match="3 attempts failed .* the judge failed: .*no connection"):
      evaluate.main(config, str(tmp_path))
  assert len(lines(tmp_path)) == 6 and all(r["score"] is None for r in lines(tmp_path))
  chat = Scripted()
  found = run(config, tmp_path, chat, monkeypatch)
  assert chat.calls == 3 * 3 and found["n"] == 6 and found["invalid"] == 0


def test_an_endpoint_that_somebody_has_to_mend_stops_at_once():
  async def one(problem, sample):
    raise Unavailable("the budget is spent")

  with pytest.raises(ValueError, match="1 attempts failed .*budget is spent"):
    asyncio.run(attempts.run(
      [(Problem("a", "s"), 0)] * 9, one, print, at_once=2, failures_in_a_row=99
    ))  # fmt: skip


@pytest.mark.parametrize("variant", ["nope", "tiny,proofbench", "rsa,direct", "tiny,judge"])
def test_an_unknown_variant_is_one_line(variant):
  with pytest.raises(ValueError) as e:
    evaluate_config.get_config(variant)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("variant", ["", "tiny", "direct", "proofbench,direct", "imo_answerbench"])
def test_variants_check(variant):
  flags.check(evaluate_config.get_config(variant))


PROBLEM = {"problem": "Prove it.", "rubric": "7 points"}


def test_a_policy_must_be_named(config, tmp_path):
  with pytest.raises(ValueError, match=r"config\.policy is empty"):
    evaluate.open_chat(config, tmp_path)


def served(tmp_path, monkeypatch, url, key=None):
  c = of_file(tmp_path, [PROBLEM | {"id": str(i)} for i in range(3)])
  c.endpoint.update(model="policy", retries=1, timeout_s=5.0)
  monkeypatch.setenv("POLICY_BASE_URL", url)
  monkeypatch.delenv("POLICY_API_KEY", raising=False)
  if key:
    monkeypatch.setenv("POLICY_API_KEY", key)
  monkeypatch.setattr(evaluate.jobs, "grader", lambda *_: graded_by([5] * 99))
  return c


@pytest.mark.parametrize(
  "status, hint", [(404, "name of the model"), (401, "key in POLICY_API_KEY")]
)
def test_an_endpoint_without_the_model_or_key_is_one_line(status, hint, tmp_path, monkeypatch):
  with serve(lambda i, r: error(status)) as server:
    config = served(tmp_path, monkeypatch, server.url)
    with pytest.raises(ValueError, match=f"HTTP {status}.*{hint}") as e:
      evaluate.main(config, str(tmp_path / "run"))
  assert "\n" not in str(e.value) and len(server.requests) <= 3


def test_a_wrong_address_is_one_line(tmp_path, monkeypatch):
  config = served(tmp_path, monkeypatch, "http://127.0.0.1:9/v1")
  with pytest.raises(ValueError, match="no connection.*address in POLICY_BASE_URL"):
    evaluate.main(config, str(tmp_path / "run"))
  monkeypatch.setenv("POLICY_BASE_URL", "localhost:8000")
  with pytest.raises(ValueError, match="write it as http"):
    evaluate.main(config, str(tmp_path / "other"))
  monkeypatch.delenv("POLICY_BASE_URL")
  with pytest.raises(ValueError, match="POLICY_BASE_URL is not: export it"):
    evaluate.main(config, str(tmp_path / "other"))
  assert not (tmp_path / "other" / "config.json").exists()  # a mended config may use the folder


def test_a_served_policy_pays_for_a_call_once(tmp_path, monkeypatch):
  """The judge's side falls over after the model has answered: the rerun asks the server nothing."""
  with serve(lambda i, r: said(f"thought {i}</think>proof {i}")) as server:
    config = served(tmp_path, monkeypatch, server.url, key="sk-0123456789")
    config.problems_at_once = 1  # what is in flight when a run ends is asked for again

    async def falls_over(problem, proof):
      raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
      patch.setattr(evaluate.jobs, "grader", lambda *_: falls_over)
      with pytest.raises(RuntimeError):
        evaluate.main(config, str(tmp_path / "run"))
    assert len(server.requests) == 1
    evaluate.main(config, str(tmp_path / "run"))
  assert len(server.requests) == 3
  written = lines(tmp_path / "run")
  assert {r["proof"] for r in written} == {"proof 0", "proof 1", "proof 2"}
  assert {(r["tokens"], r["input_tokens"]) for r in written} == {(5, 7)}
  everything = "".join(p.read_text() for p in (tmp_path / "run").iterdir() if p.is_file())
  assert "sk-0123456789" not in everything


def test_the_tiny_world_is_evaluated_for_twice_the_turns_of_training():
  assert evaluate_config.get_config("tiny").scaffold.turns == 6
