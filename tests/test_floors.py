"""Arrows point down: who may import whom, as a table, and what `import poisonshield` may load."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "poisonshield"

FLOORS = {
    "errors": 0, "registry": 0, "config": 0,
    "ops": 1, "batch": 1, "collectives": 1, "random": 1, "keys": 1,
    "losses": 2, "attacks": 2, "models": 2, "data": 2, "method": 2,
    "methods": 3, "defenses": 3, "poisons": 3, "evals": 3, "world": 3,
    "engine": 4,
    "runs": 5, "api": 5, "reports": 5,
    "commands": 6, "bench": 6, "cli": 6,
}  # fmt: skip

# Same floor, and still allowed: foundations that their whole floor stands on.
BESIDE = {
    ("config", "errors"), ("config", "registry"), ("registry", "errors"),
    ("batch", "random"), ("ops", "random"), ("method", "losses"), ("method", "models"), ("world", "methods"),
    ("runs", "reports"), ("api", "runs"), ("api", "reports"), ("commands", "bench"), ("cli", "commands"),
}  # fmt: skip

# Heavy packages and the files that are their doors.
DOORS = {
    "deepspeed": {"engine/backends/deepspeed.py"},
    "webdataset": {"data/tars.py"},
    "timm": {"models/backbones.py"},
    "triton": {f"ops/{path.parent.name}/{path.name}" for path in PACKAGE.glob("ops/*/triton_*.py")}
    | {"ops/trigonometry.py"},
    "diffusers": {
        "bench/diffusion.py",
        "models/diffusion/pipeline.py",
        "models/diffusion/sampler.py",
        "world/small_pipeline.py",
    },
    "transformers": {"models/diffusion/pipeline.py", "models/feature_networks.py", "world/small_pipeline.py"},
    "wandb": set(),
}

# Rooms whose files never import each other in a circle, and the arrows that are let off: file -> files it may import.
ROOMS_WITHOUT_CIRCLES = {"poisons"}
CIRCLES_ALLOWED: dict[str, set[str]] = {}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def imported(tree):
    """Dotted names that a file imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            if node.module == "poisonshield":
                yield from (f"poisonshield.{alias.name}" for alias in node.names)
            else:
                yield node.module


def part_of(relative):
    return relative.split("/")[0].removesuffix(".py")


def upward_imports(relative, tree):
    own = part_of(relative)
    if own == "__init__":
        return
    for name in imported(tree):
        parts = name.split(".")
        if parts[0] != "poisonshield" or len(parts) == 1 or parts[1] == "__version__":
            continue
        other = parts[1]
        assert other in FLOORS, f"{relative} imports poisonshield.{other}, which has no floor: add it to the table"
        if other != own and FLOORS[other] >= FLOORS[own] and (own, other) not in BESIDE:
            yield f"{relative} ({FLOORS[own]}) imports {'.'.join(parts[1:])} ({FLOORS[other]})"


def files_imported(tree, known):
    """Those of the known files that a file imports at any depth, inside functions and for types alone too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {name.removeprefix("poisonshield.").replace(".", "/") for name in names if name.startswith("poisonshield.")}
    return {f"{path}{end}" for path in paths for end in (".py", "/__init__.py")} & set(known)


def import_graph():
    """(file, files that it imports), within the rooms where arrows run one way already."""
    trees = {name: tree for name, tree in modules() if part_of(name) in ROOMS_WITHOUT_CIRCLES}
    return [(name, files_imported(tree, trees)) for name, tree in trees.items()]


def first_circle(graph):
    """The files of one circle of imports, none if arrows run one way."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as err:
        return err.args[1]
    return []


def test_imports_point_down():
    wrong = [line for relative, tree in modules() for line in upward_imports(relative, tree)]
    assert not wrong, "\n".join(wrong)


def test_the_check_can_fail():
    tree = ast.parse("from poisonshield.engine import trainer\nimport poisonshield.poisons.lsp")
    assert list(upward_imports("methods/simclr.py", tree)) == [
        "methods/simclr.py (3) imports engine (4)",
        "methods/simclr.py (3) imports poisons.lsp (3)",
    ]


def test_only_the_top_floor_and_data_itself_import_data():
    wrong = [
        relative
        for relative, tree in modules()
        if part_of(relative) not in ("data", "world", "runs", "api", "reports", "commands", "bench", "cli")
        and any(n.startswith("poisonshield.data") for n in imported(tree))
    ]
    assert not wrong


def test_no_file_imports_itself_around_a_corner():
    tangle = first_circle({name: arrows - CIRCLES_ALLOWED.get(name, set()) for name, arrows in import_graph()})
    assert not tangle, " -> ".join(tangle)


def test_a_circle_is_found_however_it_is_imported():
    files = {"a.py": "def f():\n    import poisonshield.b", "b.py": "if TYPE_CHECKING:\n    from poisonshield import a"}
    graph = {name: files_imported(ast.parse(text), files.keys()) for name, text in files.items()}
    assert set(first_circle(graph)) == {"a.py", "b.py"} and not first_circle({**graph, "b.py": set()})


def test_every_part_has_a_floor():
    parts = {part_of(relative) for relative, _ in modules()} - {"__init__"}
    assert parts == set(FLOORS)


def test_attacks_and_models_do_not_see_each_other():
    for relative, tree in modules():
        pair = {"attacks": "models", "models": "attacks"}.get(part_of(relative))
        assert pair is None or not any(n.startswith(f"poisonshield.{pair}") for n in imported(tree)), relative


@pytest.mark.parametrize("package", sorted(DOORS))
def test_heavy_packages_come_in_by_their_door(package):
    users = {relative for relative, tree in modules() if any(n.split(".")[0] == package for n in imported(tree))}
    assert users <= DOORS[package], f"{package} is imported by {sorted(users - DOORS[package])}"


def test_library_code_does_not_print():
    wrong = [
        f"{relative}:{node.lineno}"
        for relative, tree in modules()
        if part_of(relative) not in ("commands", "cli") and not relative.endswith("draw.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not wrong


def test_no_file_is_called_utils():
    assert not [p for p, _ in modules() if Path(p).stem in ("utils", "helpers", "common", "misc")]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_takes_under_a_second_beyond_torch():
    seconds = run_python(
        "import torch, time; start = time.perf_counter(); import poisonshield; print(time.perf_counter() - start)"
    )
    assert float(seconds) < 1.0


def test_import_loads_no_heavy_package():
    loaded = run_python(
        "import sys, poisonshield, poisonshield.api; print(*{m.split('.')[0] for m in sys.modules})"
    ).split()
    assert "torch" in loaded
    assert not set(loaded) & {"triton", "deepspeed", "diffusers", "webdataset", "timm", "matplotlib"}
