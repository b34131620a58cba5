"""Tokens by themselves: their text, their bytes, their names."""

from qed_jax.data.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decode shows for bytes that are no character

# Byte-level BPE writes a token as one character a byte: printable ones stand for themselves, the
# others for the characters from 256 on, in order (GPT-2's encoder.py).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}


class Vocabulary:
  """What single tokens of a tokenizer say; each is looked up once."""

  def __init__(self, tokenizer: Tokenizer):
    self.decode, self._piece = tokenizer.decode, tokenizer.piece
    self._texts: dict[int, str] = {}

  def text(self, token: int) -> str:
    """The token decoded alone; "" for control tokens, which decode leaves out."""
    text = self._texts.get(token)
    if text is None:
      text = self._texts[token] = self.decode([token])
    return text

  def name(self, token: int) -> str:
    """The text, or the name of a control token."""
    return self.text(token) or self._piece(token)

  def bytes(self, token: int) -> bytes:
    """What the token adds to the text as UTF-8, be it part of a character."""
    text = self.text(token)
    if INCOMPLETE not in text:
      return text.encode()
    piece = self._piece(token)
    return bytes(_BYTES[c] for c in piece) if set(piece) <= _BYTES.keys() else text.encode()
