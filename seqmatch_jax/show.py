"""Generations with their erasures visible: struck through in the terminal, replayed in HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from seqmatch_jax.tokens import BACKSPACE, EOS, PAD, Vocab

_STRIKE, _PLAIN = "\x1b[9;31m", "\x1b[0m"


def strokes(actions: Sequence[int], vocab: Vocab) -> list[str]:
  """Actions as what a reader sees typed: characters, "\\b" for <backspace>, "\\n" for <eos>."""
  names = {BACKSPACE: "\b", EOS: "\n"}
  return [names.get(a) or vocab.decode([a]) for a in actions if a != PAD]


def line(typed: Sequence[str], color: bool) -> str:
  """One line of text: erased characters struck through, or as [-x-] where there is no colour.

  Typed on a row, an erased character stays where it was typed.
  """
  shown: list[list] = []  # [character, erased?]
  alive: list[int] = []
  for key in typed:
    if key == "\b":
      shown[alive.pop()][1] = True
    elif key != "\n":
      alive.append(len(shown))
      shown.append([key, False])
  strike = (lambda c: f"{_STRIKE}{c}{_PLAIN}") if color else (lambda c: f"[-{c}-]")
  text = "".join(strike(char) if erased else char for char, erased in shown)
  return text if "\n" in typed else text + " ..."


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
    head.textContent = prompt + "  ";
    return {{row, keys, alive: []}};
  }});
  const longest = Math.max(...data.map(([, keys]) => keys.length));
  for (let i = 0; i < longest; i++) {{
    for (const {{row, keys, alive}} of rows) {{
      const key = keys[i];
      if (key === undefined) continue;
      if (key === "\\n") row.classList.add("done");
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
  """A self-contained HTML page on which one watches the generations being typed and erased."""
  # "</" inside a script would end it.
  data = json.dumps([list(row) for row in zip(prompts, map(list, typed), strict=True)])
  return _PAGE.format(title=html.escape(title), data=data.replace("</", "<\\/"))


def write(out: Path, title: str, prompts: Sequence[str], typed: Sequence[Sequence[str]]) -> None:
  """Writes `out/generations.html` and `out/generations.json`: prompt, typed, answer."""
  out.mkdir(parents=True, exist_ok=True)
  (out / "generations.html").write_text(page(title, prompts, typed), encoding="utf-8")
  rows = [
    {"prompt": prompt, "typed": "".join(keys), "answer": answer(keys)}
    for prompt, keys in zip(prompts, typed, strict=True)
  ]
  (out / "generations.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))


def answer(typed: Sequence[str]) -> str:
  """What is left when all is typed and erased."""
  left: list[str] = []
  for key in typed:
    if key == "\b":
      left.pop()
    elif key != "\n":
      left.append(key)
  return "".join(left)
