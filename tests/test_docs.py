"""The docs: the site builds without a warning, its generated pages are current, and its commands and Python run."""

from __future__ import annotations

import html
import io
import json
import os
import re
import runpy
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from conftest import PROSE, CheckpointFactory, Command, build_tokenizer
from doc_blocks import Block, blocks_of
from kvconvert import convert, measure, pipeline, uptrain
from kvconvert.cli.main import app
from typer.main import get_command

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(ROOT / "configs").glob("*/README.md"), ROOT / "README.md"])
# What pages take for granted: a checkpoint with more than the 8 heads that most of them reduce it to, and text
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 8, "num_hidden_layers": 2}
FOLDERS = ("cli", "convert", "measure", "pipeline", "uptrain")
HEADERS = {"llama-2-7b": 32, "llama-2-7b-gqa8": 8}  # K/V heads of checkpoints of which only headers are read
MADE = {
    "gqa2": ("mha2gqa", "configs/demo/model", "--groups", "2", "--output", "gqa2"),
    "model_dir-gqa8": ("mha2gqa", "model_dir", "--groups", "8"),
    "model_dir-cla2": ("mha2cla", "model_dir", "--share", "2"),
    "model_dir-gqa8-uptrained": (
        *("uptrain", "model_dir-gqa8", "--data", "text.jsonl", "--teacher", "model_dir", "--steps", "2"),
        *("--sequence-length", "32", "--global-batch-tokens", "128"),
    ),
}


