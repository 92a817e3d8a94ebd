"""What MkDocs does before it builds the site: it shows the folders as kvconvert.* to the reader of docstrings."""

from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
FOLDERS = ("cli", "configs", "convert", "measure", "pipeline", "uptrain")


def on_startup(command: Literal["build", "gh-deploy", "serve"], dirty: bool) -> None:
    """Link the folders into build/tree/kvconvert, as scripts/check does for the type checker."""
    tree = ROOT / "build" / "tree" / "kvconvert"
    tree.mkdir(parents=True, exist_ok=True)
    for folder in FOLDERS:
        link = tree / folder
        if not link.is_symlink():
            link.symlink_to(Path("../../..") / folder)
