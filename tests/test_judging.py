"""The judge of a run: what it costs, how it is watched, and when it stops the run."""

import asyncio
import json
import re
import threading
import time

import pytest
import scripted_server
from fake_endpoint import KEY, error, responded, said, serve
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine
from scripted_server import says
from test_tokenizer import write_bpe_folder

from configs import common, rl
from qed_jax import flags
from qed_jax.chat import HttpChat, Unavailable
from qed_jax.data import tokenizer as tokenizer_lib
from qed_jax.records import Completion, Grade, Problem, Usage
from qed_jax.rewards import canaries, precheck, rubric
from qed_jax.rollout import jobs, judging
from qed_jax.rollout.experience import Experience
from qed_jax.rollout.requests import RequestError

PROBLEM = Problem(id="p1", statement="Prove that 1 + 1 = 2 holds.", rubric="7 points: done.")
LIMITS = {"min_chars": 100, "max_chars": 40_000}


def proof(number: int) -> str:
  return f"Proof {number}. " + "We show by induction that the claim holds for all n. " * 5


def config_of(**changes):
  config = common.rubric_judge()
  config.update({"api": "chat", "cache": "", "canary_share": 0.0, "audit_share": 0.0} | changes)
  flags.check(config, "config.judge")
  return config


@pytest.fixture
def make(tmp_path, monkeypatch):
  """make(server, **changes of the config) -> a Judge that asks the server, its waits cut short."""
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)

  async def sleep(seconds):
    await asyncio.sleep(seconds / 100)

  def made(server, **changes):
    monkeypatch.setenv("OPENAI_BASE_URL", server if isinstance(server, str) else server.url)
    with monkeypatch.context() as patch:
      patch.setattr(judging, "HttpChat", lambda *a, **k: HttpChat(*a, **(k | {"sleep": sleep})))
      return judging.grader(config_of(**changes), tmp_path)

  return made


def grades_of(judge, proofs, problem=PROBLEM):
  async def main():
    try:
      return await asyncio.gather(*(judge(problem, text) for text in proofs))
    finally:
      await judge.close()

  return asyncio.run(main())


# --- prechecks ---------------------------------------------------------------------------------

FACTS = [
  ("", "empty"),
  (" \n ", "empty"),
  (":", "characters"),
  ("Thought process:", "characters"),
  ("Let's solve this problem step by step.", "characters"),
  ("\u2234 " * 200, "no words"),
  ("1 + 1 = 2; " * 50, "no words"),
  (PROBLEM.statement * 9, "repeats the problem"),
  (f"{PROBLEM.statement} This is true.\n{PROBLEM.statement} " * 2, "repeats the problem"),
  (f"{proof(1)}<think>But wait, {proof(2)}", "thought does not end"),
  ("word " * 9_000, "40000 are allowed"),
]


@pytest.mark.parametrize("text, reason", FACTS)
def test_a_fact_about_the_text_is_a_zero_without_a_call(text, reason, make):
  with serve(lambda i, r: said("<score>7</score>")) as server:
    judge = make(server)
    [grade] = grades_of(judge, [text])
    assert grade.score == 0 and reason in grade.reason and not server.requests
  assert judge.metrics()["judge/precheck_share"] == 1.0


@given(st.text(), st.text())
def test_a_precheck_never_fails_and_never_gives_points(statement, text):
  found = precheck.verdict(Problem(id="p", statement=statement), text, **LIMITS)
  assert found is None or (found.score == 0 and re.match("empty|precheck: ", found.reason))


def test_a_proof_is_not_prechecked_away():
  """In several languages, with a thought that did end, and for a problem it quotes."""
  chinese = "\u7531\u6570\u5b66\u5f52\u7eb3\u6cd5\u53ef\u8bc1" * 20
  for text in [proof(1), chinese, f"<think>Hm.</think>{proof(1)}", PROBLEM.statement + proof(1)]:
    assert precheck.verdict(PROBLEM, text, **LIMITS) is None
  assert precheck.verdict(PROBLEM, "Trivial: yes.", min_chars=0, max_chars=0) is not None
  assert (
    precheck.verdict(PROBLEM, "It follows from 1 being what it is.", min_chars=0, max_chars=0)
    is None
  )


def test_parity_has_no_prechecks_but_for_an_empty_proof(make):
  with serve(lambda i, r: said("<score>7</score> <score>1</score>")) as server:
    short, empty = grades_of(make(server, style="parity"), [":", ""])
  assert (short.score, empty.score, empty.reason) == (7, 0, "empty")


# --- what it asks and counts -------------------------------------------------------------------