def write_llama_2_7b(directory: Path, num_key_value_heads: int = 32) -> None:
    """A config, a tokenizer and a header of 13.5 GB of weights, which the file has as a hole."""
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    }
    (directory / "config.json").write_text(json.dumps(config))
    rows = 128 * num_key_value_heads
    sizes = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (rows, 4096), "self_attn.v_proj": (rows, 4096)}
    sizes |= {"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096)}
    sizes |= {"mlp.down_proj": (4096, 11008), "input_layernorm": (4096, 1), "post_attention_layernorm": (4096, 1)}
    shapes = {"model.embed_tokens": (32000, 4096), "lm_head": (32000, 4096), "model.norm": (4096, 1)}
    shapes |= {f"model.layers.{layer}.{name}": shape for layer in range(32) for name, shape in sizes.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, (height, columns) in shapes.items():
        begin, end = end, end + 2 * height * columns
        shape = [height] if "norm" in name else [height, columns]
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    build_tokenizer().save_pretrained(directory)


class Reader:
    """Follows a page on a small checkpoint, from the directory that a reader of it would be in."""

    def __init__(self, invoke: Command, directory: Path) -> None:
        self.invoke = invoke
        self.directory = directory
        self.scope: dict[str, Any] = {}

    def run(self, block: Block) -> None:
        if block.language == "python":
            self.provide(re.findall(r"[\w-]+", block.text))
            exec(compile(block.text, "a page", "exec"), self.scope)
            return
        shown = ""
        for words in block.commands:
            assert words[0] == "kvconvert", f"nothing here runs {words[0]}: say why the block is not run"
            end = words.index(">") if ">" in words else len(words)
            command, files = replaced(words[:end], block.run_with), words[end + 1 :]
            self.provide(command)
            outcome = self.invoke(*command[1:])
            for file in files:
                (self.directory / file).write_text(outcome.stdout)
            assert outcome.returncode == block.exits_with, f"{' '.join(command)}\n{outcome.stdout}{outcome.stderr}"
            shown += outcome.stderr + outcome.stdout if block.exits_with else outcome.stdout
        if block.language == "console":
            assert_shows(shown, block.output)

    def provide(self, words: list[str]) -> None:
        """What a command reads and an earlier page, or nobody, has made."""
        for before, word in zip(["", *words], words, strict=False):
            if word in HEADERS and not (self.directory / word).exists():
                write_llama_2_7b(self.directory / word, HEADERS[word])
            if word in MADE and before not in ("--output", "-o") and not (self.directory / word).exists():
                self.provide(list(MADE[word]))
                assert self.invoke(*MADE[word], "--quiet").returncode == 0


def replaced(words: list[str], options: Sequence[str]) -> list[str]:
    """A command with these options in place of those of the same names."""
    kept: list[str] = []
    names = [option for option in options if option.startswith("--")]
    for before, word in zip(["", *words], words, strict=False):
        if word not in names and (before not in names or word.startswith("--")):
            kept.append(word)
    return [*kept, *options]


def assert_shows(printed: str, shown: str) -> None:
    """A page shows what a command prints, where a line of … stands for any lines."""
    pattern = "".join(r"(?s:.*)" if line == "…" else re.escape(line.rstrip()) + r"\s*\n" for line in shown.splitlines())
    lines = "".join(line.rstrip() + "\n" for line in printed.splitlines())
    assert re.fullmatch(pattern, lines), f"printed:\n{lines}\nshown:\n{shown}"


@pytest.fixture
def reader(make_checkpoint: CheckpointFactory, invoke: Command, working_directory: Path) -> Reader:
    make_checkpoint(name="cwd/model_dir", with_tokenizer=True, **HEADS)
    for name, numbers in (("text.jsonl", range(16)), ("held_out.jsonl", range(100, 110))):
        lines = [json.dumps({"text": f"Chapter {number}. {PROSE}"}) for number in numbers]
        (working_directory / name).write_text("\n".join(lines) + "\n")
    (working_directory / "configs").symlink_to(ROOT / "configs")
    (recipe,) = [block.text for block in blocks_of(DOCS / "recipes.md") if block.language == "yaml"]
    (working_directory / "recipe.yaml").write_text(recipe)
    return Reader(invoke, working_directory)


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "library.md"], ids=page_name)
def test_every_block_of_a_page_runs_or_says_why_not(path: Path, reader: Reader) -> None:
    for block in blocks_of(path):
        if block.language in ("bash", "console", "python") and block.not_run is None:
            try:
                with redirect_stdout(io.StringIO()):
                    reader.run(block)
            except Exception as error:
                error.add_note(f"{page_name(path)}:{block.line}")
                raise


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_commands_that_are_not_run_have_options_and_scripts_that_exist(path: Path) -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    blocks = [block for block in blocks_of(path) if block.language in ("bash", "console")]
    for words in (words for block in blocks for words in block.commands):
        while re.fullmatch(r"\w+=\S*", words[0]):  # a variable of the environment
            words = words[1:]
        scripts = [word for word in words[:3] if re.match(r"(scripts|benchmarks)/", word)]
        assert all((ROOT / script).exists() for script in scripts), words
        if words[0] == "kvconvert" and not words[1].startswith("--"):  # what typer adds to every program
            assert words[1] in commands, words
            given = {word for word in words[2:] if word.startswith("--")} - {"--debug", "--help"}
            assert given <= options_of(commands[words[1]]), words


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```\nkvconvert inspect x\n```\n", "page.md:1: a block without a known language ('')"),
        ("```text\nkvconvert inspect x\n```\n", "page.md:1: commands in a block that is not run (text)"),
        ("Words.\n\n    kvconvert inspect x\n", "page.md:3: code that is indented; fence it, and say its language"),
    ],
)
def test_a_block_that_could_hide_a_command_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=re.escape(problem)):
        blocks_of(tmp_path / "page.md")


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nkvconvert inspect nothing\n```\n",
        "```bash\npip install kvconvert\n```\n",
        "```python\nassert False\n```\n",
        "```console\n$ kvconvert mha2mqa model_dir\nanother line\n```\n",
        "<!-- not run: of the block before -->\n```bash\ntrue\n```\n```bash\nfalse\n```\n",
    ],
)
def test_a_block_that_fails_fails_its_page(text: str, reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError):
        for block in blocks_of(tmp_path / "page.md"):
            if block.not_run is None:
                reader.run(block)


def test_the_code_of_the_library_page_prints_what_it_should(reader: Reader) -> None:
    printed: list[tuple[Any, ...]] = []
    reader.scope["print"] = lambda *values: printed.append(values)
    for block in blocks_of(DOCS / "library.md"):
        if block.language == "python":
            reader.run(block)
    assert printed[0] == ("MHA", 16, 2 * 2 * 16 * 8 * 2)  # layers, keys and values, heads, head_dim, bytes
    assert printed[1][1:] == ("LlamaForCausalLM", (1024, 128))
    assert ("mqa", {"num_key_value_heads": 1}) in [line[:2] for line in printed]
    assert printed[-2] == (True, [])
    assert (2, 64, 2 * 64 * 256, 2 * 64 * 2048) in printed  # in float32, twice the bytes of the plans
    assert (reader.directory / "planned" / "model.safetensors").exists()
    assert printed[-1][0].args == ("16 K/V heads cannot form 3 equal groups",)


def test_the_reference_of_the_command_line_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(ROOT / "scripts" / "generate_cli_reference.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    monkeypatch.setenv("COLUMNS", "200")
    runpy.run_path(script, run_name="__main__")  # exits, and so fails, if it would write something else


def test_the_page_of_the_api_has_every_exported_name_once() -> None:
    listed = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    modules = (convert, uptrain, measure, pipeline)
    assert sorted(listed) == sorted(f"{module.__name__}.{name}" for module in modules for name in module.__all__)


def test_messages_that_are_explained_are_ones_that_are_written() -> None:
    sources = "".join(path.read_text() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    cells = re.findall(r"^\| ([^|]+) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 30
    assert [message for message in messages if message not in sources] == []


def test_every_figure_of_the_results_is_in_the_log() -> None:
    """The log has its command; a figure that is changed in one of the two pages is changed in both."""
    results, log = ((DOCS / f"{name}.md").read_text() for name in ("measurements", "measurement-log"))
    figures = set(re.findall(r"(?<![\w.])\d+\.\d{2,}", results))
    assert len(figures) > 100
    assert figures <= set(re.findall(r"(?<![\w.])\d+\.\d{2,}", log))


def test_the_picture_of_uptraining_has_the_figures_of_the_results(tmp_path: Path) -> None:
    script, page = ROOT / "benchmarks" / "draw_uptrained.py", DOCS / "measurements.md"
    rows = runpy.run_path(str(script))["rows_of"](page.read_text())
    assert [str(row.cache) for row in rows] == ["1/2", "1/2", "1/4", "1/4", "1/8"]
    assert rows[-1].excesses == ((1.8947, 0.2038), (0.2156, 0.0340))
    assert rows[-2].excesses == (None, (0.0682, 0.0078))
    subprocess.run([sys.executable, script, page, tmp_path / "picture.png"], check=True)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def build_site(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Build a site. Not with --quiet, which hides warnings from the strict mode too."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(directory), *arguments],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site: mkdocs.yml makes every warning, broken link and missing anchor an error."""
    directory = tmp_path_factory.mktemp("site")
    done = build_site(directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.mark.parametrize("link", ["#no-anchor", "no-page.md", "page.md#no-anchor"])
def test_a_broken_link_fails_the_build(link: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n[A link]({link}) and [another](page.md#part)\n")
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n## Part\n")
    inherited = f"INHERIT: {ROOT / 'mkdocs.yml'}\n"
    (tmp_path / "mkdocs.yml").write_text(
        inherited + "docs_dir: docs\nnav: [index.md, page.md]\nhooks: []\nplugins: []\nwatch: []\n"
    )
    done = build_site(tmp_path / "site", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode == 1
    assert f"contains a link '{link}'" in done.stderr


def test_the_site_builds_and_needs_no_network(site: Path) -> None:
    pages = {path.name: path.read_text() for path in site.glob("*.html")}
    assert {path.with_suffix(".html").name for path in DOCS.glob("*.md")} <= set(pages)
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?([^\"> ]+)", text)
        loaded += re.findall(
            r"<link\b(?=[^>]*rel=\"?(?:stylesheet|preload|preconnect|icon))[^>]*href=\"?([^\"> ]+)", text
        )
        assert not [place for place in loaded if re.match(r"(https?:)?//", place)], name
    assert "K/V heads of the result." in html.unescape(pages["api.html"])  # the text beside a field
