"""The promises about outputs, at every line of what writes them, and on full disks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "soak.py"


def test_no_kill_no_signal_and_no_full_disk_breaks_an_output() -> None:
    outcome = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    parts = json.loads(outcome.stdout)
    assert not [broken for part in parts.values() for broken in part["broken"]]
    at_least = {
        "swap at every line": 500,
        "four processes at once": 50,
        "processes of one id": 9,
        "statistics at every line": 50,
        "publishing at every line": 10,
        "full disk, conversion": 4,
        "full disk, uptrain": 4,
    }
    skipped = {name for name, part in parts.items() if "skipped" in part}
    assert skipped <= {"processes of one id", "full disk, conversion", "full disk, uptrain"}  # without namespaces
    assert {name for name, least in at_least.items() if parts[name]["runs"] < least} <= skipped
