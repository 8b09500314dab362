/* Descriptors from open to close, and the ends of processes. */
#include "parity.h"

#define N 4ul

TEST(close_brings_everything_back, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *more = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 1);
    MOVED(fd, more, N, 2);
    CHECK(close(fd) == 0);
    IS(at, N, HERE);
    IS(more, N, HERE);
    fd = device(0);
    AT_HOME(fd, at, N, RW);
    AT_HOME(fd, more, N, RW);
    DOES(fd, READ, at, to, N, N, 1);
    HOLDS(to, N, 1);
    HOLDS(at, N, 1);
    HOLDS(more, N, 2);
}

TEST(close_of_one_of_two_opens_loses_nothing, BOTH) {
    int one = device(0), two = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(one, at, N, 3);
    CHECK(close(one) == 0);
    DOES(two, READ, at, to, N, N, 1);
    HOLDS(to, N, 3);
    HOLDS(at, N, 3);
    MOVED(two, at, N, 4);
    CHECK(close(two) == 0);
    IS(at, N, HERE);
    HOLDS(at, N, 4);
}

TEST(close_ends_exclusive_access, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 5);
    WORKS(fd, EXCLUSIVE, at, to, N);
    CHECK(close(fd) == 0);
    HOLDS(at, N, 5);
    fd = device(0);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
    LOOKS(fd, at, N, RW);
}

TEST(a_closed_descriptor_is_EBADF, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 6);
    DOES(fd, READ, at, to, N, N, 1);
    CHECK(close(fd) == 0);
    FAILS(fd, READ, at, to, N, EBADF);
    CHECK(close(fd) == -1 && errno == EBADF);
}

TEST(a_copy_of_a_descriptor_is_the_same_open, BOTH) {
    int fd = device(0), copy = dup(fd), far = dup2(fd, 100), locked = fcntl(fd, F_DUPFD_CLOEXEC, 200);
    char *at = anonymous(N), *to = buffer(N);
    CHECK(copy >= 0 && far == 100 && locked >= 200);
    fill(at, N, 7);
    DOES(fd, READ, at, to, N, N, 1);
    DOES(copy, READ, at, to, N, N, 0);
    DOES(far, READ, at, to, N, N, 0);
    DOES(locked, READ, at, to, N, N, 0);
    MOVED(copy, at, N, 8);
    CHECK(close(fd) == 0 && close(locked) == 0);
    ON_DEVICE(copy, at, N, RW);
    DOES(far, READ, at, to, N, N, 0);
    HOLDS(to, N, 8);
    CHECK(close(far) == 0);
    ON_DEVICE(copy, at, N, RW);
    CHECK(close(copy) == 0);
    IS(at, N, HERE);
    HOLDS(at, N, 8);
}

TEST(many_opens, BOTH) {
    enum { many = 64 };
    int fds[many];
    char *at = anonymous(many), *to = buffer(1);
    fill(at, many, 9);
    for (int i = 0; i < many; i++)
        fds[i] = device(i & 1);
    for (int i = 0; i < many; i++)
        DOES(fds[i], MIGRATE_TO_DEV, at + (size_t)i * PAGE, to, 1, 1, 0);
    for (int i = 0; i < many; i++)
        ON_DEVICE(fds[i], at + (size_t)i * PAGE, 1, RW);
    for (int i = 0; i < many; i += 2)
        CHECK(close(fds[i]) == 0);
    HOLDS(at, many, 9);
    for (int i = 1; i < many; i += 2)
        CHECK(close(fds[i]) == 0);
    IS(at, many, HERE);
}

