"""A conversion that was ended goes on at the layer that it had reached, to the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, KilledError
from kvconvert.convert import Calibration, Cla, Gqa, Mla, conversion
from kvconvert.convert import convert as convert_checkpoint
from kvconvert.convert.calibration import streams, writing
from kvconvert.convert.calibration.fitting import Fit
from kvconvert.convert.checkpoint.work_directory import WorkDirectory, work_directory
from kvconvert.convert.conversion import Conversion
from kvconvert.convert.errors import InputError, OutputError
from kvconvert.convert.methods import compression, layer_choice, merging, mla

LAYERS = 4
# the number of parts that a run keeps: its text, what it chooses, and the groups of layers
CASES: dict[str, tuple[Any, int]] = {
    "gqa": (Gqa(2, merge="svd", fit_steps=4), 1 + LAYERS),
    "cla": (Cla(share=2, num_key_value_heads=2, merge="svd", keep_first=1, keep_last=1, fit_steps=4), 1 + 3),
    "cla-auto": (Cla(share=2, num_key_value_heads=1, merge="svd", pairs="auto", fit_steps=0), 2 + 2),
    "mla": (Mla(24, 4, fit_steps=4), 1 + LAYERS),
    "mla-gain": (Mla(24, 4, latent_norm="exact", rope_selection="gain", refit=False), 2 + LAYERS),
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of two sequences, so that a short text is fitted to."""
    monkeypatch.setattr(streams, "STEP_TOKENS", 64)


@pytest.fixture
def source(make_checkpoint: CheckpointFactory) -> Path:
    return make_checkpoint(num_hidden_layers=LAYERS, num_key_value_heads=4, with_tokenizer=True, dtype=torch.bfloat16)


@pytest.fixture
def convert(source: Path, prose_file: Path) -> Callable[..., Conversion]:
    def run(method: Any, output: Path, work_dir: Path | None = None, **options: Any) -> Conversion:
        named = {"data": prose_file, "num_tokens": 1100, "sequence_length": 32, "device": "cpu", "precision": "fp32"}
        calibration = Calibration(**{**named, **options.pop("calibration", {})})
        return convert_checkpoint(source, method, output, calibration=calibration, work_dir=work_dir, **options)

    return run


def die_after(monkeypatch: pytest.MonkeyPatch, number: int, *, writing: bool = False) -> None:
    """Let the process end where it has kept so many parts, or, `writing`, before the record of the next is there."""
    keep, kept = WorkDirectory.keep, list[str]()

    def dying(self: WorkDirectory, part: str, content: Any, files: Any = ()) -> None:
        if writing and len(kept) == number:
            raise KilledError
        keep(self, part, content, files)
        kept.append(part)
        if not writing and len(kept) == number:
            raise KilledError

    monkeypatch.setattr(WorkDirectory, "keep", dying)


def die_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end where all is measured, and nothing of the output is there."""

    def die(*arguments: Any, **named: Any) -> None:
        raise KilledError

    monkeypatch.setattr(conversion, "execute", die)


PROGRAM = """
import os, signal, sys
from pathlib import Path
from kvconvert.convert import Calibration, Gqa, convert

source, text, output, work = map(Path, sys.argv[1:])
fsync = os.fsync

def dying(descriptor):
    if any(work.glob(".layer-00001.safetensors.partial-*")):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = dying
