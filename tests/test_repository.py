"""The repository's shape: file lengths, top-level names, import direction, configs, and the README's commands."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = {
    "pyproject.toml",
    "README.md",
    "unclip_jax",
    "configs",
    "tests",
    "tpu_scripts",
    "notebooks",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
}
LAYERS = (  # a module may import from its own layer and from those before it
    ("types", "config", "sharding", "compile_cache", "pictures", "preemption", "watchdog"),
    ("diffusion", "models", "checkpoint", "overrides", "optim", "contrastive", "masks", "preflight"),
    ("data", "stages", "hosts", "offload"),
    ("train", "inputs", "rank"),
    ("cascade", "interop", "priors", "output", "curate"),
    ("generate", "plan"),
    ("edit", "inpaint", "outpaint", "mural", "redraw", "bench"),
    ("evaluate", "run", "doctor"),
    ("sample", "sample_command", "edit_files", "paint_files"),  # a command's options import nothing heavy
    ("cli", "edit_command", "paint_command", "embed_command", "data_command", "eval_command", "check_command"),
)


def files() -> list[Path]:
    """Tracked files and those about to be, relative to the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(line) for line in listing.splitlines() if (ROOT / line).exists()]


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it; `from a import b` counts as a and as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(module), level=0):
                names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_no_file_is_longer_than_400_lines():
    lengths = {p: len((ROOT / p).read_text(encoding="utf-8").splitlines()) for p in files() if p.suffix == ".py"}
    assert len(lengths) > 20
    assert {path: n for path, n in lengths.items() if n > 400} == {}


def test_top_level_names():
    assert {path.parts[0] for path in files() if not path.parts[0].startswith(".")} == TOP


def test_readme_has_both_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'unclip sample "' in readme
    assert "pip install -e '.[train,test]' && pytest -q tests" in readme
    assert "pytest -q tests" in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "unclip_jax/diffusion").glob("*.py")), ids=lambda path: path.stem)
def test_diffusion_sees_no_network(path):
    seen = {name for name in imports(path) if name.split(".")[0] == "flax" or name.startswith("unclip_jax.models")}
    assert seen == set()


def test_every_module_has_its_layer():
    modules = {
        path.stem for path in (ROOT / "unclip_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert modules - {"__init__"} == {name for names in LAYERS for name in names}


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_imports_point_one_way(layer):
    above = {f"unclip_jax.{name}" for names in LAYERS[layer + 1 :] for name in names}
    for name in LAYERS[layer]:
        package = ROOT / "unclip_jax" / name
        for path in [*package.rglob("*.py"), *package.parent.glob(f"{name}.py")]:
            upward = {found for found in imports(path) if ".".join(found.split(".")[:2]) in above}
            assert upward == set(), f"{path.relative_to(ROOT)} imports from above"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_loads(path):
    import runpy

    from unclip_jax.config import TrainConfig

    config = runpy.run_path(str(path))["get_config"]()
    assert isinstance(config, TrainConfig)
    assert config.name == path.stem
