"""Training text: several weighted sources, packed into blocks on disk, and the samples of a run drawn from them."""
