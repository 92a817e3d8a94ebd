"""The Python of the docs runs, block after block, on a small checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, CheckpointFactory

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.slow
def test_the_code_of_the_library_page_runs(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(name="model_dir", num_hidden_layers=4, with_tokenizer=True)
    for name, numbers in (("text.jsonl", range(40)), ("held_out.jsonl", range(100, 110))):
        lines = [json.dumps({"text": f"Chapter {number}. {PROSE}"}) for number in numbers]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "library.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 12
    printed: list[tuple[Any, ...]] = []
    scope: dict[str, Any] = {"print": lambda *values: printed.append(values)}
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), scope)
    assert printed[0] == ("MHA", 8, 4 * 2 * 8 * 8 * 2)  # layers, keys and values, heads, head_dim, bytes
    assert printed[1][1:] == ("LlamaForCausalLM", (1024, 256))
    assert [line[:2] for line in printed if line[0] == "mqa"] == [("mqa", {"num_key_value_heads": 1})]
    assert printed[-2] == (True, [])
    assert (2, 64, 2 * 64 * 512, 2 * 64 * 2048) in printed  # in float32, twice the bytes of the plans
    assert (tmp_path / "planned" / "model.safetensors").exists()
    assert printed[-1][0].args == ("8 K/V heads cannot form 3 equal groups",)
