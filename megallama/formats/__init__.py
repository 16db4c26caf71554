"""Weights as other programs keep them: Hugging Face, Meta, Megatron. Knows none of our checkpoints."""
