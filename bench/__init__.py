"""Step time, kept bytes and peak bytes of reverse-pass pretraining, as ratios to plain training."""
