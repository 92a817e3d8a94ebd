"""Places of outputs: what may be replaced, how that is done, and what a run that was killed leaves."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name as resolve
from typing import Any

import pytest
from conftest import CheckpointFactory, Command
from kvconvert.convert import Gqa, convert
from kvconvert.convert.checkpoint import staging
from kvconvert.convert.checkpoint.files import append_file, copy_file, create_file, replaced_file, write_text
from kvconvert.convert.checkpoint.manifest import unlike_manifest, write_manifest
from kvconvert.convert.checkpoint.output import (
    check_file,
    check_free_space,
    check_free_spaces,
    check_output,
    check_replaceable,
    disk_errors,
)
from kvconvert.convert.checkpoint.staging import (
    check_renames,
    clear_leftovers,
    discard,
    scratch_directory,
    staged_directory,
)
from kvconvert.convert.errors import CheckpointError, InputError, KvConvertError, OutputError


def ours(directory: Path, content: str = "old") -> Path:
    """A directory that kvconvert wrote."""
    directory.mkdir(parents=True)
    (directory / "model").write_text(content)
    write_manifest(directory, {})
    return directory


def make(output: Path, content: str = "new", *, force: bool = True) -> None:
    with staged_directory(output, force=force) as new:
        (new / "model").write_text(content)
        write_manifest(new, {})


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can exchange two names, or refuses the flag as NFS does."""
    if not request.param:
        monkeypatch.setattr(staging, "_renameat2", lambda one, other, flags: False)
    return bool(request.param)


def test_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with pytest.raises(RuntimeError, match="boom"), staged_directory(output) as staging:
        (staging / "file").write_text("half")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []
    with staged_directory(output) as staging:
        (staging / "file").write_text("whole")
        assert not output.exists()
    assert (output / "file").read_text() == "whole"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "exists").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "exists")
    with pytest.raises(OutputError, match="exists already exists") as raised:
        check_output(tmp_path / "exists", force=False)
    assert raised.value.hint == "choose another output, or let it be replaced"
    assert raised.value.settings == ("output", "force")
    with pytest.raises(OutputError, match="is a file, not a directory"):
        check_output(tmp_path / "file", force=True)
    with pytest.raises(OutputError, match="is a symbolic link"):
        check_output(tmp_path / "link", force=True)
    with pytest.raises(OutputError, match="is not a writable directory"):
        check_output(tmp_path / "file" / "below", force=False)
    check_output(tmp_path / "new" / "deeper", force=False)


def test_a_relative_output_that_fails_leaves_no_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError), staged_directory(Path("new/deep/out")):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "one")
    write_text(tmp_path / "a.json", "two")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "two"}


def test_too_little_space_is_seen_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs 1000000\.\d\d GB, but its disk has \d+\.\d\d GB free"):
        check_free_space(tmp_path / "out", 10**15)


def test_what_goes_to_one_disk_is_counted_together(tmp_path: Path) -> None:
    half = shutil.disk_usage(tmp_path).free * 6 // 10
    check_free_spaces([(tmp_path / "out", half)])
    with pytest.raises(OutputError, match=r"out: needs .* GB, but its disk has"):
        check_free_spaces([(tmp_path / "out", half), (tmp_path / "work" / "layer", half)])


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the operating system refuse the write, as a full disk does."""
    program = f"""
