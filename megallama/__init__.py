"""megallama: Megatron-style Llama pretraining that reads like one GPU."""

__version__ = "0.1.0"
