"""The command as people run it: exit codes, stdout, stderr, and what it leaves behind.

What a process of its own shows, and the command in this process does not, is checked once for each kind: how it starts,
is refused, is stopped, finds the disk full, and ends with each exit code.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import KVCONVERT, CheckpointFactory, Command, Outcome, RunHere
from kvconvert.cli.main import app
from kvconvert.configs import DEMO
from kvconvert.convert import Checkpoint
from kvconvert.convert import errors as errors_module
from kvconvert.convert.errors import InputError, KvConvertError
from kvconvert.pipeline.values import parse_percentage, parse_size
from transformers import AutoModelForCausalLM
from typer.main import get_command

README = Path(__file__).parents[1] / "README.md"
COMMANDS = (
    *("inspect", "mha2gqa", "mha2mqa", "mha2cla", "mha2mla"),
    *("uptrain", "evaluate", "benchmark", "sweep", "run", "schema", "verify", "push", "refresh", "demo"),
)


def snapshot(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def drop_shard(model: Path) -> None:
    sorted(model.glob("*.safetensors"))[0].unlink()


def truncate(model: Path) -> None:
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])


def corrupt(model: Path) -> None:
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(b"\0" * 8 + weights.read_bytes()[8:])


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps(config))

    return edit


def put_a_directory(model: Path) -> None:
    weights = next(model.glob("*.safetensors"))
    weights.unlink()
    weights.mkdir()


def occupy_output(model: Path) -> None:
    (model.with_name("model-gqa2")).mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"model: no such directory"),
        (drop_shard, r"shard model-00001-of-\d+\.safetensors is missing"),
        (truncate, r"model-\d+-of-\d+\.safetensors: not a valid safetensors file, or truncated"),
        (corrupt, r"not a valid safetensors file"),
        (put_a_directory, r"shard model-\d+-of-\d+\.safetensors is missing"),
        (edit_config(num_key_value_heads=4), r"layer 0: k_proj has 8 heads, config\.json says num_key_value_heads = 4"),
        (edit_config(model_type="nonesuch"), r"model_type 'nonesuch' is not supported: kvconvert does not know"),
        (edit_config(model_type="jetmoe"), r"model_type 'jetmoe' is not supported: its experts hold"),
        (edit_config(num_key_value_heads="8"), r"num_key_value_heads = '8', which the class of llama does not take"),
        (edit_config(head_dim="8"), r"head_dim = '8', which the class of llama does not take"),
        (edit_config(intermediate_size=100), r"LlamaForCausalLM does not accept its weights: \d+ mismatched keys"),
        (edit_config(hidden_act="nonesuch"), r"transformers cannot open it \(KeyError"),
        (occupy_output, r"model-gqa2 already exists"),
    ],
)
def test_a_bad_checkpoint_gives_one_line_and_leaves_nothing(
    damage: Callable[[Path], None],
    message: str,
    make_checkpoint: CheckpointFactory,
    invoke: Command,
    tmp_path: Path,
) -> None:
    model = make_checkpoint(max_shard_size="60KB")
    damage(model)
    before = snapshot(tmp_path)
    assert_one_line(invoke("mha2gqa", model, "--groups", 2), message)
    assert snapshot(tmp_path) == before


def assert_one_line(outcome: Outcome, message: str, *, exit_code: int = 2) -> None:
    """An error on stderr, a hint perhaps, and nothing else."""
    assert outcome.returncode == exit_code, outcome.stderr
    assert outcome.stdout == ""
    lines = outcome.stderr.splitlines()
    assert re.match(f"error: .*{message}", outcome.stderr), outcome.stderr
    assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"])


def test_an_error_of_the_installed_command_is_one_line_too(
    make_checkpoint: CheckpointFactory, kvconvert: Command, tmp_path: Path
) -> None:
    """No library writes beside it, when the class is about to be opened and before."""
    model = make_checkpoint()
    edit_config(intermediate_size=100)(model)
    before = snapshot(tmp_path)
    assert_one_line(kvconvert("mha2gqa", model, "--groups", 2), "LlamaForCausalLM does not accept its weights")
    assert_one_line(kvconvert("inspect", tmp_path / "none"), "none: no such directory")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    ["mha2gqa MODEL --groups 2", "uptrain MODEL --steps 2 --global-batch-tokens 64 --data PROSE --sequence-length 32"],
)
def test_a_full_disk(arguments: str, make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path) -> None:
    """`ulimit -f` makes the operating system refuse to write more, as a full disk does."""
    model = make_checkpoint(with_tokenizer=True)
    before = snapshot(tmp_path)
    command = f"{KVCONVERT} {arguments} --quiet"
    command = command.replace("MODEL", str(model)).replace("PROSE", str(prose_file))
    outcome = subprocess.run(
        ["bash", "-c", f"ulimit -f 20; exec {command}"], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 2, outcome.stderr
    assert re.fullmatch(r"error: \S+: the disk is full \(.*\)\nhint: free some space, .*\n", outcome.stderr)
    kept = {path for path in snapshot(tmp_path) if "model-uptrained.uptraining" not in path}
    assert kept == set(before)  # an unfinished run stays: it can be resumed


BEYOND = r"short\.txt: needs the token 'It', whose id \d+ is beyond the vocab_size 300 of \S+; .* has ids up to \d+\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mha2gqa", "MODEL", "--groups", "3"], r"8 K/V heads cannot form 3 equal groups\nhint: .*1, 2, 4$"),
        (["mha2gqa", "MODEL", "--groups", "8"], r"already has 8 K/V heads\nhint: .*--groups, --allow-same"),
        (["mha2gqa", "MODEL", "--groups", "2", "--output", "MODEL", "--force"], "which is read"),
        (["uptrain", "MODEL", "--steps", "1", "--data", "SHORT", "--lr", "0"], "learning rate is 0"),
        (["evaluate", "MODEL", "--data", "none.jsonl"], r"none\.jsonl: no such file"),
        (["evaluate", "MODEL", "--data", "EMPTY"], r"empty\.txt: no text in it"),
        (["evaluate", "MODEL", "--data", "SHORT"], r"the text has \d+ tokens, fewer than one window of 128"),
        (["evaluate", "MODEL", "--data", "SHORT", "--max-ppl-increase", "5%"], "--max-ppl-increase needs --against"),
        (["evaluate", "BARE", "--data", "SHORT"], r"bare: no tokenizer"),
        (["uptrain", "MODEL", "--steps", "1", "--data", "EMPTY"], r"empty\.txt: no text in it"),
        (["uptrain", "MODEL", "--steps", "1", "--data", "SHORT", "--quiet"], r"fewer than one block of 128"),
        (["uptrain", "BARE", "--steps", "1", "--data", "SHORT"], r"bare: no tokenizer"),
        (["uptrain", "MODEL", "--steps", "1", "--tokens", "1M", "--data", "SHORT"], "--steps and --tokens both say"),
        (["uptrain", "MODEL", "--data", "SHORT"], "on how many tokens the model was pretrained is not known"),
        (["uptrain", "MODEL", "--steps", "1", "--data", "SHORT", "--recipe", "light"], "needs the original model"),
        (["evaluate", "NARROW", "--data", "SHORT", "--window", "4", "--quiet"], BEYOND),
        (["uptrain", "NARROW", "--steps", "1", "--data", "SHORT", "--sequence-length", "4", "--quiet"], BEYOND),
        (["mha2gqa", "NARROW", "--groups", "2", "--method", "svd", "--calibration", "SHORT", "--quiet"], BEYOND),
    ],
)
def test_bad_requests_give_one_line_and_leave_nothing(
    arguments: list[str], message: str, make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "short.txt").write_text("It was the best of times.")
    places = {
        "MODEL": make_checkpoint(with_tokenizer=True),
        "BARE": make_checkpoint(name="bare"),
        "NARROW": make_checkpoint(name="narrow", with_tokenizer=True, vocab_size=300),
        "EMPTY": tmp_path / "empty.txt",
        "SHORT": tmp_path / "short.txt",
    }
    before = snapshot(tmp_path)
    assert_one_line(invoke(*(places.get(argument, argument) for argument in arguments)), message)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["mha2gqa"],
        ["mha2gqa", "x"],
        ["nonesuch"],
        ["mha2gqa", "x", "-g", "0"],
        ["mha2gqa", "x", "-g", "2", "--method", "m"],
    ],
)
def test_wrong_usage_exits_with_2_and_shows_the_usage(arguments: list[str], invoke: Command) -> None:
    outcome = invoke(*arguments)
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert "Usage: kvconvert" in outcome.stderr


def test_the_installed_command_shows_its_usage(kvconvert: Command) -> None:
    outcome = kvconvert("mha2gqa", "x", "-g", "0")
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert re.match(r"Usage: kvconvert mha2gqa .*MODEL", outcome.stderr)
    assert "Invalid value for '--groups' / '-g'" in outcome.stderr


def test_convert_as_json_is_one_object_and_the_result_opens(
    make_checkpoint: CheckpointFactory, kvconvert: Command, run_here: RunHere, tmp_path: Path
) -> None:
    """Options before MODEL, as the client wrote the command."""
    result = kvconvert("mha2gqa", "--groups", 2, make_checkpoint(), "--json").printed
    assert result["output"] == str(tmp_path / "model-gqa2")
    assert result["num_key_value_heads"] == {"source": 8, "result": 2}
    assert result["cache_bytes_per_token"] == {"source": 512, "result": 128}
    assert result["opened_as"] == "LlamaForCausalLM"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model-gqa2")
    assert opened.config.num_key_value_heads == 2
    assert run_here("inspect", tmp_path / "model-gqa2")["attention"] == "GQA"


def test_convert_for_people(make_checkpoint: CheckpointFactory, kvconvert: Command, tmp_path: Path) -> None:
    outcome = kvconvert("mha2mqa", make_checkpoint(), "-o", tmp_path / "deep" / "out", "--max-shard-size", "100KB")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines() == [
        "llama: 8 → 1 K/V heads",
        "  method      mean, 4 tensors made, 17 copied",
        "  K/V cache   512 → 64 bytes per token (16-bit), 1/8",
        "  weights     403 kB → 345 kB",
        f"  wrote {tmp_path / 'deep' / 'out'} (opens as LlamaForCausalLM)",
    ]
    assert "converting: 100 %" in outcome.stderr
    assert len(list((tmp_path / "deep" / "out").glob("*.safetensors"))) > 1


def test_a_dry_run_writes_nothing(
    make_checkpoint: CheckpointFactory, run_here: RunHere, prose_file: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(with_tokenizer=True)
    before = snapshot(tmp_path)
    plan = run_here("mha2gqa", model, "--groups", 2, "--dry-run")["plan"]
    assert {step["writes"]["name"] for step in plan["steps"] if step["op"]} == {
        f"model.layers.{layer}.self_attn.{projection}_proj.weight" for layer in range(2) for projection in "kv"
    }
    train = run_here("uptrain", model, "--steps", 10, "--data", prose_file, "--dry-run")
    assert train["tokens"] == 10 * 2**14
    assert snapshot(tmp_path) == before


def test_evaluate_and_its_gate(kvconvert: Command, invoke: Command, run_here: RunHere, tmp_path: Path) -> None:
    original, held_out = DEMO / "model", DEMO / "heldout.jsonl"
    run_here("mha2mqa", original, "--output", tmp_path / "mqa")
    common = ["--data", held_out, "--window", 64, "--max-windows", 8, "--against", original, "--json"]
    passed = invoke("evaluate", original, *common, "--max-ppl-increase", "0%")
    gate = {"name": "max_ppl_increase", "value": 0.0, "threshold": 0.0, "passed": True}
    assert passed.printed["gates"] == [gate | {"standard_error": 0.0, "task": None}]
    failed = kvconvert("evaluate", tmp_path / "mqa", *common, "--max-ppl-increase", "50%")
    assert failed.returncode == 3
    result = json.loads(failed.stdout)
    assert [gate["passed"] for gate in result["gates"]] == [False]
    assert result["num_windows"] == 8
    assert result["against"]["kl_nats_per_token"] > 1
    assert re.search(r"error: perplexity is \d+\.\d% above the original, more than the allowed 50\.0%", failed.stderr)


def test_one_window_has_no_standard_error(
    make_checkpoint: CheckpointFactory, run_here: RunHere, prose_file: Path
) -> None:
    model = make_checkpoint(with_tokenizer=True)
    result = run_here("evaluate", model, "--data", prose_file, "--window", 64, "--max-windows", 1)
    assert (result["num_windows"], result["standard_error"]) == (1, None)


def test_uptrain_is_stopped_by_sigterm_and_resumed(
    make_checkpoint: CheckpointFactory, kvconvert: Command, prose_file: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(with_tokenizer=True)
    arguments = ["uptrain", model, "--steps", 400, "--data", prose_file, "--global-batch-tokens", 256, "--log-steps", 1]
    metrics = tmp_path / "model-uptrained.uptraining" / "metrics.jsonl"
    with subprocess.Popen(
        [str(KVCONVERT), *map(str, arguments)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert re.search(r"error: stopped at step \d+ of 400 \(received SIGTERM\); saved in ", errors)
    assert not (tmp_path / "model-uptrained").exists()
    # a process again, so that whatever a library prints while it trains would be seen among the JSON
    assert kvconvert(*arguments, "--json").printed["tokens"] == 400 * 2 * 128
    lines = (tmp_path / "model-uptrained" / "metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, lines) if "loss" in record]
    assert steps == list(range(1, 401))


def test_a_diverging_run_exits_with_4(
    make_checkpoint: CheckpointFactory, invoke: Command, prose_file: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(with_tokenizer=True)
    outcome = invoke("uptrain", model, "--steps", 5, "--lr", 1e30, "--data", prose_file, "--quiet")
    assert outcome.returncode == 4
    assert re.match(
        r"error: step 2: (loss|gradient norm) is (nan|inf); the weights were not updated; "
        r"no checkpoint was saved before it\nhint: use a smaller --lr",
        outcome.stderr,
    )
    assert not (tmp_path / "model-uptrained").exists()


def test_an_unexpected_error_is_one_line_and_debug_shows_the_traceback(
    invoke: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(checkpoint: Checkpoint) -> int:
        raise ZeroDivisionError("nobody\nforesaw it")

    monkeypatch.setattr(Checkpoint, "num_parameters", property(fail))
    outcome = invoke("inspect", DEMO / "model")
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr == (
        "error: unexpected ZeroDivisionError: nobody foresaw it\n"
        "hint: this is a bug: run again with `kvconvert --debug …` and report the traceback\n"
    )
    outcome = invoke("--debug", "inspect", DEMO / "model")
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("Traceback (most recent call last):\n")
    assert outcome.stderr.endswith("\nerror: unexpected ZeroDivisionError: nobody foresaw it\n")


def test_debug_shows_the_traceback_of_an_expected_error(invoke: Command, tmp_path: Path) -> None:
    outcome = invoke("--debug", "inspect", tmp_path / "none")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("Traceback (most recent call last):\n")
    assert f"\nerror: {tmp_path / 'none'}: no such directory\n" in outcome.stderr


def test_help_imports_neither_torch_nor_transformers() -> None:
    """That of every command, shown one after the other in one process."""
    program = (
        "import sys; from kvconvert.cli.main import app\n"
        f"for command in {['', *COMMANDS]!r}: app([*command.split(), '--help'], 'kvconvert', standalone_mode=False)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    usages = re.findall(r"^ *Usage: kvconvert (.*)$", outcome.stdout, re.MULTILINE)
    assert [usage.partition(" ")[0].replace("[OPTIONS]", "") for usage in usages] == ["", *COMMANDS]
    assert outcome.stderr.split() == ["False", "False"]


def test_every_command_has_an_example_and_a_place_in_the_docs() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert tuple(commands) == COMMANDS
    reference = (README.parent / "docs" / "cli.md").read_text()
    for name, command in commands.items():
        assert f"Example: kvconvert {name} " in command.help
        assert f"## kvconvert {name}\n" in reference
        for parameter in command.params:
            assert getattr(parameter, "help", None) or parameter.name == "help", f"{name}: {parameter.name} has no help"


def test_every_example_parses() -> None:
    """The arguments of each example are ones that its command takes."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        example = re.search(r"Example: kvconvert \S+ (.*)", command.help)
        assert example is not None
        command.make_context(name, example[1].partition("> ")[0].split())  # raises where it does not take them


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5kb", 1500), ("2GiB", 2**31), ("100", 100)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5XB", "-1GB", "0GB", "GB"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(InputError, match="is not a size; write for example 5GB"):
        parse_size(text)


def test_percentages() -> None:
    assert parse_percentage("5%") == parse_percentage("0.05") == 0.05
    assert parse_percentage("500%") == 5
    for text in ("five", "5%%", "-5%", "5"):
        with pytest.raises(InputError, match="is not a percentage"):
            parse_percentage(text)


def test_the_table_of_architectures_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(README.parent / "scripts" / "generate_support_table.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    runpy.run_path(script, run_name="__main__")  # exits, and so fails, if it would write something else


def test_the_readme_lists_the_exit_codes() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \| ", README.read_text().partition("### Exit codes")[2], re.MULTILINE)
    codes = [int(code) for row in rows for code in row.split(", ")]
    classes = vars(errors_module).values()
    found = {c.exit_code for c in classes if isinstance(c, type) and issubclass(c, KvConvertError)}
    # done, the three signals that end a command, and the one of a pipe that nobody reads from
    assert codes == sorted({0, 129, 130, 143, 141} | found)
