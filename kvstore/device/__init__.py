"""Where an engine's KV cache lies, and copies between it and host memory.

`base` is the contract. `host` keeps it where the KV cache is in host memory, `gpu` where it
is on a GPU, through the calls of `cuda`. `adversarial` keeps it as badly as it may be kept,
for tests.

`codec` makes fewer bytes of blocks, and `coding_kernels` has a GPU do that.

`vram` is memory of a GPU that processes share, `mirrors` says which blocks lie there;
`cuda_vram` and, for tests, `vram_stand_in` have such memory.
"""
