"""Endpoint replies: read strictly, whatever the bytes, and kept through kills and full disks."""

import asyncio
import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qed_jax import replies


@pytest.mark.parametrize(
  "items", [[3, None, {}], [{"content": 5}], [{"content": [4, {"type": [], "text": "x"}]}]]
)
def test_odd_items_of_a_response_are_passed_over(items):
  body = json.dumps({"output": items, "status": "completed"}).encode()
  assert replies.read(body, "responses", 0).content == ""


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_read_or_malformed(body):
  for api in ("chat", "responses"):
    with pytest.raises(replies.Malformed):
      replies.read(body, api, 0)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(
        "choices message content output status type text usage finish_reason summary".split()
      ),
      inner,
      max_size=4,
    )
  ),
)


@given(JSON)
def test_any_json_is_a_reply_or_malformed(payload):
  for api in ("chat", "responses"):
    try:
      reply = replies.read(json.dumps(payload).encode(), api, 0)
    except replies.Malformed:
      continue
    assert isinstance(reply.content, str) and reply.finish_reason in ("stop", "length")


REPLY = replies.Reply("r", "a\n\u2028é\ud800", "stop", 1, 2)


@pytest.mark.parametrize("cut_at", [1, 20, 76, 79, 100, -3, -1])
def test_torn_last_line_loses_only_itself(tmp_path, cut_at):
  path = str(tmp_path / "c")
  cache = replies.ReplyCache(path)
  cache.add("a" * 64, REPLY)
  size = os.path.getsize(path)
  cache.add("b" * 64, REPLY)
  cache.close()
  with open(path, "r+b") as file:
    file.truncate(size + cut_at if cut_at > 0 else 2 * size + cut_at)
  cache = replies.ReplyCache(path)
  assert cache.get("a" * 64) == REPLY
  torn = cache.get("b" * 64)
  assert torn is None or cut_at == -1  # all of the record, without its newline
  cache.add("c" * 64, REPLY)
  cache.add("b" * 64, REPLY)
  cache.close()
  again = replies.ReplyCache(path)
  assert [again.get(key * 64) for key in "abcd"] == [REPLY] * 3 + [None]
  again.close()


def test_cache_passes_over_foreign_lines(tmp_path):
  path = tmp_path / "c"
  key = "a" * 64
  lines = [b"\xff\xfe", b"", b"{}", b'{"key": 3}', b'{"key": "%s", "reply": 3}' % key.encode()]
  path.write_bytes(b"\n".join(lines))
  cache = replies.ReplyCache(str(path))
  assert cache.get(key) is None
  cache.add(key, REPLY)
  assert cache.get(key) == REPLY
  cache.close()


def test_two_writers_of_one_file_do_not_tear_each_other(tmp_path):
  one, two = (replies.ReplyCache(str(tmp_path / "c")) for _ in range(2))
  for number in range(20):
    (one if number % 2 else two).add(f"{number:064x}", REPLY)
  assert one.get(f"{19:064x}") == two.get(f"{18:064x}") == REPLY
  both = replies.ReplyCache(str(tmp_path / "c"))
  assert all(both.get(f"{number:064x}") == REPLY for number in range(20))
  for cache in (one, two, both):
    cache.close()


def test_full_disk_is_an_error_and_the_next_line_is_whole(tmp_path, monkeypatch):
  cache = replies.ReplyCache(str(tmp_path / "c"))
  write = os.write
  with monkeypatch.context() as patch:
    patch.setattr(os, "write", lambda file, data: write(file, data[:30]))
    with pytest.raises(OSError, match="disk"):
      cache.add("a" * 64, REPLY)
  assert cache.get("a" * 64) is None
  cache.add("b" * 64, REPLY)
  cache.close()
  again = replies.ReplyCache(str(tmp_path / "c"))
  assert again.get("a" * 64) is None and again.get("b" * 64) == REPLY
  again.close()


def test_a_reply_is_on_disk_when_it_is_handed_on_and_many_share_a_sync(tmp_path, monkeypatch):
  """What `keep` returns from has been synced; 200 at once take a few syncs, not 200."""
  synced, sync = [], os.fsync

  def slow_sync(file):
    size = os.fstat(file).st_size
    time.sleep(0.01)
    sync(file)
    synced.append(size)

  async def keep(cache, number):
    await cache.keep(f"{number:064x}", REPLY)
    with open(tmp_path / "c", "rb") as file:
      end = file.read().index(b"%064x" % number)
    assert synced and synced[-1] > end

  async def main(cache):
    await asyncio.gather(*(keep(cache, number) for number in range(200)))
    assert await cache.find(f"{7:064x}") == REPLY and await cache.find("f" * 64) is None

  monkeypatch.setattr(os, "fsync", slow_sync)
  cache = replies.ReplyCache(str(tmp_path / "c"))
  asyncio.run(main(cache))
  assert len(synced) <= 20
  cache.close()
  again = replies.ReplyCache(str(tmp_path / "c"))
  assert all(again.get(f"{number:064x}") == REPLY for number in range(200))
  assert cache.spent_before == (0, 0) and again.spent_before == (200 * 1, 200 * 2)
  again.close()


def test_a_disk_that_refuses_is_everybodys_error_and_the_next_one_is_kept(tmp_path, monkeypatch):
  cache = replies.ReplyCache(str(tmp_path / "c"))

  def full(file, data):
    raise OSError("no space left")

  async def main():
    with monkeypatch.context() as patch:
      patch.setattr(os, "write", full)
      keeping = [cache.keep(f"{number:064x}", REPLY) for number in range(5)]
      found = await asyncio.gather(*keeping, return_exceptions=True)
    assert all(isinstance(error, OSError) for error in found)
    await cache.keep("b" * 64, REPLY)

  asyncio.run(main())
  cache.close()
  again = replies.ReplyCache(str(tmp_path / "c"))
  assert again.get("b" * 64) == REPLY and again.get(f"{0:064x}") is None
  again.close()


@pytest.mark.parametrize(
  "body, said",
  [
    (b'{"error": {"message": "no", "code": "spent"}}', ("no", "spent")),
    (b'{"error": "no"}', ("no", "")),
    (b'{"detail": [1]}', ("[1]", "")),
    (b'{"message": null}', ("", "")),
    (b"<html>" + b"x" * 999, ("<html>" + "x" * 194, "")),
    (b"[3]", ("[3]", "")),
    (b"\xff", ("\ufffd", "")),
  ],
)
def test_what_an_error_says(body, said):
  assert replies.error(body) == said
