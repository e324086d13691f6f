"""Commands around `racecar.bench` that are not installed.

gpu                       `make gpu`; gpu_steps: its steps and their processes, gpu_summary: what people read of it
layers, layer_shapes      full fusion against library convolution and pointwise kernel, for every layer of the networks
linear_layers             the same for linear layers
bandwidth                 the pointwise kernels against a copy; device_time: timing, and what the device does at best
compile_kernels           `make kernels`
test_ops, forms           single operators, and forms of a convolution, on a CPU
"""
