r"""Near-duplicates among statements: n-grams of normalised text, with the passage that matched.

A statement is read as tokens: words in lower case, LaTeX commands by a common name (\dfrac and
\tfrac are frac, \leq and the sign are le), numbers, single letters and operators; what only sets
type (dollars, \left, \, braces, spaces, punctuation) is nothing. Two statements match when

  exact      their tokens are equal, or those of one, at least MIN_CONTAINED of them, stand in the
             other as they are;
  fuzzy      of the n-grams of the lighter one, in which every single letter reads the same so that
             renamed variables and points do not hide anything, the share that the other one has is
             at least the threshold. N-grams that many statements have ("for all positive integers
             v") weigh less: each counts 1 / (number of indexed statements that have it), and
             nothing when more than COMMON have it. Where one has fewer than MIN_CONTAINED tokens,
             it is the share of the heavier one's.

Pure functions over text; the index is the one thing with a state.
"""

import collections
import dataclasses
import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

MIN_CONTAINED = 12  # tokens; a shorter statement inside of another says little
COMMON = 50
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+|[^\W\d_]+|[^\w\s]", re.UNICODE)
# Commands and characters that only set type. Braces and "$" are among the characters.
_SPACING = frozenset(
  "left right big bigl bigr Big Bigl Bigr bigg biggl biggr displaystyle textstyle limits nolimits"
  " quad qquad text textbf textit textrm mathrm mathit mathbf mathbb mathcal mathsf operatorname"
  " begin end item hspace vspace label emph noindent par rm bf it middle".split()
)
_IGNORED = frozenset("$,.;:!?'\"`´’‘“”{}()[]&~_^\\|*")
_NAMES = {
  "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "≤": "le",
  "⩽": "le", "geq": "ge", "geqslant": "ge", "≥": "ge", "⩾": "ge", "neq": "ne", "≠": "ne",
  "×": "times", "·": "times", "⋅": "times", "cdot": "times", "∈": "in", "→": "to",
  "rightarrow": "to", "longrightarrow": "to", "mapsto": "to", "∠": "angle", "measuredangle":
  "angle", "△": "triangle", "∞": "infty", "∑": "sum", "∏": "prod", "√": "sqrt", "π": "pi",
  "ldots": "dots", "cdots": "dots", "dotsc": "dots", "dotsb": "dots", "…": "dots", "mid": "divides",
  "∣": "divides", "∥": "parallel", "⊥": "perp", "°": "circ", "varphi": "phi", "varepsilon":
  "epsilon", "emptyset": "varnothing", "∅": "varnothing", "backslash": "setminus", "∪": "cup",
  "∩": "cap", "⊂": "subset", "⊆": "subseteq", "−": "-", "–": "-", "lt": "<", "gt": ">",
  "lvert": "", "rvert": "", "vert": "", "lfloor": "floor", "rfloor": "floor", "⌊": "floor",
  "⌋": "floor", "lceil": "ceil", "rceil": "ceil", "⌈": "ceil", "⌉": "ceil", "lbrace": "",
  "rbrace": "", "dot": "",
}  # fmt: skip
_LETTER = "v"


@dataclasses.dataclass(frozen=True)
class Token:
  """What a piece of text is after normalising, and where it stands: text[start:end]."""

  text: str
  start: int
  end: int


@dataclasses.dataclass(frozen=True)
class Match:
  """The indexed statement that a text is like. kind: "exact" or "fuzzy". score: 0..1. passage: the
  longest run of tokens that both have, in the words of the text."""

  id: str
  kind: str
  score: float
  passage: str


def tokens(text: str) -> list[Token]:
  """The normalised tokens of a statement, in order."""
  found = []
  for match in _TOKEN.finditer(text):
    word = match[0]
    if word.startswith("\\"):
      word = word[1:]
      if word in _SPACING or not word[:1].isalnum():
        continue
    word = _NAMES.get(word, word)
    if word in _IGNORED or not word:
      continue
    word = unicodedata.normalize("NFKC", word).casefold()
    # "½", "ﬁ" and the like become several characters, and may become several tokens.
    found += [Token(w, match.start(), match.end()) for w in re.findall(r"\d+|[^\W\d_]+|\S", word)]
  return found


