/* Every call of a process that changes files below a folder: counted, recorded, and answered as a test wants.

   Preloaded into a process (LD_PRELOAD), so that it sees the calls of Python, of Rust and of C++ alike. Nothing happens
   until arm() is called. write_points.py compiles it and says what the answers mean. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { RECORD, KILL_BEFORE, KILL_AFTER, KILL_WITHIN, FULL }; /* as in write_points.py */

static char folder[PATH_MAX];
static int log_fd = -1, answer;
static long point;
static atomic_long count;
static atomic_int is_full;

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t plain_write(int fd, const void *data, size_t size) {
    REAL(write);
    return real(fd, data, size);
}

void arm(const char *below, const char *log, long at, int how) {
    answer = how, point = at;
    log_fd = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    snprintf(folder, sizeof folder, "%s/", below);
}

static int is_below(const char *path) { return !strncmp(path, folder, strlen(folder)); }

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static int counts_fd(int fd, char *path) { return folder[0] && fd != log_fd && path_of(fd, path) && is_below(path); }

static int counts(int at, const char *name, char *path) {
    char base[PATH_MAX] = "";
    if (!folder[0]) return 0;
    if (name[0] != '/') {
        if (at == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else path_of(at, base);
    }
    snprintf(path, PATH_MAX, "%.2000s%s%.2000s", base, name[0] == '/' ? "" : "/", name);
    return is_below(path);
}

/* Whether this is the point; `takes` says whether the call needs room on the disk. */
static int begin(const char *call, const char *path, int takes) {
    long number = ++count;
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %d %s\n", call, takes, path + strlen(folder));
    plain_write(log_fd, line, length);
    if (number != point) return 0;
    if (answer == KILL_BEFORE) kill(getpid(), SIGKILL);
    if (answer == FULL) is_full = 1;
    return 1;
}

/* Whether the disk refuses the call. At the point itself any call is refused, later those that need room. */
static int refused(int here, int takes) {
    if (!is_full || (!here && !takes)) return 0;
    errno = ENOSPC;
    return 1;
}

static void end(int here) {
    if (here && (answer == KILL_AFTER || answer == KILL_WITHIN)) kill(getpid(), SIGKILL);
}

#define DO(call, path, takes, failed, doing) \
    int here = begin(call, path, takes); \
    if (refused(here, takes)) return failed; \
    __typeof__(failed) result = doing; \
    end(here); \
    return result

/* How many bytes of a write are written: half of them at the point, as on a disk that is just full. */
static size_t share(int here, size_t size) {
    return here && (answer == KILL_WITHIN || answer == FULL) ? size / 2 : size;
}

#define WRITES(fd, size, doing) \
    char path[PATH_MAX]; \
    if (!counts_fd(fd, path)) { size_t part = size; return doing; } \
    int here = begin("write", path, 1); \
    size_t part = share(here, size); \
    if (is_full && (!here || !part)) { errno = ENOSPC; return -1; } \
    ssize_t result = doing; \
    end(here); \
    return result

ssize_t write(int fd, const void *data, size_t size) { REAL(write); WRITES(fd, size, real(fd, data, part)); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); WRITES(fd, size, real(fd, data, part, at)); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); WRITES(fd, size, real(fd, data, part, at)); }
ssize_t writev(int fd, const struct iovec *data, int n) { REAL(writev); WRITES(fd, (size_t)n, real(fd, data, (int)part)); }
ssize_t sendfile64(int fd, int from, off64_t *at, size_t size) {
    static ssize_t (*real)(int, int, off64_t *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "sendfile64");
    WRITES(fd, size, real(fd, from, at, part));
}
ssize_t sendfile(int fd, int from, off_t *at, size_t size) {
    static ssize_t (*real)(int, int, off_t *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "sendfile");
    WRITES(fd, size, real(fd, from, at, part));
}
ssize_t copy_file_range(int from, off64_t *a, int fd, off64_t *b, size_t size, unsigned flags) {
    REAL(copy_file_range);
    WRITES(fd, size, real(from, a, fd, b, part, flags));
}

static int is_made(int at, const char *name, int flags) {
    struct stat there;
    return (flags & O_TRUNC) || ((flags & O_CREAT) && fstatat(at, name, &there, 0));
}

#define OPENS(name, at, file) \
    char path[PATH_MAX]; \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
    if (!is_made(at, file, flags) || !counts(at, file, path)) return name; \
    DO("make", path, 1, -1, name)

int open(const char *file, int flags, ...) { REAL(open); OPENS(real(file, flags, mode), AT_FDCWD, file); }
int open64(const char *file, int flags, ...) { REAL(open64); OPENS(real(file, flags, mode), AT_FDCWD, file); }
int openat(int at, const char *file, int flags, ...) { REAL(openat); OPENS(real(at, file, flags, mode), at, file); }
int openat64(int at, const char *file, int flags, ...) { REAL(openat64); OPENS(real(at, file, flags, mode), at, file); }

#define OF_FD(call, takes, doing) \
    char path[PATH_MAX]; \
    if (!counts_fd(fd, path)) return doing; \
    DO(call, path, takes, -1, doing)

int fsync(int fd) { REAL(fsync); OF_FD("sync", 0, real(fd)); }
int fdatasync(int fd) { REAL(fdatasync); OF_FD("sync", 0, real(fd)); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); OF_FD("cut", 0, real(fd, size)); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); OF_FD("cut", 0, real(fd, size)); }

/* It returns the error, and gives room for later writes. */
#define RESERVES(doing) \
    char path[PATH_MAX]; \
    if (!counts_fd(fd, path)) return doing; \
    DO("reserve", path, 1, ENOSPC, doing)
int posix_fallocate(int fd, off_t at, off_t size) { REAL(posix_fallocate); RESERVES(real(fd, at, size)); }
int posix_fallocate64(int fd, off64_t at, off64_t size) { REAL(posix_fallocate64); RESERVES(real(fd, at, size)); }

#define OF_NAME(call, at, file, takes, doing) \
    char path[PATH_MAX]; \
    if (!counts(at, file, path)) return doing; \
    DO(call, path, takes, -1, doing)

int rename(const char *old, const char *file) { REAL(rename); OF_NAME("rename", AT_FDCWD, file, 0, real(old, file)); }
int renameat(int from, const char *old, int at, const char *file) {
    REAL(renameat);
    OF_NAME("rename", at, file, 0, real(from, old, at, file));
}
int mkdir(const char *file, mode_t mode) { REAL(mkdir); OF_NAME("folder", AT_FDCWD, file, 1, real(file, mode)); }
int mkdirat(int at, const char *file, mode_t mode) { REAL(mkdirat); OF_NAME("folder", at, file, 1, real(at, file, mode)); }

/* A full disk refuses no removal. */
#define REMOVES(at, file, doing) \
    char path[PATH_MAX]; \
    if (!counts(at, file, path)) return doing; \
    int here = begin("remove", path, 0); \
    int result = doing; \
    end(here); \
    return result
int unlink(const char *file) { REAL(unlink); REMOVES(AT_FDCWD, file, real(file)); }
int unlinkat(int at, const char *file, int flags) { REAL(unlinkat); REMOVES(at, file, real(at, file, flags)); }
int rmdir(const char *file) { REAL(rmdir); REMOVES(AT_FDCWD, file, real(file)); }
