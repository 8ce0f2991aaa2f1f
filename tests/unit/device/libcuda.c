/* As much of CUDA's driver as `cuda_vram` and `cuda` call, over memory of the host: a handle is a
   memfd, a device pointer is where it is mapped. What is called wrongly is refused, as the driver
   would. `stand_in_left` counts what was not given back. */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { DONE = 0, INVALID = 1, FULL = 2, NOT_FOUND = 500, REFUSED = 801 };
enum { PAGES = 2 << 20, GPUS = 2, DESCRIPTOR = 1, PINNED = 1, DEVICE = 1, READ = 1, BOTH = 3 };
static const size_t MEMORY = (size_t)1 << 30;

typedef unsigned long long Pointer, Handle;
struct Place { int type, id; };
struct Properties { int type, kinds; struct Place place; void *security; unsigned char flags[8]; };
struct Access { struct Place place; int flags; };
struct Attributes { int order; struct Place from, to; unsigned int flags; };

static atomic_int handles, reserved, mapped, mode;
static int driver_version = 13000;

int stand_in_left(void) { return handles + reserved + mapped + mode; }
void stand_in_version(int version) { driver_version = version; }

static int on_gpu(struct Place place) { return place.type == DEVICE && !place.id; }
static int proper(const struct Properties *asked)
{
    return asked->type == PINNED && asked->kinds == DESCRIPTOR && on_gpu(asked->place);
}

