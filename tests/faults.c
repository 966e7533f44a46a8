/* Fails, or kills the process at, the N-th system call that concerns files below a folder.

   Loaded with LD_PRELOAD, so what is failed is what Python's own C code calls. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[4096], ours[65536];  /* ours: by file descriptor */
static long calls, place;
static int error, lasting;

/* number: 0 counts only. what: an errno, or 0 for a kill. always: also fails each later call. */
void arm(const char *path, long number, int what, int always) {
    strncpy(folder, path, sizeof folder - 1);
    calls = 0, place = number, error = what, lasting = always;
}

long disarm(void) {
    folder[0] = 0;
    return calls;
}

static int below(const char *path) {
    size_t length = strlen(folder);
    return length && path && !strncmp(path, folder, length) &&
           (path[length] == '/' || !path[length]);
}

static int fails(void) {
    ++calls;
    if (!place || (lasting ? calls < place : calls != place)) return 0;
    if (!error) kill(getpid(), SIGKILL);
    errno = error;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int opened(int file, int mine) {
    if (file >= 0 && file < (int)sizeof ours) ours[file] = (char)mine;
    return file;
}

#define OPEN(name)                                           \
    int name(const char *path, int flags, ...) {             \
        va_list list;                                        \
        va_start(list, flags);                               \
        mode_t mode = va_arg(list, mode_t);                  \
        va_end(list);                                        \
        int mine = below(path);                              \
        if (mine && fails()) return -1;                      \
        return opened(REAL(name)(path, flags, mode), mine);  \
    }
OPEN(open)
OPEN(open64)

#define FILE_CALL(type, name, parameters, arguments)                                      \
    type name parameters {                                                                \
        if (*folder && file >= 0 && file < (int)sizeof ours && ours[file] && fails())     \
            return -1;                                                                    \
        return REAL(name) arguments;                                                      \
    }
FILE_CALL(ssize_t, read, (int file, void *data, size_t size), (file, data, size))
FILE_CALL(int, fsync, (int file), (file))

/* Half of what is to be written is there when it fails, as on a disk that becomes full. */
ssize_t write(int file, const void *data, size_t size) {
    if (*folder && file >= 0 && file < (int)sizeof ours && ours[file]) {
        if (calls + 1 == place && size > 1 && REAL(write)(file, data, size / 2) < 0) return -1;
        if (fails()) return -1;
    }
    return REAL(write)(file, data, size);
}

#define PATH_CALL(name, parameters, arguments)     \
    int name parameters {                          \
        if (below(path) && fails()) return -1;     \
        return REAL(name) arguments;               \
    }
PATH_CALL(rename, (const char *path, const char *other), (path, other))
PATH_CALL(mkdir, (const char *path, mode_t mode), (path, mode))
PATH_CALL(unlink, (const char *path), (path))
PATH_CALL(rmdir, (const char *path), (path))
