"""Text to token ids and back, for Qwen3 folders and for the tiny world, behind one interface.

Text convention of both: a thinking prompt already opens the think block, so that a completion is
"reasoning</think>proof"; a prompt with thinking=False ends with a closed, empty think block, so
that the completion is plain text. Control tokens come from the code here only: a chat marker
inside a message is encoded as the characters it is made of, so that text cannot open a turn or
close a think block.
"""

import abc
import io
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece

from qed_jax.data import hub

Message = dict[str, str]

THINK = "<think>"
END_THINK = "</think>"
HUGGING_FACE_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "chat_template.jinja",
  "vocab.json",
  "merges.txt",
  "added_tokens.json",
  "special_tokens_map.json",
  "tokenizer.model",
)
ROLES = ("system", "user", "assistant")
END = "<|end|>"
SENTENCEPIECE_MARKERS = (*(f"<|{role}|>" for role in ROLES), END, THINK, END_THINK)
# What AutoTokenizer users of a tiny export get; chat() below builds the same ids by hand.
SENTENCEPIECE_TEMPLATE = (
  "{% for message in messages %}<|{{ message.role }}|> "
  "{{ message.content.split('</think>')[-1] if message.role == 'assistant' else message.content }} "
  "<|end|> {% endfor %}{% if add_generation_prompt %}<|assistant|> <think>{% endif %}"
)


class Tokenizer(abc.ABC):
  """What every tokenizer here offers.

  vocab_size: rows that an embedding needs for these ids. pad_id: the id to fill rows with; masks
  never come from it, since a model may sample it. stop_ids: ids that end a completion, the one
  that training appends first.
  """

  vocab_size: int
  pad_id: int
  stop_ids: tuple[int, ...]

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Ids of text that a model wrote: think tags become control tokens, other markers do not."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids, think tags kept; stop tokens, padding and chat markers are left out."""

  @abc.abstractmethod
  def piece(self, token: int) -> str:
    """A token as the vocabulary's file writes it; "" where there is none of that number."""

  @abc.abstractmethod
  def chat(self, messages: Sequence[Message], thinking: bool = True) -> list[int]:
    """Prompt ids of a conversation, with the generation prompt of the assistant's next turn.

    messages: {"role": "system" | "user" | "assistant", "content": str}. The reasoning of earlier
    assistant turns is left out, as Qwen3's template does. Raises ValueError on anything else.
    """

  @abc.abstractmethod
  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the files that `load` and transformers' AutoTokenizer read."""

  def example(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """A training example: (tokens int32 [n], is_target bool [n]).

    The last message is the assistant's; its tokens and the stop token are the targets. Content
    with a think tag follows a thinking prompt, content without one the closed think block, exactly
    as the two are sampled. Raises ValueError when the last message is not the assistant's.
    """
    _check(messages)
    if messages[-1]["role"] != "assistant":
      raise ValueError(
        f"the last message has role {messages[-1]['role']!r}; training needs 'assistant'"
      )
    content = messages[-1]["content"]
    thinking = content.startswith(THINK) or END_THINK in content
    prompt = self.chat(messages[:-1], thinking=thinking)
    # The generation prompt has these already.
    content = content.removeprefix(THINK).removeprefix("\n") if thinking else content
    completion = [*self.encode(content), self.stop_ids[0]]
    tokens = np.asarray([*prompt, *completion], np.int32)
    return tokens, np.arange(len(tokens)) >= len(prompt)


def load(path_or_hub_id: str | pathlib.Path, revision: str | None = None) -> Tokenizer:
  """Opens a local folder, or a Hugging Face hub id at a revision.

  Raises FileNotFoundError for a folder without tokenizer files, ValueError for a hub id that does
  not open or has no revision. Code in the repository is never run.
  """
  folder = pathlib.Path(path_or_hub_id)
  if not folder.is_dir():
    if not hub.is_hub_id(str(path_or_hub_id)):
      raise FileNotFoundError(f"tokenizer folder {str(path_or_hub_id)!r} does not exist")
    folder = hub.fetch(
      str(path_or_hub_id), kind="model", revision=revision, patterns=HUGGING_FACE_FILES
    )
  config_file = folder / "tokenizer_config.json"
  if not config_file.is_file():
    raise FileNotFoundError(f"{folder} has no tokenizer_config.json; it is not a tokenizer folder")
  config = json.loads(config_file.read_text())
  if config.get("qed_jax_class") == SentencePieceTokenizer.__name__:
    return SentencePieceTokenizer(folder)
  return HuggingFaceTokenizer(folder)


class HuggingFaceTokenizer(Tokenizer):
  """A byte-level BPE folder with a ChatML template, such as Qwen3's, through transformers."""

  def __init__(self, folder: str | pathlib.Path):
    # Three seconds of imports that the tiny world does without.
    import transformers

    self._folder = pathlib.Path(folder)
    try:
      self._tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(self._folder), trust_remote_code=False
      )
    except Exception as error:
      # transformers raises many kinds, of many lines, and advises to run the folder's code.
      reason = str(error).strip().partition("\n")[0]
      raise ValueError(
        f"{self._folder} does not open as a tokenizer ({reason}); give a folder whose "
        "tokenizer.json transformers reads without code of its own"
      ) from error
    if self._tokenizer.chat_template is None:
      raise ValueError(f"{self._folder} has no chat template; add chat_template.jinja")
    added = self._tokenizer.get_added_vocab()
    self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
    # Qwen3's chat models end a turn with <|im_end|> and stop at <|endoftext|> too; the base
    # models name <|endoftext|> as eos although their template closes turns with <|im_end|>.
    end_of_turn = [added[t] for t in ("<|im_end|>",) if t in str(self._tokenizer.chat_template)]
    end_of_text = [added[t] for t in ("<|endoftext|>",) if t in added]
    eos = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
    self.stop_ids = tuple(dict.fromkeys([*end_of_turn, *eos, *end_of_text]))
    if not self.stop_ids:
      raise ValueError(f"{self._folder} names no eos token; set eos_token in tokenizer_config.json")
    pad_id = self._tokenizer.pad_token_id
    self.pad_id = self.stop_ids[-1] if pad_id is None else pad_id
    think = {added[t] for t in (THINK, END_THINK) if t in added}
    self._dropped = {
      i for i, t in self._tokenizer.added_tokens_decoder.items() if t.special and i not in think
    }
    self._markers = frozenset(added)

  def encode(self, text: str) -> list[int]:
    mark = _unused_character([text])
    return self._ids(_break(text, self._markers - {THINK, END_THINK}, mark), mark)

  def decode(self, ids: Iterable[int]) -> str:
    kept = [int(i) for i in ids if int(i) not in self._dropped]
    return self._tokenizer.decode(
      kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )

  def piece(self, token: int) -> str:
    return self._tokenizer.convert_ids_to_tokens(token) or ""

  def chat(self, messages: Sequence[Message], thinking: bool = True) -> list[int]:
    _check(messages)
    mark = _unused_character([m["content"] for m in messages])
    # The template cuts the reasoning off earlier turns by the think tags of the assistant.
    allowed = {"assistant": {THINK, END_THINK}}
    broken = [
      m | {"content": _break(m["content"], self._markers - allowed.get(m["role"], set()), mark)}
      for m in messages
    ]
    text = self._tokenizer.apply_chat_template(broken, tokenize=False, add_generation_prompt=True)
    text = text.removesuffix(f"{THINK}\n")
    text += f"{THINK}\n" if thinking else f"{THINK}\n\n{END_THINK}\n\n"
    return self._ids(text, mark)

  def save(self, folder: str | pathlib.Path) -> None:
    _copy(self._folder, folder, HUGGING_FACE_FILES)

  def _ids(self, text: str, mark: str) -> list[int]:
    pieces = [part for part in text.split(mark) if part]
    if not pieces:
      return []
    return [
      i for ids in self._tokenizer(pieces, add_special_tokens=False)["input_ids"] for i in ids
    ]


