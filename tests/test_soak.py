"""The promise about outputs, at every line of the swap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "soak.py"


def test_no_kill_and_no_signal_breaks_an_output(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--folder", tmp_path], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    parts = json.loads(outcome.stdout)
    assert not [broken for part in parts.values() for broken in part["broken"]]
    assert parts["swap at every line"]["runs"] > 500
