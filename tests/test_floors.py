"""Arrows point down: who may import whom, as a table, and what `import poisonshield` may load."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from walk import FLOORS

PACKAGE = Path(__file__).resolve().parents[1] / "poisonshield"

# Same floor, and still allowed: foundations that their whole floor stands on.
BESIDE = {
    ("config", "errors"), ("config", "registry"), ("config", "files"), ("registry", "errors"), ("files", "errors"),
    ("terminal", "plain"),
    ("batch", "random"), ("ops", "random"), ("method", "losses"), ("method", "models"), ("world", "methods"),
    ("runs", "reports"), ("api", "runs"), ("api", "reports"),
    ("commands", "bench"), ("commands", "chaos"), ("cli", "commands"),
}  # fmt: skip

# Heavy packages and the files that are their doors.
DOORS = {
    "deepspeed": {"engine/backends/deepspeed.py"},
    "webdataset": {"bench/stream.py", "data/tars.py"},
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

    def find(name):
        path = name.removeprefix("poisonshield.").replace(".", "/")
        return {f"{path}{end}" for end in (".py", "/__init__.py")} & set(known)

    files = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            files |= set().union(*(find(alias.name) for alias in node.names))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # a file of the folder, or a name of its __init__
                files |= find(f"{node.module}.{alias.name}") or find(node.module)
    return files


def import_graph():
    """(file, files that it imports)."""
    trees = dict(modules())
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
    tangle = first_circle(dict(import_graph()))
    assert not tangle, " -> ".join(tangle)


def test_a_circle_is_found_however_it_is_imported():
    files = {"a.py": "def f():\n    import poisonshield.b", "b.py": "if TYPE_CHECKING:\n    from poisonshield import a"}
    graph = {name: files_imported(ast.parse(text), files.keys()) for name, text in files.items()}
    assert set(first_circle(graph)) == {"a.py", "b.py"} and not first_circle({**graph, "b.py": set()})


# Contracts and records that whoever composes may ask about: not one thing among others of its kind.
CONTRACTS = {"Choice", "Batch", "Concept", "Method", "Path", "Tensor"}


def recognitions(relative, tree):
    """Places where a file asks whether something is a certain class of another room, or looks for its attribute.

    isinstance and issubclass with a class imported from another room, `is` with one, and getattr of a literal name with
    a default on anything. What a contract does not declare is not asked for (style: nobody recognises anybody).
    """
    others = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("poisonshield."):
            room = node.module.split(".")[1]
            if room != part_of(relative) and FLOORS.get(room, 0) > 0:
                others |= {alias.asname or alias.name: room for alias in node.names}
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            found = [n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)]
        elif isinstance(node, ast.Compare) and any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            found = [n.id for n in (node.left, *node.comparators) if isinstance(n, ast.Name)]
        yield from (f"{relative}:{node.lineno} asks for {n}" for n in found if n in others and n not in CONTRACTS)


def test_nobody_recognises_anybody():
    wrong = [line for relative, tree in modules() for line in recognitions(relative, tree)]
    assert not wrong, "\n".join(wrong)


def test_nobody_looks_for_an_attribute_of_another_room():
    """getattr(x, "name", default) is left to foreign objects: torch's, timm's, Pillow's, DeepSpeed's."""
    rooms = ("runs", "api", "commands", "engine", "defenses", "evals", "methods", "poisons", "attacks", "reports")
    wrong = [
        f"{relative}:{node.lineno}"
        for relative, tree in modules()
        if part_of(relative) in rooms
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) == 3
        if isinstance(node.args[1], ast.Constant) and node.args[1].value != "is_cross_attention"
    ]
    assert not wrong, wrong


def test_recognition_is_found():
    tree = ast.parse("from poisonshield.defenses.jpeg import JPEG\nx = isinstance(d, JPEG)\ny = d.cls is JPEG")
    assert len(list(recognitions("runs/classify.py", tree))) == 2
    assert not list(recognitions("defenses/other.py", tree))


def test_every_part_has_a_floor():
    parts = {part_of(relative) for relative, _ in modules()}
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
