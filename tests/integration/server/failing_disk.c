/* A drive that fails, in front of a real one: loaded before libc (LD_PRELOAD), it spoils
 * the calls on segments (*.seg) and on the index (data.mdb), as the kernel would report
 * them. What it spoils can be changed at any time: a fault is on while a file of its name
 * is in $FAILING_DISK.
 *
 *   write-error  read-error  sync-error   EIO
 *   write-lost                            said to be done, and not done
 *   sync-lost                             said to be done, and not done
 *   hang                                  reads, writes and syncs wait while it is on
 *   index-write-error  index-sync-error   EIO
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_on(const char *fault)
{
    const char *folder = getenv("FAILING_DISK");
    char path[PATH_MAX];
    if (folder == NULL)
        return 0;
    snprintf(path, sizeof path, "%s/%s", folder, fault);
    return access(path, F_OK) == 0;
}

static int is_named(int fd, const char *end)
{
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1), wanted = strlen(end);
    if (length < wanted)
        return 0;
    path[length] = '\0';
    return strcmp(path + length - wanted, end) == 0;
}

static int on(const char *fault, int fd)
{
    return is_on(fault) && is_named(fd, ".seg");
}

static int on_index(const char *fault, int fd)
{
    return is_on(fault) && is_named(fd, "data.mdb");
}

static void hang(int fd)
{
    while (on("hang", fd) || on_index("hang", fd))
        usleep(10000);
}

static int fail(void)
{
    errno = EIO;
    return -1;
}

ssize_t pwritev64v2(int fd, const struct iovec *pieces, int count, off64_t offset, int flags)
{
    static ssize_t (*real)(int, const struct iovec *, int, off64_t, int);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "pwritev64v2");
    hang(fd);
    if (on("write-error", fd))
        return fail();
    if (on("write-lost", fd)) {
        ssize_t done = 0;
        for (int i = 0; i < count; i++)
            done += pieces[i].iov_len;
        return done;
    }
    return real(fd, pieces, count, offset, flags);
}

ssize_t preadv64v2(int fd, const struct iovec *pieces, int count, off64_t offset, int flags)
{
    static ssize_t (*real)(int, const struct iovec *, int, off64_t, int);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "preadv64v2");
    hang(fd);
    return on("read-error", fd) ? fail() : real(fd, pieces, count, offset, flags);
}

int fdatasync(int fd)
{
    static int (*real)(int);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "fdatasync");
    hang(fd);
    if (on("sync-error", fd) || on_index("index-sync-error", fd))
        return fail();
    return on("sync-lost", fd) ? 0 : real(fd);
}

/* How LMDB writes its pages. */

ssize_t pwrite(int fd, const void *data, size_t nbytes, off_t offset)
{
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "pwrite");
    hang(fd);
    return on_index("index-write-error", fd) ? fail() : real(fd, data, nbytes, offset);
}

ssize_t writev(int fd, const struct iovec *pieces, int count)
{
    static ssize_t (*real)(int, const struct iovec *, int);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "writev");
    hang(fd);
    return on_index("index-write-error", fd) ? fail() : real(fd, pieces, count);
}
