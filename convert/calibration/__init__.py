"""A model run layer by layer over text, and what is measured on the way."""