def normalise(text: str) -> str:
  """The statement as its normalised tokens, a space between them."""
  return " ".join(token.text for token in tokens(text))


def ngrams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
  """The n-grams of tokens with every single letter read as the same one; all of them as one gram
  when there are fewer than n."""
  plain = [_LETTER if len(w) == 1 and w.isalpha() else w for w in words]
  return {tuple(plain[i : i + n]) for i in range(max(1, len(plain) - n + 1))} - {()}


class Index:
  """Statements to compare others with; more may be added at any time."""

  def __init__(self, statements: Iterable[tuple[str, str]], *, n: int):
    """statements: (id, text). n: tokens of a gram."""
    if n < 1:
      raise ValueError(f"n is {n}: a gram has at least one token")
    self._n = n
    self._ids: list[str] = []
    self._words: list[tuple[str, ...]] = []
    self._grams: list[set[tuple[str, ...]]] = []
    self._holders: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
    self._whole: dict[tuple[str, ...], int] = {}
    for id_, text in statements:
      self.add(id_, text)

  def __len__(self) -> int:
    return len(self._ids)

  def add(self, id_: str, text: str) -> None:
    words = tuple(token.text for token in tokens(text))
    grams = ngrams(words, self._n)
    for gram in grams:
      self._holders[gram].append(len(self._ids))
    self._whole.setdefault(words, len(self._ids))
    self._ids.append(id_)
    self._words.append(words)
    self._grams.append(grams)

  def match(self, text: str, *, threshold: float) -> Match | None:
    """The indexed statement most like the text, exact before fuzzy, if one is like it at all."""
    found = tokens(text)
    words = tuple(token.text for token in found)
    if words in self._whole:
      return self._matched(text, found, self._whole[words], "exact", 1.0)
    grams = ngrams(words, self._n)
    shared: collections.Counter[int] = collections.Counter()
    for gram in grams:
      if weight := self._weight(gram):
        for holder in self._holders.get(gram, ()):
          shared[holder] += weight
    total = sum(map(self._weight, grams))
    best = (False, threshold, -1)
    for candidate in sorted(shared):
      exact = _contained(words, self._words[candidate])
      # Of a statement too short to say much, both have to be the same.
      short, long = sorted((total, sum(map(self._weight, self._grams[candidate]))))
      said = min(len(words), len(self._words[candidate])) >= MIN_CONTAINED
      score = shared[candidate] / (short if said else long)
      if (exact, score) > best[:2] or (best[2] < 0 and score >= threshold):
        best = (exact, score, candidate)
    exact, score, candidate = best
    if candidate < 0:
      return None
    return self._matched(text, found, candidate, "exact" if exact else "fuzzy", min(score, 1.0))

  def _weight(self, gram: tuple[str, ...]) -> float:
    holders = len(self._holders.get(gram, ()))
    return 0.0 if holders > COMMON else 1 / max(1, holders)

  def _matched(self, text: str, found: list[Token], i: int, kind: str, score: float) -> Match:
    return Match(self._ids[i], kind, score, _passage(text, found, self._words[i]))


def _contained(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
  """Whether they are equal or a long enough one stands in the other as it is."""
  if one == other:
    return True
  short, long = sorted((one, other), key=len)
  if len(short) < MIN_CONTAINED:
    return False
  # Tokens hold no space, so that a match of the joined text begins and ends with a token.
  return f" {' '.join(short)} " in f" {' '.join(long)} "


def _passage(text: str, found: list[Token], other: tuple[str, ...]) -> str:
  words = [token.text for token in found]
  matcher = difflib.SequenceMatcher(None, words, other, autojunk=False)
  run = matcher.find_longest_match()
  if not run.size:
    return ""
  return text[found[run.a].start : found[run.a + run.size - 1].end]