class SentencePieceTokenizer(Tokenizer):
  """Word-level SentencePiece model of the tiny world: one id a word, words joined by one space."""

  def __init__(self, folder: str | pathlib.Path):
    self._folder = pathlib.Path(folder)
    config = json.loads((self._folder / "tokenizer_config.json").read_text())
    self._model = sentencepiece.SentencePieceProcessor(
      model_file=str(self._folder / "tokenizer.model")
    )
    self.vocab_size = config["vocab_size"]
    self.pad_id = self._model.pad_id()
    self._marker_ids = {m: self._model.piece_to_id(m) for m in SENTENCEPIECE_MARKERS}
    self.stop_ids = (self._marker_ids[END],)

  def encode(self, text: str) -> list[int]:
    ids = []
    for part in re.split(f"({THINK}|{END_THINK})", text):
      ids.extend([self._marker_ids[part]] if part in (THINK, END_THINK) else self._plain(part))
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    dropped = {self.pad_id, *(self._marker_ids[m] for m in (*(f"<|{r}|>" for r in ROLES), END))}
    size = self._model.get_piece_size()
    words = [
      self._model.id_to_piece(int(i)) for i in ids if int(i) < size and int(i) not in dropped
    ]
    return " ".join(word.removeprefix("\u2581") for word in words)

  def piece(self, token: int) -> str:
    return self._model.id_to_piece(token) if token < self._model.get_piece_size() else ""

  def chat(self, messages: Sequence[Message], thinking: bool = True) -> list[int]:
    _check(messages)
    ids = []
    for message in messages:
      content = message["content"]
      if message["role"] == "assistant":
        content = content.rpartition(END_THINK)[2]
      opening = self._marker_ids[f"<|{message['role']}|>"]
      ids.extend([opening, *self._plain(content), self._marker_ids[END]])
    ids.extend([self._marker_ids["<|assistant|>"], self._marker_ids[THINK]])
    return ids if thinking else [*ids, self._marker_ids[END_THINK]]

  def save(self, folder: str | pathlib.Path) -> None:
    _copy(self._folder, folder, ("tokenizer.model", "tokenizer_config.json", "tokenizer.json"))

  def _plain(self, text: str) -> list[int]:
    # Word by word: the encoder would merge neighbouring unknown words into one id. Control pieces
    # lack the word mark, so that no text reaches them.
    return self._model.piece_to_id(["\u2581" + word for word in text.split()])


