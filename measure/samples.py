"""What a model writes behind the beginnings of a text, beside what its original writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .windows import Windows

__all__ = ["Sample", "write_samples"]

_PROMPT_TOKENS = 32
_NEW_TOKENS = 48


@dataclass(frozen=True)
class Sample:
    """The most likely continuation of a prompt, word by word; `equal_tokens` of its first are the original's too."""

    prompt: str
    continuation: str
    original: str | None
    equal_tokens: int | None


@torch.no_grad()
def write_samples(
    model: Any, windows: Windows, tokenizer: Any, number: int, original: Any = None
) -> tuple[Sample, ...]:
    """Continue the beginnings of so many windows, evenly spread over the text, greedily, with each model.

    The prompts are the same in every run on the same text: the first 32 tokens of a window, or half of a short one; 48
    tokens follow, fewer where EOS ends them.
    """
    count = len(windows.input_ids)
    rows = [place * count // number for place in range(min(number, count))]
    prompt_tokens = min(_PROMPT_TOKENS, windows.input_ids.shape[1] // 2)
    samples = list[Sample]()
    for row in rows:
        prompt = windows.input_ids[row : row + 1, :prompt_tokens]
        found = _continue(model, prompt)
        wanted = None if original is None else _continue(original, prompt)
        samples.append(
            Sample(
                tokenizer.decode(prompt[0], skip_special_tokens=True),
                _text(tokenizer, prompt[0], found),
                None if wanted is None else _text(tokenizer, prompt[0], wanted),
                None if wanted is None else _num_equal(found, wanted),
            )
        )
    return tuple(samples)


def _continue(model: Any, prompt: Tensor) -> Tensor:
    """The tokens that follow a prompt, (1, length), greedily: at most 48, EOS among them, (num_new,)."""
    from transformers import GenerationConfig

    # nothing of the checkpoint's own settings, such as a temperature or a penalty, but for where it ends
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=_NEW_TOKENS,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id or 0,
        bos_token_id=model.generation_config.bos_token_id,
    )
    ids = prompt.to(model.device)
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    new: Tensor = written[0, ids.shape[1] :].cpu()
    return new


def _text(tokenizer: Any, prompt: Tensor, new: Tensor) -> str:
    """The text of new tokens as it stands behind the prompt, with the space that may come between."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    both: str = tokenizer.decode(torch.cat([prompt, new]), skip_special_tokens=True)
    return both.removeprefix(before)


def _num_equal(some: Tensor, others: Tensor) -> int:
    """How many of the first tokens are equal."""
    count = 0
    for one, other in zip(some.tolist(), others.tolist(), strict=False):
        if one != other:
            break
        count += 1
    return count
