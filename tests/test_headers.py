"""Files of weights that were made to do harm: headers that lie, and pickles that claim more than they hold."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from kvconvert.convert.checkpoint import pickle_check
from kvconvert.convert.checkpoint.headers import checked_info, load_pickle, read_header
from kvconvert.convert.errors import CheckpointError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, num_bytes: int) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(num_bytes))
    return path


def test_a_header_in_the_order_of_the_file(tmp_path: Path) -> None:
    header = {"__metadata__": {"a": "b"}, "b": ENTRY | {"data_offsets": [8, 16]}, "a": ENTRY}
    path = write(tmp_path / "x.safetensors", header, 16)
    start = path.stat().st_size - 16
    assert [(info.name, info.begin, info.end) for info in read_header(path, "x")] == [
        ("a", start, start + 8),
        ("b", start + 8, start + 16),
    ]


@pytest.mark.parametrize(
    ("header", "num_bytes", "reason"),
    [
        ({"a": ENTRY}, 9, "incomplete metadata, file not fully covered"),  # something behind the last tensor
        ({"a": ENTRY}, 7, "incomplete metadata, file not fully covered"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [9, 17]}}, 17, "invalid offset for tensor `b`"),  # a hole
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, 12, "invalid offset for tensor `b`"),  # an overlap
        ({"a": ENTRY | {"shape": [3]}}, 8, "invalid shape, data type, or offset for tensor"),
        ({"a": ENTRY | {"shape": [2**63, 4]}}, 8, "overflow"),
        ({"a": ENTRY | {"shape": [-2]}}, 8, "invalid JSON in header"),
        ({"a": ENTRY | {"shape": [10**400]}}, 8, "invalid JSON in header"),
        (b"[" * 100_000, 0, "not a valid safetensors file"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": ' + json.dumps(ENTRY).encode() + b"}",
            8,
            "",
        ),
    ],
)
def test_headers_that_are_refused(header: object, num_bytes: int, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", header, num_bytes)
    with pytest.raises(CheckpointError, match=f"(?i)x.safetensors: .*{reason}"):
        list(read_header(path, "x.safetensors"))


def test_a_name_that_is_in_the_header_twice(tmp_path: Path) -> None:
    """safetensors takes the last one."""
    raw = b'{"a": ' + json.dumps(ENTRY).encode() + b', "a": ' + json.dumps(ENTRY).encode() + b"}"
    path = write(tmp_path / "x.safetensors", raw, 8)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its header: .*\(the key 'a' is there twice\)"):
        list(read_header(path, "x.safetensors"))


@pytest.mark.parametrize("dtype", ["X7", 3, None, ["F32"]])
def test_a_dtype_that_safetensors_does_not_have(dtype: object, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": ENTRY | {"dtype": dtype}}, 8)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: a has dtype .*, which safetensors does not have"):
        list(read_header(path, "x.safetensors"))


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**64 - 1])
def test_a_length_of_the_header_that_is_none(length: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        list(read_header(tmp_path / "x", "x"))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"dtype": "F99"}, {"dtype": []}, {"shape": 3}, {"shape": ["2"]}, {"shape": [3]}, {"data_offsets": [0]}),
        *({"data_offsets": [8, 0]}, {"shape": [-2]}, {"data_offsets": None}),
    ],
)
def test_a_header_of_the_hub_that_contradicts_itself(wrong: dict[str, Any]) -> None:
    """Nothing but its JSON is fetched, which the library passes on as it is."""
    entry: dict[str, Any] = {"dtype": "F32", "shape": [2], "offsets": [0, 8]}
    entry |= {"offsets" if key == "data_offsets" else key: value for key, value in wrong.items()}
    assert checked_info("a", "F32", [2], (0, 8), "x").num_bytes == 8
    with pytest.raises(CheckpointError, match=r"x: a has shape .*, which do not go together"):
        checked_info("a", **entry, file="x")


def saved(state: object, *, is_zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


def refused(data: bytes, tmp_path: Path) -> str:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_pickle(path)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_of_tensors(is_zip: bool, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(saved(OrderedDict(a=torch.ones(3, 4)), is_zip=is_zip))
    assert torch.equal(load_pickle(tmp_path / "x")["a"], torch.ones(3, 4))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_claims_more_values_than_the_file_has_bytes(is_zip: bool, tmp_path: Path) -> None:
    data = saved({"a": torch.ones(300)}, is_zip=is_zip)
    true, claimed = pickle.dumps(300, 2)[2:-1], pickle.dumps(65535, 2)[2:-1]
    changed = _changed(data, true, claimed) if is_zip else data.replace(true, claimed)
    assert len(changed) < 65535
    problem = f"says that a tensor has 65535 values or bytes, and the file has {len(changed)} bytes"
    assert refused(changed, tmp_path) == problem


def _changed(data: bytes, old: bytes, new: bytes) -> bytes:
    """A zip file in whose pickle something is replaced."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(changed, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            is_pickle = entry.filename.endswith(".pkl")
            target.writestr(entry.filename, content.replace(old, new) if is_pickle else content)
    return changed.getvalue()


