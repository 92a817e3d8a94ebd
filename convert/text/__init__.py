"""Text: where documents come from, and how they become token ids."""
