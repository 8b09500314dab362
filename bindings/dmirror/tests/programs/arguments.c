/* Bad arguments, and the order in which they are found. */
#include "check.h"

static void find(int fd) {
    static const unsigned long all[] = {READ,      WRITE,           MIGRATE_TO_DEV, MIGRATE_TO_SYS, SNAPSHOT,
                                        EXCLUSIVE, CHECK_EXCLUSIVE, RELEASE,        FLAGS,          READ_UNLOCKED, UNKNOWN, 0x1234, 0};
    char *hole = pages(3);
    munmap(hole + 2 * PAGE, PAGE);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        FAILS(ioctl(fd, all[i], NULL), EFAULT);
        FAILS(ioctl(fd, all[i], hole + 2 * PAGE - 20), EFAULT);
        FAILS(ioctl(fd, all[i], (void *)0x8000000000000000ul), EFAULT);
        struct command bad[] = {
            {.addr = PAGE + 8, .npages = 1},          {.addr = PAGE, .npages = 0},       {.addr = -PAGE, .npages = 1},
            {.addr = PAGE, .npages = -1ul},           {.addr = PAGE, .npages = 1ul << 52}, {.addr = 0, .npages = 1ul << 63},
        };
        for (size_t j = 0; j < sizeof bad / sizeof *bad; j++) {
            bad[j].cpages = 5, bad[j].faults = 6;
            FAILS(ioctl(fd, all[i], &bad[j]), EINVAL);
            CHECK(bad[j].cpages == 5 && bad[j].faults == 6);
        }
    }
    struct command good = {.addr = (uint64_t)hole, .ptr = (uint64_t)hole, .npages = 1, .cpages = 5, .faults = 6};
    FAILS(ioctl(fd, UNKNOWN, &good), EINVAL);
    CHECK(good.cpages == 5 && good.faults == 6);

    /* errno is for errors only. */
    errno = 77;
    CHECK(flags(fd) == 0 && errno == 77);
    CHECK(ioctl(fd, CHECK_EXCLUSIVE, &good) == 0 && good.cpages == 0 && good.faults == 0 && errno == 77);
    CHECK(ioctl(fd, RELEASE, &good) == 0 && errno == 77);

    /* A struct that can be read and not written. */
    struct command *fixed = (void *)hole;
    *fixed = good;
    CHECK(mprotect(hole, PAGE, PROT_READ) == 0);
    FAILS(ioctl(fd, FLAGS, fixed), EFAULT);

    /* A buffer that is not there. */
    good.ptr = (uint64_t)hole + 2 * PAGE;
    FAILS(ioctl(fd, WRITE, &good), EFAULT);
    good.ptr = 0;
    FAILS(ioctl(fd, WRITE, &good), EFAULT);
    good.ptr = (uint64_t)hole + PAGE;
    good.npages = 2; /* the second is not there */
    FAILS(ioctl(fd, WRITE, &good), EFAULT);
}

static void never(int signal) {
    _exit(100 + signal);
}

int main(void) {
    int fd = open(DEVICE, O_RDWR);
    CHECK(fd >= 0);
    find(fd);
    /* The program's own handlers are none of a device's business. */
    sigset_t faults;
    sigemptyset(&faults), sigaddset(&faults, SIGSEGV), sigaddset(&faults, SIGBUS);
    CHECK(sigprocmask(SIG_BLOCK, &faults, 0) == 0);
    find(fd);
    CHECK(sigprocmask(SIG_UNBLOCK, &faults, 0) == 0);
    CHECK(signal(SIGSEGV, never) != SIG_ERR);
    find(fd);
    CHECK(signal(SIGBUS, never) != SIG_ERR);
    find(fd);
    return 0;
}
