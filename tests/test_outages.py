"""Outages of the judge's endpoint, of every kind: waited for, and never paid for in grades."""

import asyncio
import contextlib

import pytest
from fake_endpoint import ASK, said
from virtual_time import HANG, Answer, Endpoint, now, run

from configs import common
from qed_jax.breaker import Breaker
from qed_jax.chat import ChatError, HttpChat, Unavailable
from qed_jax.chat import Endpoint as Place
from qed_jax.records import Problem
from qed_jax.rollout import judging

GOOD = Answer(200, said("Sound.\n<score>5</score>")[1], seconds=8.0)
PROBLEM = Problem(id="p", statement="Prove it.", rubric="7 points: done.")
MINUTES = 30


@contextlib.contextmanager
def judge_of(tmp_path, monkeypatch, url, **changes):
  """The judge of the plain config, in virtual time."""
  config = common.rubric_judge()
  config.update({"api": "chat", "cache": "", "canary_share": 0.0, "audit_share": 0.0} | changes)
  monkeypatch.setenv("OPENAI_BASE_URL", url)
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  clocks = {"sleep": asyncio.sleep, "clock": now}
  with monkeypatch.context() as patch:
    patch.setattr(judging, "HttpChat", lambda *a, **k: HttpChat(*a, **(k | clocks)))
    yield judging.grader(config, tmp_path)


def proof(number: int) -> str:
  return f"Proof {number}. " + "We show by induction that the claim holds for all n. " * 5


OUTAGES = {
  "503": Answer(503, {"error": {"message": "loading"}}),
  "429": Answer(429, {"error": {"message": "slow down"}}),
  "429 with Retry-After": Answer(429, {}, {"Retry-After": "120"}),
  "hang": HANG,
  "slow": Answer(200, GOOD.data, seconds=5_000.0),
  "cut": Answer(200, GOOD.data, cut=True),
  "truncated JSON": Answer(200, b'{"choices": [{"mess'),
  "HTML": Answer(200, b"<html>bad gateway</html>", {"Content-Type": "text/html"}),
  "empty": Answer(200, b""),
  "error with 200": Answer(200, {"error": {"message": "overloaded"}}),
  "refused": None,
}


@pytest.mark.parametrize("kind", OUTAGES)
def test_half_an_hour_of_outage_costs_no_grade(kind, tmp_path, monkeypatch):
  """Proofs that come before it, in it and after it all get the grade that they would have got; no
  grade is made of the outage, and it is over for us within two minutes of its end; but what hangs
  then hangs for its 15 minutes."""
  begin, end = 60.0, 60.0 + MINUTES * 60
  hangs = 900 if kind in ("hang", "slow") else 0

  async def main():
    server = Endpoint(lambda body: OUTAGES[kind] if begin <= now() < end else GOOD)
    await server.listen()
    with judge_of(tmp_path, monkeypatch, server.url) as judge:

      async def graded(number):
        await asyncio.sleep(number * 20.0)
        grade = await judge(PROBLEM, proof(number))
        return number * 20.0, now(), grade, judge.metrics()

      async def switch():
        await asyncio.sleep(begin)
        server.refuse()
        await asyncio.sleep(end - begin)
        await server.listen()

      switching = asyncio.create_task(switch()) if kind == "refused" else None
      results = await asyncio.gather(*(graded(number) for number in range(100)))
      if switching is not None:
        await switching
      await judge.close()
      return results, judge

  results, judge = run(main)
  assert [grade.score for _, _, grade, _ in results] == [5] * 100
  assert all(grade.reason == "graded" for _, _, grade, _ in results)
  assert judge._http.stats["failed"] == 0 and judge._http.breaker.outages == 1
  late = [done for asked, done, _, _ in results if asked < end]
  assert max(late) <= end + hangs + 120 + 8, f"the last came {max(late) - end:.0f} s after the end"
  assert all(done - asked <= 30 for asked, done, _, _ in results if asked > end + 120)
  paused = sum(metrics["judge/paused_s"] for *_, metrics in results)
  assert MINUTES * 60 - hangs - 400 <= paused <= MINUTES * 60 + 120


