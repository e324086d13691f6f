"""The benchmark behind `racecar bench`: step time, kept and peak bytes, as ratios to plain training.

networks, residual   what is trained
contestants          who trains it; plain and checkpointed: the reverse pass in plain PyTorch
gradients            the check of everybody's gradients that comes before any figure
steps                the measurement of one network; least: the fewest multiplications it could take
targets, tables      what is reached for, and how results are printed
results, comparison  results as a file, and two of them against each other
where                which layer keeps what for the backward pass
"""
