"""Values that are infinite or not a number: named and refused, kept where that is asked for, and never computed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROSE, CheckpointFactory, Command
from kvconvert.convert import Calibration, Cla, Gqa, Mla, convert, open_checkpoint
from kvconvert.convert.checkpoint.finite import check_computed, count_nonfinite
from kvconvert.convert.checkpoint.tensors import Checkpoint
from kvconvert.convert.errors import CheckpointError, UnsupportedError
from kvconvert.convert.translations.routes import as_target
from safetensors.torch import load_file, save_file

NAN, INF = float("nan"), float("inf")
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EMBEDDINGS, KEYS, MLP = (
    f"model.{name}.weight" for name in ("embed_tokens", "layers.1.self_attn.k_proj", "layers.0.mlp.up_proj")
)


def damage(directory: Path, name: str, *values: float, row: int = -1) -> Path:
    """Put values into a row of a tensor, the last one unless given."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[name].flatten(0, -2)[row, : len(values)] = torch.tensor(values).to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_such_value_is_counted_wherever_it_is(dtype: torch.dtype) -> None:
    for size in (1, 100, 1037):
        values = torch.linspace(-3, 3, size).to(dtype)
        assert count_nonfinite(values) == 0
        for place in (0, size // 2, size - 1):
            for value in (NAN, INF, -INF):
                damaged = values.float().clone()
                damaged[place] = value if dtype != torch.float8_e4m3fn else NAN
                assert count_nonfinite(damaged.to(dtype)) == 1
    assert count_nonfinite(torch.full((2, 3), INF)) == 6
    assert count_nonfinite(torch.empty(0, 3)) == 0


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "shards"])
@pytest.mark.parametrize("name", [EMBEDDINGS, KEYS], ids=["copied", "averaged"])
def test_a_weight_that_is_not_finite_is_named_and_refused(
    name: str, kind: str, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = damage(make_checkpoint(dtype=torch.bfloat16), name, NAN, INF, -INF)
    file = "model.safetensors"
    if kind != "safetensors":
        tensors = load_file(source / file)
        (source / file).unlink()
        file = "pytorch_model.bin"
        torch.save(tensors, source / file)
    if kind == "shards":
        (source / file).unlink()
        file = "odd.safetensors"
        save_file({name: tensors.pop(name)}, source / file)
        save_file(tensors, source / "others.safetensors")
        weight_map = dict.fromkeys(tensors, "others.safetensors") | {name: file}
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"^{file}: 3 of \d+ values of {name} are infinite or not a") as refusal:
        convert(source, Gqa(2), tmp_path / "out")
    assert refusal.value.settings == ("allow_nonfinite",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_command_keeps_them_where_that_is_asked_for(
    make_checkpoint: CheckpointFactory, invoke: Command, tmp_path: Path
) -> None:
    source = damage(damage(make_checkpoint(), EMBEDDINGS, NAN), KEYS, NAN, INF, row=0)
    refused = invoke("mha2gqa", "--groups", "2", source, "-o", tmp_path / "out")
    assert refused.returncode == 2
    assert f"values of {EMBEDDINGS} are infinite or not a number" in refused.stderr
    assert "--allow-nonfinite" in refused.stderr
    kept = invoke("mha2gqa", "--groups", "2", source, "-o", tmp_path / "out", "--allow-nonfinite")
    assert kept.returncode == 0, kept.stderr
    assert f"1 values of {EMBEDDINGS} are infinite or not a number" in kept.stderr
    assert json.loads((tmp_path / "out/kvconvert.json").read_text())["nonfinite_values"] == {EMBEDDINGS: 1, KEYS: 2}
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert torch.equal(before[EMBEDDINGS].view(torch.int32), after[EMBEDDINGS].view(torch.int32))
    assert count_nonfinite(after[KEYS]) == 2
    assert sum(map(count_nonfinite, after.values())) == 3


def test_a_sound_checkpoint_is_read_once_and_noted_as_sound(
    make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    forget = Checkpoint._forget
    monkeypatch.setattr(Checkpoint, "_forget", lambda self, info: (read.update([info.name]), forget(self, info))[1])
    source = make_checkpoint()
    convert(source, Gqa(2), tmp_path / "out")
    assert read == Counter(dict.fromkeys(load_file(source / "model.safetensors"), 1))
    assert "nonfinite_values" not in json.loads((tmp_path / "out/kvconvert.json").read_text())


def test_masks_of_older_versions_may_be_infinite(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(dtype=torch.float16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.tensor([1.0, INF])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert convert(source, Gqa(2), tmp_path / "out").opened_as == "LlamaForCausalLM"


MEASURING: dict[str, Any] = {
    "gqa": Gqa(2, merge="svd"),
    "cla": Cla(share=2, merge="svd"),
    "cla-auto": Cla(num_key_value_layers=1, pairs="auto"),
    "mla": Mla(24, 4),
    "mla-gain": Mla(24, 4, rope_selection="gain", refit=False),
}


@pytest.mark.parametrize("method", MEASURING.values(), ids=MEASURING)
def test_a_text_is_not_blamed_for_weights(method: Any, make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = damage(make_checkpoint(with_tokenizer=True), MLP, NAN)
    (tmp_path / "text.txt").write_text(PROSE)
    text = Calibration(str(tmp_path / "text.txt"), num_tokens=64, sequence_length=32)
    with pytest.raises(CheckpointError, match=f"model.safetensors: 1 of 3072 values of {MLP} are infinite"):
        convert(source, method, tmp_path / "out", calibration=text)
    with pytest.raises(
        UnsupportedError, match=f"layer 1 computes values .* weights are not: {MLP} has 1 such"
    ) as error:
        convert(source, method, tmp_path / "out", calibration=text, allow_nonfinite=True)
    assert "measures nothing" in str(error.value.hint)


def test_a_model_that_overflows_is_told_from_weights_that_are_not_finite(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = damage(make_checkpoint(with_tokenizer=True), MLP, 3e38, -3e38, 3e38)
    (tmp_path / "text.txt").write_text(PROSE)
    text = Calibration(str(tmp_path / "text.txt"), num_tokens=64, sequence_length=32, precision="fp32")
    with pytest.raises(UnsupportedError, match=r"layer 1 computes values .* not finite, though its weights are"):
        convert(source, Gqa(2, merge="svd"), tmp_path / "out", calibration=text)


def test_a_text_that_does_not_meet_them_measures_all_the_same(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = damage(make_checkpoint(with_tokenizer=True), EMBEDDINGS, NAN)  # of a token that the text does not have
    (tmp_path / "text.txt").write_text(PROSE)
    text = Calibration(str(tmp_path / "text.txt"), num_tokens=64, sequence_length=32)
    remarks: list[str] = []
    method = Gqa(2, merge="svd")
    convert(source, method, tmp_path / "out", calibration=text, allow_nonfinite=True, remark=remarks.append)
    assert remarks[-1].startswith(f"1 values of {EMBEDDINGS}")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {name: count for name, tensor in tensors.items() if (count := count_nonfinite(tensor))} == {EMBEDDINGS: 1}


@pytest.mark.parametrize("method", [Gqa(2, merge="svd"), Mla(24, 4)], ids=["gqa", "mla"])
@pytest.mark.parametrize("name", [KEYS, "model.layers.0.input_layernorm.weight"])
def test_no_closed_form_of_what_is_not_finite(
    name: str, method: Any, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = damage(make_checkpoint(), name, NAN) if name == KEYS else damage_gain(make_checkpoint(), name)
    calibration = Calibration(weights_only=True)
    if name == KEYS or isinstance(method, Mla):  # Gqa does not read the gain
        with pytest.raises(UnsupportedError, match=rf"{name} has values that are infinite .* no closed form"):
            convert(source, method, tmp_path / "out", calibration=calibration, allow_nonfinite=True)
    else:
        convert(source, method, tmp_path / "out", calibration=calibration, allow_nonfinite=True)


def damage_gain(directory: Path, name: str) -> Path:
    tensors = load_file(directory / "model.safetensors")
    tensors[name][0] = NAN
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_weights_that_the_class_renames_are_named_as_in_the_file(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint("mixtral", with_tokenizer=True, sliding_window=None)
    name = next(name for name in load_file(source / "model.safetensors") if "layers.0" in name and "experts.3" in name)
    damage(source, name, INF)
    (tmp_path / "text.txt").write_text(PROSE)
    text = Calibration(str(tmp_path / "text.txt"), num_tokens=64, sequence_length=32)
    with pytest.raises(CheckpointError, match=f"1 of .* values of {name} are infinite"):
        convert(source, Gqa(2, merge="svd"), tmp_path / "out", calibration=text)


def test_what_is_computed_is_finite(make_checkpoint: CheckpointFactory) -> None:
    check_computed("a", torch.ones(3))
    check_computed("a", torch.tensor([NAN]), [torch.tensor([INF])])  # of what was allowed
    with pytest.raises(UnsupportedError, match=r"^a: 1 of 2 computed values are not finite in float16") as error:
        check_computed("a", torch.tensor([1, INF], dtype=torch.float16), [torch.ones(1)])
    assert "bfloat16" in str(error.value.hint)

    # GPT-Neo does not divide scores by √head_dim, so that a translation multiplies its queries
    queries = "transformer.h.0.attn.attention.q_proj.weight"
    sizes = {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 8}
    source = damage(make_checkpoint("gpt_neo", dtype=torch.float16, **sizes), queries, 60000.0)
    with as_target(open_checkpoint(source), 1) as view:
        name = next(
            name for name, info in view.checkpoint.tensors.items() if info.name.endswith("0.attn.c_attn.weight")
        )
        with pytest.raises(UnsupportedError, match=r"1 of .* computed values are not finite in float16"):
            view.checkpoint.read(name)
