"""Pretrain a PyTorch model together with its own reverse pass."""