calibration = Calibration(text, num_tokens=1100, sequence_length=32, device="cpu", precision="fp32")
convert(source, Gqa(1, merge="svd", refit=False), output, calibration=calibration, work_dir=work)
"""


def count_merges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note each merge of heads, each compression of a layer, and each choice on the text."""
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def noting(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            return function(*arguments, **named)

        monkeypatch.setattr(module, name, noting)

    counted(merging, "merge_layers")
    counted(compression, "_candidates")
    counted(layer_choice, "measure_damages")
    counted(compression, "choose_rope_pairs")
    assert not hasattr(mla, "choose_rope_pairs")  # imported where it is called
    return calls


@pytest.mark.parametrize("kind", CASES)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_bytes(
    kind: str, convert: Callable[..., Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And makes no layer twice, but for the one that it was at."""
    method, num_parts = CASES[kind]
    with monkeypatch.context() as patch:
        calls = count_merges(patch)
        whole = convert(method, tmp_path / "whole")
        all_calls = list(calls)
    for number in {2, num_parts - 1}:
        work = tmp_path / f"work-{number}"
        with monkeypatch.context() as patch:
            die_after(patch, number, writing=number == num_parts - 1)
            with pytest.raises(KilledError):
                convert(method, tmp_path / "out", work)
        assert not (tmp_path / "out").exists()
        with monkeypatch.context() as patch:
            calls = count_merges(patch)
            result = convert(method, tmp_path / f"out-{number}", work)
        assert contents(result.output) == contents(whole.output)
        assert result.reports == whole.reports
        assert result.plan == whole.plan
        assert calls == all_calls[number - 1 :]  # the text is the first part
        assert list(work.iterdir()) == []


@pytest.fixture
def begun(convert: Callable[..., Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work directory of a conversion that ended with two layers finished: by statistics' merge, which is quick."""
    work = tmp_path / "work"
    with monkeypatch.context() as patch:
        die_after(patch, 3)
        with pytest.raises(KilledError):
            convert(QUICK, tmp_path / "out", work)
    return work


QUICK = Gqa(1, merge="svd", refit=False)


def test_a_process_that_is_killed_while_it_writes(
    convert: Callable[..., Conversion], source: Path, prose_file: Path, tmp_path: Path
) -> None:
    """With the file of its second layer half on the disk."""
    work = tmp_path / "work"
    arguments = (source, prose_file, tmp_path / "out", work)
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert sorted(name for name in contents(work) if not name.startswith(".")) == [
        *("kvconvert-work.json", "layer-00000.safetensors", "layers-00000.json", "text.json")
    ]
    assert [name.partition("partial")[0] for name in contents(work) if name.startswith(".")] == [
        ".layer-00001.safetensors."
    ]
    result = convert(QUICK, tmp_path / "out", work)
    assert contents(result.output) == contents(convert(QUICK, tmp_path / "whole").output)
    assert list(work.iterdir()) == []


def test_a_work_directory_is_of_one_conversion(
    begun: Path,
    convert: Callable[..., Conversion],
    source: Path,
    prose_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another method, setting, text, model or machine is refused in a line that says what differs."""
    before = contents(begun)
    out = tmp_path / "out"
    kept = f"{begun} holds the work of another conversion: "
    for method, options, message in (
        (Gqa(2, merge="svd", refit=False), {}, "num_key_value_heads was 1, now 2"),
        (Gqa(1, merge="svd", fit_steps=0), {}, "refit was False, now True; fit_steps was None, now 0"),
        (Mla(24, 4), {}, "conversion was 'gqa', now 'mla'; "),
        (QUICK, {"calibration": {"sequence_length": 16}}, "sequence_length was 32, now 16"),
        (QUICK, {"calibration": {"precision": "bf16"}}, "precision was 'fp32', now 'bf16'"),
        (QUICK, {"calibration": {"save_statistics": tmp_path / "f"}}, "save_statistics was False, now True"),
    ):
        with pytest.raises(InputError) as caught:
            convert(method, out, begun, **options)
        assert str(caught.value).startswith(kept + message)
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "DEFAULT_FIT", Fit(learning_rate=0.5))
        with pytest.raises(InputError, match=r"conversion: fit_learning_rate was 0\.02, now 0\.5$"):
            convert(QUICK, out, begun)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        with pytest.raises(InputError, match=r"conversion: threads was \d+, now 7$"):
            convert(QUICK, out, begun)
    prose_file.write_text(prose_file.read_text().replace("a", "b"))
    with pytest.raises(InputError, match=r"work was begun with another text than prose.\w+ is now$"):
        convert(QUICK, out, begun)
    (source / "modeling_mine.py").write_text("pass")
    with pytest.raises(InputError, match=r"conversion: source other_files was '[0-9a-f]{16}', now '[0-9a-f]{16}'$"):
        convert(QUICK, out, begun)
    (source / "modeling_mine.py").unlink()
    weights = next(source.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"@")
    with pytest.raises(InputError, match=r"conversion: source weights was '[0-9a-f]{16}', now '[0-9a-f]{16}'$"):
        convert(QUICK, out, begun)
    assert contents(begun) == before
    assert not out.exists()


def test_what_is_damaged_is_made_again(
    begun: Path, convert: Callable[..., Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what comes after it; without damage two layers are left."""
    whole = contents(convert(QUICK, tmp_path / "whole").output)
    kept = contents(begun)

    def damage(name: str, content: bytes | None) -> tuple[int, list[str]]:
        for file, before in kept.items():
            (begun / file).write_bytes(before)
        if content is None:
            (begun / name).unlink()
        else:
            (begun / name).write_bytes(content)
        remarks: list[str] = []
        with monkeypatch.context() as patch:
            calls = count_merges(patch)
            result = convert(QUICK, tmp_path / "out", begun, force=True, remark=remarks.append)
        assert contents(result.output) == whole
        assert list(begun.iterdir()) == []
        return len(calls), remarks

    first, record = kept["layer-00000.safetensors"], kept["layers-00001.json"]
    assert damage("layers-00001.json", record) == (2, [f"{begun} holds 2 of 4 layers: going on from there"])
    flipped = first[:-1] + bytes([first[-1] ^ 1])
    again = f"{begun / 'layer-00000.safetensors'} is not as it was written: from here on all is made again"
    assert damage("layer-00000.safetensors", flipped) == (4, [again])
    missing = f"{begun / 'layer-00001.safetensors'} is missing: from here on all is made again"
    one_of_four = f"{begun} holds 1 of 4 layers: going on from there"
    assert damage("layer-00001.safetensors", None) == (3, [missing, one_of_four])
    assert damage("layers-00001.json", record.replace(b"1", b"2", 1))[0] == 3
    assert damage("layers-00001.json", b"[")[0] == 3
    assert damage("text.json", None) == (4, [])


def test_files_of_others_stay_and_those_of_a_kill_go(
    begun: Path, convert: Callable[..., Conversion], tmp_path: Path
) -> None:
    (begun / "notes.txt").write_text("mine")
    (begun / ".notes.txt.partial-0123abcd").write_text("mine")
    (begun / ".layer-00002.safetensors.partial-0123abcd").write_text("half")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (begun / "layer-00002.safetensors").symlink_to(elsewhere)
    whole = convert(QUICK, tmp_path / "whole")
    assert contents(convert(QUICK, tmp_path / "out", begun).output) == contents(whole.output)
    assert sorted(contents(begun)) == [".notes.txt.partial-0123abcd", "notes.txt"]
    assert elsewhere.read_text() == "mine"


def test_a_dry_run_leaves_its_work_for_the_conversion(
    convert: Callable[..., Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, whole = tmp_path / "work", convert(QUICK, tmp_path / "whole")
    planned = convert(QUICK, tmp_path / "out", work, dry_run=True)
    assert not planned.output.exists()
    calls = count_merges(monkeypatch)
    result = convert(QUICK, tmp_path / "out", work)
    assert not calls
    assert result.reports == planned.reports == whole.reports
    assert contents(result.output) == contents(whole.output)


def test_statistics_are_saved_once_by_a_run_that_goes_on(
    convert: Callable[..., Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it ended in the middle of the layers, and where the statistics were there already."""
    expected, saved, work = tmp_path / "expected", tmp_path / "saved", tmp_path / "work"
    convert(QUICK, tmp_path / "whole", calibration={"save_statistics": expected})
    for die in (lambda patch: die_after(patch, 3), die_at_last):
        with monkeypatch.context() as patch:
            die(patch)
            with pytest.raises(KilledError):
                convert(QUICK, tmp_path / "out", work, calibration={"save_statistics": saved})
    assert saved.read_bytes() == expected.read_bytes()
    convert(QUICK, tmp_path / "out", work, calibration={"save_statistics": saved})
    assert saved.read_bytes() == expected.read_bytes()
    assert list(work.iterdir()) == []
    with pytest.raises(OutputError, match="saved already exists"):  # the control
        convert(QUICK, tmp_path / "other", work, calibration={"save_statistics": saved})


def test_a_text_that_the_model_wrote_is_written_once(
    convert: Callable[..., Conversion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = writing.write_calibration_text

    def noting(*arguments: Any, **named: Any) -> Any:
        written.append(1)
        return write(*arguments, **named)

    monkeypatch.setattr(conversion, "write_calibration_text", noting)
    text = {"data": "self", "num_tokens": 64}
    whole = convert(QUICK, tmp_path / "whole", calibration=text)
    with monkeypatch.context() as patch:
        die_after(patch, 3)
        with pytest.raises(KilledError):
            convert(QUICK, tmp_path / "out", tmp_path / "work", calibration=text)
    assert len(written) == 2
    result = convert(QUICK, tmp_path / "out", tmp_path / "work", calibration=text)
    assert len(written) == 2
    assert contents(result.output) == contents(whole.output)
    assert list((tmp_path / "work").iterdir()) == []


def test_places_where_no_work_can_be_kept(convert: Callable[..., Conversion], source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for place, message in (
        (out, "out is or lies in .*out, which is made"),
        (out / "work", "work is or lies in .*out, which is made"),
        (source / "work", "work is or lies in .*model, which is read"),
        (tmp_path / "link", "link is a symbolic link"),
        (tmp_path / "file", "file is a file, not a directory"),
        (tmp_path / "file" / "work", "work cannot be written: .*file is not a writable directory"),
        (tmp_path / "mine", "mine is no work directory, and holds notes.txt"),
    ):
        with pytest.raises(OutputError, match=message):
            convert(QUICK, out, place)
    assert not out.exists()
    assert not (source / "work").exists()
    assert sorted(contents(tmp_path / "mine")) == ["notes.txt"]
    weights = Calibration(weights_only=True)
    for method, calibration in ((Gqa(1), None), (Gqa(4, merge="svd", allow_same=True), weights)):
        with pytest.raises(InputError, match="nothing is measured for this conversion, so there is no work to keep"):
            convert_checkpoint(source, method, out, calibration=calibration, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        work_directory(tmp_path / "work", {"a": 1}),
        pytest.raises(OutputError, match="work: another run is at work there"),
        work_directory(tmp_path / "work", {"a": 1}),
    ):
        pass
    with work_directory(tmp_path / "work", {"a": 1}):  # the lock went with the block
        pass


def test_a_record_leads_to_no_file_elsewhere(tmp_path: Path) -> None:
    """Nor is one removed that a record names, whoever wrote it."""
    (tmp_path / "mine.safetensors").write_text("mine")
    with work_directory(tmp_path / "work", {}) as work:
        work.keep("text", 1, ["../mine.safetensors"])
    with work_directory(tmp_path / "work", {}) as work:
        assert work.kept("text") is None
        work.clear()
    assert (tmp_path / "mine.safetensors").exists()


def test_a_directory_that_does_not_say_of_what_it_is(tmp_path: Path) -> None:
    with work_directory(tmp_path / "work", {"a": 1}):
        pass
    (tmp_path / "work" / "kvconvert-work.json").write_text("{")
    with (
        pytest.raises(OutputError, match=r"kvconvert-work.json: not readable as JSON") as caught,
        work_directory(tmp_path / "work", {"a": 1}),
    ):
        pass
    assert caught.value.hint == "choose a new or empty directory; nothing there can be used"


def test_an_interruption_says_that_work_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, work_directory(tmp_path / "work", {}):
        raise KeyboardInterrupt
    assert caught.value.__notes__ == [f"{tmp_path / 'work'} keeps what is finished"]
