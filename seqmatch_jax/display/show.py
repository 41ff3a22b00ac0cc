"""Generations with their erasures visible: struck through in the terminal, replayed in HTML."""

from __future__ import annotations

import html
import json
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.tokens import BACKSPACE, EOS, PAD, Vocab

END = "\x04"  # what <eos> is typed as
# A model may type any character; those that move a cursor are shown as pictures of themselves.
_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"} | {127: 0x2421}
_STRIKE, _PLAIN = "\x1b[9;31m", "\x1b[0m"


class Typist:
  """Turns actions into keys for a reader: text, "\\b" for <backspace>, END for <eos>.

  The text of a token depends on the tokens before it. So a typist keeps those written so far, the
  prompt's first.
  """

  def __init__(self, vocab: Vocab | TextVocab, prompt: Iterable[int] = ()):
    self.vocab, self.written = vocab, list(prompt)

  def keys(self, actions: Sequence[int]) -> list[str]:
    """The keys of the next actions."""
    typed, new = [], len(self.written)  # the first token that has no key yet

    def settle():
      if len(self.written) > new:
        typed.extend(text.translate(_PICTURES) for text in self.vocab.pieces(self.written)[new:])

    for action in actions:
      if action in (BACKSPACE, EOS):
        settle()
        typed.append("\b" if action == BACKSPACE else END)
        if action == BACKSPACE:
          self.written.pop()
        new = len(self.written)
      elif action != PAD:
        self.written.append(action)
    settle()
    return typed


def _struck(text: str) -> str:
  return f"{_STRIKE}{text}{_PLAIN}"


def line(typed: Sequence[str], color: bool) -> str:
  """All keys on one line, with the erased ones struck through, or as [-x-] without colour."""
  shown: list[list] = []  # [character, erased?]
  alive: list[int] = []
  for key in typed:
    if key == "\b":
      shown[alive.pop()][1] = True
    elif key != END:
      alive.append(len(shown))
      shown.append([key, False])
  strike = _struck if color else (lambda c: f"[-{c}-]")
  text = "".join(strike(char) if erased and char else char for char, erased in shown)
  return text if END in typed else text + " ..."


def _width(char: str) -> int:
  """The columns of a terminal that a character takes."""
  if unicodedata.category(char) in ("Mn", "Me", "Cf"):  # drawn over the one before, or invisible
    return 0
  return 2 if unicodedata.east_asian_width(char) in "WF" else 1


