/* READ: what the device sees, and what it costs. */
#include "parity.h"

#define N 8ul

TEST(read_costs_one_round_then_none, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 1);
    DOES(fd, READ, at, to, N, N, 1);
    HOLDS(to, N, 1);
    memset(to, 0, N * PAGE);
    DOES(fd, READ, at, to, N, N, 0);
    HOLDS(to, N, 1);
    DOES(fd, READ, at + 3 * PAGE, to, 1, 1, 0);
    AT_HOME(fd, at, N, RW); /* it does not migrate */
    HOLDS(at, N, 1);
}

TEST(read_of_a_large_range_is_one_round, BOTH) {
    int fd = device(0);
    char *at = anonymous(1500), *to = buffer(1500);
    fill(at, 1500, 2);
    DOES(fd, READ, at, to, 1500, 1500, 1);
    HOLDS(to, 1500, 2);
    DOES(fd, READ, at, to, 1500, 1500, 0);
}

TEST(read_faults_the_rest_of_the_range_at_once, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 3);
    DOES(fd, READ, at, to, 2, 2, 1);
    DOES(fd, READ, at + 5 * PAGE, to, 1, 1, 1);
    DOES(fd, READ, at, to, N, N, 1); /* from page 2 on, whatever is mirrored behind */
    HOLDS(to, N, 3);
    DOES(fd, READ, at + 2 * PAGE, to, N - 2, N - 2, 0);
}

TEST(read_sees_what_the_program_writes_without_a_new_round, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 4);
    DOES(fd, READ, at, to, N, N, 1);
    fill(at, N, 5);
    DOES(fd, READ, at, to, N, N, 0);
    HOLDS(to, N, 5);
}

TEST(every_open_has_a_page_table_of_its_own, BOTH) {
    int one = device(0), two = device(0), other = device(1);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 6);
    DOES(one, READ, at, to, N, N, 1);
    DOES(two, READ, at, to, N, N, 1);
    DOES(other, READ, at, to, N, N, 1);
    DOES(one, READ, at, to, N, N, 0);
    CHECK(close(one) == 0);
    DOES(two, READ, at, to, N, N, 0);
    HOLDS(to, N, 6);
    one = device(0);
    DOES(one, READ, at, to, N, N, 1);
}

TEST(read_of_a_hole_is_zeroes, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    IS(at, N, EMPTY);
    DOES(fd, READ, at, to, N, N, 1);
    ALL(to, N, 0ul);
    ALL(at, N, 0ul);
    DOES(fd, READ, at, to, N, N, 0);
}

TEST(read_of_the_zero_page, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    ALL(at, N, 0ul);
    LOOKS(fd, at, N, RO | ZERO);
    DOES(fd, READ, at, to, N, N, 1);
    ALL(to, N, 0ul);
    LOOKS(fd, at, N, RO | ZERO);
    fill(at, N, 7); /* the program's first write replaces the page: the entry is gone */
    DOES(fd, READ, at, to, N, N, 1);
    HOLDS(to, N, 7);
}

TEST(read_of_nothing_is_EFAULT_and_gives_no_data, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 8);
    CHECK(munmap(at + 5 * PAGE, PAGE) == 0);
    FAILS(fd, READ, at, to, N, EFAULT);
    ALL(to, N, UNSET);
    FAILS(fd, READ, at + 5 * PAGE, to, 1, EFAULT);
    WORKS(fd, READ, at, to, 5);
    HOLDS(to, 5, 8);
    ALL(to + 5 * PAGE, N - 5, UNSET);
}

TEST(read_without_permission_is_EFAULT, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 9);
    DOES(fd, READ, at, to, N, N, 1);
    memset(to, (int)(UNSET & 0xff), N * PAGE);
    CHECK(mprotect(at + 2 * PAGE, PAGE, PROT_NONE) == 0);
    FAILS(fd, READ, at, to, N, EFAULT);
    ALL(to, N, UNSET);
    CHECK(mprotect(at + 2 * PAGE, PAGE, PROT_WRITE) == 0);
    FAILS(fd, READ, at, to, N, EFAULT);
    CHECK(mprotect(at + 2 * PAGE, PAGE, PROT_READ) == 0);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 9);
}

TEST(read_of_a_file_and_beyond_its_end, BOTH) {
    int fd = device(0), file = file_of(2, 10);
    char *to = buffer(4);
    for (int flags = MAP_SHARED; flags <= MAP_PRIVATE; flags++) {
        char *at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, flags, file, 0);
        CHECK(at != MAP_FAILED);
        DOES(fd, READ, at, to, 2, 2, 1);
        HOLDS(to, 2, 10);
        FAILS(fd, READ, at, to, 3, EFAULT);
        FAILS(fd, READ, at + 2 * PAGE, to, 1, EFAULT);
        HOLDS(at, 2, 10);
    }
}

TEST(read_of_a_file_sees_its_changes, BOTH) {
    int fd = device(0), file = file_of(2, 11);
    char *at = mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, file, 0), *from = anonymous(2), *to = buffer(2);
    CHECK(at != MAP_FAILED);
    DOES(fd, READ, at, to, 2, 2, 1);
    fill(from, 2, 12);
    CHECK(pwrite(file, from, 2 * PAGE, 0) == 2 * PAGE);
    DOES(fd, READ, at, to, 2, 2, 0);
    HOLDS(to, 2, 12);
    CHECK(ftruncate(file, PAGE) == 0); /* unmaps the second page */
    FAILS(fd, READ, at, to, 2, EFAULT);
    WORKS(fd, READ, at, to, 1);
}

TEST(read_into_a_bad_buffer_is_EFAULT, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 13);
    FAILS(fd, READ, at, (char *)8, N, EFAULT);
    CHECK(mprotect(to + (N - 1) * PAGE, PAGE, PROT_READ) == 0);
    FAILS(fd, READ, at, to, N, EFAULT);
    CHECK(munmap(to + (N - 1) * PAGE, PAGE) == 0);
    FAILS(fd, READ, at, to, N, EFAULT);
    HOLDS(at, N, 13);
}

TEST(read_into_an_unaligned_buffer, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N + 1);
    fill(at, N, 14);
    DOES(fd, READ, at, to + 24, N, N, 1);
    HOLDS(to + 24, N, 14);
    CHECK(to[23] == (char)UNSET && to[N * PAGE + 24] == (char)UNSET);
}

TEST(read_leaves_a_device_page_where_it_is, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 15);
    DOES(fd, READ, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(to, N, 15);
}

TEST(read_by_another_device, BOTH) {
    int fd = device(0), other = device(1);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 16);
    LOOKS(other, at, N, coherent ? RW | COHERENT_OTHER : NONE);
    DOES(other, READ, at, to, N, N, 1);
    HOLDS(to, N, 16);
    if (coherent)
        ON_DEVICE(fd, at, N, RW);
    else
        AT_HOME(fd, at, N, RW);
    HOLDS(at, N, 16);
}

TEST(read_unlocked_is_a_read, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 17);
    DOES(fd, READ_UNLOCKED, at, to, N, N, 1);
    HOLDS(to, N, 17);
    DOES(fd, READ_UNLOCKED, at, to, N, N, 0);
    DOES(fd, READ, at, to, N, N, 0);
    CHECK(munmap(at, PAGE) == 0);
    FAILS(fd, READ_UNLOCKED, at, to, N, EFAULT);
}
