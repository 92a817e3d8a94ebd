from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import pytest
import torch
from conftest import CheckpointFactory, Command, RunHere
from kvconvert.convert import open_checkpoint
from kvconvert.convert.algebra.kv_cache import kv_cache_bytes, kv_cache_bytes_per_token
from kvconvert.convert.architectures.attention import read_attention
from kvconvert.convert.architectures.table import find_architecture
from kvconvert.convert.checkpoint.loading import check_source, load_model
from kvconvert.convert.describe.inspection import inspect_checkpoint
from kvconvert.convert.errors import CheckpointError, UnsupportedError
from safetensors.torch import load_file, save_file


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))


def read_shape(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        read_attention(checkpoint, find_architecture(checkpoint))


def test_reads_headers_and_single_tensors(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint(dtype=torch.bfloat16, max_shard_size="60KB")
    expected = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        assert checkpoint.num_parameters == sum(tensor.numel() for tensor in expected.values())
        assert checkpoint.dtype == "BF16"
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_a_missing_shard(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint(max_shard_size="60KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.name} is missing"):
        open_checkpoint(source)


def test_a_shard_without_its_tensor(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint(max_shard_size="60KB")
    shard = sorted(source.glob("*.safetensors"))[1]
    weights = load_file(shard)
    dropped = sorted(weights)[0]
    save_file({name: tensor for name, tensor in weights.items() if name != dropped}, shard)
    with (
        open_checkpoint(source) as checkpoint,
        pytest.raises(CheckpointError, match=f"{dropped} is in {shard.name}, but it is not there"),
    ):
        check_source(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(keep: int, make_checkpoint: CheckpointFactory) -> None:
    weights = make_checkpoint() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a valid safetensors file, or truncated"):
        open_checkpoint(weights.parent)


def test_a_corrupt_header(make_checkpoint: CheckpointFactory) -> None:
    weights = make_checkpoint() / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        open_checkpoint(weights.parent)


def test_what_is_not_a_checkpoint(tmp_path: Path, make_checkpoint: CheckpointFactory) -> None:
    with pytest.raises(CheckpointError, match="nowhere/at/all: no such directory"):
        open_checkpoint("nowhere/at/all")
    (tmp_path / "file.bin").touch()
    with pytest.raises(CheckpointError, match="is a file, not a checkpoint directory"):
        open_checkpoint(tmp_path / "file.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path / "empty")
    source = make_checkpoint()
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a file of tensors that torch reads without running code"):
        open_checkpoint(source)
    (source / "pytorch_model.bin").rename(source / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"has other\.safetensors but no model\.safetensors\.index\.json"):
        open_checkpoint(source)
    (source / "config.json").write_text("{")
    (source / "other.safetensors").rename(source / "model.safetensors")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        open_checkpoint(source)


def test_a_directory_has_no_revisions(make_checkpoint: CheckpointFactory, invoke: Command) -> None:
    source = make_checkpoint()
    for arguments in (["inspect"], ["mha2mqa", "--dry-run"], ["evaluate", "--data", "text.txt"]):
        outcome = invoke(*arguments, source, "--revision", "v2")
        assert outcome.returncode == 2
        assert outcome.stderr.splitlines()[-2:] == [
            f"error: {source} is a directory, which has no revisions, and 'v2' was asked for",
            "hint: give a hub id, or leave the revision out (--revision)",
        ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, r"layer 0: k_proj has 8 heads, config.json says num_key_value_heads = 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 8 is not a multiple of num_key_value_heads = 3"),
        ({"num_hidden_layers": 3}, r"layer 2: model.layers.2.self_attn.o_proj.weight is missing"),
        ({"num_hidden_layers": 1}, r"model.layers.1.self_attn.o_proj.weight exists, .* num_hidden_layers = 1"),
        (
            {"num_attention_heads": 7},
            r"cannot read its config.json .* not a multiple of the number of attention heads \(7\)",
        ),
        (
            {"num_attention_heads": None},
            "config.json has num_attention_heads = None, which the class of llama does not take",
        ),
        ({"num_hidden_layers": 0}, "config.json has num_hidden_layers = 0, expected a positive integer"),
        ({"head_dim": 16}, r"layer 0: o_proj has shape \[64, 64\], config.json implies \[64, 128\]"),
    ],
)
def test_a_config_that_contradicts_the_tensors(
    changes: dict[str, object], message: str, make_checkpoint: CheckpointFactory
) -> None:
    source = make_checkpoint()
    edit_config(source, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_shape(source)


def test_what_a_config_leaves_out_comes_from_the_tensors(make_checkpoint: CheckpointFactory) -> None:
    """mistral's class has 8 K/V heads by default, llama's as many as query heads: the tensors know."""
    source = make_checkpoint("mistral", num_key_value_heads=2)
    config = json.loads((source / "config.json").read_text())
    del config["num_key_value_heads"], config["head_dim"]
    (source / "config.json").write_text(json.dumps(config))
    with open_checkpoint(source) as checkpoint:
        shape = read_attention(checkpoint, find_architecture(checkpoint))
    assert (shape.num_key_value_heads, shape.head_dim, shape.kind) == (2, 8, "GQA")


def test_integer_weights_are_not_averaged(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    name = "model.layers.0.self_attn.k_proj.weight"
    weights = load_file(source / "model.safetensors")
    save_file(weights | {name: weights[name].to(torch.int8)}, source / "model.safetensors")
    with open_checkpoint(source) as checkpoint, pytest.raises(UnsupportedError, match=f"{name} has dtype I8"):
        checkpoint.read(name)


def test_inspection_of_an_mha_checkpoint(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint(dtype=torch.bfloat16)
    with open_checkpoint(source) as checkpoint:
        inspection = inspect_checkpoint(checkpoint, context_length=1000)
    assert inspection.attention == "MHA"
    assert inspection.cache_bytes_per_token == 2 * 2 * 8 * 8 * 2
    assert inspection.cache_bytes_for_context == 1000 * inspection.cache_bytes_per_token
    assert inspection.size_on_disk_bytes == (source / "model.safetensors").stat().st_size
    assert [(target.command, target.possible, target.groups) for target in inspection.targets] == [
        ("mha2gqa", True, (2, 4)),
        ("mha2mqa", True, (1,)),
        ("mha2cla", True, ()),
        ("mha2mla", True, ()),
    ]


@pytest.mark.parametrize(
    ("num_key_value_heads", "reasons"),
    [
        (1, ["the model has one K/V head already", "the model is MQA already", "2 layers share keys and values"]),
        (2, ["2 K/V heads have no divisor between 1 and 2", "2 K/V heads become 1", "2 layers share keys and values"]),
    ],
)
def test_inspection_says_why_a_target_is_not_possible(
    num_key_value_heads: int, reasons: list[str], make_checkpoint: CheckpointFactory
) -> None:
    with open_checkpoint(make_checkpoint(num_key_value_heads=num_key_value_heads)) as checkpoint:
        assert [target.reason for target in inspect_checkpoint(checkpoint).targets[:3]] == reasons


def test_a_refused_checkpoint_is_inspected_all_the_same(make_checkpoint: CheckpointFactory) -> None:
    source = make_checkpoint()
    edit_config(source, quantization_config={"quant_method": "gptq"})
    with open_checkpoint(source) as checkpoint:
        targets = inspect_checkpoint(checkpoint).targets
    assert not any(target.possible for target in targets)
    assert all("quantised" in target.reason for target in targets)


SLIDING: list[tuple[str, dict[str, object], int]] = [
    ("gemma2", {"sliding_window": 16}, 1),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 1),
    ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, 0),
]
WHOLE: list[tuple[str, dict[str, object], int]] = [
    ("mistral", {"sliding_window": 16}, 2),
    ("mistral", {"sliding_window": None}, 0),
    ("qwen3_moe", {"sliding_window": 16, "use_sliding_window": True}, 2),  # its class knows no max_window_layers
    ("llama", {}, 0),
]


@pytest.mark.parametrize(
    ("model_type", "overrides", "num_sliding", "listed"),
    [*((*case, listed) for case in SLIDING for listed in (True, False)), *((*case, False) for case in WHOLE)],
)
def test_sliding_windows_bound_the_cache(
    model_type: str, overrides: dict[str, object], num_sliding: int, listed: bool, make_checkpoint: CheckpointFactory
) -> None:
    """With config.json's layer_types as transformers 5 writes them, and without as older versions did."""
    source = make_checkpoint(model_type, **overrides)
    config = json.loads((source / "config.json").read_text())
    assert ("layer_types" in config) == (model_type in ("gemma2", "qwen2"))
    if not listed:
        config.pop("layer_types", None)
        (source / "config.json").write_text(json.dumps(config | overrides))
    with open_checkpoint(source) as checkpoint:
        inspection = inspect_checkpoint(checkpoint, context_length=100)
    tokens = num_sliding * 16 + (2 - num_sliding) * 100
    assert inspection.cache_bytes_for_context == tokens * 2 * 8 * 8 * 2


def test_cache_arithmetic_of_llama_2_7b() -> None:
    """The figures of DESIGN §10."""
    assert kv_cache_bytes_per_token(num_layers=32, values=2 * 32 * 128) == 524_288
    assert kv_cache_bytes_per_token(num_layers=32, values=2 * 8 * 128) == 131_072
    assert kv_cache_bytes_per_token(num_layers=32, values=2 * 128) == 16_384
    full = kv_cache_bytes(4096, windows=[None] * 32, values=2 * 32 * 128)
    assert full == 4096 * 524_288


class _Hub(SimpleHTTPRequestHandler):
    """The part of the hub's HTTP interface that huggingface_hub needs, serving one repository from a directory."""

    repository: Path
    num_weight_bytes_sent = 0
    refusals: ClassVar[dict[str, tuple[int, str]]] = {}

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        for name, (status, code) in self.refusals.items():
            if f"/{name}/" in f"{path}/":
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        if path.startswith("/api/models/org/tiny"):
            self._send_json({"id": "org/tiny", "sha": "0" * 40, "siblings": self._siblings()}, path)
            return
        file = self.repository / path.rpartition("/")[2]
        if not path.startswith("/org/tiny/resolve/") or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "/org/tiny/" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, status = file.read_bytes(), 200
        total = len(content)
        if "Range" in self.headers:
            begin, end = self.headers["Range"].removeprefix("bytes=").split("-")
            content, status = content[int(begin) : int(end or total - 1) + 1], 206
        if with_body and file.suffix == ".safetensors":
            type(self).num_weight_bytes_sent += len(content)
        self.send_response(status)
        self.send_header("ETag", f'"{file.name}-{total}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _siblings(self) -> list[dict[str, str]]:
        return [{"rfilename": path.name} for path in sorted(self.repository.iterdir())]

    def _send_json(self, data: object, path: str) -> None:
        if "/tree/" in path:
            data = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in self.repository.iterdir()
            ]
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(repository: Path, refusals: dict[str, tuple[int, str]] | None = None) -> Iterator[tuple[str, type[_Hub]]]:
    handler = type("Hub", (_Hub,), {"repository": repository, "refusals": refusals or {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


def test_a_hub_id_is_inspected_downloaded_once_and_then_used_offline(
    make_checkpoint: CheckpointFactory,
    kvconvert: Command,
    run_here: RunHere,
    working_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In processes while there is a hub, whose address the library reads when it is imported."""
    source = make_checkpoint(with_tokenizer=True, vocab_size=50_000)
    shutil.copy(source / "model.safetensors", source / "consolidated.safetensors")  # as Mistral's repositories have it
    size = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    home = tmp_path / "hf-home"
    with serve(source) as (endpoint, hub):
        online = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
        inspected = kvconvert("inspect", "org/tiny", "--json", env=online).printed
        assert inspected["num_key_value_heads"] == 8
        assert inspected["size_on_disk_bytes"] == size
        assert hub.num_weight_bytes_sent < size / 10  # headers only
        converted = kvconvert("mha2gqa", "org/tiny", "--groups", 2, env=online)
        assert converted.returncode == 0, converted.stderr
        assert [path.name for path in home.rglob("*.safetensors")] == ["model.safetensors"]
        missing = kvconvert("inspect", "org/other", env=online)
        assert missing.returncode == 2
        assert "org/other: " in missing.stderr
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    run_here("mha2mqa", "org/tiny")
    assert {path.name for path in working_directory.iterdir()} == {"tiny-gqa2", "tiny-mqa"}
    assert json.loads((working_directory / "tiny-mqa" / "kvconvert.json").read_text())["source"] == "org/tiny"


_REFUSALS = {
    "org/gated": (403, "GatedRepo"),
    "org/private": (401, "RepoNotFound"),
    "org/none": (404, "RepoNotFound"),
    "org/branch": (404, "RevisionNotFound"),
    "org/forbidden": (403, ""),
    "org/down": (500, ""),
}
_OPENS = """
import json, sys
from kvconvert.convert import open_checkpoint
from kvconvert.convert.checkpoint import hub, opening
from kvconvert.convert.errors import CheckpointError
exec(sys.argv[2])
said = {}
for name, headers_only in json.loads(sys.argv[1]):
    try:
        open_checkpoint(name, headers_only=headers_only, revision="v1")
    except CheckpointError as error:
        said[f"{name} {headers_only}"] = [str(error), error.hint]
print(json.dumps(said))
"""


def opened_in_a_process(names: Iterable[str], before: str = "", **environment: str) -> dict[str, tuple[str, str]]:
    """What opening these hub ids says, by headers only and whole, and nothing else.

    In a process of its own, since the hub's address is read when one starts; `before` is run there first.
    """
    asked = json.dumps([(name, headers_only) for name in names for headers_only in (True, False)])
    outcome = subprocess.run(
        [sys.executable, "-c", _OPENS, asked, before],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "0", **environment},
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    return {name: (message, hint) for name, (message, hint) in json.loads(outcome.stdout).items()}


def test_why_the_hub_does_not_give_a_model(tmp_path: Path) -> None:
    with serve(tmp_path, _REFUSALS) as (endpoint, _):
        said = opened_in_a_process(_REFUSALS, HF_HOME=str(tmp_path / "hf-home"), HF_ENDPOINT=endpoint)
    login = "log in with `hf auth login` or set HF_TOKEN"
    wanted = {
        "org/gated": ("the hub gives this model only to people who were granted access", login),
        "org/private": ("the hub has no model of this name, or it is private", login),
        "org/none": ("the hub has no model of this name, or it is private", "check the spelling"),
        "org/branch": ("the model on the hub has no revision 'v1'", "give a branch, a tag or a commit"),
        "org/forbidden": ("the hub refuses access (HTTP 403)", login),
        "org/down": ("the hub answered with an error (HTTP 500)", "try again later"),
    }
    for name, (reason, hint) in wanted.items():
        for headers_only in (True, False):
            message, found = said[f"{name} {headers_only}"]
            assert message == f"{name}: {reason}; there is no directory of this name either"
            assert hint in found


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    said = opened_in_a_process(["org/any"], HF_HOME=str(tmp_path / "hf-home"), HF_ENDPOINT="http://127.0.0.1:1")
    for message, hint in said.values():
        assert re.fullmatch(r"org/any: the hub cannot be reached \(.*\); there is no directory of .*", message)
        assert hint.startswith("check the network")


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and says nothing
        environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}
        said = opened_in_a_process(
            ["org/any"], before="hub.ANSWER_SECONDS = opening.ANSWER_SECONDS = 0.1", **environment
        )
    for message, _ in said.values():
        assert message.startswith("org/any: the hub cannot be reached (no answer within 0.1 s); ")


@pytest.mark.parametrize("name", ["x\x1b[31m", "a" * 200, "org/-a"])
def test_a_name_that_no_model_can_have(name: str) -> None:
    with pytest.raises(CheckpointError, match="this is no name of a model on the hub"):
        open_checkpoint(name)


def test_a_hub_id_that_is_not_cached_fails_offline(
    invoke: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    outcome = invoke("inspect", "org/none")
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines() == [
        "error: org/none: it is not in the cache of this machine, and HF_HUB_OFFLINE forbids to ask the hub; "
        "there is no directory of this name either",
        "hint: unset HF_HUB_OFFLINE, or download it where there is a network and copy the cache",
    ]


@pytest.fixture
def cached(make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of org/kept in a cache of the hub."""
    repository = tmp_path / "hub/models--org--kept"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return Path(shutil.move(make_checkpoint(), repository / "snapshots/abc"))


def test_a_cached_model_whose_hub_cannot_be_reached_is_said_to_be_that(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be older than the hub's."""

    def fail(*arguments: object, **options: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with open_checkpoint("org/kept") as checkpoint:
        assert checkpoint.path == cached
        assert checkpoint.notes == ("the hub cannot be reached: org/kept is commit abc, from this machine's cache",)


def test_a_cached_model_without_its_weights(cached: Path, invoke: Command) -> None:
    """As where `inspect` has fetched its headers."""
    (cached / "model.safetensors").unlink()
    outcome = invoke("mha2mqa", "org/kept")
    assert outcome.returncode == 2
    assert outcome.stderr.splitlines() == [
        "error: org/kept: the cache of this machine has its config.json, but no weights",
        "hint: download it where there is a network, with `hf download org/kept`, and copy the cache",
    ]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_model_that_does_not_fit_is_no_broken_checkpoint(
    error: BaseException, make_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*arguments: object, **options: object) -> None:
        raise error

    source = make_checkpoint()
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", run_out)
    with pytest.raises(type(error)) as raised:
        load_model(source, dtype=torch.float32, device="cpu")
    assert raised.value.__notes__ == [f"while {source} was loaded"]


def test_what_transformers_cannot_open_is_still_said_so(
    make_checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("shapes\n differ")

    source = make_checkpoint()
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"transformers cannot open it \(RuntimeError: shapes differ\)"):
        load_model(source, dtype=torch.float32, device="cpu")
