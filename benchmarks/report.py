"""The table of docs/PERFORMANCE.md, from what the benchmarks last measured here.

for name in train_step wavelet sampling sinkhorn decode data start; do
  python benchmarks/$name.py
done
python benchmarks/report.py > table.md
"""

import json

from timing import ROOT

# (benchmark, what is measured, its column and row, what it should be at most)
LINES = (
  ("train_step", "the engine around a bare gradient step, iSM", "engine/ism_digits", 1.03),
  ("train_step", "iSM step, of the flow step (counted: 1.34)", "ratio/ism_digits", 1.47),
  ("data", "iSM on its data, of one batch repeated", "ratio/ism_digits, data", 1.03),
  (
    "data",
    "SequenceMatch on its data, of one batch repeated",
    "ratio/seqmatch_arithmetic, data",
    1.03,
  ),
  ("sinkhorn", "training with sOT solved ahead, of random pairs", "ratio/sOT, ahead", 1.04),
  ("wavelet", "wavelet loss and gradient, of the MSE's", "ratio/Haar", 1.3),
  (
    "sampling",
    "classifier-free guidance, of guidance as input",
    "ratio/classifier-free, 4 steps",
    None,
  ),
  ("decode", "generation with <backspace>s, of without", "ratio/with <backspace>s", 1.1),
  ("decode", "generation without a cache, of with", "ratio/no cache", None),
  ("decode", "tree pass and gradient, of maximum likelihood", "ratio/SequenceMatch on trees", 1.15),
  ("start", "seconds to the first step, cold", "seconds/ism_digits, cold", 20),
  ("start", "seconds to the first step, compiled before", "seconds/ism_digits, compiled before", 8),
)


def main() -> None:
  print("| what | measured | at most | command |\n| --- | --- | --- | --- |")
  for name, what, key, most in LINES:
    path = ROOT / "runs" / "benchmarks" / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {"tables": {}, "command": ""}
    found = [numbers[key] for numbers in record["tables"].values() if key in numbers]
    measured = f"{found[0]:.2f}" if found else "not measured"
    print(f"| {what} | {measured} | {most or ''} | `{record['command']}` |")


if __name__ == "__main__":
  main()
