"""Tokens become the text that the tokenizer's decode gives, however they come, and stop in time."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_tokenizer import write_bpe_folder

from qed_jax.data import tokenizer as tokenizer_lib
from qed_jax.rollout.requests import Piece
from qed_jax.serving.answers import total
from qed_jax.serving.choice import Choice
from qed_jax.serving.text import Detokenizer, Reasoning, StopStrings
from qed_jax.serving.vocabulary import Vocabulary

STOPS = ("ab", "aab", "b\n", "\u20ac", "x</th")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return tokenizer_lib.load(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  lines = ["a b c : = +1 proof"]
  return tokenizer_lib.train_sentencepiece(
    lines, tmp_path_factory.mktemp("words"), vocab_size=64, vocab_multiple=16
  )


@pytest.fixture(scope="module", params=["bpe", "words"])
def tokenizer(request):
  return request.getfixturevalue(request.param)


def cut(items, sizes):
  """items in pieces of the given sizes, over and over."""
  pieces, i = [], 0
  while i < len(items):
    size = sizes[len(pieces) % len(sizes)]
    pieces.append(items[i : i + size])
    i += size
  return pieces


def pieces_of(tokens, sizes, k=2):
  """Pieces whose log-probabilities are those of the tokens' places."""
  places = cut(list(range(len(tokens))), sizes)
  return [
    Piece(
      np.asarray([tokens[i] for i in part], np.int32),
      -np.asarray(part, np.float32),
      np.zeros(len(part), np.int32),
      np.asarray([[(tokens[i] + j) % 60 for j in range(k)] for i in part], np.int32),
      -np.asarray([[i + j for j in range(k)] for i in part], np.float32),
    )
    for part in places
  ]


def ids(size):
  """Token ids; most draws have some of the characters of several bytes and of the markers."""
  return st.lists(st.integers(0, size - 1), max_size=60)


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_the_text_is_that_of_the_tokenizer(tokenizer, data):
  """Any ids at all, those of control tokens, of no token and of parts of characters included."""
  tokens = data.draw(ids(tokenizer.vocab_size + 3))
  detokenizer = Detokenizer(Vocabulary(tokenizer))
  parts = [detokenizer.push(token) for token in tokens]
  assert "".join(parts) + detokenizer.end() == tokenizer.decode(tokens)


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=80))
@example(data="\u20ac\U0001f600\u20ac".encode())
@example(data=b"\xe2\x82" * 20 + b"\xac")
@example(data=b"\xff" * 50 + "\U0001f600".encode())
@example(data=b"\xf0\x9f\x98" + b"\x98" * 40)
def test_bytes_make_the_characters_that_they_are(bpe, data):
  """A byte a token: unfinished characters wait for their end, and wrong bytes do not wait on."""
  vocabulary = Vocabulary(bpe)
  by_byte = {vocabulary.bytes(i): i for i in range(256)}
  assert len(by_byte) == 256
  detokenizer = Detokenizer(vocabulary)
  parts = [detokenizer.push(by_byte[data[i : i + 1]]) for i in range(len(data))]
  assert "".join(parts) + detokenizer.end() == data.decode("utf-8", "replace")
  for i in range(len(parts)):  # all is out but a character that may be unfinished
    so_far, out = data[: i + 1].decode("utf-8", "replace"), "".join(parts[: i + 1])
    assert out in (so_far, so_far[:-1])


def test_no_number_of_wrong_bytes_spoils_the_character_after_them(bpe):
  """The window over the last tokens is cut now and then, also in the middle of a character."""
  vocabulary = Vocabulary(bpe)
  by_byte = {vocabulary.bytes(i): i for i in range(256)}
  for count in range(60):
    for wrong in (b"\xff", b"\x98", b"\xe2"):
      data = wrong * count + "\U0001f600\u20ac".encode()
      detokenizer = Detokenizer(vocabulary)
      text = "".join(detokenizer.push(by_byte[bytes([b])]) for b in data) + detokenizer.end()
      assert text == data.decode("utf-8", "replace")


def test_a_character_comes_with_its_last_byte(bpe):
  vocabulary = Vocabulary(bpe)
  by_byte = {vocabulary.bytes(i): i for i in range(256)}
  detokenizer = Detokenizer(vocabulary)
  data = "a\U0001f600\u20ac".encode()
  parts = [detokenizer.push(by_byte[bytes([b])]) for b in data]
  assert parts == ["a", "", "", "", "\U0001f600", "", "", "\u20ac"] and detokenizer.end() == ""


@settings(deadline=None)
@given(ids(400))
def test_bytes_of_tokens_make_the_text(bpe, tokens):
  """The bytes that log-probabilities show, put together, are the text."""
  vocabulary = Vocabulary(bpe)
  data = b"".join(vocabulary.bytes(token) for token in tokens)
  assert data.decode("utf-8", "replace") == bpe.decode(tokens)


