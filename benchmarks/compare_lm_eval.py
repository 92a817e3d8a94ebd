"""Compares `evaluate` with lm-evaluation-harness: word perplexity of the same passages by both.

    pip install 'kvconvert[eval]'
    python benchmarks/compare_lm_eval.py MODEL HELD_OUT [--passages 32] [--words 150]

The harness puts its prefix token before a document and scores every token of it, in windows that each begin behind the
last token of the one before. Ours puts BOS before each window. So the figures are the same thing for passages that fit
into one window, with the same token before them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from kvconvert.convert.checkpoint.loading import load_model
from kvconvert.convert.checkpoint.tokenizer import load_tokenizer
from kvconvert.convert.text.documents import read_documents
from kvconvert.convert.text.sources import TextSource
from kvconvert.measure.scoring import score
from kvconvert.measure.windows import cut_windows
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("held_out")
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--words", type=int, default=150)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, dtype=torch.float32, device="cpu")
    words = [document.split() for document in read_documents(TextSource(arguments.held_out))]
    passages = [" ".join(each[: arguments.words]) for each in words if len(each) >= arguments.words]
    passages = passages[: arguments.passages]
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    prefix = harness.prefix_token_id
    ours = 0.0
    for passage in passages:
        ids = torch.tensor(tokenizer(passage, add_special_tokens=False)["input_ids"])
        ours += score(model, cut_windows(ids, window=len(ids) + 1, bos_token_id=prefix)).nats[0].double().sum().item()
    requests = [
        Instance("loglikelihood_rolling", {}, (passage,), place, ("passages", None, None))
        for place, passage in enumerate(passages)
    ]
    theirs = -sum(harness.loglikelihood_rolling(requests, disable_tqdm=True))
    num_words = len(passages) * arguments.words
    print(
        json.dumps(
            {
                "passages": len(passages),
                "words": num_words,
                "word_perplexity": math.exp(ours / num_words),
                "word_perplexity_of_the_harness": math.exp(theirs / num_words),
            }
        )
    )


if __name__ == "__main__":
    main()
