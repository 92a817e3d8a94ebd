"""What a `model_type` is, and what a checkpoint says of its own attention."""
