"""What `evaluate` says beside the perplexity: bytes, positions, several texts, what came back, samples and limits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CheckpointFactory, Command, build_model
from kvconvert.convert.errors import InputError
from kvconvert.convert.text.sources import TextSource
from kvconvert.measure import EvaluationSettings, Limits, TaskSettings, check_limits, evaluate, read_baseline
from kvconvert.measure.held_out import load_windows
from kvconvert.measure.perplexity import recovery, summarise
from kvconvert.measure.samples import write_samples
from kvconvert.measure.scoring import Scores, score
from kvconvert.measure.tasks import TaskScore, hub_results, task_scores
from kvconvert.measure.windows import Windows, cut_windows, join_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parent.parent / "configs" / "demo"
TEXT = "A café costs 3 € in the Île-de-France, said the President — naïvely.\n" * 40


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 120, (count,), generator=torch.Generator().manual_seed(seed))


def scores_of(*windows: list[float], first: int = 1) -> Scores:
    return Scores([first] * len(windows), [torch.tensor(window) for window in windows])


def test_bytes_are_those_of_the_text_that_is_scored(tmp_path: Path) -> None:
    """One window that holds the whole text: all of it but the first token, which nothing predicts."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    ids = tokenizer(TEXT)["input_ids"]
    (tmp_path / "text.txt").write_text(TEXT)
    windows = load_windows(DEMO / "model", TextSource(str(tmp_path / "text.txt")), window=len(ids))
    assert windows.input_ids.tolist() == [ids]
    assert windows.num_bytes == len(TEXT.encode()) - len("A")
    halves = load_windows(DEMO / "model", TextSource(str(tmp_path / "text.txt")), window=len(ids) // 8, stride=9)
    covered = str(tokenizer.decode(ids[: halves.num_scored_tokens + 1]))
    assert halves.num_bytes == pytest.approx(len(covered.encode()) - 1, abs=6 * len(halves.input_ids))


def test_bits_per_byte_are_nats_over_bytes() -> None:
    windows = Windows(torch.zeros(2, 3, dtype=torch.int64), (1, 1), "", num_bytes=8)
    evaluation = summarise(scores_of([math.log(2), math.log(4)], [math.log(8), math.log(4)]), windows)
    assert evaluation.bits_per_byte == pytest.approx((1 + 2 + 3 + 2) / 8)
    assert summarise(scores_of([1.0]), replace(windows, num_bytes=None)).bits_per_byte is None


def test_losses_by_position_are_those_of_a_loop() -> None:
    model, original = build_model(seed=1), build_model(seed=2)
    windows = cut_windows(tokens(64 * 9), window=192, stride=96)
    scores = score(model, windows, original=original)
    evaluation = summarise(scores, windows)
    expected: dict[range, list[tuple[float, float]]] = {range(64): [], range(64, 128): [], range(128, 256): []}
    for first, nats, others in zip(windows.scored_from, scores.nats, scores.original_nats, strict=True):
        for place, pair in enumerate(zip(nats.tolist(), others.tolist(), strict=True), start=first):
            next(values for group, values in expected.items() if place in group).append(pair)
    found = [(group.first_position, group.last_position) for group in evaluation.positions]
    assert found == [(0, 63), (64, 127), (128, 191)]
    for group, pairs in zip(evaluation.positions, expected.values(), strict=True):
        assert group.num_tokens == len(pairs)
        assert group.nats_per_token == pytest.approx(sum(one for one, _ in pairs) / len(pairs), abs=1e-6)
        excess = sum(one - other for one, other in pairs) / len(pairs)
        assert group.excess_nats_per_token == pytest.approx(excess, abs=1e-6)
    assert sum(group.num_tokens for group in evaluation.positions) == evaluation.num_tokens
    alone = summarise(score(model, windows), windows)
    assert {group.excess_nats_per_token for group in alone.positions} == {None}


def test_what_came_back_is_a_part_of_the_excess_before() -> None:
    now, before, original = (torch.tensor(values) for values in ([2.0, 3.0, 4.0], [3.0, 5.0, 5.0], [1.0, 2.0, 2.0]))
    scores = Scores([1] * 3, list(now[:, None]), list(original[:, None]))
    found = recovery(scores, Scores([1] * 3, list(before[:, None])))
    assert found.before_excess_nats_per_token == pytest.approx(8 / 3)
    assert found.recovered == pytest.approx(1 - 4 / 8)
    left_out = [1 - 3 / 6, 1 - 3 / 5, 1 - 2 / 5]  # each window left out once
    mean = sum(left_out) / 3
    assert found.standard_error == pytest.approx(math.sqrt(2 / 3 * sum((each - mean) ** 2 for each in left_out)))
    nothing = recovery(scores, Scores([1] * 3, list(original[:, None])))
    assert math.isnan(nothing.recovered)


def test_several_texts_are_scored_apart_and_together(
    make_checkpoint: CheckpointFactory, prose_file: Path, tmp_path: Path
) -> None:
    model = make_checkpoint(with_tokenizer=True)
    other = tmp_path / "other.txt"
    other.write_text("the a of and in to that the a of and in to " * 60)
    settings = EvaluationSettings(window=32)
    both = evaluate(model, [prose_file, other], against=model, settings=settings)
    alone = [evaluate(model, path, settings=settings) for path in (prose_file, other)]
    assert list(both.by_source) == [str(prose_file), str(other)]
    for found, expected in zip(both.by_source.values(), alone, strict=True):
        assert (found.nats_per_token, found.num_tokens) == (expected.nats_per_token, expected.num_tokens)
        assert found.bits_per_byte == expected.bits_per_byte
        assert found.against is not None
    total = sum(each.nats_per_token * each.num_tokens for each in alone)
    assert both.nats_per_token == pytest.approx(total / sum(each.num_tokens for each in alone), rel=1e-6)
    assert both.nats_per_token != pytest.approx(alone[0].nats_per_token, rel=1e-3)
    assert alone[0].by_source == {}


def test_a_context_reads_windows_behind_what_comes_before(make_checkpoint: CheckpointFactory, prose_file: Path) -> None:
    model = make_checkpoint(with_tokenizer=True)
    behind = evaluate(model, prose_file, settings=EvaluationSettings(window=8, context=32))
    overlapping = evaluate(model, prose_file, settings=EvaluationSettings(window=32, stride=8))
    assert (behind.nats_per_token, behind.text_sha256) == (overlapping.nats_per_token, overlapping.text_sha256)
    assert "overlapping (stride 8) windows of 32 tokens" in behind.method
    assert behind.num_tokens == 31 + 8 * (behind.num_windows - 1)
    with pytest.raises(InputError, match="context is 8, and a window has 32 tokens"):
        evaluate(model, prose_file, settings=EvaluationSettings(window=32, context=8))
    with pytest.raises(InputError, match="and so does a stride"):
        EvaluationSettings(context=8, stride=4)


def test_samples_are_the_greedy_continuations_of_the_text() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    windows = load_windows(DEMO / "model", TextSource(str(DEMO / "heldout.jsonl")), window=64, max_windows=6)
    first, second = write_samples(model, windows, tokenizer, 2, model)
    prompt = windows.input_ids[3, :32]
    ids = prompt.tolist()
    with torch.inference_mode():
        for _ in range(48):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert second.prompt == tokenizer.decode(prompt)
    assert second.prompt + second.continuation == tokenizer.decode(ids)
    assert (second.original, second.equal_tokens) == (second.continuation, 48)
    assert first.prompt == tokenizer.decode(windows.input_ids[0, :32])
    assert write_samples(model, windows, tokenizer, 1)[0].original is None


def test_the_command_agrees_with_a_loop_over_the_file(invoke: Command) -> None:
    """An independent loop: the tokenizer and the class of transformers, its own loss, windows by hand."""
    options = ["--data", DEMO / "heldout.jsonl", "--window", 64, "--max-windows", 4, "--json"]
    found = invoke("evaluate", DEMO / "model", *options).printed
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    ids: list[int] = []
    for line in (DEMO / "heldout.jsonl").read_text().splitlines():
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    rows = torch.tensor(ids[:256]).view(4, 64)
    with torch.inference_mode():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
    assert found["window_nats"] == pytest.approx(losses, abs=1e-5)


def limits_of(evaluation: Any, **limits: Any) -> list[tuple[str, bool]]:
    return [(gate.name, gate.passed) for gate in check_limits(evaluation, Limits(**limits))]


def test_each_limit_is_kept_up_to_its_value() -> None:
    model, original = build_model(seed=1), build_model(seed=2)
    windows = cut_windows(tokens(96), window=16)
    evaluation = summarise(score(model, windows, original=original), windows)
    assert evaluation.against is not None
    increase, kl = evaluation.against.perplexity_increase, evaluation.against.kl_nats_per_token
    assert limits_of(evaluation, max_ppl_increase=increase, max_kl=kl) == [("max_ppl_increase", True), ("max_kl", True)]
    below = {"max_ppl_increase": increase - 1e-6, "max_kl": kl - 1e-6}
    assert limits_of(evaluation, **below) == [("max_ppl_increase", False), ("max_kl", False)]
    alone = replace(evaluation, against=None)
    for limits in (Limits(max_ppl_increase=1.0), Limits(max_kl=1.0), Limits(min_recovery=0.5)):
        with pytest.raises(InputError):
            check_limits(alone, limits)


def test_a_recovery_that_is_undefined_does_not_pass() -> None:
    windows = cut_windows(tokens(32), window=16)
    scores = scores_of([2.0], [3.0])
    scores.original_nats = [torch.tensor([1.0]), torch.tensor([1.0])]
    for before, passes in (([[4.0], [4.0]], True), ([[3.0], [3.0]], False), ([[1.0], [1.0]], False)):
        found = recovery(scores, scores_of(*before))
        evaluation = replace(summarise(scores_of([2.0], [3.0]), windows), recovery=found)
        assert limits_of(evaluation, min_recovery=0.5) == [("min_recovery", passes)]


def test_a_baseline_is_paired_window_by_window(tmp_path: Path) -> None:
    windows = cut_windows(tokens(48), window=16)
    before = summarise(scores_of([2.0], [3.0], [4.0]), windows)
    results = tmp_path / "results.json"
    results.write_text(
        json.dumps({"window_nats": before.window_nats, "num_windows": 3, "text_sha256": before.text_sha256})
    )
    baseline = read_baseline(results)
    for worse, passes in ((0.0, True), (0.0009, True), (0.0011, False), (-1.0, True)):
        now = summarise(scores_of([2.0 + worse], [3.0 + worse], [4.0 + worse]), windows)
        gate = check_limits(now, Limits(baseline=baseline))[0]
        assert gate.passed is passes
        assert gate.value == pytest.approx(worse, abs=1e-6)
    noisy = summarise(scores_of([2.0], [3.0], [4.3]), windows)  # 0.1 ± 0.1
    gate = check_limits(noisy, Limits(baseline=baseline))[0]
    assert gate.passed
    assert gate.threshold == pytest.approx(0.2, abs=1e-6)
    others = cut_windows(tokens(48, 1), window=16)
    with pytest.raises(InputError, match="of other tokens or other windows"):
        check_limits(summarise(scores_of([2.0], [3.0], [4.0]), others), Limits(baseline=baseline))
    for wrong in ("{}", json.dumps({"window_nats": [1.0], "num_windows": 2, "text_sha256": "a"}), "[1]", "no JSON"):
        results.write_text(wrong)
        with pytest.raises(InputError, match=r"results\.json"):
            read_baseline(results)


def test_joined_windows_are_all_windows() -> None:
    one, other = (Windows(tokens(8, seed).view(2, 4), (1, 2), "m", num_bytes=seed) for seed in (3, 4))
    both = join_windows([one, other])
    assert torch.equal(both.input_ids, torch.cat([one.input_ids, other.input_ids]))
    assert (both.scored_from, both.method, both.num_bytes) == ((1, 2, 1, 2), "m", 7)
    assert join_windows([one, replace(other, num_bytes=None, method="n")]).method == "m; n"
    assert join_windows([one, replace(other, num_bytes=None)]).num_bytes is None
    assert len({each.sha256 for each in (one, other, both, replace(one, scored_from=(1, 1)))}) == 4


HARNESS: dict[str, Any] = {  # as lm-evaluation-harness 0.4.13 returns it
    "results": {
        "arc": {
            "name": "arc",
            "alias": "arc",
            "sample_len": 9,
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 0.6,
        },
        "wiki": {"name": "wiki", "alias": "wiki", "word_perplexity,none": 20.0, "word_perplexity_stderr,none": "N/A"},
        "math": {"alias": "math", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.01},
        "group": {"alias": "group"},
    },
    "higher_is_better": {"arc": {"acc": True, "acc_norm": True}, "wiki": {"word_perplexity": False}},
    "versions": {"arc": 1.0, "wiki": 2},
    "n-shot": {"arc": 25},
    "n-samples": {"arc": {"original": 9, "effective": 4}},
    "configs": {
        "arc": {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Challenge"},
        "wiki": {"dataset_path": "json"},
    },
}


def test_scores_of_the_harness_by_their_names() -> None:
    original = json.loads(json.dumps(HARNESS))
    original["results"]["arc"]["acc_norm,none"] = 0.8
    original["results"]["wiki"]["word_perplexity,none"] = 10.0
    arc, wiki, maths = task_scores(HARNESS, original)
    assert (arc.metric, arc.value, arc.metrics, arc.standard_errors) == (
        "acc_norm",
        0.6,
        {"acc": 0.5, "acc_norm": 0.6},
        {"acc": 0.1},
    )
    assert (arc.num_samples, arc.num_fewshot, arc.version) == (4, 25, "1.0")
    assert (wiki.metric, wiki.higher_is_better) == ("word_perplexity", False)
    assert [arc.kept, wiki.kept] == pytest.approx([0.75, 0.5])
    assert (maths.metrics, maths.standard_errors) == ({"exact_match,strict": 0.25}, {"exact_match,strict": 0.01})
    assert task_scores(HARNESS)[0].kept is None


def test_a_task_that_lost_everything_fails_its_gate() -> None:
    windows = cut_windows(tokens(32), window=16)
    evaluation = summarise(scores_of([2.0], [3.0]), windows)
    kept = TaskScore("kept", "acc", True, {"acc": 0.5}, {}, 1, 0, "", original_metrics={"acc": 0.5})
    lost = replace(kept, task="lost", metrics={"acc": 0.0})
    gates = check_limits(replace(evaluation, tasks=(lost, kept)), Limits(min_recovery=0.95))
    assert [(gate.task, gate.value, gate.passed) for gate in gates] == [("lost", 0.0, False), ("kept", 1.0, True)]


def test_the_hub_gets_results_of_its_own_datasets_alone() -> None:
    assert hub_results(task_scores(HARNESS), date="2026-11-28") == {
        "arc.yaml": [
            {
                "dataset": {"id": "allenai/ai2_arc", "task_id": "ARC-Challenge"},
                "value": 60.0,
                "date": "2026-11-28",
                "notes": "acc_norm, 25-shot, lm-evaluation-harness arc 1.0",
            }
        ]
    }


def test_settings_of_no_task_are_refused() -> None:
    with pytest.raises(InputError, match="task_limit is about tasks, and none is named"):
        TaskSettings(task_limit=3)
    with pytest.raises(InputError, match="num_fewshot is -1"):
        TaskSettings(("arc",), num_fewshot=-1)


CAPITALS = [("The President of the United", ["States", "carrots"], 0), ("the treasury", ["sings", "department"], 1)]
TASK = """task: presidents
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def test_a_task_of_local_files_end_to_end(invoke: Command, tmp_path: Path) -> None:
    """With `kvconvert[eval]`; without it the command says how it is installed."""
    rows = [dict(zip(("question", "choices", "answer"), row, strict=True)) for row in CAPITALS]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "presidents.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    options = ["--data", DEMO / "heldout.jsonl", "--window", 64, "--max-windows", 2, "--against", DEMO / "model"]
    options += ["--tasks", "presidents", "--task-directory", tmp_path, "--output", tmp_path / "out", "--json"]
    outcome = invoke("evaluate", DEMO / "model", *options, "--min-recovery", "100%")
    if find_spec("lm_eval") is None:
        assert (outcome.returncode, outcome.stdout) == (2, "")
        assert "pip install 'kvconvert[eval]'" in outcome.stderr
        return
    score = outcome.printed["tasks"][0]
    assert (score["task"], score["metrics"], score["original_metrics"]) == ("presidents", {"acc": 1.0}, {"acc": 1.0})
    assert outcome.printed["gates"][0]["task"] == "presidents"
    written = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("results_*.json")]
    assert [each["results"]["presidents"]["acc,none"] for each in written] == [1.0, 1.0]
    assert len(written[0]["task_hashes"]["presidents"]) == 64
    ours = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("evaluation_*.json")]
    assert [each["tasks"] for each in ours] == [outcome.printed["tasks"]]
    refused = invoke("evaluate", DEMO / "model", *options, "--hub-results")
    assert (refused.returncode, "leave --hub-results out" in refused.stderr) == (2, True)


def test_the_command_compares_with_what_it_printed_before(invoke: Command, tmp_path: Path) -> None:
    options = ["--data", DEMO / "heldout.jsonl", "--window", 64, "--max-windows", 4, "--json"]
    (tmp_path / "before.json").write_text(invoke("evaluate", DEMO / "model", *options).stdout)
    again = invoke("evaluate", DEMO / "model", *options, "--baseline", tmp_path / "before.json").printed
    assert [(gate["name"], gate["value"], gate["passed"]) for gate in again["gates"]] == [("baseline", 0.0, True)]
    run = invoke("mha2mqa", DEMO / "model", "--output", tmp_path / "mqa")
    assert run.returncode == 0
    worse = invoke("evaluate", tmp_path / "mqa", *options, "--baseline", tmp_path / "before.json")
    assert worse.returncode == 3
    assert "nats per token above the baseline's, more than the allowed" in worse.stderr
    assert [gate["passed"] for gate in json.loads(worse.stdout)["gates"]] == [False]
    others = ["--data", DEMO / "heldout.jsonl", "--window", 32, "--max-windows", 4, "--json"]
    refused = invoke("evaluate", DEMO / "model", *others, "--baseline", tmp_path / "before.json")
    assert (refused.returncode, "of other tokens or other windows" in refused.stderr) == (2, True)
    assert json.loads(refused.stdout)["num_windows"] == 4  # what was measured is not lost


def test_options_of_tasks_reach_the_library(invoke: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def note(*arguments: Any, **named: Any) -> None:
        seen.update(named)
        raise InputError("seen")

    monkeypatch.setattr("kvconvert.measure.evaluation.evaluate", note)
    options = ["--tasks", "arc, wiki", "--task-directory", tmp_path, "--task-limit", 3, "--num-fewshot", 2]
    assert invoke("evaluate", "m", "--data", "d", *options, "--output", tmp_path / "out").returncode == 2
    assert seen["tasks"] == TaskSettings(("arc", "wiki"), tmp_path, 3, 2)
    assert seen["output"] == tmp_path / "out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-kl", "1"], "--max-kl needs --against"),
        (["--before", "b"], "--before needs --against"),
        (["--against", "a", "--min-recovery", "90%"], "--min-recovery needs --before or --tasks"),
        (["--against", "a", "--max-kl", "-1"], "--max-kl is -1.0, expected a number from 0 on"),
        (["--hub-results"], "--hub-results is about --tasks"),
        (["--num-fewshot", "2"], "num_fewshot is about tasks, and none is named"),
        (["--context", "64", "--stride", "8"], "give one of the two (--context, --stride)"),
        (["--baseline", "nowhere.json"], "nowhere.json"),
    ],
)
def test_options_without_what_they_need_are_refused(options: list[str], message: str, invoke: Command) -> None:
    outcome = invoke("evaluate", "m", "--data", "d", *options)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert message in outcome.stderr


def test_what_was_before_has_the_same_tokens(make_checkpoint: CheckpointFactory, prose_file: Path) -> None:
    """Token ids of another vocabulary would give a recovery of nothing."""
    model = make_checkpoint(with_tokenizer=True)
    with pytest.raises(InputError, match="token"):
        evaluate(model, prose_file, against=model, before=DEMO / "model", settings=EvaluationSettings(window=32))
