/* What every command checks, in which order, and what it says. */
#include "parity.h"

#define N 4ul
static const unsigned commands[] = {READ,     WRITE,     MIGRATE_TO_DEV,  MIGRATE_TO_SYS, SNAPSHOT,
                                    EXCLUSIVE, CHECK_EXCLUSIVE, RELEASE, FLAGS,          READ_UNLOCKED};
#define EACH(command_) for (size_t i_ = 0; i_ < sizeof commands / 4; i_++) for (unsigned command_ = commands[i_], once_ = 1; once_; once_ = 0)

TEST(the_files_are_there, BOTH) {
    int one = device(0), two = device(1), again = device(0);
    CHECK(one != two && one != again);
    CHECK(close(one) == 0 && close(two) == 0 && close(again) == 0);
    CHECK(open("/dev/hmm_dmirror9", O_RDWR) == -1 && errno == ENOENT);
}

TEST(request_numbers_are_as_they_are_computed, BOTH) {
    for (unsigned i = 0; i < 10; i++) /* read and write, 40 bytes, 'H' */
        EQ(_IOWR('H', i, struct command), commands[i]);
    EQ(sizeof(struct command), 40);
}

TEST(a_bad_struct_is_EFAULT, BOTH) {
    int fd = device(0);
    EACH(request) {
        EQ(ioctl(fd, request, (void *)8), -1);
        EQ(errno, EFAULT);
    }
    EQ(ioctl(fd, 0xC0284830u, (void *)8), -1);
    EQ(errno, EFAULT);
    char *at = anonymous(2);
    CHECK(mprotect(at + PAGE, PAGE, PROT_NONE) == 0);
    EQ(ioctl(fd, FLAGS, at + PAGE - 32), -1); /* the first of its words alone can be read */
    EQ(errno, EFAULT);
}

TEST(bad_ranges_are_EINVAL, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 1);
    EACH(request) {
        FAILS(fd, request, at + 1, to, 1, EINVAL);
        FAILS(fd, request, at + 8, to, 1, EINVAL);
        FAILS(fd, request, at + PAGE / 2, to, 1, EINVAL);
        FAILS(fd, request, at, to, 0, EINVAL);
        FAILS(fd, request, at, to, ~0ul / PAGE + 1, EINVAL);
        FAILS(fd, request, (char *)-PAGE, to, 2, EINVAL);
        FAILS(fd, request, at + 1, (char *)8, 0, EINVAL); /* before the buffer is looked at */
    }
    ALL(to, N, UNSET);
    HOLDS(at, N, 1);
}

TEST(an_unknown_command_is_EINVAL, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    FAILS(fd, 0xC028480Au, at, to, N, EINVAL);
    FAILS(fd, 0xC0284830u, at, to, N, EINVAL);
    FAILS(fd, 0xC0284700u, at, to, N, EINVAL);
    FAILS(fd, 0xC0204800u, at, to, N, EINVAL);
    FAILS(fd, 0x00004800u, at, to, N, EINVAL);
}

