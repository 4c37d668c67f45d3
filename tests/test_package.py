import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_effdl


PACKAGE = Path(hf_effdl.__file__).parent
PURE = [
    f"structure/{name}.py"
    for name in ("groups", "param_group_checks", "path", "prox", "schedule", "settling", "sharding", "split_lbi")
]
PURE += [f"samples/{name}.py" for name in ("uncertainty", "sampling", "noise", "planning")]
PURE += [
    f"vicl/{name}.py"
    for name in ("losses", "aggregation", "reliable", "designs", "covering_tables", "cascade_features", "row_model")
]
LIGHT = {
    "torch",
    "numpy",
    "math",
    "json",
    "os",
    "collections",
    "dataclasses",
    "pathlib",
    "typing",
    "safetensors",
    "statistics",
    "copy",
    "functools",
    "hashlib",
    "numbers",
    "warnings",
}
# what a model's code on the Hub may count on
TRAVELLERS = {"torch", "numpy", "PIL", "transformers", "safetensors", "huggingface_hub"}


def imports(file: Path, top_level_only: bool = False) -> set[str]:
    """Modules that a file of the package imports, by their whole names."""
    tree = ast.parse(file.read_text())
    folders = ("hf_effdl", *file.parent.relative_to(PACKAGE).parts)
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = folders[: len(folders) - node.level + 1] if node.level else ()
            found.add(".".join((*above, *([node.module] if node.module else []))))
    return found


def test_every_public_name_can_be_imported_and_says_what_it_is():
    for name in hf_effdl.__all__:
        value = getattr(hf_effdl, name)
        assert name == "__version__" or value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_effdl.nothing  # noqa: B018


def test_importing_the_package_adds_little_to_torch_and_transformers():
    code = (
        "import torch, transformers, transformers.quantizers, time; start = time.perf_counter(); import hf_effdl;"
        "print(time.perf_counter() - start); import sys;"
        "heavy = [m for m in ('datasets', 'accelerate', 'matplotlib', 'torch_pruning', 'peft') if m in sys.modules];"
        "before = set(heavy); print([m for m in heavy if m not in OTHERS])"
    )
    probe = (
        "import torch, transformers, transformers.quantizers, sys;"
        "print(sorted(m for m in sys.modules if '.' not in m))"
    )
    others = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    outputs = [
        subprocess.run(
            [sys.executable, "-c", f"OTHERS = {others}\n" + code.replace("import torch", "import torch", 1)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        for _ in range(3)
    ]
    assert min(float(lines[0]) for lines in outputs) < 0.3
    assert outputs[0][1] == "[]", f"import hf_effdl loads {outputs[0][1]}"


def test_importing_the_package_registers_the_slim_sizes():
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert "hf_effdl" in AUTO_QUANTIZATION_CONFIG_MAPPING and "hf_effdl" in AUTO_QUANTIZER_MAPPING


def test_the_maths_imports_only_torch_and_the_standard_library():
    for file in PURE:
        outside = {
            name
            for name in imports(PACKAGE / file, top_level_only=True)
            if name.split(".")[0] not in LIGHT and f"{name.replace('.', '/').removeprefix('hf_effdl/')}.py" not in PURE
        }
        assert not outside, f"{file} imports {outside}"


def test_pillars_do_not_import_each_other_and_the_hub_folder_imports_none():
    pillars = [folder for folder in ("structure", "samples", "vicl") if (PACKAGE / folder).is_dir()]
    for folder in [*pillars, "hub"]:
        for file in (PACKAGE / folder).rglob("*.py"):
            wrong = {
                name
                for name in imports(file)
                for other in pillars
                if other != folder and name.startswith(f"hf_effdl.{other}")
            }
            assert not wrong, f"{file} imports {wrong}"


def test_what_travels_with_a_model_imports_its_siblings_and_well_known_packages_only():
    folder = PACKAGE / "vicl"
    waiting, seen = {"pipeline_visual_in_context", "modeling_listwise_ranker", "ranker_selector"}, set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{name}: {ast.unparse(node)}"
                waiting |= {node.module} - seen
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                for module in modules:
                    top = module.split(".")[0]
                    assert top in TRAVELLERS or top in sys.stdlib_module_names, f"{name} imports {module}"
    assert {"pool_reader", "visual_tasks", "seggpt_in_context", "feature_matching", "example_selectors"} <= seen
    assert {"cascade", "cascade_fit", "cascade_head", "consensus", "row_model", "designs", "aggregation"} <= seen
    assert not {"pool", "labels", "auto", "held_out", "ranking_lists", "ranker_trainer"} & seen


def test_what_all_pillars_share_imports_none_of_them():
    for file in ("weighting.py", "random_state.py"):
        assert not {name for name in imports(PACKAGE / file) if name.startswith("hf_effdl.")}, file


def test_nothing_of_the_tracer_leaks_into_the_public_interface():
    for file in PACKAGE.rglob("*.py"):
        if file.name != "tracing.py":
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