def test_a_pickle_that_is_compressed(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    assert refused(packed.getvalue(), tmp_path) == "'x/data.pkl' in it is compressed, which torch never writes"


def test_a_text_in_a_pickle_that_claims_to_be_longer_than_all_memory(tmp_path: Path) -> None:
    data = b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x."
    assert "expected 4611686018427387904 bytes in a bytes8, but only 2 remain" in refused(data, tmp_path)


def test_a_pickle_with_more_operations_than_tensors_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_check, "_MAX_OPERATIONS", 10)
    assert refused(saved({"a": torch.ones(2)}), tmp_path) == "more operations than a file of tensors needs"


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"a": torch.ones(1).expand(100)}, "a is 400 bytes, and the file has 4 of them"),
        (
            {"a": torch.ones(2, device="meta")},
            "calls 'torch._utils._rebuild_meta_tensor_no_storage', which no file of tensors does",
        ),
        ({"a": torch.eye(2).to_sparse()}, "holds something else than named tensors"),
        ({3: torch.ones(2)}, "holds something else than named tensors"),
        ({"\ud800": torch.ones(2)}, "holds something else than named tensors"),
        ([torch.ones(2)], "holds something else than named tensors"),
    ],
)
def test_what_is_no_named_tensor(state: object, problem: str, tmp_path: Path) -> None:
    assert refused(saved(state), tmp_path) == problem


BOMBS = {
    # a tuple that holds the one before twice, as a key, whose hash takes 2**40 steps
    "hash": (b"}" + b")" + b"q\x00h\x00\x86" * 40 + b"Ns.", "hold each other more often than tensors need"),
    # the same of lists, as what is called, which the message of an error would print
    "text": (b"]" + b"q\x00](h\x00h\x00e" * 40 + b")R.", "hold each other more often than tensors need"),
    "late": (b"]q\x00]q\x01h\x01ah\x00Nah\x01h\x00a.", "is changed after another holds it"),
    "bytes": (
        b"(cbuiltins\nbytearray\nq\x00" + b"h\x00M\xff\xff\x85R" * 9 + b"t.",
        "calls 'builtins.bytearray', which no",
    ),
    "new": (b"ctorch\nFloatTensor\nM\xff\xff\x85\x81.", "calls 'torch.FloatTensor', which no file of tensors does"),
    "behind": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\nctorch\nTensor\nM\xff\xff\x85NtR.",
        "calls 'builtins.bytearray', which no file of tensors does",
    ),
    "called by itself": (
        b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00NNNtR.",
        "calls what is no function, which no file of tensors does",
    ),
    "storage": (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n)X\x03\x00\x00\x00cpuK\x01tQ.",
        "names a storage otherwise",
    ),
    "storages": (
        b"("
        + b"".join(
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00%dX\x03\x00\x00\x00cpuM\xff\xfftQ"
            % number
            for number in range(9)
        )
        + b"t.",
        "says that its storages have ",
    ),
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_would_make_more_than_it_holds(name: str, is_zip: bool, tmp_path: Path) -> None:
    """Each takes a few hundred bytes beside a tensor's, and with more of the same hours or all memory."""
    content, problem = BOMBS[name]
    state = {"a": torch.ones(70_000)}
    if is_zip:
        data = _changed(saved(state), _pickle_of(saved(state)), b"\x80\x02" + content)
    else:
        preambles = saved({}, is_zip=False).rpartition(pickle.dumps({}, 2)[:-1])[0]
        data = preambles + b"\x80\x02" + content + bytes(300_000)
    assert problem in refused(data, tmp_path)


def _pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def test_the_pickle_that_torch_takes_is_the_one_that_is_looked_at(tmp_path: Path) -> None:
    """The folder of the first entry is what counts, not the first pickle."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("x/version", b"3\n")
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data.pkl", b"\x80\x02" + BOMBS["bytes"][0])
        archive.writestr("x/data/0", bytes(10**6))
    assert "calls 'builtins.bytearray'" in refused(packed.getvalue(), tmp_path)


def test_a_tar_file_that_looks_like_pickles_is_refused(tmp_path: Path) -> None:
    """torch opens it as one, and what is in it has not been looked at."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("N.N.N.N.N."))
    assert refused(packed.getvalue(), tmp_path) == "a tar file, a format that torch left in 2017"


def test_the_names_of_storages_behind_a_pickle_are_looked_at(tmp_path: Path) -> None:
    data = saved({"a": torch.ones(2)}, is_zip=False)
    names = data.rindex(b"\x80\x02]")  # the last pickle
    changed = data[:names] + b"\x80\x02" + BOMBS["hash"][0] + bytes(10**6)
    assert "hold each other more often" in refused(changed, tmp_path)


def test_pickles_of_parameters_and_of_tensors_with_attributes_are_read(tmp_path: Path) -> None:
    """What is refused by what it calls is not what real files call."""
    parameter, tensor = torch.nn.Parameter(torch.ones(3)), torch.ones(2)
    parameter.partition = tensor.partition = True  # type: ignore[attr-defined]
    weight = torch.nn.Parameter(torch.ones(4))
    state = OrderedDict(a=parameter, b=tensor, c=weight, d=weight, e=torch.ones(2, 3).T)
    state._metadata = OrderedDict(a={"version": 1})  # type: ignore[attr-defined]
    for is_zip in (True, False):
        (tmp_path / "x").write_bytes(saved(state, is_zip=is_zip))
        loaded = load_pickle(tmp_path / "x")
        shapes = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
        assert shapes == {"a": (3,), "b": (2,), "c": (4,), "d": (4,), "e": (3, 2)}
