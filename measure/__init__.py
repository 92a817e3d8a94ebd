"""Numbers about a model, alone or against its original."""
