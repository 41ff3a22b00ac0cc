"""docs/LIBRARY.md: its snippets run as they stand."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "LIBRARY.md").read_text()
SECTIONS = (section.partition("\n") for section in TEXT.split("\n## ")[1:])
SNIPPETS = {title: re.findall("```python\n(.*?)```", text, re.S) for title, _, text in SECTIONS}
ALONE = {
  t: code for t, found in SNIPPETS.items() for code in found if "load_pretrained" not in code
}


def test_each_section_has_one_snippet_and_only_trained_models_need_files():
  assert [len(found) for found in SNIPPETS.values()] == [1] * len(SNIPPETS)
  assert {*SNIPPETS} - {*ALONE} == {"Trained models"}


@pytest.mark.parametrize("title", ALONE)
def test_a_snippet_runs(title):
  names = {}
  exec(compile(ALONE[title], title, "exec"), names)
  made = [x for x in names.values() if isinstance(x, np.ndarray | jax.Array)]
  assert made and all(np.isfinite(x).all() for x in made)
