"""The forms in which one product can be computed on a CPU, timed beside each other: where bounds in code come from."""
