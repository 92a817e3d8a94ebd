from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import kvconvert.configs
import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("cli", "configs", "convert", "measure", "pipeline", "uptrain")


def test_every_package_of_the_tree_is_installed() -> None:
    """A sub-package missing from the list works in an editable install and is absent from the wheel."""
    found = {
        "kvconvert." + str(path.parent.relative_to(ROOT)).replace("/", ".")
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == found
    assert {name: path for name, path in setuptools["package-dir"].items() if "/" not in path} == {
        f"kvconvert.{folder}": folder for folder in FOLDERS
    }
    assert all((ROOT / folder / "py.typed").exists() for folder in FOLDERS)


def test_every_file_of_configs_is_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["kvconvert.configs"]
    covered = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern) if path.is_file()}
    data = {path for path in (ROOT / "configs").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert covered == {path for path in data if path.name != "py.typed"}
    assert kvconvert.configs.PRETRAINING_TOKENS.exists()
    assert (kvconvert.configs.DEMO / "model" / "model.safetensors").exists()
    assert kvconvert.configs.CALIBRATION_TEXT in covered


def test_data_beside_code_is_package_data() -> None:
    """What is missing from the list works in an editable install and is absent from the wheel."""
    listed = {
        path
        for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.removeprefix("kvconvert.").replace(".", "/")).glob(pattern)
    }
    code = [ROOT / folder for folder in FOLDERS if folder != "configs"]
    for kind in ("*.json", "*.j2"):
        found = {path for folder in code for path in folder.rglob(kind)}
        assert found
        assert found <= listed


def test_demo_sizes() -> None:
    """The checkpoint stays under 12 MB, its texts together under 4 MB."""
    sizes = {path.name: path.stat().st_size for path in (ROOT / "configs" / "demo").rglob("*") if path.is_file()}
    assert sizes["model.safetensors"] <= 12e6
    assert sizes["uptrain.jsonl"] + sizes["heldout.jsonl"] <= 4e6


def test_public_names_exist() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            exported = [
                ast.literal_eval(node.value)
                for node in tree.body
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
            ]
            names = {
                name
                for node in tree.body
                for name in (
                    [node.name]
                    if isinstance(node, ast.FunctionDef | ast.ClassDef)
                    else [getattr(target, "id", "") for target in getattr(node, "targets", [])]
                    or [getattr(getattr(node, "target", None), "id", "")]
                )
            }
            names |= {
                alias.asname or alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
            for name in exported[0] if exported else []:
                assert name in names, f"{path}: {name}"


def test_the_version_is_written_once() -> None:
    assert version("kvconvert") == PROJECT["project"]["version"]
    assert f"## {version('kvconvert')}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("tag", "changes", "error"),
    [
        (None, "Unreleased", None),
        ("v1.2.3", "1.2.3 (2026-11-28)", None),
        ("nightly", "Unreleased", None),
        (
            "v1.2.4",
            "1.2.3",
            "HEAD has the tag v1.2.4, pyproject.toml the version 1.2.3, and CHANGELOG.md begins with 1.2.3",
        ),
        (
            "v1.2.3",
            "Unreleased",
            "HEAD has the tag v1.2.3, pyproject.toml the version 1.2.3, and CHANGELOG.md begins with",
        ),
    ],
)
def test_a_wheel_of_a_tag_has_its_version(tag: str | None, changes: str, error: str | None, tmp_path: Path) -> None:
    """In a repository of one commit, with stand-ins for what sets up and builds."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/build_wheel", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changes\n\n## {changes}\n\n## 1.2.2\n")
    for name in ("scripts/setup", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#!/bin/sh\necho $0 >&2\n")
        (tmp_path / name).chmod(0o755)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"], *([["tag", tag]] if tag else [])):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    done = subprocess.run(["scripts/build_wheel"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (tmp_path / "build/wheel.log").exists() is (error is None)
    assert done.returncode == (0 if error is None else 2)
    assert error is None or done.stderr.startswith(f"error: {error}")


def test_all_is_every_extra_of_a_feature() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    (every,) = extras["all"]
    assert every == f"kvconvert[{','.join(sorted(extras.keys() - {'all', 'dev', 'docs', 'fuzz', 'test'}))}]"


@pytest.mark.parametrize("stem", ["grouped_decoder", "grouped_seq2seq"])
@pytest.mark.parametrize("kind", ["configuration", "modeling"])
def test_the_files_of_our_classes_can_be_imported_first(kind: str, stem: str) -> None:
    program = f"import kvconvert.convert.runtime.{kind}_{stem}"
    subprocess.run([sys.executable, "-c", program], check=True)
