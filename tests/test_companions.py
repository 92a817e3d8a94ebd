"""What lies beside the weights: what goes with them, what stays behind, and that nothing is lost without a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import CheckpointFactory, Command, RunHere
from kvconvert.convert import Cla, Gqa, convert
from kvconvert.convert.checkpoint.companions import Companions, find_companions
from kvconvert.convert.checkpoint.tensors import Checkpoint, TensorInfo

ADAPTER = "an adapter, which is not merged into the weights"
ATTENTION = "says how many heads the source has"
CODE = "code of the source's class"
HIDDEN = "hidden, of the repository"
MISSING = "named by modules.json, and not there"
TRAINING = "of a training run"
UNKNOWN = "not known to belong to the model"
WEIGHTS = "other weights than the model's"

POOLING = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
# Each case: files by their names, and what becomes of the directory's entries: None where it is copied.
CASES: dict[str, tuple[dict[str, Any], Mapping[str, str | None]]] = {
    "texts, tokenizer and licence": (
        {
            "LICENSE": "",
            "USE_POLICY.md": "",
            "tekken.json": {},
            "chat_template.jinja": "",
            "generation_config.json": {},
        },
        dict.fromkeys(("LICENSE", "USE_POLICY.md", "tekken.json", "chat_template.jinja", "generation_config.json")),
    ),
    "what a result has of its own": (
        {"README.md": "", "kvconvert.json": {}, "a.safetensors.index.json": {"weight_map": {"a": "model.safetensors"}}},
        {},
    ),
    "an index of other weights": (
        {"model.safetensors.index.json": {"weight_map": {"a": "model-00001-of-00002.safetensors"}}},
        {"model.safetensors.index.json": WEIGHTS},
    ),
    "configs for other versions": ({"config.4.0.0.json": {"n_head": 8}}, {"config.4.0.0.json": ATTENTION}),
    "an adapter": (
        {"adapter_config.json": {}, "adapter_model.safetensors": "", "adapter_model.bin": ""},
        dict.fromkeys(("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"), ADAPTER),
    ),
    "pooling": (
        {"modules.json": POOLING, "1_Pooling/config.json": {}, "config_sentence_transformers.json": {}},
        {"modules.json": None, "1_Pooling/": None, "config_sentence_transformers.json": None},
    ),
    "a dense layer over the pooling": (
        {"modules.json": [*POOLING, {"path": "./2_Dense", "type": "x.Dense"}], "2_Dense/model.safetensors": ""},
        {"modules.json": None, "1_Pooling/": MISSING, "2_Dense/": None},
    ),
    "modules elsewhere": (
        {
            "modules.json": [{"path": "../outside", "type": "x"}, {"path": "/etc", "type": "x"}, "nonsense"],
            "data/a": "",
        },
        {"modules.json": None, "data/": UNKNOWN},
    ),
    "pooling without its file": ({"1_Pooling/config.json": {}}, {"1_Pooling/": UNKNOWN}),
    "Llama's own files": (
        {"original/consolidated.00.pth": "", "original/params.json": {"n_heads": 32}, "params.json": {"n_heads": 32}},
        {"original/": WEIGHTS, "params.json": ATTENTION},
    ),
    "Mistral's own files": (
        {"consolidated.safetensors": "", "params.json": {"n_kv_heads": 8}, "tokenizer.model.v3": ""},
        {"consolidated.safetensors": WEIGHTS, "params.json": ATTENTION, "tokenizer.model.v3": None},
    ),
    "other descriptions of the model": (
        {"genai_config.json": {"model": {"decoder": {"num_key_value_heads": 8}}}, "configuration.json": {"task": "x"}},
        {"genai_config.json": ATTENTION, "configuration.json": None},
    ),
    "LitGPT's own files": (
        {
            "lit_model.pth": "",
            "model_config.yaml": "n_head: 8\nn_query_groups: 8\n",
            "a.yaml": "x: [1",
            "b.yml": "x: 1",
        },
        {"lit_model.pth": WEIGHTS, "model_config.yaml": ATTENTION, "a.yaml": None, "b.yml": None},
    ),
    "a vocabulary of code": (
        {"vocab.json": {f"a{number}": number for number in range(600)} | {"num_heads": 600}},
        {"vocab.json": None},
    ),
    "other formats": (
        {"pytorch_model.bin": "", "pytorch_model.bin.index.json": {}, "tf_model.h5": "", "flax_model.msgpack": ""}
        | {"model-q4.gguf": "", "onnx/model.onnx": "", "onnx/model.onnx_data": "", "model.fp16.safetensors": ""}
        | {"model.ckpt.index": "", "rust_model.ot": "", "model.safetensors.index.fp32.json": {}},
        dict.fromkeys(
            ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"), WEIGHTS
        )
        | dict.fromkeys(("model-q4.gguf", "onnx/", "model.fp16.safetensors", "model.ckpt.index"), WEIGHTS)
        | dict.fromkeys(("rust_model.ot", "model.safetensors.index.fp32.json"), WEIGHTS),
    ),
    "a training run": (
        {
            "trainer_state.json": {},
            "training_args.bin": "",
            "optimizer.pt": "",
            "scheduler.pt": "",
            "rng_state_0.pth": "",
        }
        | {"global_step10/mp_rank_00_model_states.pt": "", "latest": "", "zero_to_fp32.py": "", "all_results.json": {}}
        | {"runs/a": "", "checkpoint-500/model.safetensors": "", "random_states_0.pkl": ""}
        | {"run_status.json": {}, "run_files.json": {}},
        dict.fromkeys(("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt"), TRAINING)
        | dict.fromkeys(("rng_state_0.pth", "global_step10/", "latest", "zero_to_fp32.py"), TRAINING)
        | dict.fromkeys(("all_results.json", "runs/", "checkpoint-500/"), TRAINING)
        | dict.fromkeys(("run_status.json", "run_files.json"), TRAINING)
        | {"random_states_0.pkl": TRAINING},
    ),
    "a repository": (
        {".git/HEAD": "", ".gitattributes": "", ".cache/huggingface/x": "", "figures/a.png": ""},
        {".git/": HIDDEN, ".gitattributes": HIDDEN, ".cache/": HIDDEN, "figures/": UNKNOWN},
    ),
    "code": (
        {
            "modeling_mine.py": "from .attention import A",
            "configuration_mine.py": "",
            "attention.py": "",
            "handler.py": "",
        },
        {"modeling_mine.py": CODE, "configuration_mine.py": CODE, "attention.py": CODE, "handler.py": None},
    ),
    "code that the tokenizer needs": (
        {"modeling_mine.py": "from .shared import a", "shared.py": "", "configuration_mine.py": ""}
        | {"tokenization_mine.py": "from .shared import b\nfrom .configuration_mine import c"}
        | {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}},
        {"modeling_mine.py": CODE, "shared.py": None, "configuration_mine.py": None, "tokenization_mine.py": None}
        | {"tokenizer_config.json": None},
    ),
    "code for generation": ({"custom_generate/generate.py": ""}, {"custom_generate/": None}),
}


def write(directory: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def companions_in(directory: Path, **options: bool) -> Companions:
    """Of a checkpoint whose weights are model.safetensors."""
    tensor = TensorInfo("a", "F32", (0,), "model.safetensors", 0, 0)
    return find_companions(Checkpoint("model", directory, {}, {"a": tensor}, 0), **options)


@pytest.mark.parametrize("case", CASES)
def test_every_entry_goes_along_or_is_named(case: str, tmp_path: Path) -> None:
    files, expected = CASES[case]
    write(tmp_path, {"config.json": {"model_type": "llama"}, "model.safetensors": "", **files})
    companions = companions_in(tmp_path)
    copied = {f"{name}/" if (tmp_path / name).is_dir() else name: None for name in companions.copied}
    assert copied | dict(companions.left_behind) == expected
    assert not copied.keys() & companions.left_behind.keys()


def test_what_a_result_of_the_same_shape_keeps(tmp_path: Path) -> None:
    """After uptraining params.json is as true as before, and other weights are not."""
    write(tmp_path, {"model.safetensors": "", "params.json": {"n_heads": 8}, "pytorch_model.bin": ""})
    assert companions_in(tmp_path).left_behind == {"params.json": ATTENTION, "pytorch_model.bin": WEIGHTS}
    assert companions_in(tmp_path, same_attention=True).left_behind == {"pytorch_model.bin": WEIGHTS}


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": ""})
    (tmp_path / "LICENSE").symlink_to(tmp_path / "gone")
    assert companions_in(tmp_path).left_behind == {"LICENSE": "neither a file nor a directory that can be read"}


def test_the_size_of_what_is_copied(tmp_path: Path) -> None:
    write(
        tmp_path, {"model.safetensors": "", "modules.json": POOLING, "1_Pooling/config.json": "abc", "a.gguf": "abcd"}
    )
    assert companions_in(tmp_path).num_bytes == 3 + (tmp_path / "modules.json").stat().st_size


def test_what_stays_behind_is_printed_and_in_the_json(
    make_checkpoint: CheckpointFactory, invoke: Command, run_here: RunHere, tmp_path: Path
) -> None:
    source = make_checkpoint(with_tokenizer=True)
    write(
        source,
        {"modules.json": POOLING, "1_Pooling/config.json": "pooling", "adapter_config.json": {}, "README.md": ""},
    )
    write(source, {f"optimizer_{number}.bin": "" for number in range(8)})
    expected = {"adapter_config.json": ADAPTER} | {f"optimizer_{number}.bin": TRAINING for number in range(8)}
    command = ("mha2gqa", source, "--groups", 2, "--output")
    planned = run_here(*command, tmp_path / "out", "--dry-run")
    written = run_here(*command, tmp_path / "out")
    assert planned["left_behind"] == written["left_behind"] == expected
    assert (tmp_path / "out/1_Pooling/config.json").read_text() == "pooling"
    assert not {path.name for path in (tmp_path / "out").iterdir()} & expected.keys()
    assert [line for line in invoke(*command, tmp_path / "other").stdout.splitlines() if "left behind" in line] == [
        f"  left behind adapter_config.json: {ADAPTER}",
        "  left behind optimizer_0.bin, optimizer_1.bin, optimizer_2.bin, optimizer_3.bin, optimizer_4.bin, "
        f"optimizer_5.bin and 2 more: {TRAINING}",
    ]


def test_a_result_that_is_converted_again_leaves_nothing_behind(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    """Also where it is in a class of ours, whose code lies beside it."""
    first = convert(make_checkpoint(num_hidden_layers=4), Cla(share=2), tmp_path / "first")
    assert first.left_behind == {}
    for dry_run in (True, False):
        again = convert(first.output, Gqa(2), tmp_path / "again", dry_run=dry_run)
        assert again.left_behind == {}
    assert (tmp_path / "again/modeling_cross_layer_decoder.py").exists()
