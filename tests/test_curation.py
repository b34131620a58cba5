"""The parts of the data jobs: ledgers outlive kills, streams are whole, replies are read."""

import asyncio
import itertools
import json
import math
import subprocess
import sys
import time

import pytest
from fake_endpoint import ASK, Handler, error, said, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.chat import ChatError, Endpoint
from qed_jax.curation import asking, difficulty, quality, rubrics
from qed_jax.curation.chats import answer_of
from qed_jax.curation.ledger import Ledger
from qed_jax.curation.streams import StreamingChat
from qed_jax.records import Completion

SCHEME = """## 1. Checkpoints (7 points total)
- [3 points] The bound.
- [4 points] The construction.
Total (max 7)

## 2. Zero-credit items
- The answer alone.

## 3. Deductions
- [-1] A slip."""
VERDICT = {"difficulty": 5} | dict.fromkeys(quality.FLAGS, False)


# --- the ledger


def test_a_ledger_gives_back_what_is_finished(tmp_path):
  """Records outlive the object; a torn line is passed over, and the next record is whole."""
  path = tmp_path / "deep" / "x.jsonl"
  with Ledger(path) as ledger:
    ledger.add("a", {"text": "é\n\u2028"})
    ledger.add("b", {"n": 1})
    ledger.add("a", {"text": "later"})
  path.write_bytes(path.read_bytes() + b'{"key": "c", "record": {"n"')
  with Ledger(path) as ledger:
    assert "c" not in ledger and len(ledger) == 2
    assert (ledger["a"], ledger["b"]) == ({"text": "later"}, {"n": 1})
    ledger.add("c", {"n": 3})
  with Ledger(path) as ledger:
    assert ledger["c"] == {"n": 3} and len(ledger) == 3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=30)), st.dictionaries(st.text(), st.integers()))
def test_a_ledger_opens_whatever_the_file_holds(tmp_path_factory, lines, records):
  """Foreign bytes are no records, and do not spoil those that come after them."""
  path = tmp_path_factory.mktemp("ledger") / "x.jsonl"
  path.write_bytes(b"\n".join(lines))
  with Ledger(path) as ledger:
    for name, value in records.items():
      ledger.add(name, {"value": value})
  with Ledger(path) as ledger:
    assert {name: ledger[name]["value"] for name in records} == records


def test_a_second_process_is_told(tmp_path):
  with Ledger(tmp_path / "x.jsonl"):
    with pytest.raises(ValueError, match="another process works in"):
      Ledger(tmp_path / "x.jsonl")
  Ledger(tmp_path / "x.jsonl").close()


WRITER = """
import sys
from qed_jax.curation.ledger import Ledger
ledger = Ledger(sys.argv[1])
for i in range(len(ledger), len(ledger) + 300):
  ledger.add(str(i), {"i": i, "pad": "x" * (i % 500)})
  print(i, flush=True)
"""