@pytest.mark.parametrize("style", rubric.STYLES)
def test_a_style_is_a_prompt_with_its_scale(style, make):
  problem = Problem("p", "Prove it.", rubric="7: all", solution="REFERENCE")
  with serve(lambda i, r: said("<score>6</score>")) as server:
    [grade] = grades_of(make(server, style=style), [proof(1)], problem)
    text = server.requests[0]["body"]["messages"][0]["content"]
  assert grade.score == 6
  assert ("REFERENCE" in text) == (style in ("reference", "imo"))
  scale = "0, 1, 6, 7" if style == "imo" else "0, 1, 2, 3, 4, 5, 6, 7"
  assert f"out of {scale}" in text


def test_the_imo_scale_has_no_five(make):
  with serve(lambda i, r: said("<score>5</score>")) as server:
    [grade] = grades_of(
      make(server, style="imo"), [proof(1)], Problem("p", "s", "rubric", solution="r")
    )
  assert grade.score is None and grade.reason.startswith("invalid")


def test_metrics_are_those_of_what_happened_since_they_were_asked(make):
  """Six readings of three proofs: one is retried, one unreadable at first."""
  script = [error(503), said("none")] + [said(f"<score>{n}</score>") for n in (7, 3, 3, 5, 4, 6)]

  def answer(number, request):
    return script[number]

  with serve(answer) as server:
    judge = make(server, votes=2, concurrency=1, price_read=2.0, price_written=10.0)
    grades = grades_of(judge, [proof(1), proof(2), proof(3)])
  found = judge.metrics()
  spread = [max(g.votes) - min(g.votes) for g in grades]
  assert found["judge/calls"] == 7 and found["judge/requests"] == 8 and found["judge/retries"] == 1
  assert found["judge/input_tokens"] == 49 and found["judge/output_tokens"] == 35
  assert found["judge/dollars"] == pytest.approx(49 * 2e-6 + 35 * 10e-6)
  assert found["judge/invalid_share"] == pytest.approx(1 / 7) and found["judge/none_share"] == 0
  assert found["judge/disagreement"] == pytest.approx(sum(spread) / 3)
  assert 0 < found["judge/latency_p50_s"] <= found["judge/latency_p95_s"]
  later = judge.metrics()
  assert later["judge/calls"] == later["judge/dollars"] == 0 and "judge/invalid_share" not in later


def test_what_the_cache_answers_is_counted_and_costs_nothing(make, tmp_path):
  with serve(lambda i, r: said("<score>5</score>")) as server:
    for hits in (0, 2):
      judge = make(server, cache="judge.jsonl", price_read=1.0)
      grades_of(judge, [proof(1), proof(2)])
      found = judge.metrics()
      assert found["judge/cache_hits"] == hits and (found["judge/dollars"] == 0) == bool(hits)
    assert len(server.requests) == 2
  assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
  "budget, said_",
  [({"token_budget": 100}, "token_budget"), ({"money_budget": 1e-4}, "money_budget")],
)
def test_a_spent_budget_stops_the_run_and_its_rerun(budget, said_, make):
  """12 tokens a call; the replies of the first run count in the second."""
  prices = {"price_read": 1.0, "price_written": 1.0}
  with serve(lambda i, r: said("<score>5</score>")) as server:
    for asked in (9, 9):
      judge = make(server, cache="judge.jsonl", concurrency=1, **budget, **prices)
      with pytest.raises(Unavailable, match=said_) as caught:
        grades_of(judge, [proof(n) for n in range(20)])
      assert len(server.requests) == asked and "\n" not in str(caught.value)


def test_the_audit_holds_whole_conversations(make, tmp_path):
  with serve(lambda i, r: said("Fine.\n<score>5</score>", reasoning="Hm.")) as server:
    judge = make(server, audit_share=1.0, votes=2)
    (tmp_path / "judge_audit.jsonl").write_text('{"torn')
    grades_of(judge, [proof(1), proof(2)])
  rows = (tmp_path / "judge_audit.jsonl").read_text().splitlines()[1:]
  rows = sorted(map(json.loads, rows), key=lambda row: row["proof"])
  assert [row["proof"] for row in rows] == [proof(1), proof(2)]
  for row in rows:
    assert (row["kind"], row["score"], row["votes"]) == ("graded", 5, [5, 5])
    for turn in row["conversation"]:
      assert "Proof" in turn["messages"][0]["content"]
      assert turn["reply"] == "Hm.</think>Fine.\n<score>5</score>"