TEST(opens_beyond_256, BOTH) {
    enum { many = 300 };
    int fds[many];
    char *at = anonymous(many), *to = buffer(1);
    fill(at, many, 22);
    for (int i = 0; i < many; i++) {
        fds[i] = device(0);
        DOES(fds[i], READ, at + (size_t)i * PAGE, to, 1, 1, 1);
    }
    DOES(fds[many - 1], MIGRATE_TO_DEV, at, to, 1, 1, 0);
    for (int i = 0; i < many; i++) {
        LOOKS(fds[i], at, 1, RW | (coherent ? COHERENT_MINE : MINE));
        if (i > 0) /* each has kept its entry */
            DOES(fds[i], READ, at + (size_t)i * PAGE, to, 1, 1, 0);
    }
    CHECK(madvise(at, many * PAGE, MADV_DONTNEED) == 0);
    for (int i = many - 1; i > 0; i--) { /* and each hears of a change */
        DOES(fds[i], READ, at + (size_t)i * PAGE, to, 1, 1, 1);
        ALL(to, 1, 0ul);
        CHECK(close(fds[i]) == 0);
    }
    DOES(fds[0], READ, at, to, 1, 1, 1);
}

TEST(commands_need_no_descriptors, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N), *from = anonymous(N);
    fill(at, N, 23), fill(from, N, 24);
    CHECK(where(at) == HERE); /* opens what that takes */
    struct rlimit none;
    CHECK(getrlimit(RLIMIT_NOFILE, &none) == 0);
    none.rlim_cur = 0; /* what may be raised again */
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0 && dup(fd) == -1 && errno == EMFILE);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    HOLDS(to, N, 23);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 23);
    well(CHILD({ /* by the parent's descriptor, of the parent's memory */
        WORKS(fd, READ, at, to, N);
        HOLDS(to, N, 23);
        WORKS(fd, WRITE, at, from, N);
        DOES(fd, FLAGS, at, NULL, 2, 0, 0);
    }));
    HOLDS(at, N, 24);
    CHECK(dup(fd) == -1 && errno == EMFILE); /* the limit is as it was */
    MOVED(fd, at, N, 25);
    CHECK(close(fd) == 0);
    IS(at, N, HERE);
    HOLDS(at, N, 25);
}

TEST(open_and_close_many_times, BOTH) {
    char *at = anonymous(N);
    for (uint64_t round = 0; round < 50; round++) {
        int fd = device(0);
        MOVED(fd, at, N, round);
        CHECK(close(fd) == 0);
        IS(at, N, HERE);
        HOLDS(at, N, round);
    }
}

TEST(exec_with_data_on_the_device, BOTH) {
    if (getenv("PARITY_AGAIN")) { /* the new program: it has memory of its own, and opens the device anew */
        char *at = anonymous(N), *to = buffer(N);
        int inherited = atoi(getenv("PARITY_AGAIN")), fd = device(0);
        fill(at, N, 11);
        CHECK(command(inherited, READ, at, to, N) != 0); /* it mirrors what is gone */
        MOVED(fd, at, N, 12);
        HOLDS(at, N, 12);
        return;
    }
    int fd = device(0), status = 0;
    char *at = anonymous(N);
    MOVED(fd, at, N, 10);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        int own = device(0);
        MOVED(own, at, N, 13);
        char number[12];
        snprintf(number, sizeof number, "%d", own);
        setenv("PARITY_AGAIN", number, 1);
        execl("/proc/self/exe", self, "exec_with_data_on_the_device", coherent ? "coherent" : "private", NULL);
        _exit(3);
    }
    CHECK(waitpid(child, &status, 0) == child);
    EQ(status, 0);
    HOLDS(at, N, 10);
}

TEST(exit_with_data_on_the_device, BOTH) {
    for (uint64_t round = 0; round < 5; round++)
        well(CHILD({
            int fd = device(0);
            char *at = anonymous(N);
            MOVED(fd, at, N, round);
            exit(0);
        }));
    int fd = device(0);
    char *at = anonymous(N);
    MOVED(fd, at, N, 14);
    HOLDS(at, N, 14);
}