int cuInit(unsigned int flags) { return flags ? INVALID : DONE; }
int cuDriverGetVersion(int *version) { *version = driver_version; return DONE; }
int cuDeviceGet(int *device, int ordinal)
{
    *device = ordinal;
    return ordinal >= 0 && ordinal < GPUS ? DONE : INVALID;
}
int cuDeviceGetCount(int *count) { *count = GPUS; return DONE; }
int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    /* VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED */
    *value = attribute == 102 || attribute == 103;
    return device >= 0 && device < GPUS ? DONE : INVALID;
}
int cuDeviceGetUuid(unsigned char *uuid, int device)
{
    for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)(device * 16 + i);
    return DONE;
}
int cuDeviceCanAccessPeer(int *can, int device, int other)
{
    *can = device == 0 && other == 1;
    return DONE;
}
int cuMemGetInfo(size_t *free_bytes, size_t *total)
{
    *free_bytes = MEMORY / 2;
    *total = MEMORY;
    return DONE;
}
int cuMemGetAllocationGranularity(size_t *bytes, const struct Properties *asked, int which)
{
    *bytes = PAGES;
    return proper(asked) && !which ? DONE : INVALID;
}
int cuMemCreate(Handle *handle, size_t bytes, const struct Properties *asked, Handle flags)
{
    if (!proper(asked) || flags || bytes % PAGES) return INVALID;
    if (bytes > MEMORY) return FULL;
    int made = memfd_create("stand-in", MFD_CLOEXEC);
    if (made < 0 || ftruncate(made, (off_t)bytes)) return FULL;
    handles++;
    *handle = (Handle)made;
    return DONE;
}
int cuMemRelease(Handle handle)
{
    handles--;
    return close((int)handle) ? INVALID : DONE;
}
int cuMemExportToShareableHandle(void *to, Handle handle, int kind, Handle flags)
{
    if (kind != DESCRIPTOR || flags) return INVALID;
    *(int *)to = dup((int)handle);
    return DONE;
}
int cuMemImportFromShareableHandle(Handle *handle, void *from, int kind)
{
    int made = kind == DESCRIPTOR ? dup((int)(intptr_t)from) : -1;
    if (made < 0) return INVALID;
    handles++;
    *handle = (Handle)made;
    return DONE;
}
int cuMemAddressReserve(Pointer *to, size_t bytes, size_t alignment, Pointer near, Handle flags)
{
    if (bytes % PAGES || alignment || near || flags) return INVALID;
    void *at = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return FULL;
    reserved++;
    *to = (Pointer)at;
    return DONE;
}
int cuMemAddressFree(Pointer at, size_t bytes)
{
    reserved--;
    return munmap((void *)at, bytes) ? INVALID : DONE;
}
int cuMemMap(Pointer at, size_t bytes, size_t offset, Handle handle, Handle flags)
{
    if (flags || offset) return INVALID;
    void *there = mmap((void *)at, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle, 0);
    if (there == MAP_FAILED) return INVALID;
    mapped++;
    return DONE;
}
int cuMemUnmap(Pointer at, size_t bytes)
{
    mapped--;
    void *there = mmap((void *)at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return there == MAP_FAILED ? INVALID : DONE;
}
int cuMemSetAccess(Pointer at, size_t bytes, const struct Access *access, size_t count)
{
    if (count != 1 || !on_gpu(access->place)) return INVALID;
    /* As drivers do that know no reading alone. */
    if (access->flags == READ) return INVALID;
    return access->flags == BOTH && !mprotect((void *)at, bytes, PROT_READ | PROT_WRITE) ? DONE
                                                                                         : INVALID;
}
int cuMemcpyHtoDAsync(Pointer to, const void *from, size_t bytes, void *stream)
{
    if (!stream) return INVALID;
    memcpy((void *)to, from, bytes);
    return DONE;
}
int cuMemsetD8Async(Pointer at, unsigned char value, size_t bytes, void *stream)
{
    if (!stream) return INVALID;
    memset((void *)at, value, bytes);
    return DONE;
}
int cuThreadExchangeStreamCaptureMode(int *asked)
{
    /* 0: global, as every thread begins; 2: relaxed. Every change is to be taken back. */
    static _Thread_local int now;
    int before = now;
    now = *asked;
    *asked = before;
    mode += (now ? 1 : 0) - (before ? 1 : 0);
    return DONE;
}

static int batch(const Pointer *to, const Pointer *from, const size_t *bytes, size_t count,
                 const struct Attributes *attributes, const size_t *first, size_t kinds, void *stream)
{
    /* In the stream's order; beside computing. Addresses are known for what they are. */
    if (kinds != 1 || *first || attributes->order != 1 || attributes->flags != 1) return INVALID;
    if (!stream || attributes->from.type || attributes->to.type) return INVALID;
    for (size_t i = 0; i < count; i++) memcpy((void *)to[i], (void *)from[i], bytes[i]);
    return DONE;
}
static int batch_with_index(const Pointer *to, const Pointer *from, const size_t *bytes, size_t count,
                            const struct Attributes *attributes, const size_t *first, size_t kinds,
                            size_t *failed, void *stream)
{
    *failed = SIZE_MAX;
    return batch(to, from, bytes, count, attributes, first, kinds, stream);
}

static int refused(void) { return REFUSED; }

int cuGetProcAddress_v2(const char *name, void **function, int version, Handle flags, int *status)
{
    static const struct { const char *name; void *function; } known[] = {
#define KNOWN(name) {#name, (void *)name}
        KNOWN(cuInit), KNOWN(cuDriverGetVersion), KNOWN(cuDeviceGet), KNOWN(cuDeviceGetCount),
        KNOWN(cuDeviceGetAttribute), KNOWN(cuDeviceGetUuid), KNOWN(cuDeviceCanAccessPeer),
        KNOWN(cuMemGetInfo), KNOWN(cuMemGetAllocationGranularity), KNOWN(cuMemCreate),
        KNOWN(cuMemRelease), KNOWN(cuMemExportToShareableHandle),
        KNOWN(cuMemImportFromShareableHandle), KNOWN(cuMemAddressReserve), KNOWN(cuMemAddressFree),
        KNOWN(cuMemMap), KNOWN(cuMemUnmap), KNOWN(cuMemSetAccess), KNOWN(cuMemcpyHtoDAsync),
        KNOWN(cuMemsetD8Async), KNOWN(cuThreadExchangeStreamCaptureMode),
        KNOWN(cuGetProcAddress_v2), {"cuGetProcAddress", (void *)cuGetProcAddress_v2},
    };
    (void)flags;
    if (status) *status = 0;
    *function = (void *)refused;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) *function = known[i].function;
    if (!strcmp(name, "cuMemcpyBatchAsync")) {
        if (version < 12080) return NOT_FOUND;
        *function = version < 13000 ? (void *)batch_with_index : (void *)batch;
    }
    return DONE;
}
int cuGetProcAddress(const char *name, void **function, int version, Handle flags)
{
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
