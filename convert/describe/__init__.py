"""What a checkpoint is and costs, in words and numbers, for people and for a model card."""
