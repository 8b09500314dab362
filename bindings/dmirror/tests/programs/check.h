/* What the test programs share. A program that finds all as it should be ends with 0 and says nothing. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

struct command {
    uint64_t addr, ptr, npages, cpages, faults;
};

#define READ 0xC0284800ul
#define WRITE 0xC0284801ul
#define MIGRATE_TO_DEV 0xC0284802ul
#define MIGRATE_TO_SYS 0xC0284803ul
#define SNAPSHOT 0xC0284804ul
#define EXCLUSIVE 0xC0284805ul
#define CHECK_EXCLUSIVE 0xC0284806ul
#define RELEASE 0xC0284807ul
#define FLAGS 0xC0284808ul
#define READ_UNLOCKED 0xC0284809ul
#define UNKNOWN 0xC0284830ul
#define PAGE 4096ul
#define DEVICE "/dev/hmm_dmirror0"

#define CHECK(what)                                                                       \
    do {                                                                                  \
        if (!(what)) {                                                                    \
            fprintf(stderr, "%s:%d: not so: %s (errno %d)\n", __FILE__, __LINE__, #what, errno); \
            _exit(1);                                                                     \
        }                                                                                 \
    } while (0)

/* The call fails with just this error. */
#define FAILS(call, error)                                         \
    do {                                                           \
        errno = 0;                                                 \
        long result_ = (long)(call);                               \
        int errno_ = errno;                                        \
        if (result_ != -1 || errno_ != (error)) {                  \
            fprintf(stderr, "%s:%d: %s gives %ld, errno %d (%s), not %s\n", __FILE__, __LINE__, #call, result_, errno_, \
                    strerror(errno_), #error);                     \
            _exit(1);                                              \
        }                                                          \
    } while (0)

/* A command that is done whatever the pages are: the next allocation does not fail. */
static inline int flags(int fd) {
    struct command command = {.addr = PAGE, .npages = 2, .cpages = 7, .faults = 7};
    int result = ioctl(fd, FLAGS, &command);
    if (result == 0)
        CHECK(command.cpages == 0 && command.faults == 0);
    return result;
}

static inline void *pages(size_t count) {
    void *at = mmap(0, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

/* Waits for a child that found all as it should be. */
static inline void well(pid_t child) {
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