TEST(what_sockets_and_terminals_know_a_device_does_not, BOTH) {
    static const unsigned requests[] = {FIONREAD, TIOCOUTQ, TCGETS, 0x8901 /* FIOSETOWN */, 0x8903 /* FIOGETOWN */, 0x8904 /* SIOCGPGRP */, 0x8905 /* SIOCATMARK */,
                                        0x8910 /* SIOCGIFNAME */, 0x89A0 /* SIOCBRADDBR */, 0x89E0 /* SIOCUNIXFILE */, 0x8B01 /* SIOCGIWNAME */};
    int fd = device(0), on = 1, off = 0;
    char *at = anonymous(N), *to = buffer(N);
    for (size_t i = 0; i < sizeof requests / sizeof *requests; i++) {
        FAILS(fd, requests[i], at, to, N, EINVAL);
        EQ(ioctl(fd, requests[i], NULL), -1);
        EQ(errno, EFAULT);
    }
    ALL(to, N, UNSET);
    /* Of every file the kernel itself knows: */
    CHECK(ioctl(fd, FIOCLEX) == 0 && fcntl(fd, F_GETFD) == FD_CLOEXEC);
    CHECK(ioctl(fd, FIONCLEX) == 0 && fcntl(fd, F_GETFD) == 0);
    CHECK(ioctl(fd, FIONBIO, &on) == 0 && fcntl(fd, F_GETFL) & O_NONBLOCK);
    CHECK(ioctl(fd, FIONBIO, &off) == 0 && !(fcntl(fd, F_GETFL) & O_NONBLOCK));
    CHECK(ioctl(fd, FIOASYNC, &off) == 0);
    CHECK(ioctl(fd, FIOASYNC, &on) == -1 && errno == ENOTTY && !(fcntl(fd, F_GETFL) & O_ASYNC));
    CHECK(ioctl(fd, FIOQSIZE, to) == -1 && errno == ENOTTY);
    int pair[2];
    CHECK(pipe(pair) == 0 && write(pair[1], "four", 4) == 4 && ioctl(pair[0], FIONREAD, &on) == 0);
    EQ(on, 4);
}

TEST(the_outputs_are_set, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 2);
    DOES(fd, CHECK_EXCLUSIVE, at, to, N, 0, 0);
    DOES(fd, FLAGS, at, to, 2, 0, 0);
    DOES(fd, MIGRATE_TO_SYS, at, to, N, 0, 0);
    DOES(fd, SNAPSHOT, at, to, N, N, 0);
    DOES(fd, READ, at, to, N, N, 1);
    DOES(fd, WRITE, at, to, 1, 1, 0);
    DOES(fd, RELEASE, at, to, N, 0, 0);
}

TEST(the_struct_may_lie_on_the_device, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 3);
    struct command *inside = (struct command *)(at + PAGE);
    *inside = (struct command){(uint64_t)(at + 2 * PAGE), (uint64_t)to, 1, UNSET, UNSET};
    CHECK(ioctl(fd, READ, inside) == 0);
    EQ(inside->cpages, 1);
    EQ(inside->addr, (uint64_t)(at + 2 * PAGE));
    char *whole = buffer(N);
    fill(whole, N, 3);
    CHECK(memcmp(to, whole + 2 * PAGE, PAGE) == 0);
}

TEST(a_buffer_may_lie_on_the_device, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *data = anonymous(N);
    MOVED(fd, at, N, 4);
    fill(data, N, 5);
    WORKS(fd, READ, data, at, N);
    HOLDS(at, N, 5);
    MOVED(fd, at, N, 6);
    WORKS(fd, WRITE, data, at, N);
    HOLDS(data, N, 6);
    MOVED(fd, at, N, 7);
    WORKS(fd, READ, at, at, N); /* the range itself */
    HOLDS(at, N, 7);
}

TEST(an_error_leaves_the_struct_alone, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    CHECK(munmap(at, N * PAGE) == 0);
    FAILS(fd, READ, at, to, N, EFAULT);
    FAILS(fd, WRITE, at, to, N, EFAULT);
    FAILS(fd, READ_UNLOCKED, at, to, N, EFAULT);
    FAILS(fd, MIGRATE_TO_DEV, at, to, N, EINVAL);
    FAILS(fd, EXCLUSIVE, at, to, N, EFAULT);
    ALL(to, N, UNSET);
}

TEST(a_struct_that_cannot_be_written_is_EFAULT, BOTH) {
    int fd = device(0);
    char *at = anonymous(1), *data = anonymous(N), *to = buffer(N);
    fill(data, N, 8);
    *(struct command *)at = (struct command){(uint64_t)data, (uint64_t)to, N, 3, 4};
    CHECK(mprotect(at, PAGE, PROT_READ) == 0);
    EQ(ioctl(fd, READ, at), -1);
    EQ(errno, EFAULT);
    EQ(((struct command *)at)->cpages, 3);
    HOLDS(to, N, 8); /* it has been done */
}