@pytest.mark.parametrize("kind", ["503", "hang", "refused"])
def test_an_outage_that_outlasts_the_patience_is_one_line(kind, tmp_path, monkeypatch):
  async def main():
    server = Endpoint(lambda body: OUTAGES[kind])
    await server.listen()
    if kind == "refused":
      server.refuse()
    with judge_of(tmp_path, monkeypatch, server.url, patience_s=3000.0) as judge:
      tasks = [asyncio.create_task(judge(PROBLEM, proof(n))) for n in range(20)]
      results = await asyncio.gather(*tasks, return_exceptions=True)
      ended = now()
      await judge.close()
      await asyncio.sleep(0)
      return results, ended, asyncio.all_tasks() - {asyncio.current_task()}

  results, ended, left = run(main)
  assert all(isinstance(result, Unavailable) for result in results), results[0]
  line = str(results[0])
  assert isinstance(results[0], ValueError) and "\n" not in line
  assert "patience_s" in line and "run the same command" in line
  assert 2900 <= ended <= 3000 + 900 + 60
  assert not [task for task in left if "_serve" not in repr(task)]


def test_one_request_that_fails_for_ever_is_its_own_fault(tmp_path, monkeypatch):
  """The probe is answered, so the others go on and this proof has no grade; no outage is seen."""

  def script(body):
    return OUTAGES["503"] if "Proof 3." in body["messages"][0]["content"] else GOOD

  async def main():
    server = Endpoint(script)
    await server.listen()
    with judge_of(tmp_path, monkeypatch, server.url) as judge:
      grades = await asyncio.gather(*(judge(PROBLEM, proof(n)) for n in range(6)))
      await judge.close()
      return grades, judge

  grades, judge = run(main)
  assert [g.score for g in grades] == [5, 5, 5, None, 5, 5]
  assert grades[3].reason.startswith("failed") and judge._http.breaker.outages == 0


def test_a_hundred_hung_calls_do_not_slow_twenty_healthy_ones(tmp_path, monkeypatch):
  """The healthy take what they take alone, to within a fifth at the 95th percentile."""

  def script(body):
    content = body["messages"][0]["content"]
    return HANG if "hang" in content else Answer(200, GOOD.data, seconds=5 + len(content) % 7)

  async def healthy(judge, seconds):
    async def one(number):
      begin = now()
      grade = await judge(PROBLEM, proof(number) + "x" * number)
      seconds.append(now() - begin)
      return grade.score

    return await asyncio.gather(*(one(number) for number in range(20)))

  async def main(hung):
    server = Endpoint(script)
    await server.listen()
    with judge_of(tmp_path, monkeypatch, server.url) as judge:
      waiting = [asyncio.create_task(judge(PROBLEM, proof(n) + "hang")) for n in range(hung)]
      await asyncio.sleep(1.0)
      seconds = []
      assert await healthy(judge, seconds) == [5] * 20
      assert len(server.asked) == hung + 20 and not any(task.done() for task in waiting)
      for task in waiting:
        task.cancel()
      await asyncio.gather(*waiting, return_exceptions=True)
      await judge.close()
      return sorted(seconds)[18]

  alone, beside = run(lambda: main(0)), run(lambda: main(100))
  assert beside <= 1.2 * alone


@pytest.mark.parametrize(
  ("status", "data", "said"),
  [
    (401, {"error": {"message": "bad key"}}, "export the key in OPENAI_API_KEY"),
    (404, {"error": {"message": "no such model"}}, "the name of the model"),
    (405, b"<html>", "check base_url"),
    (301, b"", "check base_url"),
    (429, {"error": {"message": "no", "code": "insufficient_quota"}}, "HTTP 429"),
  ],
)
def test_an_endpoint_that_refuses_everybody_stops_the_run(
  status, data, said, tmp_path, monkeypatch
):
  """A key that was withdrawn in mid-run, say: one line, at once, and no grade."""
  monkeypatch.delenv("OPENAI_API_KEY", raising=False)

  async def main():
    server = Endpoint(lambda body: GOOD if now() < 50 else Answer(status, data))
    await server.listen()
    with judge_of(tmp_path, monkeypatch, server.url) as judge:
      assert (await judge(PROBLEM, proof(0))).score == 5
      await asyncio.sleep(50)
      try:
        with pytest.raises(Unavailable, match=said) as caught:
          await judge(PROBLEM, proof(1))
      finally:
        await judge.close()
      assert now() < 60
      return str(caught.value)

  line = run(main)
  assert "\n" not in line and "run the same command" in line


