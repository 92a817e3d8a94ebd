"""Files of checkpoints: reading tensors on demand, the hub, writing shards, tokenizers and code beside the weights."""
