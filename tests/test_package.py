import ast
import importlib
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_effdl


PACKAGE = Path(hf_effdl.__file__).parent
ROOMS = (
    "version",
    "checks",
    "files",
    "processes",
    "pictures",
    "random_state",
    "registration",
    "moved",
    "row_losses",
    "weighting",
    "weighted_sft",
)  # single files at the root

# Rooms of each pillar, lowest floor first: a file imports its own room and rooms on lower floors, never one beside it.
FLOORS = {
    "structure": [
        {"groups", "optim"},
        {"path", "calibration"},
        {"slim", "lora"},
        {"training"},
        {"tickets", "growing"},
    ],
    "samples": [{"scores"}, {"drawing"}, {"probes"}, {"language", "scale", "rounds"}, {"selection"}],
    "vicl": [{"remote_code"}, {"pool", "held_out"}, {"measure", "ranking"}, {"auto"}],
}
# Rooms whose files import torch and the standard library at the top, nothing heavier.
PURE = {"structure/groups", "structure/optim", "structure/path", "samples/scores", "samples/drawing"}
HEAVY = {"hf_effdl.structure.groups.slim_config"}  # is registered with transformers' loading code when imported
LIGHT = {"torch", "numpy", "safetensors"} | set(sys.stdlib_module_names)
# What a model's code on the Hub may count on.
TRAVELLERS = {"torch", "numpy", "PIL", "transformers", "safetensors", "huggingface_hub"}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in FILES}


def import_nodes(file: Path, top_level_only: bool = False):
    """`(module, names)` of every import of a file; typing and lazy ones too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = (PACKAGE.name, *file.parent.relative_to(PACKAGE).parts)
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*above, *([node.module] if node.module else []))), [alias.name for alias in node.names]


def imports(file: Path, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports, by their whole names; a name that is a module of ours counts as that module."""
    found = set()
    for module, names in import_nodes(file, top_level_only):
        ours = {f"{module}.{name}" for name in names} & set(MODULES)
        found |= ours or {module}
    return found


def room_of(module: str) -> tuple[str, str] | None:
    """Pillar and room of a module of the package; None for what belongs to no pillar."""
    parts = module.split(".")
    return (parts[1], parts[2]) if len(parts) > 2 and parts[0] == PACKAGE.name and parts[1] in FLOORS else None


def test_every_public_name_can_be_imported_and_says_what_it_is():
    for name in hf_effdl.__all__:
        value = getattr(hf_effdl, name)
        assert name == "__version__" or value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_effdl.nothing  # noqa: B018


def test_type_checkers_see_the_names_that_load_on_first_use():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typing = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typing.body for alias in node.names}
    assert {*seen, "__version__"} == set(hf_effdl.__all__)
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(hf_effdl, name)