class Screen:
  """Types keys as they come. A terminal shows erased text struck through where it stands.

  Other outputs cannot change what they have shown, and an erasure is a ⌫ behind the erased text.

  Args:
    columns: of the terminal; 0 for another output.
  """

  def __init__(self, out: TextIO, columns: int):
    self.out, self.columns = out, columns
    self.cells: list[list] = []  # [text, erased?, row, column]
    self.alive: list[int] = []
    self.row = self.column = 0

  @classmethod
  def of(cls, out: TextIO) -> Screen:
    """The screen that `out` writes to."""
    return cls(out, shutil.get_terminal_size().columns if out.isatty() else 0)

  def _put(self, text: str, erased: bool) -> None:
    """Writes text, and breaks the lines, because terminals break them in different places."""
    lines = [""]
    for char in text.replace("\t", "    "):
      width = _width(char)
      if char == "\n" or (self.columns and self.column + width > self.columns - 1):
        lines.append("")
        self.row, self.column = self.row + 1, 0
      if char != "\n":
        lines[-1] += char
        self.column += width
    # Each line is coloured by itself: no colour is on when the next begins.
    self.out.write("\n".join(_struck(part) if erased and part else part for part in lines))

  def prompt(self, text: str) -> None:
    """Text that is never erased."""
    self._put(text, False)
    self.out.flush()

  def key(self, key: str) -> None:
    """One key, see `Typist`."""
    if key == "\b" and not self.columns:
      shown, _, _, _ = self.cells[self.alive.pop()]
      self.out.write("⌫" if shown else "")  # half a character was not shown
    elif key == "\b":
      first = self.alive.pop()
      self.cells[first][1] = True
      _, _, row, column = self.cells[first]
      up = f"\x1b[{self.row - row}A" if self.row > row else ""
      right = f"\x1b[{column}C" if column else ""
      self.out.write(f"{up}\r{right}")
      self.row, self.column = row, column
      for text, erased, *_ in self.cells[first:]:
        self._put(text, erased)
    elif key != END:
      self.alive.append(len(self.cells))
      self.cells.append([key, False, self.row, self.column])
      self._put(key, False)
    self.out.flush()


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Generations</title>
<style>
body {{ font: 17px/1.6 ui-monospace, monospace; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; background: Canvas; color: CanvasText; color-scheme: light dark; }}
.prompt {{ opacity: .6 }} .gone {{ color: #c33; text-decoration: line-through; opacity: .7 }}
.row {{ margin: .3rem 0; white-space: pre-wrap }} .done::after {{ content: " \\25A0"; opacity: .4 }}
button, input {{ font: inherit; margin-right: 1rem }}
</style>
<h1>{title}</h1>
<p><button id="again">play again</button>
<label><input type="checkbox" id="keep" checked>keep what was erased, struck through</label>
<label>speed <input type="range" id="speed" min="1" max="30" value="8"></label></p>
<main></main>
<script>
const data = {data};
const main = document.querySelector("main"), at = id => document.getElementById(id);
let run = 0;
async function play() {{
  const mine = ++run;
  main.replaceChildren();
  const rows = data.map(([prompt, keys]) => {{
    const row = main.appendChild(document.createElement("div"));
    row.className = "row";
    const head = row.appendChild(document.createElement("span"));
    head.className = "prompt";
    head.textContent = prompt;
    return {{row, keys, alive: []}};
  }});
  const longest = Math.max(...data.map(([, keys]) => keys.length));
  for (let i = 0; i < longest; i++) {{
    for (const {{row, keys, alive}} of rows) {{
      const key = keys[i];
      if (key === undefined) continue;
      if (key === "\\u0004") row.classList.add("done");
      else if (key === "\\b") {{
        const last = alive.pop();
        at("keep").checked ? last.classList.add("gone") : last.remove();
      }} else {{
        const span = row.appendChild(document.createElement("span"));
        span.textContent = key;
        alive.push(span);
      }}
    }}
    await new Promise(next => setTimeout(next, 1000 / at("speed").value));
    if (mine !== run) return;
  }}
}}
at("again").onclick = play;
play();
</script>
</html>
"""


def page(title: str, prompts: Sequence[str], typed: Sequence[Sequence[str]]) -> str:
  """A self-contained HTML page that types and erases the generations."""
  # "</script" inside a script would end it, and "<!--" change what ends it.
  data = json.dumps([list(row) for row in zip(prompts, map(list, typed), strict=True)])
  return _PAGE.format(title=html.escape(title), data=data.replace("<", "\\u003c"))


def write(
  out: Path,
  title: str,
  prompts: Sequence[str],
  typed: Sequence[Sequence[str]],
  gap: str = "  ",
  references: Sequence[str] = (),
) -> None:
  """Writes `out/generations.html` and `out/generations.json`: prompt, typed, answer.

  Args:
    gap: the text between a prompt and the keys.
    references: the data's text after each prompt, for the second file; or none.
  """
  out.mkdir(parents=True, exist_ok=True)
  shown = page(title, [prompt + gap for prompt in prompts], typed)
  (out / "generations.html").write_text(shown, encoding="utf-8")
  rows = [
    {"prompt": prompt, "typed": "".join(keys), "answer": answer(keys)}
    for prompt, keys in zip(prompts, typed, strict=True)
  ]
  for row, reference in zip(rows, references, strict=False):
    row["reference"] = reference
  text = json.dumps(rows, indent=1, ensure_ascii=False)
  (out / "generations.json").write_text(text, encoding="utf-8")


def answer(typed: Sequence[str]) -> str:
  """The text after all keys, without the erased ones."""
  text: list[str] = []
  for key in typed:
    if key == "\b":
      text.pop()
    elif key != END:
      text.append(key)
  return "".join(text)
