"""Commands around `racecar.bench` that are not installed: the GPU run, single operators, forms of a convolution."""
