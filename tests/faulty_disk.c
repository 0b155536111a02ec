/* A disk that fails when it is told to: LD_PRELOAD it into the daemon.
 *
 * The file that $DISK_FAULT names tells what is wrong, and may change or go away at any time: letters for what
 * fails (r read, w write, s sync) and the number of the error, such as "ws 5" for EIO. With the number 0, nothing
 * fails, but what is asked does not come back as long as that stands there. Only the store's files are meant.
 *
 * No header is included, so that a compiler is all that this needs. Built with
 *     gcc -shared -fPIC -o faulty_disk.so faulty_disk.c
 */

typedef long ssize;
typedef unsigned long size;

extern void *dlsym(void *, const char *);
extern int *__errno_location(void);
extern char *getenv(const char *), *strstr(const char *, const char *), *strchr(const char *, int);
extern int snprintf(char *, size, const char *, ...), open(const char *, int, ...), close(int), atoi(const char *);
extern int usleep(unsigned);
extern ssize read(int, void *, size), readlink(const char *, char *, size);

#define NEXT(name) dlsym((void *)-1L, name) /* RTLD_NEXT */

/* Wait while the disk hangs. 0: all is well, else the call fails, with errno set. */
static int fault(int fd, char what)
{
    const char *control = getenv("DISK_FAULT");
    char link[64], path[4096];
    ssize length;
    int error;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    if (!control || !strstr(path, "calls.db"))
        return 0;
    for (;; usleep(10000)) {
        char text[64], *number;
        int file = open(control, 0);
        if (file < 0)
            return 0;
        length = read(file, text, sizeof text - 1);
        close(file);
        text[length < 0 ? 0 : length] = 0;
        number = strchr(text, ' ');
        if (!number || !strchr(text, what) || strchr(text, what) > number)
            return 0;
        if ((error = atoi(number)) != 0)
            break;
    }
    *__errno_location() = error;
    return -1;
}

ssize pread64(int fd, void *data, size length, long at)
{
    ssize (*real)(int, void *, size, long) = NEXT("pread64");
    return fault(fd, 'r') ? -1 : real(fd, data, length, at);
}

ssize pwrite64(int fd, const void *data, size length, long at)
{
    ssize (*real)(int, const void *, size, long) = NEXT("pwrite64");
    return fault(fd, 'w') ? -1 : real(fd, data, length, at);
}

int ftruncate64(int fd, long length)
{
    int (*real)(int, long) = NEXT("ftruncate64");
    return fault(fd, 'w') ? -1 : real(fd, length);
}

int fsync(int fd)
{
    int (*real)(int) = NEXT("fsync");
    return fault(fd, 's') ? -1 : real(fd);
}

int fdatasync(int fd)
{
    int (*real)(int) = NEXT("fdatasync");
    return fault(fd, 's') ? -1 : real(fd);
}