def test_shares_are_drawn_by_content_and_kept(make, tmp_path):
  """A share of 0.2 is about that, the same proofs on every run, and not those with a canary."""
  with serve(lambda i, r: said("<score>0</score>")) as server:
    kept = []
    for name in ("a.jsonl", "b.jsonl"):
      judge = make(server, audit_share=0.2, audit=name)
      grades_of(judge, [proof(n) for n in range(200)])
      rows = map(json.loads, (tmp_path / name).read_text().splitlines())
      kept.append(sorted(row["proof"] for row in rows))
  assert kept[0] == kept[1] and 20 <= len(kept[0]) <= 65


# --- canaries ----------------------------------------------------------------------------------


def known(body) -> int:
  """What our canaries deserve, as an examiner would see it."""
  text = body["messages"][0]["content"]
  shown = re.findall(r"<submission-\w+>\n(.*)\n</submission-\w+>", text, re.DOTALL)
  return next((c.score for c in canaries.load("") if [c.proof] == shown), 5)


def test_our_canaries_are_sound():
  found = canaries.load("")
  assert {c.score for c in found} == {0, 7} and len({c.problem.id for c in found}) == len(found)
  assert all(c.problem.rubric and c.problem.solution for c in found)


def test_canaries_of_a_good_judge_cost_little_and_say_so(make, tmp_path):
  with serve(lambda i, r: said(f"<score>{known(r['body'])}</score>")) as server:
    judge = make(server, canary_share=0.2, audit_share=0.001)
    grades = grades_of(judge, [proof(n) for n in range(200)])
    assert {g.score for g in grades} == {5}
    sent = len(server.requests) - 200
  found = judge.metrics()
  assert 20 <= sent <= 65 and found["judge/canary_error"] == 0
  kinds = [json.loads(row)["kind"] for row in (tmp_path / "judge_audit.jsonl").open()]
  assert kinds.count("canary") == sent


@pytest.mark.parametrize(
  "judged, said_",
  [
    (lambda body: 7, "it gave 7 to all of 16 proofs"),
    (lambda body: 7 - known(body) if known(body) != 5 else 5, "off by 7.0 points"),
  ],
)
def test_a_judge_that_does_not_grade_stops_the_run(judged, said_, make):
  with serve(lambda i, r: said(f"<score>{judged(r['body'])}</score>")) as server:
    judge = make(server, canary_share=0.5)
    with pytest.raises(Unavailable, match=said_) as caught:
      grades_of(judge, [proof(n) for n in range(100)])
  assert "config.judge." in str(caught.value) and "\n" not in str(caught.value)


def test_the_same_canary_is_read_afresh_each_time_and_again_after_a_restart(make):
  """With a cache: a judge that went bad in mid-run is noticed, and nothing is paid twice."""
  with serve(lambda i, r: said(f"<score>{known(r['body'])}</score>")) as server:
    for _ in range(2):
      judge = make(server, canary_share=0.5, cache="judge.jsonl")
      grades_of(judge, [proof(n) for n in range(60)])
      total = len(server.requests)
    assert total == len(server.requests) and total > 75
    texts = [r["body"]["messages"][0]["content"] for r in server.requests]
    assert len(set(texts)) == total


def test_top_marks_only_are_worth_a_word_without_canaries(make, capsys):
  with serve(lambda i, r: said("<score>7</score>")) as server:
    grades_of(make(server), [proof(n) for n in range(250)])
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and "gave 7 to 200 proofs" in lines[0] and "canary_share" in lines[0]


BAD_CANARIES = [
  ('{"statement": "s"}', "line 1: KeyError"),
  ('{"statement": "s", "rubric": "r", "proof": "p", "score": 8}', "score is 8"),
  ('\n{"statement": "s", "rubric": "r", "proof": 3, "score": 7}', "line 2: statement"),
  ("{", "line 1"),
  ("[]", "line 1"),
  ("", "holds no row"),
]


@pytest.mark.parametrize("text, message", BAD_CANARIES)
def test_bad_canaries_are_one_line(text, message, tmp_path):
  path = tmp_path / "c.jsonl"
  path.write_text(text)
  with pytest.raises(ValueError, match=message) as caught:
    canaries.load(str(path))
  assert "\n" not in str(caught.value)
  with pytest.raises(ValueError, match="cannot be read"):
    canaries.load(str(tmp_path / "none"))


# --- bad input, before anything is spent -------------------------------------------------------


def test_check_passes_a_judge_that_grades(make):
  with serve(lambda i, r: said(f"<score>{known(r['body'])}</score>")) as server:
    judge = make(server, canary_share=0.01)
    judging.check(judge)
    assert len(server.requests) == 5
    assert grades_of(judge, [proof(1)])[0].score == 5
    judging.check(make(server, canary_share=0.0))
    assert len(server.requests) == 7


