"""What a run comes to, computed before it begins: its length, FLOPs, GPU hours, memory and disk."""
