"""The laws of docs/ARCHITECTURE.md: every import and every class of the project is read."""

import ast
import re
import sys
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE, METHODS = "train_jax", ("ism_jax", "seqmatch_jax")
PACKAGES = (*METHODS, ENGINE)
ASSEMBLE = ("method", "model", "commands")  # files at the top that may import rooms
LAZY = ("model", "commands")  # ... and do so when a function of theirs is called
ONE_A_METHOD = {"LossConfig", "Model"}  # no other class name exists twice


def module_name(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
  module_name(path): path
  for top in (*PACKAGES, "configs", "tools", "benchmarks")
  for path in sorted((ROOT / top).rglob("*.py"))
} | {"main": ROOT / "main.py"}


@cache
def parse(name: str) -> ast.Module:
  return ast.parse(FILES[name].read_text())


def found(node: ast.AST, functions: bool):
  """The modules that are imported below a node, inside functions as well or not.

  Those of `if TYPE_CHECKING` are annotations.
  """
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
      continue
    if isinstance(child, ast.Import):
      yield from (alias.name for alias in child.names)
    elif isinstance(child, ast.ImportFrom):
      assert not child.level, "imports are absolute"
      for alias in child.names:
        whole = f"{child.module}.{alias.name}"
        yield whole if whole in FILES else child.module
    elif functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
      yield from found(child, functions)


@cache
def imports(name: str, functions: bool = True) -> frozenset[str]:
  return frozenset(found(parse(name), functions))


@cache
def reached(name: str) -> frozenset[str]:
  """All that is imported by importing a module: other people's packages by their first name."""
  seen, waiting = set(), [name]
  while waiting:
    module = waiting.pop()
    parts = module.split(".")
    for parent in (".".join(parts[: i + 1]) for i in range(len(parts))):
      if parent not in seen:
        seen.add(parent)
        waiting += imports(parent, functions=False) if parent in FILES else ()
  return frozenset(seen)


def top(name: str) -> str:
  return name.partition(".")[0]


def room(name: str) -> str:
  """The package inside a package that a module belongs to; a file at the top is its own room."""
  parts = name.split(".")
  folder = FILES[name].name == "__init__.py"
  return ".".join(parts[:2] if len(parts) > 2 or folder else parts)


def inside(*tops: str) -> list[str]:
  return [name for name in FILES if top(name) in tops]


def rooms_of(package: str) -> list[str]:
  return sorted(p.parent.name for p in (ROOT / package).glob("*/__init__.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_method_imports_itself_and_the_engine_and_the_engine_only_itself(package):
  ours = {top(name) for name in FILES}
  for name in inside(package):
    others = {module for module in imports(name) if top(module) in ours - {package, ENGINE}}
    assert not others, f"{name} imports {others}"


@pytest.mark.parametrize("package", METHODS)
def test_the_core_of_a_method_imports_none_of_its_rooms(package):
  rooms = {f"{package}.{name}" for name in rooms_of(package)}
  assert rooms >= {f"{package}.data", f"{package}.evaluation"}
  core = [name for name in inside(package) if FILES[name].parent.name == package]
  assert len(core) > len(ASSEMBLE)
  for name in core:
    used = {module for module in imports(name) if module in FILES and room(module) in rooms}
    assert not used or FILES[name].stem in ASSEMBLE, f"{name} imports {used}"


def test_networks_import_nothing_of_the_package_but_each_other():
  networks = [name for name in FILES if name.startswith("ism_jax.networks.")]
  assert networks
  for name in networks:
    used = {module for module in imports(name) if top(module) == "ism_jax"}
    assert all(module.startswith("ism_jax.networks") for module in used), f"{name} imports {used}"


def test_configs_import_no_framework():
  known = {*sys.stdlib_module_names, "configs", "ml_collections"}
  for name in inside("configs"):
    assert {top(module) for module in imports(name)} <= known, name


def sort(graph: dict[str, set[str]]) -> None:
  try:
    tuple(TopologicalSorter(graph).static_order())
  except CycleError as err:
    pytest.fail(f"they import each other: {' <- '.join(err.args[1])}")


def test_no_files_and_no_rooms_import_each_other():
  files, rooms = {}, defaultdict(set)
  for name in FILES:
    lazy = top(name) in METHODS and name.count(".") == 1 and FILES[name].stem in LAZY
    used = {module for module in imports(name, functions=not lazy) if module in FILES}
    files[name] = used
    rooms[room(name)] |= {room(module) for module in used} - {room(name)}
  assert {"ism_jax.evaluation", "ism_jax.loss", "train_jax.storage", "main"} <= {*rooms}
  sort(files)
  sort(rooms)


TRAINING = (
  "train_jax.loop",
  "train_jax.checkpointing",
  "train_jax.optim",
  "orbax",
  "optax",
  "grain",
  "ml_collections",
)


@pytest.mark.parametrize(
  ("module", "unneeded"),
  [
    ("ism_jax.model", ("ism_jax.data", "ism_jax.evaluation", "ism_jax.networks", *TRAINING)),
    ("seqmatch_jax.model", ("seqmatch_jax.data", "seqmatch_jax.evaluation", *TRAINING)),
    ("ism_jax.commands", ("ism_jax.model", "ism_jax.data", *TRAINING[:-1])),  # --help is quick
    ("seqmatch_jax.commands", ("seqmatch_jax.model", "seqmatch_jax.data", *TRAINING[:-1])),
    ("ism_jax.evaluation.spec", ("matplotlib", "ism_jax.sample")),
    ("ism_jax.data.latents", ("ism_jax.sample", "ism_jax.evaluation")),
    ("ism_jax.networks.dinov2", ("ism_jax.networks.inception",)),
    ("main", ("tools", "ism_jax", "seqmatch_jax")),
  ],
)
def test_what_is_not_needed_is_not_imported(module, unneeded):
  assert "train_jax.errors" in reached(module)
  assert not reached(module) & {*unneeded}


def test_no_two_classes_share_a_name():
  places = defaultdict(list)
  for name in FILES:
    for node in ast.walk(parse(name)):
      if isinstance(node, ast.ClassDef):
        places[node.name].append(name)
  shared = {name: where for name, where in places.items() if len(where) > 1}
  assert {*shared} == ONE_A_METHOD, shared
  assert all(sorted(map(top, where)) == [*METHODS] for where in shared.values()), shared


def test_every_room_has_a_sentence_and_is_on_the_page():
  page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
  rooms = [f"{package}.{name}" for package in PACKAGES for name in rooms_of(package)]
  for name in rooms:
    assert ast.get_docstring(parse(name)), name
    assert f"`{name.replace('.', '/')}/`" in page, name


def test_the_page_names_files_that_are_there():
  page = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
  folders, files = re.findall(r"`((?:\w+/)+)`", page), re.findall(r"`((?:\w+/)*\w+\.py)`", page)
  assert len(folders) > 15 and len(files) > 50
  assert [path for path in folders if not (ROOT / path).is_dir()] == []
  known = [f"/{path.relative_to(ROOT)}" for path in (*FILES.values(), Path(__file__))]
  assert [file for file in files if not any(path.endswith(f"/{file}") for path in known)] == []
