"""A conversion through the front door, and its plan carried out by another process."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import LATENT, CheckpointFactory
from kvconvert.convert import Calibration, Cla, Gqa, KvConvertError, Mla, convert, execute, inspect, open_checkpoint
from kvconvert.convert.checkpoint.loading import check_accepts, check_opens
from kvconvert.convert.conversion import Method
from kvconvert.convert.errors import InputError, OutputError, UnsupportedError
from kvconvert.convert.methods.prepared import Preparation, Prepared
from test_translations import GPT2, GPTJ

METHODS: dict[str, tuple[str, dict[str, Any], Method]] = {
    "mean": ("llama", {}, Gqa(2)),
    "random": ("llama", {}, Gqa(2, merge="random")),
    "translated": ("gptj", GPTJ, Gqa(2)),
    "translated-twice": ("gpt2", GPT2, Gqa(1)),
    "fused": ("phi3", {}, Gqa(2, merge="svd")),
    "svd": ("llama", {"attention_bias": True}, Gqa(2, merge="svd")),
    "layers": ("qwen3", {"num_hidden_layers": 4}, Cla(share=2)),
    "layers-svd": ("llama", {"num_hidden_layers": 4}, Cla(share=2, num_key_value_heads=2, merge="svd")),
    "latent": ("llama", {}, Mla(24, 4)),
}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


PROGRAM = """
import json, sys
from pathlib import Path
from kvconvert.convert import ConversionPlan, Overlay, execute, open_checkpoint

for folder in map(Path, sys.argv[1:]):
    plan = ConversionPlan.from_json(json.loads((folder / "plan.json").read_text()))
    record = json.loads((folder / "record.json").read_text())
    with open_checkpoint(folder / "source") as checkpoint:
        overlay = Overlay.open(folder / "overlay")
        execute(plan, checkpoint, folder / "there", overlay, max_shard_bytes=60_000, **record)