import resource, signal
from pathlib import Path
from kvconvert.convert.checkpoint.staging import staged_directory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with staged_directory(Path({str(tmp_path / "out")!r})) as staging, (staging / "big").open("wb") as file:
    file.write(bytes(5000))
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "OutputError" in outcome.stderr
    assert "the disk is full" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Have the operating system refuse what is written beyond so many bytes of a file, as a full disk does."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_at_any_write_leaves_what_was_there(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint(with_tokenizer=True)
    output = convert(source, Gqa(2), tmp_path / "out").output
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    sizes = sorted({len(content) for content in before.values()})
    assert len(sizes) > 4
    for size in [0, *(size - 1 for size in sizes)]:  # each of the files is one that cannot be written
        with largest_file(size), pytest.raises(OutputError, match="the disk is full"):
            convert(source, Gqa(2, merge="first"), output, force=True)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", source.name])
    with largest_file(sizes[-1]):  # the control
        convert(source, Gqa(2), output, force=True)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda place: OSError(errno.ENOSPC, "No space left on device", f"{place}/a"),
            "{}: the disk is full (No space ",
        ),
        (lambda place: RuntimeError(f"{place}/a: PytorchStreamWriter failed"), "{0}: the disk is full ({0}/a: Pytorch"),
        (
            lambda place: RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 61 vs 60"),
            "{}: the disk is full ([enforce fail at ",
        ),
        (lambda place: RuntimeError("basic_ios::clear: iostream error"), "{}: the disk is full (basic_ios::clear: "),
        (lambda place: PermissionError(13, "Permission denied", f"{place}/a"), "{}: cannot be written (Permission den"),
        (lambda place: CheckpointError(f"{place}: LlamaModel does not accept"), "{}: LlamaModel does not accept"),
    ],
)
def test_errors_name_the_output_and_not_where_it_is_made(
    make: Callable[[Path], Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (Path("out"), tmp_path / "out"):
        with pytest.raises(KvConvertError) as raised, staged_directory(output) as staging:
            raise make(staging)
        assert str(raised.value).startswith(said.format(output))
        assert "partial" not in str(raised.value)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), NotADirectoryError(20, "Not a directory")])
