"""The tokens of a pretrained model: those of Hugging Face's tokenizer.json, in our order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, NAME, SHOWN, SPECIAL, Vocab, check_text
from train_jax.errors import UserError
from train_jax.files import LFS, is_lfs_pointer, read_json
from train_jax.storage.weights import sha256

if TYPE_CHECKING:
  from tokenizers import Tokenizer

NAMING = ("tokenizer_config.json", "special_tokens_map.json")  # they name special tokens
OLDER = ("tokenizer.model", "vocab.json", "spiece.model")  # of tokenizers without tokenizer.json


@dataclass(frozen=True)
class TextVocab:
  """The tokens of a tokenizer.json (Hugging Face's `tokenizers`), in our order.

  Our special tokens come first, and the tokenizer's other tokens follow in its own order. Its
  begin- and end-of-text become BOS and EOS. If one token is both (GPT-2), BOS and EOS are two
  copies of it.

  Attributes:
    path, sha256: of tokenizer.json.
    bos, eos: the tokenizer's ids of the tokens that begin and end a text.
    backspace: the tokenizer's id of <backspace>, which only an exported one has; otherwise -1.
  """

  path: str
  sha256: str
  bos: int
  eos: int
  backspace: int = -1

  @classmethod
  def from_file(cls, path: str | Path) -> TextVocab:
    """The vocabulary of a tokenizer.json, or of the folder that holds it.

    tokenizer_config.json, special_tokens_map.json or config.json beside it, the first that does,
    says which tokens begin and end a text.

    Raises:
      UserError: the file cannot be read, or nothing says which token ends a text.
    """
    path = Path(path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
      if older := next((n for n in OLDER if path.with_name(n).is_file()), None):
        raise UserError(
          f"there is no tokenizer {path}, and {older} beside it is not read; write it once with "
          "transformers: AutoTokenizer.from_pretrained(FOLDER, use_fast=True)"
          ".save_pretrained(FOLDER)."
        )
      raise UserError(
        f"there is no tokenizer {path}; give a tokenizer.json, or a folder that holds one (nothing "
        "is fetched by name)."
      )
    vocab = cls(str(path), sha256(path), 0, 0)
    tokenizer = vocab._tokenizer
    bos, eos = (_special(tokenizer, path.parent, name) for name in ("bos", "eos"))
    if eos is None:
      raise UserError(
        f"nothing beside {path} says which token ends a text; write "
        '{"bos_token": "...", "eos_token": "..."} into '
        f"{path.with_name('tokenizer_config.json')}."
      )
    backspace = tokenizer.token_to_id(NAME)
    return replace(
      vocab,
      bos=eos if bos is None else bos,
      eos=eos,
      backspace=-1 if backspace is None else backspace,
    )

  @classmethod
  def from_metadata(cls, metadata: dict) -> TextVocab:
    """The vocabulary of `TextVocab.metadata`; UserError if its file has changed or is gone."""
    vocab = cls(**metadata)
    if not Path(vocab.path).is_file():
      raise UserError(
        f"the tokenizer {vocab.path} is not there; put it back, or give --pretrained=FOLDER if the "
        "run's pretrained folder was moved."
      )
    if (digest := sha256(vocab.path)) != vocab.sha256:
      raise UserError(
        f"{vocab.path} has the SHA-256 {digest[:12]}... and this run was made with "
        f"{vocab.sha256[:12]}...; put the tokenizer of that time back."
      )
    return vocab

  def metadata(self) -> dict:
    """The JSON that `from_metadata` reads."""
    return asdict(self)

  @cached_property
  def _tokenizer(self) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
      tokenizer = Tokenizer.from_file(self.path)
    except Exception as err:  # tokenizers raises plain Exceptions
      if is_lfs_pointer(Path(self.path)):
        raise UserError(f"{self.path} {LFS}.") from err
      raise UserError(
        f"{self.path} is no tokenizer ({str(err)[:100]}); give a tokenizer.json of `tokenizers`."
      ) from err
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # "<|endoftext|>" in a text stands for these characters: a text cannot end itself.
    tokenizer.encode_special_tokens = True
    return tokenizer

  @cached_property
  def hf_size(self) -> int:
    """Number of the tokenizer's own tokens; a model's embedding has at least as many rows."""
    return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

  def only_special_from(self, hf_id: int) -> bool:
    """Whether the tokenizer's tokens from `hf_id` on are added special ones: no text holds them."""
    added = self._tokenizer.get_added_tokens_decoder()
    later = (i for i in self._tokenizer.get_vocab(with_added_tokens=True).values() if i >= hf_id)
    return all(i in added and added[i].special for i in later)

  def name(self, hf_id: int) -> str:
    """How the tokenizer writes its token `hf_id`."""
    return repr(self._tokenizer.id_to_token(hf_id))

  @cached_property
  def hf_ids(self) -> np.ndarray:
    """int32 [size]: the tokenizer's id of each of our tokens, or -1."""
    special = (-1, self.bos, self.eos, self.backspace)
    others = [i for i in range(self.hf_size) if i not in special]
    return np.array([*special, *others], np.int32)

  @cached_property
  def _ids(self) -> list[int]:
    """Our id of each of the tokenizer's tokens."""
    ids = np.full(self.hf_size, BACKSPACE, np.int32)
    ids[self.hf_ids[SPECIAL:]] = np.arange(SPECIAL, self.size)
    ids[self.bos] = BOS
    ids[self.eos] = EOS
    return ids.tolist()

  @property
  def size(self) -> int:
    """Number of tokens, special ones included."""
    return len(self.hf_ids)

  def encode(self, text: str) -> list[int]:
    """The tokens of `text`, without special ones; UserError if it holds a backspace."""
    check_text(text)
    return [self._ids[i] for i in self._tokenizer.encode(text, add_special_tokens=False).ids]

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """The text that each of `ids` adds: ⌫ for a backspace, nothing for other special tokens.

    A character of several tokens comes with the last of them. The joined pieces are `decode(ids)`.
    A backspace erases the token before, and the tokens after it are read as if that one had never
    been typed.
    """
    from tokenizers.decoders import DecodeStream

    hf_ids, pieces, kept, pending, stream = self.hf_ids, [], [], [], DecodeStream()

    def add(hf_id: int) -> str:
      nonlocal stream
      pending.append(hf_id)
      try:
        piece = stream.step(self._tokenizer, hf_id)
      except Exception:  # a plain one: these bytes are no character and unmake the one before
        stream = DecodeStream()
        piece = "".join(stream.step(self._tokenizer, hf_id) or "" for hf_id in pending)
      if piece:
        pending.clear()
      return piece or ""

    for i in ids:
      if i >= SPECIAL:
        kept.append(int(hf_ids[i]))
        pieces.append(add(kept[-1]))
        continue
      pieces.append(SHOWN[i])
      if i == BACKSPACE:
        del kept[-1:], pending[:]
        stream = DecodeStream()
        for hf_id in kept:
          add(hf_id)
    return pieces

  def decode(self, ids: Iterable[int]) -> str:
    """The joined `pieces` of `ids`."""
    return "".join(self.pieces(ids))


def _special(tokenizer: Tokenizer, folder: Path, name: str) -> int | None:
  """The tokenizer's id of the token that files in `folder` call `name`: "bos" or "eos"."""

  def read(file: str, key: str):
    try:
      return read_json(folder / file).get(key)
    except FileNotFoundError:
      return None
    except (OSError, ValueError) as err:
      raise UserError(f"{folder / file} cannot be read as JSON: {err}.") from err

  tokens = (read(file, f"{name}_token") for file in NAMING)
  token = next((token for token in tokens if token is not None), None)
  token = token.get("content") if isinstance(token, dict) else token
  if not isinstance(token, str | None):
    raise UserError(f"{folder} names {token!r} as {name} token; give the token as a string.")
  if token is not None:
    hf_id = tokenizer.token_to_id(token)
  else:
    hf_id = read("config.json", f"{name}_token_id")
    hf_id = hf_id[0] if isinstance(hf_id, list) and hf_id else hf_id  # the first one ends a text
    if hf_id is not None and (type(hf_id) is not int or hf_id < 0):
      raise UserError(
        f"{folder / 'config.json'} has {name}_token_id={hf_id!r}, which must be a token's number."
      )
    token = hf_id
  if token is not None and (hf_id is None or tokenizer.id_to_token(hf_id) is None):
    raise UserError(f"{folder} names {token!r} as {name} token, which its tokenizer does not have.")
  return hf_id


def to_metadata(vocab: Vocab | TextVocab) -> dict:
  """The JSON that `from_metadata` reads."""
  if isinstance(vocab, TextVocab):
    return {"tokenizer": vocab.metadata()}
  return {"symbols": list(vocab.symbols)}


def from_metadata(metadata: dict) -> Vocab | TextVocab:
  """The vocabulary that `to_metadata` described; UserError if its tokenizer has changed."""
  if "tokenizer" in metadata:
    return TextVocab.from_metadata(metadata["tokenizer"])
  return Vocab(tuple(metadata["symbols"]))