"""


def test_plans_written_as_json_give_the_same_bytes_in_another_process(
    make_checkpoint: CheckpointFactory, tmp_path: Path, prose_file: Path
) -> None:
    """One other process for all of them: it takes seconds to begin."""
    for name, (model_type, overrides, method) in METHODS.items():
        options = {"with_tokenizer": True, "max_shard_size": "60KB", **overrides}
        source = make_checkpoint(model_type, name=f"{name}/source", **options)
        folder = source.parent
        calibration = None
        if method.needs_measurements:
            calibration = Calibration(prose_file, num_tokens=256, sequence_length=64, device="cpu", precision="fp32")
        here = convert(source, method, folder / "here", calibration=calibration, max_shard_bytes=60_000)
        (folder / "overlay").mkdir()
        with method.source(open_checkpoint(source)) as view:
            text = None if calibration is None else read_text(view.checkpoint, prose_file)
            prepared = method.resolve(view).prepare(view, Preparation(folder / "overlay", text))
        assert isinstance(prepared, Prepared)
        (folder / "plan.json").write_text(json.dumps(here.plan.to_json()))
        options = json.loads((here.output / "kvconvert.json").read_text())["options"]
        (folder / "record.json").write_text(json.dumps({"calibration": here.calibration, "options": options}))
    subprocess.run([sys.executable, "-c", PROGRAM, *(tmp_path / name for name in METHODS)], check=True)
    for name in METHODS:
        expected = files(tmp_path / name / "here")
        assert any(file.endswith(".safetensors") for file in expected)
        assert files(tmp_path / name / "there") == expected, name


def read_text(checkpoint: Any, prose_file: Path) -> Any:
    from kvconvert.convert.calibration.text import read_calibration_text
    from kvconvert.convert.text.sources import TextSource

    return read_calibration_text(checkpoint, TextSource(str(prose_file)), num_tokens=256, sequence_length=64)


@pytest.mark.parametrize("merge", ["mean", "svd"])
def test_source_and_result_are_opened_in_their_class_once_each(
    merge: Literal["mean", "svd"],
    make_checkpoint: CheckpointFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    def note(directory: Path) -> str:
        opened.append(directory.name)
        return check_opens(directory)

    def note_headers(config: Any, tensors: Any, name: str) -> str:
        opened.append(Path(name).name)
        return check_accepts(config, tensors, name)

    monkeypatch.setattr(sys.modules[execute.__module__], "check_opens", note)
    monkeypatch.setattr(sys.modules[check_accepts.__module__], "check_accepts", note_headers)
    calibration = Calibration(weights_only=True) if merge == "svd" else None
    convert(make_checkpoint(), Gqa(2, merge=merge), tmp_path / "out", calibration=calibration)
    assert len(opened) == 2
    assert opened[0] == "model"
    assert opened[1].startswith(".out.partial")


def test_places_may_be_texts_and_the_result_says_where_it_is(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint()
    result = convert(str(source), Gqa(2))
    assert result.output == tmp_path / "model-gqa2"
    assert result.opened_as == "LlamaForCausalLM"
    assert result.plan.cache_bytes_per_token == (512, 128)
    assert inspect(str(result.output)).num_key_value_heads == 2
    assert convert(source, Gqa(1), dry_run=True).opened_as is None
    assert not (tmp_path / "model-mqa").exists()


def test_nothing_is_printed_and_what_is_done_is_told(
    make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = make_checkpoint(with_tokenizer=True)
    capfd.readouterr()
    seen: dict[str, list[int]] = {}
    remarks: list[str] = []

    class Bar:
        def __init__(self, what: str, total: int) -> None:
            seen[what] = [total, 0]
            self.what = what

        def __enter__(self) -> Any:
            return self.add

        def __exit__(self, *exc_info: object) -> None:
            pass

        def add(self, done: int) -> None:
            seen[self.what][1] += done

    calibration = Calibration(prose_file, num_tokens=10**6, device="cpu", precision="fp32")
    result = convert(
        source, Gqa(2, merge="svd"), tmp_path / "out", calibration=calibration, progress=Bar, remark=remarks.append
    )
    assert seen == {"merging": [2, 2], "converting": [result.plan.bytes_out] * 2}
    assert len(remarks) == 1
    assert "fewer than the 1000000 that were asked for" in remarks[0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("method", "calibration", "message"),
    [
        (Gqa(2), Calibration("text.jsonl"), "nothing is measured for this conversion"),
        (Gqa(2, merge="svd"), None, "measures the model on a text"),
        (Mla(24, 4), Calibration(statistics=Path("kept")), "needs a text, and statistics of one do not do"),
        (Cla(share=2, merge="svd"), Calibration(weights_only=True), "merged on a text"),
        (Mla(24, 4), Calibration("text.jsonl", save_statistics=Path("kept")), "cannot be used again"),
    ],
)
def test_a_calibration_that_does_not_fit_the_method_is_refused(
    method: Method, calibration: Calibration | None, message: str, make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint()
    with pytest.raises(InputError, match=message):
        convert(source, method, tmp_path / "out", calibration=calibration)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [{}, {"data": "a", "weights_only": True}, {"data": "a", "statistics": Path("b")}])
def test_a_calibration_is_one_thing(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a calibration is one of data, statistics and weights_only"):
        Calibration(**given)


def test_layers_at_the_ends_keep_their_own(
    make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path
) -> None:
    """In a plan that needs no text, and in one whose pairs are chosen on it."""
    source = make_checkpoint(num_hidden_layers=4, with_tokenizer=True)
    result = convert(source, Cla(share=2, keep_first=1, keep_last=1), tmp_path / "ends").plan.result
    assert result.layer_grouping is not None
    assert result.layer_grouping.sources == (0, 1, 1, 3)
    text = Calibration(prose_file, num_tokens=256, sequence_length=64, device="cpu", precision="fp32")
    chosen = Cla(share=2, keep_first=1, keep_last=1, pairs="auto")
    result = convert(source, chosen, tmp_path / "auto", calibration=text).plan.result
    assert result.layer_grouping is not None
    assert result.layer_grouping.sources == (0, 1, 1, 3)


def test_statistics_of_heads_that_are_not_merged_cannot_be_saved(
    make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path
) -> None:
    text = Calibration(prose_file, save_statistics=tmp_path / "kept")
    with pytest.raises(InputError, match="no statistics to save"):
        convert(make_checkpoint(), Gqa(8, merge="svd", allow_same=True), tmp_path / "out", calibration=text)
    assert not (tmp_path / "out").exists()


def test_layers_that_share_are_said_once() -> None:
    with pytest.raises(InputError, match="say which layers share, by one of"):
        Cla()
    with pytest.raises(InputError, match="say which layers share, by one of"):
        Cla(share=2, num_key_value_layers=1, pairs="auto")
    with pytest.raises(InputError, match="is used where pairs is auto only"):
        Cla(num_key_value_layers=1)
    with pytest.raises(UnsupportedError, match="unknown method 'random'"):
        Cla(share=2, merge="random")  # type: ignore[arg-type]


def test_a_larger_cache_is_said_before_the_work(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = make_checkpoint(num_key_value_heads=1)
    remarks: list[str] = []

    def progress(what: str, total: int) -> Any:
        remarks.append(what)
        return nullcontext(lambda done: None)

    def run(rank: int) -> list[str]:
        remarks.clear()
        weights = Calibration(weights_only=True)
        convert(source, Mla(rank, 8), dry_run=True, calibration=weights, progress=progress, remark=remarks.append)
        return remarks[: remarks.index("compressing")]

    assert run(9)[0] == "the cache gets larger: 17 numbers of a layer and token in place of 16; ask for smaller sizes"
    assert not any("larger" in remark for remark in run(7))  # the control


def test_a_latent_source_is_refused_before_anything_is_written(
    make_checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = make_checkpoint("deepseek_v3", **LATENT)
    with pytest.raises(KvConvertError, match="its cache holds a latent"):
        convert(source, Gqa(1), tmp_path / "out")
    with pytest.raises(OutputError, match=r"is .*model, which is read"):
        convert(make_checkpoint(name="other-model"), Gqa(2), tmp_path / "other-model", force=True)
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_latent_has_the_result_s_own_numbers(make_checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """The padded size of values is its head_dim, and no layer has a window."""
    source = make_checkpoint("mistral", sliding_window=128)
    method = Mla(24, 4, v_head_dim=16)
    plan = convert(source, method, tmp_path / "out", calibration=Calibration(weights_only=True), dry_run=True).plan
    assert (plan.source.head_dim, plan.source.windows) == (8, (128, 128))
    assert (plan.result.head_dim, plan.result.windows) == (16, (None, None))


@pytest.mark.parametrize(("jobs", "each"), [(2, 2), (3, 1), (1, 4)])
def test_threads_side_by_side_share_the_processors(
    jobs: int, each: int, make_checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each had all of them, they waited for each other actively, for more than half of the time."""
    seen: set[int] = set()
    execution = sys.modules["kvconvert.convert.execute"]  # whose name is the function's in kvconvert.convert
    check = execution.check_computed

    def see(*given: Any) -> None:
        seen.add(torch.get_num_threads())
        check(*given)

    monkeypatch.setattr(execution, "check_computed", see)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        convert(make_checkpoint(), Gqa(2), tmp_path / "out", jobs=jobs)
        assert seen == {each}
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
