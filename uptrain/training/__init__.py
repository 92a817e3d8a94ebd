"""Training itself: transformers' Trainer with our losses, and all that is done beside its steps."""