def test_kill_9_loses_nothing_that_was_finished(tmp_path):
  """What was reported as added before each of five kills is there, whole, after it."""
  path, told = tmp_path / "x.jsonl", -1
  for turn in range(4):
    process = subprocess.Popen(
      [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    first = int(process.stdout.readline())
    assert first == told + 1
    time.sleep(0.02 * turn)
    process.kill()
    told = max([first, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
    process.wait()
    with Ledger(path) as ledger:
      assert all(ledger[str(i)]["i"] == i for i in range(told + 1))
      told = len(ledger) - 1


# --- asking


def fill(tmp_path, wanted, ask, **changes):
  how = {"concurrency": 4, "max_failures": 3, "label": "x"} | changes

  async def run(ledger):
    return await asking.fill(ledger, wanted, ask, **how)

  with Ledger(tmp_path / "x.jsonl") as ledger:
    return asyncio.run(run(ledger)), {key: ledger[key] for key in wanted if key in ledger}


def test_only_what_is_missing_is_asked_again(tmp_path):
  """Failures stay missing, are counted, and are the only ones that a second run asks for."""
  asked, broken = [], {"2", "7"}

  async def ask(name):
    asked.append(name)
    if name in broken:
      raise asking.Unusable("no")
    return {"name": name}

  wanted = {str(i): str(i) for i in range(10)}
  missing, found = fill(tmp_path, wanted, ask)
  assert missing == 2 and set(found) == set(wanted) - broken
  asked.clear()
  broken.clear()
  assert fill(tmp_path, wanted, ask)[0] == 0 and sorted(asked) == ["2", "7"]


def test_concurrency_is_bounded_and_used(tmp_path):
  open_now, most = 0, 0

  async def ask(_):
    nonlocal open_now, most
    open_now += 1
    most = max(most, open_now)
    await asyncio.sleep(0.001)
    open_now -= 1
    return {}

  fill(tmp_path, {str(i): i for i in range(40)}, ask, concurrency=7)
  assert most == 7


def test_a_dead_endpoint_stops_the_job_in_one_line(tmp_path):
  """After some failures in a row nothing more is asked; what was finished is kept."""
  asked = []

  async def ask(i):
    asked.append(i)
    if i >= 5:
      raise ChatError("m at host: no connection")
    return {}

  wanted = {str(i): i for i in range(100)}
  with pytest.raises(ValueError, match=r"3 calls in a row failed.*no connection; 5 of 100") as told:
    fill(tmp_path, wanted, ask, concurrency=1)
  assert len(asked) == 8 and "\n" not in str(told.value)
  with Ledger(tmp_path / "x.jsonl") as ledger:
    assert len(ledger) == 5


def test_a_fault_of_ours_is_not_swallowed(tmp_path):
  async def ask(_):
    raise KeyError("bug")

  with pytest.raises(KeyError, match="bug"):
    fill(tmp_path, {"a": 1, "b": 2}, ask)


# --- streams


class Events:
  """A body of server-sent events; `after` them the connection ends, or stays silent."""

  def __init__(self, *events, cut=False, silent=False, pause=0.0):
    self.events, self.cut, self.silent, self.pause = events, cut, silent, pause


def delta(content=None, reasoning=None, finish=None):
  return {
    "choices": [
      {"index": 0, "delta": {"content": content, "reasoning_content": reasoning}}
      | ({"finish_reason": finish} if finish else {})
    ]
  }


USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
WHOLE = (delta(reasoning="th"), delta(reasoning="ink"), delta("pro"), delta("of", finish="stop"))


@pytest.fixture
def events(monkeypatch):
  """Lets the fake endpoint answer with Events."""
  plain = Handler.answer

  def answer(self, status, data, headers=None, length=None):
    if not isinstance(data, Events):
      return plain(self, status, data, headers, length)
    self.send_response(status)
    self.send_header("Content-Type", "text/event-stream; charset=utf-8")
    self.send_header("Transfer-Encoding", "chunked")
    self.end_headers()
    for event in data.events:
      line = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"
      self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
      self.wfile.flush()
      time.sleep(data.pause)
    if data.silent:
      self.server.ended.wait(5)
    if not data.cut and not data.silent:
      self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    self.close_connection = True

  monkeypatch.setattr(Handler, "answer", answer)


def stream(server, tmp_path, **changes):
  options = {"concurrency": 2, "timeout": 20, "deadline": 60, "attempts": 2, "idle_s": 10}
  chat = StreamingChat(
    Endpoint(server.url, "m"), broken=tmp_path / "broken.jsonl", **options | changes
  )

  async def instantly(_):
    await asyncio.sleep(0)

  chat._sleep = instantly

  async def run():
    try:
      return await chat(ASK, max_tokens=9, temperature=0.5, seed=1)
    finally:
      await chat.close()

  return asyncio.run(run())


def test_a_stream_is_the_reply_that_it_would_have_been(events, tmp_path):
  """Pieces of reasoning and content come together; usage and the end are read."""
  with serve(lambda i, r: (200, Events(*WHOLE, USAGE))) as server:
    [completion] = stream(server, tmp_path)
    body = server.requests[0]["body"]
  assert completion.text == "think</think>proof" and completion.finish_reason == "stop"
  assert (completion.usage.input_tokens, completion.usage.output_tokens) == (7, 5)
  assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
  assert body["seed"] == 1 and body["max_tokens"] == 9


def test_a_slow_stream_outlives_the_idle_time(events, tmp_path):
  """What counts is the silence between two pieces, not the whole."""
  pieces = [delta("x") for _ in range(12)] + [delta("y", finish="length")]
  with serve(lambda i, r: (200, Events(*pieces, pause=0.05))) as server:
    [completion] = stream(server, tmp_path, idle_s=0.4)
  assert completion.text == "x" * 12 + "y" and completion.finish_reason == "length"


@pytest.mark.parametrize(
  ("broken", "why"),
  [
    (Events(*WHOLE[:3], cut=True), "broke off after 8 characters"),
    (Events(*WHOLE[:3]), "broke off after 8 characters without an end"),
    (Events(*WHOLE[:3], silent=True), "broke off after 8 characters: TimeoutError"),
    (Events(*WHOLE[:3], b"data: {nonsense\n\n"), "an event is not JSON"),
    (Events(*WHOLE[:3], {"error": {"message": "out of memory"}}), "an event has no choices"),
  ],
  ids=["cut", "no end", "silent", "nonsense", "error"],
)
def test_a_broken_stream_is_asked_again_and_kept_to_read(events, tmp_path, broken, why):
  """It is never taken for a finished trace; what had arrived is on disk."""
  with serve(lambda i, r: (200, broken if i == 0 else Events(*WHOLE, USAGE))) as server:
    [completion] = stream(server, tmp_path, idle_s=0.3)
    assert completion.text == "think</think>proof" and len(server.requests) == 2
  [row] = [json.loads(line) for line in (tmp_path / "broken.jsonl").read_text().splitlines()]
  assert (row["reasoning"], row["content"]) == ("think", "pro") and row["messages"] == ASK
  with serve(lambda i, r: (200, broken)) as server:
    with pytest.raises(ChatError, match=why):
      stream(server, tmp_path, idle_s=0.3)


def test_where_streams_are_refused_replies_come_whole(events, tmp_path):
  """A 400 about `stream`, and a server that ignores it, both end in the plain reply."""
  refused = error(400, "stream_options is not supported")
  whole = said("proof", reasoning="think")
  with serve(lambda i, r: refused if "stream" in r["body"] else whole) as server:
    assert stream(server, tmp_path)[0].text == "think</think>proof"
    assert ["stream" in r["body"] for r in server.requests] == [True, False]
  with serve(lambda i, r: whole) as server:
    assert stream(server, tmp_path)[0].text == "think</think>proof"
  with serve(lambda i, r: error(400, "max_tokens is too large")) as server:
    with pytest.raises(ChatError, match="max_tokens is too large"):
      stream(server, tmp_path)
    assert len(server.requests) == 1


def test_the_responses_api_is_not_streamed(tmp_path):
  with pytest.raises(ValueError, match="cannot be streamed"):
    StreamingChat(
      Endpoint("http://h/v1", "m", api="responses"), idle_s=1, broken=tmp_path / "x",
      concurrency=1, timeout=1, deadline=1, attempts=1,
    )  # fmt: skip


# --- what replies say


def test_verdicts_are_read_fenced_or_plain():
  text = json.dumps(VERDICT | {"more": 1})
  assert quality.parse(text) == VERDICT == quality.parse(f"I think so.\n```json\n{text}\n```\n")


@pytest.mark.parametrize(
  "reply",
  [
    "",
    "yes",
    "[]",
    json.dumps(VERDICT | {"gaps": "no"}),
    json.dumps(VERDICT | {"gaps": 0}),
    json.dumps(VERDICT | {"difficulty": 11}),
    json.dumps(VERDICT | {"difficulty": True}),
    json.dumps(VERDICT | {"difficulty": 5.5}),
    json.dumps({"difficulty": 5}),
    f"```json\n{json.dumps(VERDICT)}\n```\n```json\n{json.dumps(VERDICT)}\n```",
  ],
)
def test_unclear_verdicts_are_refused(reply):
  with pytest.raises(ValueError) as told:
    quality.parse(reply)
  assert "\n" not in str(told.value)


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_reply_is_a_verdict_or_refused(reply):
  for parse in (quality.parse, rubrics.scheme_of):
    with pytest.raises(ValueError):
      parse(reply)


def test_schemes_are_taken_out_of_what_stands_around_them():
  assert rubrics.scheme_of(f"Here it is:\n\n```markdown\n{SCHEME}\n```") == SCHEME
  with pytest.raises(ValueError, match="add up to 6 points"):
    rubrics.scheme_of(SCHEME.replace("[3 points]", "[2 points]"))


# --- estimates


def test_pass_at_j_is_the_share_over_all_subsets():
  """Unbiased: what is left of n attempts when every subset of j is tried."""
  scores = [7, 0, 6, 3, 0, 7]
  for j in range(1, 7):
    subsets = list(itertools.combinations(scores, j))
    share = sum(max(s) >= 6 for s in subsets) / len(subsets)
    assert math.isclose(difficulty.pass_at(6, 3, j), share)
  assert difficulty.pass_at(6, 3, 7) is None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=128))
def test_estimates_are_those_of_the_published_columns(scores):
  found = difficulty.estimates(scores)
  assert found["num_rewards"] == len(scores) and found["scores"] == scores
  assert math.isclose(found["reward_mean"], sum(scores) / 7 / len(scores))
  assert (found["reward_std"] is None) == (len(scores) == 1)
  assert math.isclose(found["pass@1"], sum(s >= 6 for s in scores) / len(scores))


def test_the_mean_is_unbiased():
  """Over all samples of three from a known policy, means average to its reward, variances to its
  variance."""
  law = [0, 0, 7, 3]
  found = [difficulty.estimates(list(draw)) for draw in itertools.product(law, repeat=3)]
  mean = sum(law) / 4 / 7
  assert math.isclose(sum(f["reward_mean"] for f in found) / len(found), mean)
  variance = sum((x / 7 - mean) ** 2 for x in law) / 4
  assert math.isclose(sum(f["reward_std"] ** 2 for f in found) / len(found), variance)


def test_a_cut_reply_has_no_answer():
  assert answer_of(Completion("t</think> a ", finish_reason="stop")) == "a"
  assert answer_of(Completion("plain", finish_reason="stop")) == "plain"
  assert answer_of(Completion("t</think>a", finish_reason="length")) == ""