@pytest.mark.alone
def test_importing_the_package_adds_little_to_torch_and_transformers():
    code = (
        "import sys, time, torch, transformers\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import hf_effdl\n"
        "spent, new = time.process_time() - start, {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(spent, *sorted(new - set(sys.stdlib_module_names)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    spent, *new = printed.split()
    assert float(spent) < 0.05 and new == ["hf_effdl"], printed


ORDERS = {
    "before the registry": "import hf_effdl, sys; assert 'transformers.quantizers' not in sys.modules",
    "after it": "import transformers.quantizers, hf_effdl",
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_the_package_registers_the_slim_sizes(order):
    code = (
        f"{ORDERS[order]}\nimport sys\nfrom transformers.quantizers import auto\n"
        "print('hf_effdl' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING, 'hf_effdl' in auto.AUTO_QUANTIZER_MAPPING)\n"
        "print(any('hf_effdl.registration' in type(finder).__module__ for finder in sys.meta_path))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["True", "True", "False"]


@pytest.mark.parametrize("pillar", FLOORS)
def test_imports_go_down_the_floors(pillar):
    height = {room: floor for floor, rooms in enumerate(FLOORS[pillar]) for room in rooms}
    wrong = []
    for name, file in MODULES.items():
        home = room_of(name)
        if home is None or home[0] != pillar:
            continue
        assert home[1] in height, f"{name} is in a room that FLOORS does not know"
        for module in imports(file):
            there = room_of(module)
            if there and (there[0] != pillar or (there[1] != home[1] and height[there[1]] >= height[home[1]])):
                wrong.append(f"{name} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_in_a_circle():
    graph = {name: (imports(file) & set(MODULES)) - {name} for name, file in MODULES.items() if name != PACKAGE.name}
    list(TopologicalSorter(graph).static_order())  # raises on one, and names it


def test_what_stands_below_the_pillars_imports_none():
    for name, file in MODULES.items():
        if name == PACKAGE.name or name.split(".")[1] not in {*ROOMS, "hub", "metrics"}:
            continue
        assert not {module for module in imports(file) if room_of(module)}, name
        assert PACKAGE.name not in imports(file), f"{name} imports the package's own face"


# What the command line's own files import at the top: they say what options there are, and torch would take long.
QUICK = {"hf_effdl.cli.arguments", "hf_effdl.cli.options", "hf_effdl.cli.sparsify", "hf_effdl.version"}
QUICK |= {"hf_effdl.launched", "transformers", "yaml"} | set(sys.stdlib_module_names)


def test_nothing_imports_the_command_line_and_its_verbs_are_quick():
    for name, file in MODULES.items():
        if not name.startswith("hf_effdl.cli"):
            assert not {module for module in imports(file) if module.startswith("hf_effdl.cli")}, name
        elif not name.startswith("hf_effdl.cli.work"):
            tops = {
                module if module.startswith(PACKAGE.name) else module.split(".")[0] for module in imports(file, True)
            }
            assert tops <= QUICK, f"{name} imports {tops - QUICK} at the top"


def test_no_file_imports_the_face_of_the_package():
    for name, file in MODULES.items():
        assert PACKAGE.name not in imports(file), name


def test_private_names_stay_in_their_file():
    for name, file in MODULES.items():
        for module, names in import_nodes(file):
            if module.split(".")[0] == PACKAGE.name and name != PACKAGE.name:
                assert not [one for one in names if is_private(one)], f"{name} imports from {module}: {names}"


def test_the_maths_imports_only_torch_and_the_standard_library():
    for name, file in MODULES.items():
        folder = "/".join(name.split(".")[1:3])
        if folder in PURE and name not in HEAVY:
            heavy = {module for module in imports(file, top_level_only=True) if not is_light(module)}
            assert not heavy, f"{name} imports {heavy} at the top"


def is_light(module: str) -> bool:
    top = module.split(".")[0]
    if top != PACKAGE.name:
        return top in LIGHT
    return "/".join(module.split(".")[1:3]) in PURE or module.split(".")[1] in ROOMS


def test_every_sub_package_says_what_its_rooms_are_and_nothing_else():
    for name, file in MODULES.items():
        if file.name == "__init__.py" and name != PACKAGE.name and "metrics" not in name:
            body = ast.parse(file.read_text(encoding="utf-8")).body
            assert len(body) == 1 and ast.get_docstring(ast.Module(body, [])), name


def test_what_travels_with_a_model_imports_its_siblings_and_well_known_packages_only():
    """transformers finds a model's files by regular expressions over the text, and puts them into one flat folder."""
    folder = PACKAGE / "vicl" / "remote_code"
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
    for file in folder.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{file.name}: {ast.unparse(node)}"
                assert (folder / f"{node.module}.py").is_file(), f"{file.name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                for top in (module.split(".")[0] for module in modules):
                    assert top in TRAVELLERS or top in sys.stdlib_module_names, f"{file.name} imports {top}"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"^\s*from \.", node.value, re.MULTILINE), (
                    f"{file.name}: an import within a string"
                )


def functions():
    """`(where, node)` of every function of the package."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield f"{name_of(file)}:{node.lineno} {node.name}", node


def own_nodes(function: ast.FunctionDef):
    """The nodes of a function without those of functions and classes inside it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)


def complexity(function: ast.FunctionDef) -> int:
    """Cyclomatic complexity: one, and one more for every way that a line can branch (McCabe 1976)."""
    branches = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.match_case)
    nodes = list(own_nodes(function))
    count = 1 + sum(isinstance(node, branches) for node in nodes)
    count += sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return count + sum(1 + len(node.ifs) for node in nodes if isinstance(node, ast.comprehension))


def code_lines(function: ast.FunctionDef) -> int:
    first = function.body[1:2] if ast.get_docstring(function) is not None else function.body[:1]
    return function.end_lineno - first[0].lineno + 1 if first else 0


def test_functions_are_short_and_plain():
    sizes = [(complexity(node), code_lines(node), where) for where, node in functions()]
    assert not [row for row in sizes if row[0] > 20]
    assert not [row for row in sizes if row[1] > 60]
    dense = [row for row in sizes if row[0] > 10]
    assert len(dense) < 0.05 * len(sizes), f"{len(dense)} of {len(sizes)}: {sorted(dense)}"


# Names of others that begin with an underscore, and why there is no public way. The list can only shrink.
PRIVATE_UPSTREAM = {
    "_set_signature_columns_if_needed": "Trainer offers no other way to keep a column",
    "_signature_columns": "Trainer offers no other way to keep a column",
    "_prepare_dataset": "SFTTrainer drops all columns but two when it packs rows",
    "_is_accelerate_prepared": "Accelerate has no call that takes its marks off a copy of a model",
    "_original_forward": "Accelerate has no call that takes its marks off a copy of a model",
    "_fingerprint": "datasets has no public name for a data set's identity",
    "_indices": "datasets has no public way to say whether rows were picked",
    "_ConvNd": "torch has no public class above all convolutions",
    "_NormBase": "torch has no public class above all norms with running statistics",
    "_BatchNorm": "torch has no public class above all batch norms",
    "_dynamo": "torch.compile's errors have no public home",
    "_int_mm": "torch has no public product of bytes",
    "_from_config": "transformers' public from_config wants an Auto class",
    "_is_quantized": "a stock model saved again must not name a quantisation method that it no longer needs",
    "_batch_size": "a pipeline's own batch size has no public name",
    "_forward_params": "a pipeline's defaults have no public name",
}


def test_private_names_of_others_are_few_and_each_has_a_reason():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and (isinstance(node.ctx, ast.Load) or node.attr in PRIVATE_UPSTREAM):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] != PACKAGE.name:
            used |= {*node.module.split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Constant) and node.value in PRIVATE_UPSTREAM:
            used.add(node.value)
    used = {name for name in used if is_private(name) and (name not in own or name in PRIVATE_UPSTREAM)}
    assert used == set(PRIVATE_UPSTREAM), sorted(used ^ set(PRIVATE_UPSTREAM))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_nothing_of_the_tracer_leaks_into_the_public_interface():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "trace.py":
            assert "torch_pruning" not in imports(file), file
    groups = importlib.import_module("hf_effdl.structure.groups.group")
    assert not any(getattr(value, "__module__", "").startswith("torch_pruning") for value in vars(groups).values())


def test_torch_load_is_only_used_for_plain_values():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                assert "weights_only=True" in ast.unparse(node), file


def test_every_file_that_is_no_module_is_package_data():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["hf_effdl"]
    packaged = {file for pattern in patterns for file in PACKAGE.glob(pattern)}
    others = {file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert others == packaged and any(file.suffix == ".cpp" for file in packaged)
