"""What a decoder is made of (see transformer.py)."""

from __future__ import annotations

from dataclasses import dataclass

from train_jax import lora
from train_jax.errors import UserError
from train_jax.layers import check_dtype, check_remat

FAMILIES = ("llama", "gpt2")


@dataclass(frozen=True)
class TransformerConfig:
  """Sizes of a decoder."""

  vocab: int
  width: int
  depth: int
  heads: int
  hidden: int  # of the SwiGLU, or of GPT-2's layer
  dtype: str = "float32"  # of the computation; parameters and logits are float32
  remat: str = "none"  # what is computed again in the backward pass, see layers.REMAT
  unroll: bool = False  # of the scan over blocks: faster when shallow, slower to compile when deep
  family: str = "llama"  # or gpt2
  kv_heads: int = 0  # of keys and values, which groups of heads share; 0: as many as heads
  theta: float = 10_000.0  # of the rotary positions
  scaling: tuple[float, ...] = ()  # Llama 3's (factor, low, high, original context) of theirs
  context: int = 0  # of GPT-2's learned positions
  epsilon: float = 1e-5  # of the norms
  tied: bool = False  # the embedding is also the output
  erase: bool = False  # <backspace>'s logit has a row and a bias of its own
  lora: lora.LoraConfig | None = None  # learn these adapters (and `erase`) only

  def __post_init__(self):
    object.__setattr__(self, "scaling", tuple(self.scaling))  # JSON has lists
    check_dtype(self.dtype)
    check_remat(self.remat)
    for name in ("vocab", "width", "depth", "heads", "hidden"):
      if getattr(self, name) < 1:
        raise UserError(f"model.{name}={getattr(self, name)} must be at least 1.")
    if self.family not in FAMILIES:
      raise UserError(
        f"model.family={self.family!r} is unknown; choose from {', '.join(FAMILIES)}."
      )
    if self.width % (2 * self.heads):
      raise UserError(
        f"model.width={self.width} must be a multiple of 2 x model.heads={self.heads}; "
        f"the nearest is {max(1, round(self.width / (2 * self.heads))) * 2 * self.heads}."
      )
    if self.kv_heads < 0 or (self.kv_heads and self.heads % self.kv_heads):
      raise UserError(
        f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}, or be 0."
      )
    if self.family == "gpt2" and self.context < 1:
      raise UserError(f"model.context={self.context} must be at least 1: GPT-2 learns positions.")
    if self.lora:
      self.lora.check(tuple(part for layer in self.parts.values() for part in layer))

  @property
  def head(self) -> int:
    """Features of a head."""
    return self.width // self.heads

  @property
  def parts(self) -> dict[str, dict[str, int]]:
    """The matrices of a block that read the same input, by layer, with their outputs."""
    groups = (self.kv_heads or self.heads) * self.head
    attention = {"qkv": {"q": self.width, "k": groups, "v": groups}, "out": {"o": self.width}}
    if self.family == "gpt2":
      return {**attention, "up": {"up": self.hidden}, "down": {"down": self.width}}
    gate_up = {"gate": self.hidden, "up": self.hidden}
    return {**attention, "gate_up": gate_up, "down": {"down": self.width}}

  def check_length(self, length: int) -> None:
    """Raises UserError if a text of `length` tokens has no place among learned positions."""
    if self.family == "gpt2" and length > self.context:
      raise UserError(
        f"a text of {length} tokens does not fit into the {self.context} positions that this model "
        f"has learned; choose a context of at most {self.context}."
      )
