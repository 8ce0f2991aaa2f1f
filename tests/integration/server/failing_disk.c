/* A drive that fails, in front of a real one: loaded before libc (LD_PRELOAD), it spoils
 * the calls on files named *.seg, as the kernel would report them. What it spoils can be
 * changed at any time: a fault is on while a file of its name is in $FAILING_DISK.
 *
 *   write-error  read-error  sync-error   EIO
 *   write-lost                            said to be done, and not done
 *   sync-lost                             said to be done, and not done
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

static int on(const char *fault, int fd)
{
    const char *folder = getenv("FAILING_DISK");
    char link[64], path[PATH_MAX];
    if (folder == NULL)
        return 0;
    snprintf(path, sizeof path, "%s/%s", folder, fault);
    if (access(path, F_OK) != 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 4)
        return 0;
    path[length] = '\0';
    return strcmp(path + length - 4, ".seg") == 0;
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
    return on("read-error", fd) ? fail() : real(fd, pieces, count, offset, flags);
}

int fdatasync(int fd)
{
    static int (*real)(int);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "fdatasync");
    if (on("sync-error", fd))
        return fail();
    return on("sync-lost", fd) ? 0 : real(fd);
}