def test_control_tokens_have_a_name_and_no_text(tokenizer):
  vocabulary = Vocabulary(tokenizer)
  for stop in tokenizer.stop_ids:
    assert vocabulary.text(stop) == "" == vocabulary.bytes(stop).decode()
    assert vocabulary.name(stop).startswith("<|")
  assert vocabulary.name(10**6) == ""


def first_stop(text, stops):
  """The reference: (text before the stop string that is complete first, whether there is one)."""
  for end in range(len(text) + 1):
    ended = [stop for stop in stops if text[:end].endswith(stop)]
    if ended:
      return text[: end - max(map(len, ended))], True
  return text, False


@settings(deadline=None, max_examples=300)
@given(
  st.text(alphabet="ab\nx</thi\u20ac", max_size=40),
  st.lists(st.sampled_from(STOPS), max_size=4),
  SIZES,
)
def test_stop_strings_end_the_text_however_it_is_cut(text, stops, sizes):
  wanted, found = first_stop(text, stops)
  finder = StopStrings(stops)
  out = ""
  for part in cut(text, sizes):
    out += finder.push(part)
    assert wanted.startswith(out)
  assert (out + finder.end(), finder.found) == (wanted, found)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(["a", "<", "</think>", "</thi", "nk>", "/"]), max_size=12), SIZES)
def test_reasoning_ends_at_the_first_delimiter_however_it_is_cut(parts, sizes):
  text = "".join(parts)
  reasoning, _, answer = text.partition("</think>")
  for inside, wanted in [(True, (reasoning, answer)), (False, ("", text))]:
    split = Reasoning(inside)
    out = [split.push(part) for part in cut(text, sizes)]
    out.append((split.end(), ""))
    assert tuple("".join(x) for x in zip(*out, strict=True)) == wanted


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_choice_is_the_same_however_its_tokens_come(tokenizer, data):
  """Text, reasoning, reason, counts and log-probabilities, with stop strings and stop tokens."""
  tokens = data.draw(ids(tokenizer.vocab_size))
  stops = data.draw(st.lists(st.sampled_from((*STOPS, "e", " ", "\ufffd")), max_size=3))
  thinking = data.draw(st.booleans())
  stop_ids = {*tokenizer.stop_ids, *data.draw(st.sets(st.integers(0, 399), max_size=2))}
  seen = []
  for sizes in ([1], data.draw(SIZES), [max(1, len(tokens))]):
    choice = Choice(
      Vocabulary(tokenizer), stop_ids=stop_ids, stops=stops, thinking=thinking, alternatives=2
    )
    deltas = [choice.take(piece) for piece in pieces_of(tokens, sizes)]
    whole = total([*deltas, choice.end("length")])
    counts = (choice.finish_reason, choice.tokens, choice.reasoning_tokens, choice.thought_ended)
    seen.append((whole, counts))
  assert seen[0] == seen[1] == seen[2]
  whole, (reason, count, *_) = seen[0]
  place = next((i for i, t in enumerate(tokens) if t in stop_ids), len(tokens))
  text, found = first_stop(tokenizer.decode(tokens[:place]), stops)
  assert text in (f"{whole.reasoning}</think>{whole.text}", whole.reasoning + whole.text)
  assert reason == ("stop" if found or place < len(tokens) else "length")
  assert count <= min(len(tokens), place + 1)
  assert [x.token for x in whole.logprobs] == tokens[: len(whole.logprobs)]
  if not found:
    assert (count, len(whole.logprobs)) == (min(len(tokens), place + 1), place)
  starts = [x.start for x in whole.logprobs]
  assert starts == sorted(starts) and all(start <= len(text) for start in starts)


@pytest.mark.parametrize("sizes", [[1], [2]])
def test_a_stop_string_may_be_an_unfinished_character(bpe, sizes):
  """Its log-probability is not out before it is known not to be text."""
  vocabulary = Vocabulary(bpe)
  broken = next(i for i in range(256) if vocabulary.bytes(i) == b"\xf0")
  choice = Choice(vocabulary, stop_ids=(), stops=["\ufffd"], thinking=False, alternatives=0)
  tokens = [broken, *bpe.encode("a")]
  whole = total([*(choice.take(p) for p in pieces_of(tokens, sizes)), choice.end("length")])
  assert (whole.text, whole.logprobs, choice.finish_reason) == ("", (), "stop")


def test_log_probabilities_come_with_their_text(bpe):
  """None is out before its text is certain, none is missing at the end."""
  tokens = bpe.encode("so it is</think>the proof ends here")
  choice = Choice(
    Vocabulary(bpe), stop_ids=bpe.stop_ids, stops=["ends!"], thinking=True, alternatives=0
  )
  text, count = "", 0
  for piece in pieces_of(tokens, [1]):
    delta = choice.take(piece)
    text += delta.reasoning + delta.text
    count += len(delta.logprobs)
    assert len(bpe.decode(tokens[:count]).replace("</think>", "")) <= len(text)
  assert count + len(choice.end("length").logprobs) == len(tokens)
