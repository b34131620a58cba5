"""Tokenizers: prompts and examples agree, and text never turns into control tokens."""

import concurrent.futures
import json
import pathlib
import re
import unicodedata

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qed_jax.data import tokenizer as tokenizer_lib

BPE_TEXT = [
  "Let n be a positive integer. Prove that n^2 + n is even.",
  "Proof. Since n(n + 1) is a product of two consecutive integers, it is even.\n\nQED",
  "system user assistant think reasoning about primes, sums and squares\n",
]
MESSAGES = [{"role": "user", "content": "Prove that n is even."}]
ANSWER = {"role": "assistant", "content": "<think>\nn is a sum\n</think>\n\nProof. n is even."}


def chatml_template(generation: str) -> str:
  return (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{{- m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content }}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n" + generation + "' }}{%- endif %}"
  )


def write_bpe_folder(
  folder: pathlib.Path, generation: str = "<think>\\n", eos: str = "<|im_end|>"
) -> pathlib.Path:
  """A Qwen2-style byte-level BPE folder with a ChatML template, as Qwen3 folders have."""
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
  bpe.normalizer = tokenizers.normalizers.NFC()
  bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400, initial_alphabet=alphabet, show_progress=False
  )
  bpe.train_from_iterator(BPE_TEXT, trainer)
  bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
  think = [tokenizers.AddedToken(t, normalized=False, special=False) for t in _THINK]
  bpe.add_tokens(think)
  folder.mkdir(parents=True, exist_ok=True)
  bpe.save(str(folder / "tokenizer.json"))
  config = {
    "tokenizer_class": "Qwen2Tokenizer",
    "eos_token": eos,
    "pad_token": "<|endoftext|>",
    "model_max_length": 262144,
    "clean_up_tokenization_spaces": False,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  (folder / "chat_template.jinja").write_text(chatml_template(generation))
  return folder


_THINK = ("<think>", "</think>")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return tokenizer_lib.load(write_bpe_folder(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  lines = [
    " ".join(f"{a} +{b} = {(a + b) % 10} ;" for a in range(10) for b in range(10)),
    "proof :",
  ]
  return tokenizer_lib.train_sentencepiece(
    lines, tmp_path_factory.mktemp("words"), vocab_size=64, vocab_multiple=48
  )


@pytest.fixture(params=["bpe", "words"])
def any_tokenizer(request):
  return request.getfixturevalue(request.param)


def special(tokenizer, text: str) -> int:
  """The id of a control token."""
  if isinstance(tokenizer, tokenizer_lib.SentencePieceTokenizer):
    return tokenizer._marker_ids[text]
  return tokenizer._tokenizer.get_added_vocab()[text]


@settings(deadline=None)
@given(st.lists(st.sampled_from("0 1 9 +3 = ; proof : <think> </think>".split()), max_size=12))
def test_words_round_trip(words, text):
  """Domain text, think tags included, survives encode and decode, one id a word."""
  ids = words.encode(" ".join(text))
  assert len(ids) == len(text)
  assert words.decode(ids) == " ".join(text)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Co", "Cn"]), max_size=40))
def test_bpe_round_trip(bpe, text):
  """Byte-level BPE gives any NFC text back, whatever markers it holds."""
  text = unicodedata.normalize("NFC", text)
  for marker in ("", "<|im_end|>", "</think>"):
    assert bpe.decode(bpe.encode(text + marker + text)) == text + marker + text


def test_training_is_reproducible(words, tmp_path):
  """The same lines give the same bytes, and the vocabulary is padded to the multiple."""
  lines = ["b a a", "c b a <think> a"]
  first, second = (
    tokenizer_lib.train_sentencepiece(lines, tmp_path / n, vocab_size=40, vocab_multiple=16)
    for n in "ab"
  )
  for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
  assert first.vocab_size == second.vocab_size == 16
  assert words.vocab_size == 48


def test_words_that_do_not_fit_are_an_error(tmp_path):
  """A word is never dropped in silence."""
  with pytest.raises(ValueError, match="vocab_size=10 is too small for 4 words.*at least 12"):
    tokenizer_lib.train_sentencepiece(["a b c d"], tmp_path, vocab_size=10, vocab_multiple=1)
  with pytest.raises(ValueError, match="no words"):
    tokenizer_lib.train_sentencepiece(["", "<think>"], tmp_path, vocab_size=10, vocab_multiple=1)


def test_unknown_and_padding_ids(words, bpe):
  """Unknown words read <unk>; ids of embedding rows without a piece decode to nothing."""
  assert words.decode(words.encode("0 zebra yak 1")) == "0 <unk> <unk> 1"
  assert words.decode([*words.encode("0"), words.vocab_size - 1, words.pad_id]) == "0"
  assert bpe.decode([*bpe.encode("even"), bpe.vocab_size + 7]) == "even"


@pytest.mark.parametrize("role", ["user", "system"])
def test_text_never_becomes_control_tokens(any_tokenizer, role):
  """A marker inside a message is plain text: the prompt's control ids are those of the template."""
  markers = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"]
  markers += ["<think>", "</think>", "<pad>", "<<think>>", "<|im_<|im_end|>end|>"]
  control = {i for i in range(any_tokenizer.vocab_size) if is_control(any_tokenizer, i)}
  plain = any_tokenizer.chat([{"role": role, "content": "0"}])
  for text in [*markers, " ".join(markers), "".join(markers), "0\n" + "\n".join(markers)]:
    ids = any_tokenizer.chat([{"role": role, "content": text}])
    assert [i for i in ids if i in control] == [i for i in plain if i in control], text
    roles = [m for m in markers if "think" not in m]
    if text in roles:
      assert not control.intersection(any_tokenizer.encode(text)), text


def is_control(tokenizer, i: int) -> bool:
  if isinstance(tokenizer, tokenizer_lib.SentencePieceTokenizer):
    return i in {*tokenizer._marker_ids.values(), tokenizer.pad_id}
  return i in tokenizer._tokenizer.added_tokens_decoder


def test_marker_in_bpe_message_keeps_its_text(bpe):
  """Escaping a marker changes its ids only: the prompt still reads the same."""
  text = "what does <|im_end|> mean, and <think>?"
  ids = bpe.chat([{"role": "user", "content": text}])
  assert bpe._tokenizer.decode(ids) == (
    f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n"
  )


@pytest.mark.parametrize("generation", ["<think>\\n", ""])
def test_bpe_prompt_is_the_template(tmp_path, generation):
  """Prompts are what transformers renders, with the think block opened, or closed and empty."""
  bpe = tokenizer_lib.load(write_bpe_folder(tmp_path, generation))
  head = "<|im_start|>user\nProve that n is even.<|im_end|>\n<|im_start|>assistant\n"
  for thinking, tail in [(True, "<think>\n"), (False, "<think>\n\n</think>\n\n")]:
    ids = bpe.chat(MESSAGES, thinking=thinking)
    assert ids == bpe._tokenizer(head + tail)["input_ids"]
    assert ids.count(special(bpe, "<think>")) == 1
    assert ids.count(special(bpe, "</think>")) == (not thinking)


def test_earlier_reasoning_is_left_out(any_tokenizer):
  """An earlier assistant turn keeps its proof and loses its reasoning."""
  history = [*MESSAGES, {"role": "assistant", "content": "<think>0 0 0</think>1"}, MESSAGES[0]]
  ids = any_tokenizer.chat(history)
  assert "1" in any_tokenizer.decode(ids) and "0" not in any_tokenizer.decode(ids)
  assert special(any_tokenizer, "</think>") not in ids


def test_example_is_prompt_and_completion(any_tokenizer):
  """Targets are the completion and the stop token, behind the very prompt of sampling."""
  tokens, is_target = any_tokenizer.example([*MESSAGES, ANSWER])
  prompt = any_tokenizer.chat(MESSAGES)
  assert tokens.dtype == np.int32 and is_target.dtype == np.bool_
  assert tokens[: len(prompt)].tolist() == prompt and not is_target[: len(prompt)].any()
  assert is_target[len(prompt) :].all() and tokens[-1] == any_tokenizer.stop_ids[0]
  assert tokens.tolist().count(special(any_tokenizer, "<think>")) == 1
  assert special(any_tokenizer, "</think>") in tokens[len(prompt) :]
  completion = any_tokenizer.decode(tokens[is_target])
  assert completion == any_tokenizer.decode(
    any_tokenizer.encode("n is a sum\n</think>\n\nProof. n is even.")
  )


def test_example_without_reasoning_follows_the_closed_think_block(any_tokenizer):
  """Plain content, such as a summary, is trained behind the prompt that asks for plain text."""
  tokens, is_target = any_tokenizer.example([*MESSAGES, {"role": "assistant", "content": "0"}])
  prompt = any_tokenizer.chat(MESSAGES, thinking=False)
  assert tokens[~is_target].tolist() == prompt
  assert tokens[is_target].tolist() == [*any_tokenizer.encode("0"), any_tokenizer.stop_ids[0]]


def test_threads_may_share_a_tokenizer(any_tokenizer):
  """Examples made in threads at once are those made one by one."""
  some = [[{"role": "user", "content": f"{i} even <|im_end|>" * i}, ANSWER] for i in range(40)]
  expected = [any_tokenizer.example(messages)[0].tolist() for messages in some]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    got = [tokens.tolist() for tokens, _ in pool.map(any_tokenizer.example, some * 3)]
  assert got == expected * 3


def test_bad_messages_are_errors(any_tokenizer):
  """Wrong roles and types are named."""
  with pytest.raises(ValueError, match="role 'user'; training needs 'assistant'"):
    any_tokenizer.example(MESSAGES)
  for bad in ([], [{"role": "tool", "content": "x"}], [{"role": "user", "content": None}]):
    with pytest.raises(ValueError, match="message"):
      any_tokenizer.chat(bad)


def test_saved_folder_loads_again(any_tokenizer, tmp_path):
  """save and load keep class, ids and prompts, also beside the files of a model."""
  (tmp_path / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 64}')
  any_tokenizer.save(tmp_path)
  again = tokenizer_lib.load(tmp_path)
  assert type(again) is type(any_tokenizer)
  for name in ("vocab_size", "pad_id", "stop_ids"):
    assert getattr(again, name) == getattr(any_tokenizer, name)
  assert again.chat([*MESSAGES, ANSWER, *MESSAGES]) == any_tokenizer.chat(
    [*MESSAGES, ANSWER, *MESSAGES]
  )
  again.save(tmp_path)
  assert (tmp_path / "config.json").is_file()


def test_tiny_export_opens_in_transformers(words, tmp_path):
  """AutoTokenizer on a saved word folder gives the same prompts, words and stop token."""
  words.save(tmp_path)
  auto = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
  messages = [{"role": "user", "content": "0 +3 ="}, ANSWER, {"role": "user", "content": "zebra 1"}]
  ids = auto.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
  assert ids == words.chat(messages)
  assert auto("3 </think> proof :")["input_ids"] == words.encode("3 </think> proof :")
  assert auto.eos_token_id == words.stop_ids[0] and auto.pad_token_id == words.pad_id


def test_stop_ids(tmp_path, bpe):
  """Chat and base folders both stop at the end of a turn first, and at the end of text."""
  base = tokenizer_lib.load(write_bpe_folder(tmp_path, eos="<|endoftext|>"))
  ids = tuple(special(bpe, t) for t in ("<|im_end|>", "<|endoftext|>"))
  assert bpe.stop_ids == base.stop_ids == ids
  assert bpe.pad_id == ids[1]
  assert bpe.decode([*bpe.encode("even</think>odd"), ids[0]]) == "even</think>odd"


def test_load_errors_are_one_line(tmp_path):
  """A missing folder, an empty folder and an unpinned hub id say what to do."""
  (tmp_path / "empty").mkdir()
  cases = [
    (tmp_path / "nowhere", FileNotFoundError, "does not exist"),
    (tmp_path / "empty", FileNotFoundError, "tokenizer_config.json"),
    ("someone/some-model", ValueError, "needs a revision"),
  ]
  for path, kind, message in cases:
    with pytest.raises(kind, match=re.escape(message)) as error:
      tokenizer_lib.load(path)
    assert "\n" not in str(error.value)


def test_folder_code_is_not_run(tmp_path):
  """A folder that asks for its own tokenizer class is refused in one line."""
  write_bpe_folder(tmp_path)
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
  with pytest.raises(ValueError, match="without code of its own") as error:
    tokenizer_lib.load(tmp_path)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "ran").exists()
