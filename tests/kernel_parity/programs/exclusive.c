/* EXCLUSIVE, CHECK_EXCLUSIVE and RELEASE. */
#include "parity.h"

#define N 4ul

TEST(exclusive_gives_the_data, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 1);
    WORKS(fd, EXCLUSIVE, at, to, N);
    HOLDS(to, N, 1);
    FAILS(fd, CHECK_EXCLUSIVE, at, NULL, N, EPERM);
    for (size_t page = 0; page < N; page++)
        FAILS(fd, CHECK_EXCLUSIVE, at + page * PAGE, NULL, 1, EPERM);
    HOLDS(at, N, 1);
}

TEST(exclusive_ends_with_a_read, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 2);
    WORKS(fd, EXCLUSIVE, at, to, N);
    LOOKS(fd, at, N, NONE);
    CHECK(((volatile char *)at)[PAGE] == to[PAGE]);
    DOES(fd, CHECK_EXCLUSIVE, at + PAGE, NULL, 1, 0, 0);
    LOOKS(fd, at + PAGE, 1, RW);
    FAILS(fd, CHECK_EXCLUSIVE, at, NULL, 2, EPERM);
    FAILS(fd, CHECK_EXCLUSIVE, at + PAGE, NULL, 2, EPERM);
    HOLDS(at, N, 2);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
    AT_HOME(fd, at, N, RW);
}

TEST(exclusive_ends_with_a_write, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 3);
    WORKS(fd, EXCLUSIVE, at, to, N);
    at[0] = 77;
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, 1, 0, 0);
    FAILS(fd, CHECK_EXCLUSIVE, at, NULL, N, EPERM);
    WORKS(fd, READ, at, to, N);
    CHECK(to[0] == 77);
    at[0] = 0;
    fill(at, N, 4);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 4);
}

TEST(exclusive_of_holes_and_zero_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    ALL(at, 1, 0ul);
    WORKS(fd, EXCLUSIVE, at, to, N);
    ALL(to, N, 0ul);
    FAILS(fd, CHECK_EXCLUSIVE, at, NULL, N, EPERM);
    ALL(at, N, 0ul);
    LOOKS(fd, at, N, RW);
}

TEST(exclusive_ends_with_protection, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 5);
    WORKS(fd, EXCLUSIVE, at, to, N);
    CHECK(mprotect(at, 2 * PAGE, PROT_READ) == 0);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, 2, 0, 0);
    FAILS(fd, CHECK_EXCLUSIVE, at + 2 * PAGE, NULL, 1, EPERM);
    FAILS(fd, EXCLUSIVE, at, to, 1, EFAULT);
    HOLDS(at, N, 5);
}

TEST(exclusive_ends_with_fork, BOTH) {
    char *at = anonymous(N), *to = buffer(N);
    int fd = device(0);
    fill(at, N, 6);
    WORKS(fd, EXCLUSIVE, at, to, N);
    FAILS(fd, CHECK_EXCLUSIVE, at, NULL, N, EPERM);
    pid_t child = CHILD({
        HOLDS(at, N, 6);
        fill(at, N, 7);
    });
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
    well(child);
    HOLDS(at, N, 6);
    WORKS(fd, EXCLUSIVE, at, to, N);
    HOLDS(to, N, 6);
}

TEST(exclusive_ends_with_munmap_and_madvise, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 8);
    WORKS(fd, EXCLUSIVE, at, to, N);
    CHECK(madvise(at, PAGE, MADV_DONTNEED) == 0);
    CHECK(munmap(at + PAGE, PAGE) == 0);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, 2, 0, 0);
    ALL(at, 1, 0ul);
    HOLDS(at + 2 * PAGE, 0, 0);
    WORKS(fd, READ, at + 2 * PAGE, to, 2);
    char *whole = buffer(N);
    fill(whole, N, 8);
    CHECK(memcmp(at + 2 * PAGE, whole + 2 * PAGE, 2 * PAGE) == 0);
}

