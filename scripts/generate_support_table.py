"""Write the tables of docs/architectures.md, what becomes of what and which engines serve it, from the code.

    python scripts/generate_support_table.py [--check]

With --check, say whether the page is what the code says, and exit with 1 if not.
"""

import argparse
import sys
from collections.abc import Container
from pathlib import Path

from kvconvert.convert import ARCHITECTURES, ROUTES
from kvconvert.convert.architectures.table import LATENT_ARCHITECTURES
from kvconvert.convert.checkpoint.config_classes import full_config
from kvconvert.convert.describe.engines import Serving, serving
from kvconvert.convert.runtime import RUNTIME_CLASSES
from kvconvert.convert.translations.cross_layer import CROSS_LAYER, CROSS_LAYER_DECODER, LATENT_SOURCES
from kvconvert.convert.translations.routes import routes_of

(LATENT,) = LATENT_ARCHITECTURES
PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
END = "<!-- end -->"


def classes(model_type: str, num_key_value_heads: int) -> tuple[str, ...]:
    """The classes that a checkpoint may become, the preferred one first."""
    ends = [route[-1].target if route else model_type for route in routes_of(model_type)]
    if num_key_value_heads == 1 and () in routes_of(model_type):
        ends = [model_type]  # a class that has one K/V head has it whatever else its config says
    return tuple(
        end
        for end in ends
        if ARCHITECTURES[end].heads_refusal(full_config({"model_type": end}), num_key_value_heads) is None
    )


def sources() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Of each `model_type` that people have as MHA, the classes with several K/V heads and with one."""
    names = sorted((set(ARCHITECTURES) | set(ROUTES)) - set(RUNTIME_CLASSES))
    return {name: (classes(name, 2), classes(name, 1)) for name in names}


def becomes(model_type: str, names: Container[str]) -> bool:
    """Whether some class that a checkpoint may become is among these."""
    return any((route[-1].target if route else model_type) in names for route in routes_of(model_type))


def sources_table() -> str:
    """Those that become the same share a line."""
    lines: dict[tuple[str, str, str, str], list[str]] = {}
    for name, (grouped, single) in sources().items():
        shared = CROSS_LAYER_DECODER if becomes(name, CROSS_LAYER) else "–"
        latent = LATENT if becomes(name, LATENT_SOURCES) else "–"
        lines.setdefault((choice(name, grouped), choice(name, single), shared, latent), []).append(name)
    rows = [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in lines.items()]
    rows.sort(key=len, reverse=True)
    return "\n".join(["| model_type | GQA | MQA | CLA | MLA |", "|---|---|---|---|---|", *rows]) + "\n"


def choice(model_type: str, ends: tuple[str, ...]) -> str:
    return ", else ".join("own" if end == model_type else end for end in ends) or "–"


def engines_table() -> str:
    lines = ["| class | transformers | vLLM | SGLang | llama.cpp |", "|---|---|---|---|---|"]
    ends = {end for several, single in sources().values() for end in (*several, *single)}
    for name in sorted({CROSS_LAYER_DECODER, LATENT, *ends}):
        lines.append(f"| {name} | {' | '.join(cell(engine) for engine in serving(name))} |")
    return "\n".join(lines) + "\n"


def cell(engine: Serving) -> str:
    if engine.evidence == "not checked":
        return ""
    evidence = engine.evidence
    works = {True: evidence, False: f"no ({evidence})", None: f"in part ({evidence})"}[engine.works]
    return f"{works}: {engine.how}" if engine.how else works


def with_table(text: str, name: str, table: str) -> str:
    """The page with the table in the place of what stands between its markers."""
    begin = f"<!-- begin: {name}, by scripts/generate_support_table.py -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{table}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text()
    renewed = with_table(with_table(text, "sources", sources_table()), "engines", engines_table())
    if not parser.parse_args().check:
        PAGE.write_text(renewed)
    elif text != renewed:
        sys.exit(f"{PAGE.name} is not what the code says; run scripts/generate_support_table.py")


if __name__ == "__main__":
    main()
