"""Uptraining: data, objectives, trainer. Works on any converted checkpoint."""
