"""The journal: what was paid is answered from disk, to the letter, through kills and crowds."""

import asyncio
import os

import pytest

from qed_jax.chat import ChatError
from qed_jax.journal import Journal
from qed_jax.records import Completion, Usage

MESSAGES = [{"role": "user", "content": "q\ud800 \u2028"}]
HOW = {"max_tokens": 5, "temperature": 0.5}


class Counting:
  """Says who asked for what, and counts."""

  def __init__(self, error=None):
    self.asked, self.error = 0, error

  async def __call__(self, messages, *, seed, n, **how):
    self.asked += 1
    await asyncio.sleep(0)
    if self.error:
      raise self.error
    tell = f"{messages[-1]['content']} {seed} {sorted(how.items())}"
    usage = Usage(7, 11, 1.5, 1)
    return [Completion(text=f"{tell} {i}</think>\n", usage=usage) for i in range(n)]


def texts(completions) -> list[str]:
  return [completion.text for completion in completions]


def ask(journal, *seeds, messages=MESSAGES, **how):
  async def main():
    return await asyncio.gather(*(journal(messages, seed=s, **HOW | how) for s in seeds))

  return asyncio.run(main())


def test_what_was_paid_is_never_asked_for_again(tmp_path):
  """Text and usage come back as they were; only that nothing was paid tells them apart."""
  chat = Counting()
  journal = Journal(chat, str(tmp_path / "j"), "m")
  [first] = ask(journal, 1, n=2)
  asyncio.run(journal.close())
  again = Journal(chat, str(tmp_path / "j"), "m")
  [second] = ask(again, 1, n=2)
  assert chat.asked == journal.paid == 1 and again.paid == 0
  assert texts(first) == texts(second) and len(set(texts(first))) == 2
  assert first[0].usage == Usage(7, 11, 1.5, 1) and second[0].usage == Usage(7, 11, 1.5, 0)
  assert first[0].finish_reason == second[0].finish_reason == "stop"
  asyncio.run(again.close())


def test_two_who_ask_the_same_at_once_pay_once(tmp_path):
  chat = Counting()
  answers = ask(Journal(chat, str(tmp_path / "j"), "m"), 1, 1, 2, 1)
  assert chat.asked == 2
  assert texts(answers[0]) == texts(answers[1]) == texts(answers[3]) != texts(answers[2])


@pytest.mark.parametrize(
  "change",
  [
    {"max_tokens": 6},
    {"temperature": 0.6},
    {"top_p": 0.9},
    {"thinking": False},
    {"messages": [*MESSAGES, MESSAGES[0]]},
    {"messages": [{"role": "system", "content": MESSAGES[0]["content"]}]},
  ],
)
def test_another_question_is_another_answer(tmp_path, change):
  chat = Counting()
  journal = Journal(chat, str(tmp_path / "j"), "m")
  ask(journal, 1)
  ask(journal, 1, **change)
  assert chat.asked == 2


def test_one_file_may_hold_several_models(tmp_path):
  one, other = Counting(), Counting()
  for chat, model in ((one, "a"), (other, "b"), (one, "a")):
    ask(Journal(chat, str(tmp_path / "j"), model), 1)
  assert (one.asked, other.asked) == (1, 1)


def test_more_samples_than_there_are_asks_for_all(tmp_path):
  """The chat's n samples are one request, so that an engine's attempts keep their numbers."""
  chat = Counting()
  journal = Journal(chat, str(tmp_path / "j"), "m")
  [few], [more], [one] = ask(journal, 1, n=1), ask(journal, 1, n=3), ask(journal, 1, n=2)
  assert chat.asked == 2 and texts(more)[:1] == texts(few) and texts(one) == texts(more)[:2]


def test_a_failure_is_not_kept(tmp_path):
  path = str(tmp_path / "j")
  with pytest.raises(ChatError, match="down"):
    ask(Journal(Counting(ChatError("down")), path, "m"), 1)
  assert os.path.getsize(path) == 0
  chat = Counting()
  ask(Journal(chat, path, "m"), 1)
  assert chat.asked == 1


@pytest.mark.parametrize("cut", [2, 30, 80, 200])
def test_a_line_torn_by_a_kill_is_asked_for_again(tmp_path, cut):
  path = str(tmp_path / "j")
  ask(Journal(Counting(), path, "m"), 1, 2)
  whole = os.path.getsize(path)
  with open(path, "r+b") as file:
    file.truncate(whole - cut)
  chat = Counting()
  answers = ask(Journal(chat, path, "m"), 1, 2)
  assert chat.asked == 1 and len(answers) == 2
  ask(Journal(chat, path, "m"), 1, 2)
  assert chat.asked == 1


def test_who_gives_up_waiting_for_the_disk_does_not_lose_the_answer(tmp_path, monkeypatch):
  """It has been paid: the write goes on."""
  path = str(tmp_path / "j")
  chat, fsync = Counting(), os.fsync
  writing = asyncio.Event()

  async def main():
    loop = asyncio.get_running_loop()

    def slow(file):
      loop.call_soon_threadsafe(writing.set)
      fsync(file)

    monkeypatch.setattr(os, "fsync", slow)
    task = asyncio.create_task(Journal(chat, path, "m")(MESSAGES, seed=1, **HOW))
    await writing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task

  asyncio.run(main())
  ask(Journal(chat, path, "m"), 1)
  assert chat.asked == 1


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
  """To go on would be to pay for what is then lost."""
  monkeypatch.setattr(os, "write", lambda *_: 0)
  with pytest.raises(OSError, match="disk full"):
    ask(Journal(Counting(), str(tmp_path / "j"), "m"), 1)
