"""What a reader sees of a generation."""

import io
import json

import pytest

from seqmatch_jax.display import show
from seqmatch_jax.tokens import BACKSPACE, EOS, PAD, Vocab

VOCAB = Vocab(tuple("12</"))
ONE, TWO = VOCAB.encode("12")


@pytest.fixture
def typed():
  """1, 2 erased, 2 erased, 1 erased, 2, end."""
  actions = [ONE, TWO, BACKSPACE, TWO, BACKSPACE, BACKSPACE, TWO, EOS, PAD, PAD]
  return show.Typist(VOCAB).keys(actions)


def test_what_is_typed_and_what_is_left_of_it(typed):
  assert "".join(typed) == "12\b2\b\b2" + show.END and show.answer(typed) == "2"
  # Erased characters stay where they were typed; an unfinished line says so.
  assert show.line(typed, color=False) == "[-1-][-2-][-2-]2"
  assert show.line(typed, color=True) == "\x1b[9;31m1\x1b[0m" + 2 * "\x1b[9;31m2\x1b[0m" + "2"
  assert show.line(typed[:-1], color=False) == "[-1-][-2-][-2-]2 ..."


def test_page_holds_everything_and_no_text_ends_its_script(typed, tmp_path):
  prompts = ["1 < 2", "</script>"]
  show.write(tmp_path, "a < b", prompts, [typed, typed[:2]])
  page = (tmp_path / "generations.html").read_text()
  assert page.count("</script>") == 1 and "a &lt; b" in page
  start = page.index("const data = ") + len("const data = ")
  data = json.loads(page[start : page.index(";\n", start)])
  assert data == [["1 < 2  ", typed], ["</script>  ", ["1", "2"]]]
  saved = json.loads((tmp_path / "generations.json").read_text())
  assert [row["answer"] for row in saved] == ["2", "12"]
  assert saved[0]["typed"] == "12\b2\b\b2" + show.END


# --- a screen -------------------------------------------------------------------------------------


def render(written: str) -> list[str]:
  """The lines that a terminal shows, a struck character as a capital X."""
  rows, row, column, struck, i = [{}], 0, 0, False, 0
  while i < len(written):
    if written[i] == "\x1b":
      end = next(k for k in range(i, len(written)) if written[k].isalpha())
      number, kind = written[i + 2 : end], written[end]
      if kind == "m":
        struck = number != "0"
      elif kind == "A":
        row -= int(number)
      else:
        assert kind == "C"
        column += int(number)
      i = end
    elif written[i] == "\r":
      column = 0
    elif written[i] == "\n":
      row, column = row + 1, 0
      rows += [{}] * (row == len(rows))
    else:
      rows[row] = {**rows[row], column: "X" if struck else written[i]}
      column += 1
    i += 1
  return ["".join(line.get(k, " ") for k in range(max(line, default=-1) + 1)) for line in rows]


def watch(keys, columns):
  """What a terminal shows after each key."""
  out = io.StringIO()
  screen = show.Screen(out, columns)
  screen.prompt("go ")
  for key in keys:
    screen.key(key)
    yield render(out.getvalue())


def test_what_is_erased_is_struck_through_at_once():
  shown = list(watch(["a", "b", "\b", "c", "\b", "\b", "d", show.END], 80))
  states = "go a", "go ab", "go aX", "go aXc", "go aXX", "go XXX", "go XXXd", "go XXXd"
  assert tuple(rows[0] for rows in shown) == states


def test_erasures_find_their_line_again():
  *_, before, after, last = watch(["abc", "def", "\n", "ghi", "jklm", "\b", "\b"], 8)
  assert before == ["go abcd", "ef", "ghijklm"]
  assert after == ["go abcd", "ef", "ghiXXXX"]
  assert last == ["go abcd", "ef", "XXXXXXX"]
  *_, last = watch(["abc", "def", "\n", "ghi", *"\b\b\b\b", "z"], 8)
  assert last == ["go XXXX", "XX", "XXXz"]


def test_where_there_is_no_terminal_erasures_are_told():
  out = io.StringIO()
  screen = show.Screen(out, 0)
  half = ("", "\b")  # of a character: nothing was shown, so nothing is taken back
  for key in ("a", *half, "b", "\b", "c" * 200, show.END):
    screen.key(key)
  assert out.getvalue() == "ab⌫" + "c" * 200


def test_wide_and_combining_characters_take_their_columns():
  written = io.StringIO()
  screen = show.Screen(written, 12)
  for key in ("日本", "語", "\b", "e\u0301", "x"):
    screen.key(key)
  assert screen.column == 2 + 2 + 2 + 1 + 1
  assert "\r\x1b[4C" in written.getvalue()  # back to the third, behind two of 2 columns


def test_control_characters_that_a_model_types_are_shown_and_move_nothing():
  vocab = Vocab(("\x04", "\b", "\x1b", "a"))
  typed = show.Typist(vocab).keys([4, 5, 6, 7, BACKSPACE, EOS])
  assert typed == ["␄", "␈", "␛", "a", "\b", show.END]
  assert show.line(typed, color=False) == "␄␈␛[-a-]" and show.answer(typed) == "␄␈␛"


def test_a_typist_goes_on_where_it_was(typed):
  actions = [ONE, TWO, BACKSPACE, TWO, BACKSPACE, BACKSPACE, TWO, EOS, PAD, PAD]
  typist = show.Typist(VOCAB, [TWO, TWO])
  keys = [key for action in actions for key in typist.keys([action])]
  assert keys == typed == show.Typist(VOCAB, [TWO, TWO]).keys(actions)


class Counting:
  """A vocabulary whose tokens look otherwise at another place in the text."""

  def pieces(self, ids):
    return [f"{place}:{token} " for place, token in enumerate(ids)]


def test_what_is_typed_depends_on_the_text_that_is_left():
  keys = show.Typist(Counting(), [4]).keys([5, 6, 7, BACKSPACE, BACKSPACE, 8, EOS])
  assert keys == ["1:5 ", "2:6 ", "3:7 ", "\b", "\b", "2:8 ", show.END]