CHECKED = [
  (error(404, "the model `m` does not exist"), "check base_url and the name of the model"),
  (error(401, "no key"), "export the key in OPENAI_API_KEY"),
  ((200, b"<html>", {"Content-Type": "text/html"}), "check base_url"),
  (said("Grade: 85 %"), "must end with <score>N</score>, N one of 0, 1, 2"),
  (said("<score>85</score>"), "ends with '<score>85</score>'"),
  (said("<score>7</score>"), "it gave 7 to all of 4 proofs"),
  (said("<score>0</score>"), "it gave 0 to all of 4 proofs"),
  (said("<score>7</score>", "length"), "max_tokens"),
]


@pytest.mark.parametrize("answer, message", CHECKED)
def test_check_names_what_is_wrong_in_one_line(answer, message, make):
  with serve(lambda i, r: answer) as server:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
      judging.check(make(server, canary_share=0.01))
  line = str(caught.value)
  assert "\n" not in line and len(line) < 700


def test_check_names_an_address_where_nobody_is_and_the_responses_api(make):
  with serve(lambda i, r: error(404, "no such route")) as server:
    with pytest.raises(ValueError, match="api='chat'"):
      judging.check(make(server, canary_share=0.01, api="responses"))
    url = server.url
  with pytest.raises(ValueError, match="whether the server is up") as caught:
    judging.check(make(url, canary_share=0.01))
  assert "no connection" in str(caught.value)


WRONG = [
  ({"style": "lenient"}, "style is 'lenient'"),
  ({"samples": 0}, "samples is 0"),
  ({"canary_share": 2.0}, "canary_share is 2.0"),
  ({"audit_share": 1.5}, "audit_share is 1.5"),
  ({"engine": "policy"}, "no engine"),
  ({"money_budget": 3.0}, "money_budget=3"),
  ({"votes": 0}, "votes is 0"),
  ({"aggregate": "max"}, "aggregate is 'max'"),
]


@pytest.mark.parametrize("changes, message", WRONG)
def test_a_wrong_field_is_one_line(changes, message, make):
  with pytest.raises(ValueError, match=message) as caught:
    make("http://127.0.0.1:1/v1", **changes)
  assert "\n" not in str(caught.value)


def test_no_address_and_no_key(make, tmp_path, monkeypatch):
  monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
  with pytest.raises(ValueError, match="set OPENAI_BASE_URL"):
    judging.grader(config_of(), tmp_path)
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("OPENAI_BASE_URL", f"http://me:{KEY}@host/v1")
  with pytest.raises(ValueError, match="credentials") as caught:
    judging.grader(config_of(), tmp_path)
  assert KEY not in str(caught.value)


# --- judging by an engine here -----------------------------------------------------------------


def test_a_chat_here_is_asked_instead_of_an_endpoint(tmp_path):
  """Its refusals, such as of too long a prompt, are no grade."""
  asked = []

  async def chat(messages, *, max_tokens, temperature, seed):
    asked.append(seed)
    if "Proof 2." in messages[0]["content"]:
      raise RequestError("the prompt has 999 tokens")
    return [Completion("Hm.</think><score>4</score>", usage=Usage(5, 6, 0.5, 1))]

  judge = judging.grader(config_of(engine="policy"), tmp_path, chat)
  one, two = grades_of(judge, [proof(1), proof(2)])
  assert one.score == 4 and two == Grade(None, "failed: the prompt has 999 tokens")
  found = judge.metrics()
  assert found["judge/calls"] == 2 and found["judge/failed"] == 1
  assert found["judge/latency_p50_s"] == 0.5 and found["judge/output_tokens"] == 6
  assert judge.in_engine and not judge.paused


# --- in a run ----------------------------------------------------------------------------------


