/* As much of cuFile as `cufile` calls, over memory of the host. What is called wrongly is refused.
   `stand_in_left` counts what was not given back. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { DONE = 0, NOT_INITIALIZED = 5001, INVALID = 5022, PAGE = 4096, HANDLES = 64 };
typedef struct { int error, cuda; } Status;
typedef struct { int type; union { int descriptor; void *handle; } file; const void *calls; } File;

static atomic_int drivers, handles, buffers;
static bool way_round = true;
static int fails;

int stand_in_left(void) { return drivers + handles + buffers; }
void stand_in_fails(int error) { fails = error; }

static Status status(int error) { return (Status){error, 0}; }

Status cuFileSetParameterBool(int parameter, bool value)
{
    /* Counts before the driver is opened only. */
    if (parameter != 1 || drivers) return status(INVALID);
    way_round = value;
    return status(DONE);
}
Status cuFileDriverOpen(void)
{
    if (way_round) return status(INVALID);
    drivers++;
    return status(DONE);
}
Status cuFileDriverClose_v2(void)
{
    if (drivers != 1 || handles || buffers) return status(INVALID);
    drivers--;
    return status(DONE);
}
Status cuFileDriverClose(void) { return cuFileDriverClose_v2(); }
Status cuFileHandleRegister(void **handle, File *file)
{
    if (!drivers) return status(NOT_INITIALIZED);
    if (file->type != 1 || file->calls || file->file.descriptor >= 1 << 16) return status(INVALID);
    handles++;
    *handle = (void *)(long)(file->file.descriptor + 1);
    return status(DONE);
}
void cuFileHandleDeregister(void *handle)
{
    (void)handle;
    handles--;
}
Status cuFileBufRegister(const void *at, size_t bytes, int flags)
{
    if (!drivers || !at || !bytes || flags) return status(INVALID);
    buffers++;
    return status(DONE);
}
Status cuFileBufDeregister(const void *at)
{
    (void)at;
    buffers--;
    return status(DONE);
}
ssize_t cuFileRead(void *handle, void *to, size_t bytes, off_t from, off_t at)
{
    if (fails) {
        /* -1 with errno for the system's, the negative of its own for cuFile's. */
        errno = fails;
        return fails < 5000 ? -1 : -fails;
    }
    if (!drivers || !buffers || (bytes | (size_t)from | (size_t)at) % PAGE) return -INVALID;
    void *pages;
    if (posix_memalign(&pages, PAGE, bytes)) return -INVALID;
    ssize_t got = pread((int)(long)handle - 1, pages, bytes, from);
    if (got > 0) memcpy((char *)to + at, pages, (size_t)got);
    free(pages);
    return got;
}
