/* What the programs share. Each shows what the kernel does, with no code of this project: it prints its facts, one a line, and ends with 0; or says why it cannot be shown here, and ends with 77. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul

/* Newer than some headers. */
#define MOVE_FEATURE (1ul << 16)
struct move {
    uint64_t dst, src, len, mode;
    int64_t done;
};
#define MOVE _IOWR(0xAA, 0x05, struct move)

#define SKIP(...)                                                 \
    do {                                                          \
        printf("skipped: "), printf(__VA_ARGS__), putchar('\n');  \
        exit(77);                                                 \
    } while (0)
#define CHECK(what)                                                                                    \
    do {                                                                                               \
        if (!(what))                                                                                   \
            fprintf(stderr, "%s:%d: not so: %s (errno %d)\n", __FILE__, __LINE__, #what, errno), exit(1);  \
    } while (0)
/* A fact: what was done, and how it ended. */
#define FACT(what, result) printf("%s: %s\n", what, (result) < 0 ? strerrorname_np(errno) : "done")

static inline char *anonymous(size_t pages) {
    char *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

/* A userfaultfd that handles the kernel's own faults too. */
static inline int userfaultfd(uint64_t features) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd < 0)
        SKIP("this user may not handle page faults of the kernel (%s)", strerrorname_np(errno));
    struct uffdio_api api = {UFFD_API, features, 0};
    if (ioctl(fd, UFFDIO_API, &api) != 0)
        SKIP("this kernel's userfaultfd has no features %#lx (%s)", (long)features, strerrorname_np(errno));
    return fd;
}

static inline int watch(int fd, const void *at, size_t pages) {
    struct uffdio_register range = {{(uint64_t)at, pages * PAGE}, UFFDIO_REGISTER_MODE_MISSING, 0};
    return ioctl(fd, UFFDIO_REGISTER, &range);
}

static inline int unwatch(int fd, const void *at, size_t pages) {
    struct uffdio_range range = {(uint64_t)at, pages * PAGE};
    return ioctl(fd, UFFDIO_UNREGISTER, &range);
}

static inline int move(int fd, const void *to, const void *from) {
    struct move one = {(uint64_t)to, (uint64_t)from, PAGE, 0, 0};
    return ioctl(fd, MOVE, &one);
}
