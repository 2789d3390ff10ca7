/* Counts a process's operations on files below a folder, and at the n-th of them kills it or has the disk full. For LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, HALF, FULL };
static char prefix[4096];
static long at = -1, seen = 0;
static int kind = COUNT, armed = 0;
static char last[8192];       /* the path of the operation that is looked at */
static char names[1 << 20];   /* the paths of all that were counted, a line each */
static size_t used = 0;

void faults_arm(const char *folder, long n, int what) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    at = n, kind = what, seen = 0, armed = 1, used = 0, names[0] = 0;
}
const char *faults_names(void) { return names; }
long faults_seen(void) { return seen; }

static int is_below(const char *path) {
    if (strncmp(path, prefix, strlen(prefix)) != 0) return 0;
    snprintf(last, sizeof last, "%s", path + strlen(prefix));
    return 1;
}
static int below(int dir, const char *path) {
    char whole[8192], folder[4096];
    if (!armed) return 0;
    if (path[0] != '/') {
        char link[64];
        if (dir == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, folder, sizeof folder - 1);
        if (n < 0) return 0;
        folder[n] = 0;
        snprintf(whole, sizeof whole, "%s/%s", folder, path);
        path = whole;
    }
    return is_below(path);
}
static int open_below(int fd) {
    char link[64], path[4096];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return is_below(path);
}
/* 1: this operation needs disk space and there is none */
static int hit(int needs_space) {
    seen++;
    size_t n = strlen(last);
    if (kind == COUNT && used + n + 2 < sizeof names) memcpy(names + used, last, n), used += n, names[used++] = '\n', names[used] = 0;
    if (at < 0) return 0;
    if ((kind == KILL || kind == HALF) && seen == at) kill(getpid(), SIGKILL), pause();
    if (kind == FULL && seen >= at && needs_space) { errno = ENOSPC; return 1; }
    return 0;
}
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & O_CREAT))

static int opened(const char *which, int dir, const char *path, int flags, mode_t mode) {
    if (WRITES(flags) && below(dir, path) && hit(flags & O_CREAT)) return -1;
    if (strcmp(which, "open") == 0) return REAL(open)(path, flags, mode);
    return REAL(openat)(dir, path, flags, mode);
}
#define MODE(flags, mode) mode_t mode = 0; if ((flags) & O_CREAT) { va_list l; va_start(l, flags); mode = va_arg(l, mode_t); va_end(l); }
int open(const char *p, int flags, ...) { MODE(flags, m) return opened("open", AT_FDCWD, p, flags, m); }
int open64(const char *p, int flags, ...) { MODE(flags, m) return opened("open", AT_FDCWD, p, flags, m); }
int openat(int d, const char *p, int flags, ...) { MODE(flags, m) return opened("openat", d, p, flags, m); }
int openat64(int d, const char *p, int flags, ...) { MODE(flags, m) return opened("openat", d, p, flags, m); }
ssize_t write(int fd, const void *b, size_t n) {
    if (open_below(fd)) {
        if (kind == HALF && at == seen + 1) REAL(write)(fd, b, n / 2); /* cut in two */
        if (hit(1)) return -1;
    }
    return REAL(write)(fd, b, n);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { return open_below(fd) && hit(1) ? -1 : REAL(pwrite64)(fd, b, n, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { return open_below(fd) && hit(1) ? -1 : REAL(writev)(fd, v, n); }
ssize_t sendfile(int o, int i, off_t *at_, size_t n) { return open_below(o) && hit(1) ? -1 : REAL(sendfile)(o, i, at_, n); }
ssize_t sendfile64(int o, int i, off64_t *at_, size_t n) { return open_below(o) && hit(1) ? -1 : REAL(sendfile64)(o, i, at_, n); }
int ftruncate64(int fd, off64_t n) { return open_below(fd) && hit(1) ? -1 : REAL(ftruncate64)(fd, n); }
int fsync(int fd) { if (open_below(fd)) hit(0); return REAL(fsync)(fd); }
int rename(const char *a, const char *b) { if (below(AT_FDCWD, a) && hit(0)) return -1; return REAL(rename)(a, b); }
int renameat(int x, const char *a, int y, const char *b) { if (below(x, a) && hit(0)) return -1; return REAL(renameat)(x, a, y, b); }
int unlink(const char *p) { if (below(AT_FDCWD, p)) hit(0); return REAL(unlink)(p); }
int unlinkat(int d, const char *p, int f) { if (below(d, p)) hit(0); return REAL(unlinkat)(d, p, f); }
int rmdir(const char *p) { if (below(AT_FDCWD, p)) hit(0); return REAL(rmdir)(p); }
int mkdir(const char *p, mode_t m) { if (below(AT_FDCWD, p) && hit(1)) return -1; return REAL(mkdir)(p, m); }
int mkdirat(int d, const char *p, mode_t m) { if (below(d, p) && hit(1)) return -1; return REAL(mkdirat)(d, p, m); }