def test_a_file_that_is_read_is_not_taken_for_the_output(error: OSError, tmp_path: Path) -> None:
    """The source lies beside the output; only what belongs to the output is blamed on it."""
    output, shard = tmp_path / "model-gqa2", tmp_path / "model" / "model-00001-of-00002.safetensors"
    said = f"{shard}: cannot be opened ({error.strerror})"
    with pytest.raises(InputError, match=re.escape(said)) as raised, staged_directory(output):
        raise type(error)(error.errno, error.strerror, str(shard))
    assert not isinstance(raised.value, OutputError)
    assert raised.value.hint == "check the file and its permissions"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_the_outputs(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    for place in (output, output / "config.json", output.parent, output.with_name(".out.partial-7") / "model", None):
        with pytest.raises(OutputError, match=re.escape(f"{output}: cannot be written (")), disk_errors(output):
            raise PermissionError(13, "Permission denied", *([str(place)] if place else []))


def test_a_source_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As open() says it to people who are not root."""
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").touch()
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.parent == source:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(InputError, match=re.escape(f"{source / 'config.json'}: cannot be opened (Permission denied)")),
        staged_directory(tmp_path / "out") as staging,
        (source / "config.json").open("rb") as file,
    ):
        (staging / "config.json").write_bytes(file.read())


def test_force_replaces_at_the_end_only(exchanges: bool, tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    with pytest.raises(RuntimeError), staged_directory(output, force=True):
        raise RuntimeError
    assert (output / "model").read_text() == "old"
    make(output)
    assert (output / "model").read_text() == "new"
    assert unlike_manifest(output, digests=True) == []
    assert list(tmp_path.iterdir()) == [output]


def test_force_spares_what_is_read(tmp_path: Path) -> None:
    model = tmp_path / "models" / "model"
    model.mkdir(parents=True)
    for output, what in ((model, "is"), (model.parent, "holds")):
        with pytest.raises(OutputError, match=f"{output} {what} {model}, which is read"):
            check_output(output, force=True, inputs=[model])
    check_output(model, force=True)  # empty


def test_force_spares_what_links_of_a_source_lead_to(tmp_path: Path) -> None:
    output, source = ours(tmp_path / "out"), tmp_path / "model"
    (source / "deep").mkdir(parents=True)
    check_output(output, force=True, inputs=[source])
    (source / "deep" / "model").symlink_to(output / "model")
    said = f"{output} holds {output / 'model'}, as {source / 'deep' / 'model'}, which is read"
    with pytest.raises(OutputError, match=re.escape(said)):
        check_output(output, force=True, inputs=[source])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda output: (output / "notes").touch(), "notes is not in the manifest"),
        (lambda output: (output / "model").write_text("longer"), "model has 6 bytes, and had 3"),
        (lambda output: (output / "kvconvert.json").write_text("{}"), "kvconvert.json does not list its files"),
        (
            lambda output: (output / "kvconvert.json").write_text("[]"),
            "kvconvert.json: expected a JSON object, found []",
        ),
        (lambda output: (output / "kvconvert.json").write_text('{"files": [7]}'), "kvconvert.json does not list"),
        (lambda output: (output / "kvconvert.json").write_text("not JSON"), "kvconvert.json: not readable as JSON"),
        (lambda output: (output / "kvconvert.json").unlink(), "kvconvert.json is missing"),
        (lambda output: (output / "model").unlink(), "model is missing"),
        (lambda output: (output / "notes").symlink_to("/etc"), "notes is not in the manifest"),
    ],
)
def test_force_spares_what_kvconvert_did_not_write(change: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    check_output(output, force=True)
    change(output)
    with pytest.raises(OutputError, match=re.escape(f"{output} is not as kvconvert wrote it")) as raised:
        check_output(output, force=True)
    assert said in str(raised.value)


@pytest.mark.parametrize("force", [True, False])
def test_what_appears_during_a_run_stays(exchanges: bool, force: bool, tmp_path: Path) -> None:
    output = tmp_path / "out"
    message = "is not as kvconvert wrote it" if force else "appeared while it was being written"
    with pytest.raises(OutputError, match=message), staged_directory(output, force=force) as new:
        (new / "model").touch()
        output.mkdir()
        (output / "precious").touch()
    assert list(tmp_path.iterdir()) == [output]
    assert [path.name for path in output.iterdir()] == ["precious"]


def test_what_appears_in_the_last_moment_is_put_back(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the exchange."""
    output, check = ours(tmp_path / "out"), check_replaceable

    def check_and_add(directory: Path, named: Path) -> None:
        check(directory, named)
        (directory / "precious").touch()

    monkeypatch.setattr(staging, "check_replaceable", check_and_add)
    with pytest.raises(OutputError, match="precious is not in the manifest"):
        make(output)
    assert list(tmp_path.iterdir()) == [output]
    assert (output / "model").read_text() == "old"
    assert (output / "precious").exists()


def test_what_is_taken_out_is_not_cleared_up_by_another_run(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the exchange and the last check it lies under the name of a leftover."""
    output, check = ours(tmp_path / "out"), check_replaceable
    looked_at: list[str] = []

    def clear_and_check(directory: Path, named: Path) -> None:
        clear_leftovers(output, pytest.fail)
        check(directory, named)
        looked_at.append(directory.name)

    monkeypatch.setattr(staging, "check_replaceable", clear_and_check)
    make(output)
    assert looked_at[0] == "out"
    assert looked_at[1].startswith(".out.")
    assert (output / "model").read_text() == "new"


def test_an_output_that_another_run_is_replacing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = ours(tmp_path / "out")
    monkeypatch.setattr(staging, "_SWAP_SECONDS", 0.1)
    descriptor = os.open(output, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(OutputError, match="is being replaced by another run"):
        make(output)
    assert list(tmp_path.iterdir()) == [output]
    os.close(descriptor)
    make(output)
    assert (output / "model").read_text() == "new"


def test_a_way_through_a_link_is_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`link/../out` is beside what the link leads to, for check and swap alike."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    foreign = tmp_path / "out"
    foreign.mkdir()
    (foreign / "precious").touch()
    make(tmp_path / "link" / ".." / "out", force=True)
    assert (foreign / "precious").exists()
    assert (tmp_path / "elsewhere" / "out" / "model").read_text() == "new"


def test_where_a_disk_is_mounted_is_refused_before_the_work() -> None:
    with pytest.raises(OutputError, match="/proc is where a disk is mounted, and cannot be replaced"):
        check_output(Path("/proc"), force=True)


IN_A_NAMESPACE = """
import os, subprocess, sys
from pathlib import Path
from kvconvert.convert.checkpoint.manifest import write_manifest
from kvconvert.convert.checkpoint.staging import check_renames
from kvconvert.convert.errors import OutputError

def ours(directory):
    directory.mkdir(parents=True)
    (directory / "model").write_text("old")
    write_manifest(directory, {})

place = Path(sys.argv[1])
for name in ("lower", "upper", "work", "merged", "elsewhere", "bound"):
    (place / name).mkdir()
ours(place / "lower" / "out")
ours(place / "elsewhere" / "out")
layers = ",".join(f"{name}dir={place / name}" for name in ("lower", "upper", "work"))
(place / "bound" / "out").mkdir()
mounts = (
    ["-t", "overlay", "overlay", "-o", f"{layers},redirect_dir=off", place / "merged"],
    ["--bind", place / "elsewhere" / "out", place / "bound" / "out"],
)
for mount in mounts:
    if subprocess.run(["mount", *mount], capture_output=True).returncode:
        sys.exit(77)
ours(place / "merged" / "new")
for name in ("merged/out", "bound/out", "merged/new", "merged/deep/absent"):
    try:
        check_renames(place / name)
        print(name, "yes")
    except OutputError as error:
        print(name, str(error).rpartition("(")[2])
print(sorted(path.name for path in (place / "merged").iterdir()), (place / "merged/out/model").read_text())
"""


def test_a_layer_of_an_image_and_a_bound_directory_are_told_before_the_work(tmp_path: Path) -> None:
    """In a mount namespace of its own: what the file system itself refuses, and beside it what it does not."""
    command = ["unshare", "--mount", sys.executable, "-c", IN_A_NAMESPACE, str(tmp_path)]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode == 77 or "unshare failed" in outcome.stderr:
        pytest.skip("nothing can be mounted here")
    assert outcome.stdout.splitlines() == [
        "merged/out Invalid cross-device link)",
        "bound/out Device or resource busy)",
        "merged/new yes",
        "merged/deep/absent yes",
        "['new', 'out'] old",
    ], outcome.stderr


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EBUSY, errno.EPERM, errno.ENOSYS])
def test_a_place_that_cannot_be_renamed_is_refused_before_the_work(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = ours(tmp_path / "out"), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == output:
            raise OSError(number, os.strerror(number), str(path))
        return rename(path, target)

    check_renames(output)
    monkeypatch.setattr(Path, "rename", refuse)
    said = re.escape(f"{output} cannot be put in place or replaced by renaming ({os.strerror(number)})")
    with pytest.raises(OutputError, match=said):
        check_renames(output)
    with pytest.raises(OutputError, match=said), staged_directory(output, force=True):
        pytest.fail("the work has begun")
    check_renames(tmp_path / "another")  # the control: only what is there cannot be moved
    assert list(tmp_path.iterdir()) == [output]
    assert (output / "model").read_text() == "old"


def test_a_place_that_came_to_be_mounted_during_the_work_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(one: Path, other: Path, flags: int) -> bool:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(one), None, str(other))

    output = ours(tmp_path / "out")
    monkeypatch.setattr(staging, "_renameat2", refuse)
    with pytest.raises(
        OutputError, match=r"cannot be put in place or replaced by renaming \(Device or resource busy\)"
    ):
        make(output)
    assert list(tmp_path.iterdir()) == [output]


def test_a_file_system_that_moves_onto_what_is_not_empty_gets_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = ours(tmp_path / "out"), Path.rename

    def take(path: Path, target: Path) -> Path:
        if target.is_dir():
            rename(target, target.with_name("aside"))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", take)
    check_renames(output)
    assert (output / "model").read_text() == "old"


def test_names_that_are_too_long_are_refused(tmp_path: Path) -> None:
    check_output(tmp_path / ("a" * 200), force=False)
    with pytest.raises(OutputError, match="a name is longer than 207 bytes"):
        check_output(tmp_path / ("a" * 208), force=False)
    with pytest.raises(OutputError, match="cannot be created"):
        check_output(tmp_path / ("a" * 300) / "out", force=False)
    with pytest.raises(OutputError, match="cannot be created"):
        check_output(tmp_path.joinpath(*["a" * 100] * 50), force=False)


def test_a_file_for_statistics_is_not_put_where_something_is_replaced(tmp_path: Path) -> None:
    output = ours(tmp_path / "out")
    (tmp_path / "way").symlink_to(output)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    check_file(tmp_path / "statistics", outside=output)
    with pytest.raises(OutputError, match="lies in"):
        check_file(tmp_path / "way" / "statistics", outside=output)
    with pytest.raises(OutputError, match="already exists"):
        check_file(tmp_path / "dangling", outside=output)


@pytest.mark.parametrize("write", [create_file, append_file])
def test_no_file_is_opened_through_a_link(write: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match=r"File exists|symbolic links"):
        write(tmp_path / "link")
    with pytest.raises(FileExistsError):
        copy_file(Path(__file__), tmp_path / "link")
    assert not (tmp_path / "other").exists()


def test_a_file_is_put_in_the_place_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("theirs")
    for write in (lambda path: write_text(path, "ours"), write_replaced):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "other")
        write(link)
        assert not link.is_symlink()
        assert link.read_text() == "ours"
    assert (tmp_path / "other").read_text() == "theirs"


def write_replaced(path: Path) -> None:
    with replaced_file(path) as file:
        file.write(b"ours")


# A run that ends, in a process of its own. PLACE is its output; `at` ends it, when the named function is called.
RUN = """
import os, shutil, signal, sys
from pathlib import Path
from kvconvert.convert import Gqa, convert
from kvconvert.convert.checkpoint import staging
from kvconvert.convert.checkpoint.manifest import write_manifest

def stop(number, frame):
    raise SystemExit(128 + number)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGHUP, stop)
place, name, number, exchange, calls = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
if exchange == "False":
    staging._renameat2 = lambda one, other, flags: False
holder = {"rename": Path, "rmtree": shutil}.get(name, staging)
function = getattr(holder, name)
count = 0

def at(*arguments, **options):
    global count
    count += 1
    if count == calls:
        os.kill(os.getpid(), number)
    return function(*arguments, **options)

setattr(holder, name, at)
with staging.staged_directory(place, force=True) as new:
    (new / "model").write_text("new")
    write_manifest(new, {})
"""


def run_and_end(output: Path, at: str, number: signal.Signals, *, exchanges: bool = True, calls: int = 1) -> int:
    program = [sys.executable, "-c", RUN, str(output), at, str(number.value), str(exchanges), str(calls)]
    return subprocess.run(program, check=False).returncode


@pytest.mark.parametrize(
    ("at", "calls", "exchanges", "left", "content"),
    [
        ("sync_tree", 1, True, 1, "old"),  # before the exchange
        ("rmtree", 1, True, 1, "new"),  # after it
        ("rename", 3, False, 1, "old"),  # before the first of two, behind two that are tries
        ("rename", 4, False, 2, "old"),  # between them: the output is not there
        ("rmtree", 1, False, 1, "new"),
    ],
)
def test_a_run_that_was_killed_is_cleared_up_by_the_next(
    at: str, calls: int, exchanges: bool, left: int, content: str, tmp_path: Path
) -> None:
    output = ours(tmp_path / "out")
    assert run_and_end(output, at, signal.SIGKILL, exchanges=exchanges, calls=calls) == -signal.SIGKILL
    assert len([path for path in tmp_path.iterdir() if path != output]) == left
    remarks: list[str] = []
    clear_leftovers(output, remarks.append)
    assert list(tmp_path.iterdir()) == [output]
    assert (output / "model").read_text() == content
    assert unlike_manifest(output, digests=True) == []
    assert len(remarks) == left
    assert any("put back" in remark for remark in remarks) == (left == 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("at", "calls", "exchanges", "content"),
    [
        ("sync_tree", 1, True, "old"),
        ("_renameat2", 1, True, "new"),
        ("rmtree", 1, True, "new"),
        ("rename", 4, False, "new"),
    ],
)
def test_a_signal_does_not_come_between_two_names(
    number: signal.Signals, at: str, calls: int, exchanges: bool, content: str, tmp_path: Path
) -> None:
    output = ours(tmp_path / "out")
    assert run_and_end(output, at, number, exchanges=exchanges, calls=calls) == 128 + number
    assert list(tmp_path.iterdir()) == [output]
    assert (output / "model").read_text() == content
    assert unlike_manifest(output, digests=True) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("kvconvert.convert.checkpoint.staging.sync_tree", "nothing was written to {}"),
        ("kvconvert.convert.checkpoint.staging._rename_new", "{} is complete"),
    ],
)
def test_a_command_that_a_signal_ends_says_what_it_did(
    number: signal.Signals,
    at: str,
    said: str,
    make_checkpoint: CheckpointFactory,
    invoke: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, output = resolve(at), tmp_path / "out"
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # which processes of pytest-xdist ignore

    def end(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return function(*arguments)

    monkeypatch.setattr(at, end)
    try:
        outcome = invoke("mha2mqa", make_checkpoint(), "--output", output, "--quiet")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert outcome.returncode == 128 + number
    how = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
    assert outcome.stderr == f"error: {how}; {said.format(output)}\n"
    assert output.exists() == ("complete" in said)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


@contextmanager
def left(parent: Path, kind: str = "partial", host: str | None = None, boot: str | None = None) -> Iterator[Path]:
    """A directory that a run left, or is at work in as long as the block lasts."""
    here, since = staging._machine()
    path = parent / f".out.{kind}-{host or here}-{boot or since}-00000000"
    path.mkdir()
    (path / ".kvconvert-unfinished").touch()
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["partial", "scratch", "removed"])
def test_what_a_run_is_at_work_in_stays(kind: str, tmp_path: Path) -> None:
    with left(tmp_path, kind) as path:
        clear_leftovers(tmp_path / "out", pytest.fail)
        assert path.exists()
    remarks: list[str] = []
    clear_leftovers(tmp_path / "other", remarks.append)
    assert path.exists()
    clear_leftovers(tmp_path / "out", remarks.append)
    assert not path.exists()
    assert remarks == [f"removed {path.name}, which a run that was killed had left beside out"]


def test_what_another_machine_may_be_at_work_in_stays(tmp_path: Path) -> None:
    remarks: list[str] = []
    with left(tmp_path, host="0" * 8) as path:
        pass
    clear_leftovers(tmp_path / "out", remarks.append)
    assert path.exists()
    assert remarks == [f"{path.name} lies beside out: remove it, unless a run on another machine is at work there"]


def test_what_was_left_before_this_machine_started_goes(tmp_path: Path) -> None:
    """A machine of the same name that is at work since then may be another one."""
    remarks: list[str] = []
    with left(tmp_path, boot="0" * 8) as path:
        pass
    clear_leftovers(tmp_path / "out", remarks.append)
    assert path.exists()
    for place in (path / ".kvconvert-unfinished", path):
        os.utime(place, (0, 0))
    clear_leftovers(tmp_path / "out", remarks.append)
    assert not path.exists()
    assert [remark.split()[0] for remark in remarks] == [path.name, "removed"]


def test_a_leftover_that_is_not_ours_stays(tmp_path: Path) -> None:
    """What came into the output in the last moment lies under the name of a leftover if the run is killed then."""
    remarks: list[str] = []
    with left(tmp_path) as path:
        (path / ".kvconvert-unfinished").rename(path / "precious")
    clear_leftovers(tmp_path / "out", remarks.append)
    assert (path / "precious").exists()
    assert remarks == [f"{path.name} lies beside out, and holds files that kvconvert did not write: look at it"]


def test_a_directory_that_a_run_is_just_making_stays(tmp_path: Path) -> None:
    """It is locked and marked in the next moment."""
    here, since = staging._machine()
    path = tmp_path / f".out.partial-{here}-{since}-00000000"
    path.mkdir()
    clear_leftovers(tmp_path / "out", lambda remark: None)
    assert path.exists()
    os.utime(path, (time.time() - 100,) * 2)
    clear_leftovers(tmp_path / "out", lambda remark: None)
    assert not path.exists()


def test_scratch_and_what_is_discarded_leave_nothing(tmp_path: Path) -> None:
    with scratch_directory(tmp_path / "out") as scratch:
        (scratch / "tensor").touch()
        assert scratch.parent == tmp_path
    discard(ours(tmp_path / "run"))
    discard(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_is_needed_meanwhile_lies_beside_a_place_whose_parents_are_made(tmp_path: Path) -> None:
    """There the next run looks for what a killed one left, and nothing stays but after a kill."""
    output = tmp_path / "deep" / "deeper" / "out"
    with scratch_directory(output) as scratch:
        assert scratch.parent == output.parent
    assert list(tmp_path.iterdir()) == []
    child = os.fork()
    if not child:
        with scratch_directory(output) as scratch:
            (scratch / "large").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    remarks: list[str] = []
    clear_leftovers(output, remarks.append)
    assert len(remarks) == 1
    assert list(output.parent.iterdir()) == []
