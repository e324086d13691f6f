"""Fused kernels for pretraining with a reverse pass (racecar training)."""