def test_a_refusal_of_one_request_is_no_grade(tmp_path, monkeypatch):
  """Some providers answer 403 to a text that they do not like."""

  def script(body):
    return Answer(403, {}) if "Proof 1." in body["messages"][0]["content"] else GOOD

  async def main():
    server = Endpoint(script)
    await server.listen()
    with judge_of(tmp_path, monkeypatch, server.url) as judge:
      grades = await asyncio.gather(*(judge(PROBLEM, proof(n)) for n in range(3)))
      await judge.close()
      return [g.score for g in grades]

  assert run(main) == [5, None, 5]


# --- the breaker by itself ---------------------------------------------------------------------


def breaker(probe, **changes):
  options = {"after": 3, "patience": 100.0, "longest_wait": 8.0, "held": lambda: 0.0}
  options |= {"sleep": asyncio.sleep, "clock": now} | changes
  return Breaker(probe, lambda seconds, wrong: TimeoutError(f"{seconds:.0f} {wrong}"), **options)


def test_a_probe_that_succeeds_leaves_it_closed():
  async def main():
    async def probe():
      return None

    found = breaker(probe)
    changes = []
    found.changed = lambda: changes.append(found.open)
    assert [await found.failed(last=False) for _ in range(4)] == [False] * 4
    assert not await found.failed(last=True) and not await found.passes()
    assert (found.outages, found.seconds, changes) == (0, 0.0, [])

  run(main)


def test_probes_come_ever_less_often_and_everybody_waits():
  times = []

  async def main():
    async def probe():
      times.append(now())
      return "down" if now() < 40 else None

    found = breaker(probe)
    changes = []
    found.changed = lambda: changes.append((now(), found.open))
    first = asyncio.create_task(found.failed(last=True))
    await asyncio.sleep(0.5)
    assert found.open and 0.4 < found.seconds <= 0.5
    assert all(await asyncio.gather(*(found.passes() for _ in range(50)), first))
    assert not found.open and changes == [(0.0, True), (47.0, False)] and found.seconds == 47

  run(main)
  assert times == [0, 1, 3, 7, 15, 23, 31, 39, 47]


def test_a_call_that_was_under_way_proves_the_endpoint_alive():
  async def main():
    async def probe():
      return "down"

    found = breaker(probe)
    waiting = asyncio.create_task(found.failed(last=True))
    await asyncio.sleep(20)
    found.succeeded()
    assert await waiting and now() <= 24

  run(main)


def test_patience_ends_for_all_who_wait_and_the_next_call_asks_anew():
  async def main():
    probes = []

    async def probe():
      probes.append(now())
      return "down"

    found = breaker(probe)
    waiting = [asyncio.create_task(found.failed(last=True)) for _ in range(3)]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert {str(r) for r in results} == {"95 down"} and not found.open
    assert not await found.passes()
    number = len(probes)
    again = asyncio.create_task(found.failed(last=True))
    await asyncio.sleep(0.1)
    assert len(probes) == number + 1 and found.open
    await found.close()
    assert again.cancelled() or again.done() or not found.open

  run(main)


def test_without_patience_nothing_waits():
  async def main():
    found = breaker(None, patience=0.0)
    assert [await found.failed(last=True) for _ in range(9)] == [False] * 9

  run(main)


def test_a_chat_without_patience_fails_as_it_always_did(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")

  async def main():
    server = Endpoint(lambda body: OUTAGES["503"])
    await server.listen()
    options = {"concurrency": 4, "timeout": 9.0, "deadline": 90.0, "attempts": 3}
    chat = HttpChat(Place(server.url, "m"), **options, sleep=asyncio.sleep, clock=now)
    with pytest.raises(ChatError, match="gave up after 3 requests") as caught:
      await chat(ASK, max_tokens=9, temperature=1.0)
    assert not isinstance(caught.value, Unavailable) and len(server.asked) == 3
    await chat.close()

  run(main)
