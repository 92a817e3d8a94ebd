"""Pure mathematics on tensors: heads and layers in groups, rotations, closed-form merges, latents. It reads no file."""