def train_sentencepiece(
  lines: Iterable[str], folder: str | pathlib.Path, *, vocab_size: int, vocab_multiple: int
) -> SentencePieceTokenizer:
  """Trains the word-level model on every word of `lines` and writes its folder.

  vocab_size: most pieces allowed, with padding, unknown and the markers. vocab_multiple: the
  tokenizer's vocab_size is rounded up to a multiple of it, for sharding and tiles. The same lines
  give the same bytes. Raises ValueError when the words do not fit, since a dropped word would be
  unknown in text that has to survive a round trip.
  """
  # Markers have ids of their own; as words they would be pieces that no text can reach.
  markers = re.compile("|".join(map(re.escape, SENTENCEPIECE_MARKERS)))
  lines = [" ".join(markers.sub(" ", line).split()) for line in lines]
  words = {word for line in lines for word in line.split()}
  needed = len(words) + len(SENTENCEPIECE_MARKERS) + 2
  if not words:
    raise ValueError("no words to train a tokenizer on; give at least one line of text")
  if needed > vocab_size:
    raise ValueError(
      f"vocab_size={vocab_size} is too small for {len(words)} words and the markers; "
      f"give at least {needed}"
    )
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([line for line in lines if line]),
    model_writer=model,
    model_type="word",
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    control_symbols=list(SENTENCEPIECE_MARKERS),
    pad_id=0,
    unk_id=1,
    bos_id=-1,
    eos_id=-1,
    character_coverage=1.0,
    max_sentence_length=1 << 24,
    normalization_rule_name="identity",
    num_threads=1,
    minloglevel=2,
  )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "tokenizer.model").write_bytes(model.getvalue())
  processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  config = {
    "qed_jax_class": SentencePieceTokenizer.__name__,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "vocab_size": -(-processor.get_piece_size() // vocab_multiple) * vocab_multiple,
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "eos_token": END,
    "chat_template": SENTENCEPIECE_TEMPLATE,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
  (folder / "tokenizer.json").write_text(json.dumps(_word_level(processor), indent=1) + "\n")
  return SentencePieceTokenizer(folder)


def _word_level(processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
  """The same vocabulary as a `tokenizers` file, so that transformers opens a tiny export."""
  pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
  flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  added = [
    {"id": i, "content": piece, **flags, "special": piece not in (THINK, END_THINK)}
    for i, piece in enumerate(pieces)
    if piece in ("<pad>", "<unk>", *SENTENCEPIECE_MARKERS)
  ]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None,
    "decoder": None,
    "model": {
      "type": "WordLevel",
      "vocab": {piece.removeprefix("\u2581"): i for i, piece in enumerate(pieces)},
      "unk_token": "<unk>",
    },
  }


def _check(messages: Sequence[Message]) -> None:
  if not messages:
    raise ValueError("no messages; give at least one")
  for i, message in enumerate(messages):
    if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
      raise ValueError(
        f"message {i} has role {message.get('role')!r} and content of type "
        f"{type(message.get('content')).__name__}; give a role of {ROLES} and a string"
      )


def _unused_character(texts: Sequence[str]) -> str:
  """A character that none of the texts has, from the private use area while that lasts."""
  used = set().union(*texts)
  return next(c for c in map(chr, range(0xE000, 0x110000)) if c not in used)


def _break(text: str, markers: frozenset[str], mark: str) -> str:
  """Puts `mark` behind the first character of each marker, so that no marker is left whole."""
  found = [marker for marker in markers if marker in text]
  if not found:
    return text
  pattern = re.compile("|".join(f"(?={re.escape(marker)})" for marker in found))
  starts = [match.start() + 1 for match in pattern.finditer(text)]
  return mark.join(text[i:j] for i, j in zip([0, *starts], [*starts, len(text)], strict=True))


def _copy(source: pathlib.Path, folder: str | pathlib.Path, names: Sequence[str]) -> None:
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    if (source / name).is_file() and (source / name).resolve() != (folder / name).resolve():
      shutil.copyfile(source / name, folder / name)
