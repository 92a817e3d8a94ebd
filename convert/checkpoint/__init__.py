"""Files: tensors on demand, hub, shards out, staged directories, tokenizer and code beside the weights."""
