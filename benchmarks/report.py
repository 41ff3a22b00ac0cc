"""The tables of docs/PERFORMANCE.md, from what the benchmarks last measured here.

for name in train_step growth wavelet sampling sinkhorn decode data start; do
  python benchmarks/$name.py
done
python benchmarks/report.py           # prints the table
python benchmarks/report.py --write   # writes it, and the others, into docs/PERFORMANCE.md

There, what stands between `<!-- NAME -->` and `<!-- end -->` is all that NAME.py printed, and the
table for NAME `report`. Of what did not run here, the old text stays, but in that table it is "not
measured".
"""

import argparse
import json
import re

from timing import KEPT, ROOT

from train_jax.metrics import table

# By benchmark: what is measured, its column and row (a table's title may stand before), what it
# should be at most.
LINES = {
  "train_step": (
    ("training loop / its step alone, iSM", "loop/ism_digits", 1.03),
    ("training loop / its step alone, SequenceMatch", "loop/seqmatch_arithmetic", 1.03),
    ("the step, of a bare gradient step, iSM", "engine/ism_digits", None),
    ("iSM step, of the flow step (counted: 1.34)", "ratio/ism_digits", 1.47),
  ),
  "data": (
    ("iSM on its data, of one batch again and again", "ratio/ism_digits, data", 1.03),
    ("arithmetic on its data", "ratio/seqmatch_arithmetic, data", 1.03),
    ("text on its data", "ratio/seqmatch_text, data", 1.03),
  ),
  "sinkhorn": (
    ("training with sOT solved ahead, of random pairs", "ratio/sOT, ahead", 1.04),
    ("training with sOT solved in between", "ratio/sOT, in between", None),
    ("cost of 2048 pairs by sOT, of the optimum", "2048 x 64/cost/sOT, blind", None),
    ("seconds for them, of SciPy's assignment", "2048 x 64/ratio/sOT, blind", None),
  ),
  "wavelet": (("wavelet loss and gradient, of the MSE's", "ratio/Haar", 1.3),),
  "sampling": (
    ("classifier-free guidance, of guidance as input", "ratio/classifier-free, 4 steps", None),
  ),
  "decode": (
    ("generation with <backspace>s, of without", "ratio/with <backspace>s", 1.1),
    ("generation without a cache, of with", "ratio/no cache", None),
    ("tree pass and gradient, of maximum likelihood", "ratio/SequenceMatch on trees", 1.15),
  ),
  "growth": (
    ("exponent of the iSM step in the batch", "exponent/iSM, batch", None),
    ("exponent of the SequenceMatch step in the context", "exponent/SequenceMatch, context", None),
    ("exponent of the pairing in the pool", "exponent/pairing, pool", None),
    ("exponent of generation in the length", "exponent/generation, length", None),
  ),
  "start": (
    ("seconds to the first step, cold", "seconds/ism_digits, cold", 20),
    ("seconds to the first step, compiled before", "seconds/ism_digits, compiled before", 8),
  ),
}


def read(name: str) -> dict:
  """What a benchmark kept; without tables if it did not run here."""
  path = KEPT / f"{name}.json"
  return json.loads(path.read_text()) if path.exists() else {"tables": {}, "command": ""}


def summary() -> str:
  """The table of LINES."""
  rows = ["| what | measured | at most | command |", "| --- | --- | --- | --- |"]
  for name, lines in LINES.items():
    record = read(name)
    numbers = {
      f"/{title}/{key}": value
      for title, found in record["tables"].items()
      for key, value in found.items()
    }
    command = f"`{record['command'] or f'python benchmarks/{name}.py'}`"
    for what, key, most in lines:
      found = [value for place, value in numbers.items() if place.endswith(f"/{key}")]
      measured = f"{found[0]:.2f}" if found else "not measured"
      rows.append(f"| {what} | {measured} | {most or ''} | {command} |")
  return "\n".join(rows)


def filled(marked: re.Match) -> str:
  """The text between two markers, made anew."""
  begin, name, old, end = marked.groups()
  if name == "report":
    return f"{begin}{summary()}\n{end}"
  record = read(name)
  if not record["tables"]:
    return begin + old + end
  tables = [f"{title}\n{table(numbers)}" for title, numbers in record["tables"].items()]
  return begin + "\n\n".join([f"```\n$ {record['command']}", *tables]) + f"\n```\n{end}"


def rewritten(text: str) -> str:
  """`text` with all that stands between markers made anew."""
  return re.sub(r"(<!-- (\w+) -->\n)(.*?)(<!-- end -->)", filled, text, flags=re.DOTALL)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--write", action="store_true", help="into docs/PERFORMANCE.md")
  if not parser.parse_args().write:
    return print(summary())
  path = ROOT / "docs" / "PERFORMANCE.md"
  path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
  main()
