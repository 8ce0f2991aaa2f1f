"""Where an engine's KV cache lies, and copies between it and host memory.

`base` is the contract. `host` keeps it where the KV cache is in host memory, `gpu` where it
is on a GPU, through the calls of `cuda`. `adversarial` keeps it as badly as it may be kept,
for tests.
"""