TEST(exclusive_of_nothing_is_EFAULT, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 9);
    CHECK(mprotect(at + 2 * PAGE, PAGE, PROT_READ) == 0);
    FAILS(fd, EXCLUSIVE, at + 2 * PAGE, to, 1, EFAULT);
    CHECK(munmap(at + 2 * PAGE, PAGE) == 0);
    FAILS(fd, EXCLUSIVE, at + 2 * PAGE, to, 1, EFAULT);
    FAILS(fd, EXCLUSIVE, at, to, N, EFAULT);
    ALL(to, N, UNSET);
    CHECK(mprotect(at, PAGE, PROT_NONE) == 0);
    FAILS(fd, EXCLUSIVE, at, to, 1, EFAULT);
}

TEST(exclusive_of_shared_memory_is_EOPNOTSUPP, BOTH) {
    int fd = device(0), file = file_of(N, 10);
    char *at = shared(N), *to = buffer(N);
    fill(at, N, 10);
    FAILS(fd, EXCLUSIVE, at, to, N, EOPNOTSUPP);
    at = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(at != MAP_FAILED);
    HOLDS(at, N, 10);
    FAILS(fd, EXCLUSIVE, at, to, N, EOPNOTSUPP);
    ALL(to, N, UNSET);
}

TEST(exclusive_of_a_page_on_the_device, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 11);
    WORKS(fd, EXCLUSIVE, at, to, N);
    HOLDS(to, N, 11);
    FAILS(fd, CHECK_EXCLUSIVE, at, NULL, N, EPERM);
    HOLDS(at, N, 11);
}

TEST(exclusive_of_one_is_taken_by_the_other, BOTH) {
    int fd = device(0), other = device(1);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 12);
    WORKS(fd, EXCLUSIVE, at, to, N);
    DOES(other, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
    DOES(other, READ, at, to, N, N, 1); /* faults, as the CPU would */
    HOLDS(to, N, 12);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
    HOLDS(at, N, 12);
}

TEST(check_exclusive_of_ordinary_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 13);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
    WORKS(fd, READ, at, to, N);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
    CHECK(munmap(at, PAGE) == 0);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
}

TEST(migrate_of_an_exclusive_page, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 14);
    WORKS(fd, EXCLUSIVE, at, to, N);
    HOLDS(to, N, 14);
    memset(to, 0, N * PAGE);
    int error = command(fd, MIGRATE_TO_DEV, at, to, N); /* it moves, or it has no entry */
    CHECK(error == 0 || error == ENOENT);
    if (error == 0)
        HOLDS(to, N, 14);
    HOLDS(at, N, 14);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
}

TEST(release_evicts_everything, BOTH) {
    int fd = device(0), same = device(0), other = device(1);
    char *at = anonymous(2 * N), *more = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 15);
    MOVED(same, at + N * PAGE, N, 16);
    MOVED(other, more, N, 17);
    DOES(fd, RELEASE, at, NULL, 1, 0, 0);
    AT_HOME(fd, at, 2 * N, RW);
    ON_DEVICE(other, more, N, RW); /* the other device's stay */
    DOES(fd, MIGRATE_TO_SYS, at, NULL, 2 * N, 0, 0);
    HOLDS(at, N, 15);
    HOLDS(at + N * PAGE, N, 16);
    HOLDS(more, N, 17);
    MOVED(fd, at, N, 18); /* it goes on */
    HOLDS(at, N, 18);
    DOES(fd, READ, at, to, N, N, coherent ? 0 : 1);
}

TEST(release_is_of_every_process, BOTH) {
    int to_parent[2], to_child[2];
    char byte, *at = anonymous(N), *mine = anonymous(N);
    CHECK(pipe(to_parent) == 0 && pipe(to_child) == 0);
    pid_t child = CHILD({
        int fd = device(0);
        MOVED(fd, at, N, 19);
        CHECK(write(to_parent[1], "", 1) == 1 && read(to_child[0], &byte, 1) == 1);
        AT_HOME(fd, at, N, RW);
        HOLDS(at, N, 19);
    });
    CHECK(read(to_parent[0], &byte, 1) == 1);
    int fd = device(0);
    MOVED(fd, mine, N, 20);
    DOES(fd, RELEASE, mine, NULL, 1, 0, 0);
    AT_HOME(fd, mine, N, RW);
    HOLDS(mine, N, 20);
    CHECK(write(to_child[1], "", 1) == 1);
    well(child);
}
