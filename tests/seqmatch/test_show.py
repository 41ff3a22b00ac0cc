"""What a reader sees of a generation."""

import json

import pytest

from seqmatch_jax import show
from seqmatch_jax.tokens import BACKSPACE, EOS, PAD, Vocab

VOCAB = Vocab(tuple("12</"))
ONE, TWO = VOCAB.encode("12")


@pytest.fixture
def typed():
  """1, 2 erased, 2 erased, 1 erased, 2, end."""
  actions = [ONE, TWO, BACKSPACE, TWO, BACKSPACE, BACKSPACE, TWO, EOS, PAD, PAD]
  return show.strokes(actions, VOCAB)


def test_strokes_are_what_is_typed(typed):
  assert "".join(typed) == "12\b2\b\b2" + show.END


def test_answer_is_what_is_left(typed):
  assert show.answer(typed) == "2"


def test_erased_characters_stay_where_they_were_typed(typed):
  assert show.line(typed, color=False) == "[-1-][-2-][-2-]2"
  assert show.line(typed, color=True) == "\x1b[9;31m1\x1b[0m" + 2 * "\x1b[9;31m2\x1b[0m" + "2"


def test_an_unfinished_line_says_so(typed):
  assert show.line(typed[:-1], color=False).endswith("2 ...")


def test_page_holds_everything_and_no_text_ends_its_script(typed, tmp_path):
  prompts = ["1 < 2", "</script>"]
  show.write(tmp_path, "a < b", prompts, [typed, typed[:2]])
  page = (tmp_path / "generations.html").read_text()
  assert page.count("</script>") == 1 and "a &lt; b" in page
  start = page.index("const data = ") + len("const data = ")
  data = json.loads(page[start : page.index(";\n", start)].replace("<\\/", "</"))
  assert data == [["1 < 2  ", typed], ["</script>  ", ["1", "2"]]]
  saved = json.loads((tmp_path / "generations.json").read_text())
  assert [row["answer"] for row in saved] == ["2", "12"]
  assert saved[0]["typed"] == "12\b2\b\b2" + show.END