TEST(kill_with_data_on_the_device, BOTH) {
    int ready[2], fd = device(0);
    char byte, *at = anonymous(N), *mine = anonymous(N);
    MOVED(fd, mine, N, 15);
    for (int round = 0; round < 3; round++) {
        CHECK(pipe(ready) == 0);
        pid_t child = CHILD({
            int own = device(0);
            char *to = buffer(N);
            MOVED(own, at, N, 16);
            WORKS(own, EXCLUSIVE, at, to, 1);
            CHECK(write(ready[1], "", 1) == 1);
            for (;;)
                command(own, READ, at, to, N);
        });
        CHECK(read(ready[0], &byte, 1) == 1);
        int status;
        CHECK(kill(child, SIGKILL) == 0 && waitpid(child, &status, 0) == child && WIFSIGNALED(status));
        CHECK(close(ready[0]) == 0 && close(ready[1]) == 0);
    }
    HOLDS(mine, N, 15);
    WORKS(fd, READ, mine, buffer(N), N); /* fork erased the entries */
    MOVED(fd, mine, N, 17);
    HOLDS(mine, N, 17);
}

TEST(a_mapping_of_the_devices_file, BOTH) {
    int fd = device(0), other = device(1);
    char *at = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), *to = buffer(N);
    char *second = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(at != MAP_FAILED && second != MAP_FAILED);
    LOOKS(fd, at, N, RO);
    LOOKS(other, at, N, RO);
    DOES(fd, READ, at, to, N, N, 1);
    ALL(to, N, 0ul);
    FAILS(fd, MIGRATE_TO_DEV, at, to, N, EINVAL);
    ALL(at, N, 0ul);
    fill(at, N, 18);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 18);
    LOOKS(fd, at, N, RO);
    ALL(second, N, 0ul); /* private to the mapping */
    FAILS(fd, MIGRATE_TO_DEV, at, to, 1, EINVAL);
    CHECK(munmap(at, N * PAGE) == 0);
    LOOKS(fd, at, N, ERROR);
}

TEST(a_mapping_of_the_devices_file_among_others, BOTH) {
    int fd = device(0);
    char *at = anonymous(3 * N), *to = buffer(3 * N);
    fill(at, 3 * N, 19);
    CHECK(mmap(at + N * PAGE, N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == at + N * PAGE);
    WORKS(fd, READ, at, to, 3 * N);
    HOLDS(to, N, 19);
    ALL(to + N * PAGE, N, 0ul);
    FAILS(fd, MIGRATE_TO_DEV, at, to, 3 * N, EINVAL);
    ON_DEVICE(fd, at, N, RW);
    LOOKS(fd, at + N * PAGE, N, RO);
    LOOKS(fd, at + 2 * N * PAGE, N, RW);
    HOLDS(at, N, 19);
}

TEST(device_memory_is_of_the_device, BOTH) {
    int one = device(0), two = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(one, at, N, 20);
    ON_DEVICE(two, at, N, RW);
    DOES(two, READ, at, to, N, N, 1);
    ON_DEVICE(one, at, N, RW);
    HOLDS(to, N, 20);
    DOES(two, MIGRATE_TO_SYS, at, NULL, N, N, 0);
    AT_HOME(one, at, N, RW);
    HOLDS(at, N, 20);
}

TEST(all_devices_at_once, PRIVATE) {
    int fds[4], count = 0;
    for (int i = 0; i < 4; i++) {
        char path[32];
        snprintf(path, sizeof path, "/dev/hmm_dmirror%d", i);
        fds[count] = open(path, O_RDWR);
        count += fds[count] >= 0;
    }
    CHECK(count >= 2);
    char *at = anonymous(4 * N), *to = buffer(4 * N);
    fill(at, 4 * N, 21);
    for (int i = 0; i < count; i++)
        DOES(fds[i], MIGRATE_TO_DEV, at + (size_t)i * N * PAGE, to, N, N, 0);
    IS(at, 2 * N, AWAY);
    for (int i = 0; i < count; i++) {
        WORKS(fds[i], READ, at, to, 4 * N);
        HOLDS(to, 4 * N, 21);
    }
    HOLDS(at, 4 * N, 21);
}
