"""Imports run one way, and `import mcl` loads only what sampling needs."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mcl"
# Layers of DESIGN.md from the lowest to the highest. A module imports modules of its own layer
# (without circles) and of lower layers.
METHOD = ("schedule", "context_windows", "motion", "guidance", "sampler", "inversion", "semantic",
          "presets")
LAYERS = (("errors",), ("config", "ownership", "files", "device", "video"), ("networks",),
          ("schedule",), ("model",), METHOD[1:], ("checkpoints",), ("clone",), ("",),
          ("evaluation",), ("cli", "__main__"))
# These know nothing of the rest.
INDEPENDENT = ("video", "ownership", "files", "device", "errors")


# Path of each module by its name inside the package; "" is the package itself.
NAMES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__")
         .rstrip("."): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(name, nodes):
    """Return the modules of the package that import statements of a module name."""
    is_package = NAMES[name].name == "__init__.py"
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name.removeprefix("mcl.") for alias in node.names
                        if alias.name.startswith("mcl")}
        elif isinstance(node, ast.ImportFrom):
            parents = ["mcl", *filter(None, name.split("."))]
            base = parents[:len(parents) - node.level + is_package] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            if source.split(".")[0] == "mcl":
                source = source.removeprefix("mcl").lstrip(".")
                modules |= {full if (full := f"{source}.{alias.name}".lstrip(".")) in NAMES
                            else source for alias in node.names}
    return modules - {name}


def top_level_imports(name):
    return imported_modules(name, ast.parse(NAMES[name].read_text("utf-8")).body)


def all_imports(name):
    return imported_modules(name, ast.walk(ast.parse(NAMES[name].read_text("utf-8"))))


def layer(name):
    part = name.split(".")[0]
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_module_imports_only_its_own_and_lower_layers(name):
    modules = all_imports(name)
    assert {module for module in modules if layer(module) > layer(name)} == set()
    if name.split(".")[0] in INDEPENDENT:
        assert {module.split(".")[0] for module in modules} <= set(INDEPENDENT)


def test_imports_have_no_circles():
    remaining = {name: top_level_imports(name) for name in NAMES}
    while free := {name for name, modules in remaining.items() if not modules & set(remaining)}:
        remaining = {name: modules for name, modules in remaining.items() if name not in free}
    assert not remaining


def test_only_the_command_line_parses_arguments():
    assert [name for name in NAMES if "argparse" in NAMES[name].read_text("utf-8")
            and not name.startswith("cli.")] == []


def test_import_mcl_loads_no_converter_no_evaluation_no_command_line_and_no_compiler():
    """Neither the import nor loading a model prints or warns anything."""
    code = ("import sys, mcl; loaded = list(sys.modules); mcl.load_model(device='cpu')\n"
            "print(*(name for name in loaded if name.startswith('mcl.')))\n"
            "print(*(name for name in sys.modules if name.startswith('torch._dynamo')))")
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=PACKAGE.parent,
                             capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    loaded, compiler = map(str.split, process.stdout.splitlines())
    assert "mcl.clone" in loaded and compiler == []
    assert [name for name in loaded if name.startswith(("mcl.evaluation", "mcl.cli"))] == []
    assert {name for name in loaded if name.startswith("mcl.checkpoints.")} == {
        "mcl.checkpoints.model_file", "mcl.checkpoints.from_state_dicts"}
