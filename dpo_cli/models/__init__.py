"""A base and an adapter as their files are: weights, settings, tokenizer; read and checked without torch."""
