"""The kernel that copies: many small copies within a GPU's memory, gathered or scattered.

A copy engine moves pieces of a few KiB at a fraction of its speed, because each costs it as
much as 30 to 50 KiB do. So small pieces are brought together, or spread, by this kernel, and
the copy engine moves what lies together. What to copy is read from a table in pinned host
memory, which a GPU reads like its own.
"""

COPY_KERNEL = "kvstore_copy_runs"

THREADS = 256
"""Of a block of threads: each moves one run at a time, 16 bytes a thread."""

MOST_BLOCKS = 64
"""Of threads. About half of an H100's processors, for some tens of microseconds: enough to
be far faster than the link to the host."""

SOURCE = r"""
struct kvstore_run {
    unsigned long long to, from, nbytes;
};

extern "C" __global__ void kvstore_copy_runs(const kvstore_run* runs, unsigned int count)
{
    for (unsigned int index = blockIdx.x; index < count; index += gridDim.x) {
        const kvstore_run run = runs[index];
        if (((run.to | run.from | run.nbytes) & 15) == 0) {
            uint4* to = reinterpret_cast<uint4*>(run.to);
            const uint4* from = reinterpret_cast<const uint4*>(run.from);
            const unsigned long long units = run.nbytes / 16;
            #pragma unroll 4
            for (unsigned long long unit = threadIdx.x; unit < units; unit += blockDim.x)
                to[unit] = from[unit];
        } else {
            unsigned char* to = reinterpret_cast<unsigned char*>(run.to);
            const unsigned char* from = reinterpret_cast<const unsigned char*>(run.from);
            for (unsigned long long at = threadIdx.x; at < run.nbytes; at += blockDim.x)
                to[at] = from[at];
        }
    }
}
"""

RUN_BYTES = 24
"""Of `kvstore_run`."""
