"""Write the reference of the command line, docs/cli.md, from the commands.

    python scripts/generate_cli_reference.py [--check]

With --check, say whether the page is what the commands say, and exit with 1 if not.
"""

import argparse
import html
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["COLUMNS"] = "200"

from kvconvert.cli.main import app
from typer.main import get_command

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """\
# Command line

<!-- written by scripts/generate_cli_reference.py from the commands -->

Every command and every option, as `--help` shows them. Options may stand before or after the checkpoint. Output for
programs, which is what `--json` prints, goes to stdout; all else goes to stderr.

`MODEL` is a checkpoint directory or a hub id; `HF_HOME`, `HF_HUB_OFFLINE` and your token are honoured. Output
directories appear only when they are whole. `--force` replaces only what kvconvert wrote, and never
what the command reads.

"""
TAIL = """\
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | unexpected error; run again as `kvconvert --debug …` for the traceback |
| 2 | wrong usage, or input that cannot be used; one line says what, where and what to do |
| 3 | a quality gate failed; the artefacts are kept |
| 4 | training produced a loss or a gradient that is not finite |
| 75 | training was stopped and saved; the same command goes on |
| 129, 130 | ended by SIGHUP, by Ctrl-C; the message says whether the output is complete or nothing was written |
| 141 | nobody reads what it prints, as with `head` |
| 143 | ended by SIGTERM, with the same message |
"""
# tests/test_docs.py runs the examples on a small checkpoint, with these options where they would take long
RUN_WITH = {
    "benchmark": "--batch 1 --context 16 --tokens 2 --warm-up 1 --repeats 1",
    "evaluate": "--window 64 --max-ppl-increase 1000000%",
    "mha2cla": "--fit-steps 1",
    "mha2gqa": "--fit-steps 1",
    "mha2mla": "--kv-lora-rank 24 --qk-rope-head-dim 4 --fit-steps 1",
    "sweep": "--targets gqa:8,mqa --method mean --window 64 --no-picture",
    "run": "--dry-run --set uptrain.sequence_length=32 --set evaluate.window=64 --set benchmark.context=[16,64]",
    "uptrain": "--dry-run",
}
NOT_RUN = {"demo": "takes minutes", "push": "needs the hub"}


def page() -> str:
    group: Any = get_command(app)
    context = group.make_context("kvconvert", [], resilient_parsing=True)
    own = [parameter.get_help_record(context) for parameter in group.get_params(context)]
    lines = [HEAD, "## kvconvert\n\n", group.help, "\n\n", *table("Options", [record for record in own if record])]
    for name in group.list_commands(context):
        lines += section(group.get_command(context, name), name)
    return "".join([*lines, TAIL])


def section(command: Any, name: str) -> Iterator[str]:
    context = command.make_context(f"kvconvert {name}", [], resilient_parsing=True)
    yield f"## kvconvert {name}\n\n"
    for paragraph in inspect.cleandoc(command.help).split("\n\n"):
        label, _, example = paragraph.partition("Example: ")
        if label:
            yield f"{' '.join(paragraph.split())}\n\n"
            continue
        if name in NOT_RUN:
            yield f"<!-- not run: {NOT_RUN[name]} -->\n"
        elif name in RUN_WITH:
            yield f"<!-- run with: {RUN_WITH[name]} -->\n"
        yield f"```bash\n{' '.join(example.split())}\n```\n\n"
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record:
            argument = parameter.param_type_name == "argument"
            panel = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append(record)
    for panel, records in panels.items():
        yield from table(panel, records)


def table(heading: str, records: list[tuple[str, str]]) -> Iterator[str]:
    yield f"| {heading} | |\n|---|---|\n"
    for names, text in records:
        yield f"| `{names.removeprefix(' / ').replace('|', chr(92) + '|')}` | {cell(text)} |\n"
    yield "\n"


def cell(text: str) -> str:
    """Markdown of a help text: what would be mark-up of its own is escaped, and defaults and bounds are set apart."""
    text = html.escape(re.sub(r"([|*_\[\]])", r"\\\1", " ".join(text.split())), quote=False)
    return re.sub(r"\\\[([^\\]*)\\\]$", r"*\1*", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"{PAGE.name} is not what the commands say; run scripts/generate_cli_reference.py")


if __name__ == "__main__":
    main()
