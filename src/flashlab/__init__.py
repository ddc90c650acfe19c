"""FlashLab: FlashAttention that works, and workloads that show it works."""

__version__ = "0.1.0"