class Engine(ScriptedEngine):
  """With the policy's side of the interface; the thread may change."""

  def set_params(self, params, version):
    pass

  def _alone(self):
    pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_lib.load(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


def experience(tokenizer, grade, order="admission", max_lag=0):
  config = rl.get_config("tiny")
  config.rollout.update(problems=3, attempts=4, max_tokens=300, max_lag=max_lag, order=order)
  config.batch.update(row_length=2_048, rows=4)
  config.objective.drop_dead_groups = False
  problems = [Problem(f"p{i}", f"Prove {i}.", rubric="7 points: done.") for i in range(4)]
  text = f"Let me see.</think>{proof(1)}"

  def script(request):
    return tokenizer.encode(f"{text} {request.attempt}")

  engine = Engine(
    vocab_size=tokenizer.vocab_size,
    stop_ids=tokenizer.stop_ids,
    slots=4,
    script=script,
    max_length=4_096,
    chunk=20,
  )
  templates = {"reason": "{problem}"}
  return Experience(config, problems, engine, tokenizer, None, grade, templates, lambda: False)


@pytest.mark.parametrize("order", ["admission", "arrival"])
def test_sampling_rests_while_the_judge_is_down_and_no_rollout_is_lost(order, tokenizer, make):
  """The endpoint answers four proofs, fails until it is mended, and answers again."""
  mended = threading.Event()

  def script(number, request):
    if number >= 4 and not mended.is_set():
      return error(503)
    return said(f"<score>{number % 8}</score>")

  with serve(script) as server:
    judge = make(server, min_chars=0)
    stream = experience(tokenizer, judge, order)
    stream.engine.step_s = 0.01
    found = []
    worker = threading.Thread(target=lambda: found.append(stream.next(None, 0)), daemon=True)
    worker.start()
    end = time.monotonic() + 60
    while not judge.paused and time.monotonic() < end:
      time.sleep(0.01)
    assert judge.paused
    time.sleep(0.1)  # for the step that was under way
    steps, left = stream.engine.steps, stream.engine.unfinished
    time.sleep(0.5)
    assert stream.engine.steps == steps and left > 0 and not found
    mended.set()
    worker.join(60)
    [(_, metrics, rollouts)] = found
    stream.close()
  assert len(rollouts) == 12 and all(r.grade.score is not None for r in rollouts)
  assert metrics["invalid_share"] == 0 and metrics["judge/paused_s"] > 0
  assert metrics["judge/failed"] == 0


def test_an_outage_without_end_ends_the_step_with_one_line(tokenizer, make):
  """And what was open is in the state, to be begun again."""
  with serve(lambda i, r: error(503)) as server:
    judge = make(server, min_chars=0, patience_s=0.5)
    stream = experience(tokenizer, judge)
    with pytest.raises(Unavailable, match="patience_s") as caught:
      stream.next(None, 0)
    assert stream.state()["window"] == {"next": 3, "open": [0, 1, 2]}
    stream.close()
  assert "\n" not in str(caught.value)


def test_the_policy_judges_itself_on_the_engine_that_samples(tokenizer, tmp_path):
  """In the order of admission too, where the engine otherwise rests while grades are awaited."""
  stream = experience(tokenizer, None)
  judge = judging.grader(
    config_of(engine="policy", style="parity", template=template(tmp_path)), tmp_path, stream.chat
  )
  stream.grade = judge
  stream.engine.script = lambda request: tokenizer.encode(
    f"Hm.</think>{proof(1)} <score>{request.attempt + 3}</score>"
  )
  _, metrics, rollouts = stream.next(None, 0)
  stream.close()
  assert [r.grade.score for r in rollouts] == [3] * 12
  assert metrics["judge/calls"] == 12 and stream.engine.leaked() == {}


def template(folder) -> str:
  path = folder / "short.md"
  path.write_text("Grade {problem} {marker} {submission}")
  return str(path)


# --- our own server as the judge ---------------------------------------------------------------


def test_our_server_is_a_judge_endpoint(tokenizer, make, monkeypatch):
  """With a key, cached, under every chat style; without the key it is one line."""
  text = "Let me see.</think>Sound.\n<score>5</score>"
  sizes = {"prompt_tokens": 20_000, "max_tokens": 30_000}
  app, _, engine = scripted_server.make(
    tokenizer, key=KEY, limits=sizes, script=says(tokenizer, text), max_length=32_000
  )
  problem = Problem("p", "Prove it.", rubric="7: all", solution="By induction.")
  with scripted_server.listening(app) as url:
    with pytest.raises(ValueError, match="export the key in OPENAI_API_KEY"):
      judging.check(make(f"{url}/v1", canary_share=0.01, model="tiny", max_tokens=2_000))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for style in rubric.STYLES:
      judge = make(f"{url}/v1", style=style, model="tiny", max_tokens=2_000)
      scale = rubric.STYLES[style].scale
      [grade] = grades_of(judge, [proof(1)], problem)
      assert grade.score == (5 if 5 in scale else None), grade
  assert engine.leaked() == {}


def test_the_responses_api_carries_the_effort(make):
  with serve(lambda i, r: responded("<score>5</score>")) as server:
    [grade] = grades_of(make(server, api="responses"), [proof(1)])
    body = server.requests[0]["body"]
  assert grade.score == 5 and body["reasoning"] == {"effort": "medium"}
  assert jobs.grader is judging.grader
