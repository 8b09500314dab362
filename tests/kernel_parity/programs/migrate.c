/* MIGRATE_TO_DEV and MIGRATE_TO_SYS: what moves, what counts, and what stays. */
#include "parity.h"

#define N 8ul

TEST(migrate_moves_pages_and_reads_them_back, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 1);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    HOLDS(to, N, 1);
    ON_DEVICE(fd, at, N, RW);
    DOES(fd, READ, at, to, N, N, 0);
    HOLDS(at, N, 1);
    if (coherent)
        ON_DEVICE(fd, at, N, RW);
    else
        AT_HOME(fd, at, N, RW);
}

TEST(migrate_a_part, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 2);
    DOES(fd, MIGRATE_TO_DEV, at + 2 * PAGE, to, 3, 3, 0);
    AT_HOME(fd, at, 2, RW);
    ON_DEVICE(fd, at + 2 * PAGE, 3, RW);
    AT_HOME(fd, at + 5 * PAGE, N - 5, RW);
    CHECK(memcmp(to + PAGE, to + PAGE, PAGE) == 0);
    HOLDS(at, N, 2);
}

TEST(migrate_counts_what_is_already_there, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 3);
    DOES(fd, MIGRATE_TO_DEV, at + 2 * PAGE, to, 3, 3, 0);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(to, N, 3);
    HOLDS(at, N, 3);
}

TEST(migrate_of_holes_gives_zeroed_device_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    ALL(to, N, 0ul);
    ALL(at, N, 0ul);
    fill(at, N, 4);
    HOLDS(at, N, 4);
}

TEST(migrate_of_zero_pages_gives_zeroed_device_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N), *from = anonymous(N);
    ALL(at, N, 0ul);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    ALL(to, N, 0ul);
    fill(from, N, 5);
    DOES(fd, WRITE, at, from, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 5);
}

TEST(migrate_of_read_only_memory, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, 2, 6);
    ALL(at + 2 * PAGE, 2, 0ul);
    CHECK(mprotect(at, N * PAGE, PROT_READ) == 0);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RO);
    HOLDS(to, 2, 6);
    ALL(to + 2 * PAGE, N - 2, 0ul);
    FAILS(fd, WRITE, at, to, N, EPERM);
    HOLDS(at, 2, 6);
    ALL(at + 2 * PAGE, N - 2, 0ul);
    CHECK(mprotect(at, N * PAGE, PROT_READ | PROT_WRITE) == 0);
    fill(at, N, 7);
    HOLDS(at, N, 7);
}

TEST(migrate_of_mixed_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, 2, 8);                 /* pages of its own */
    ALL(at + 2 * PAGE, 2, 0ul);     /* zero pages */
    DOES(fd, MIGRATE_TO_DEV, at + 4 * PAGE, to, 2, 2, 0); /* on the device, 6 and 7 are holes */
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(to, 2, 8);
    ALL(to + 2 * PAGE, N - 2, 0ul);
    HOLDS(at, 2, 8);
    ALL(at + 2 * PAGE, N - 2, 0ul);
}

TEST(migrate_across_mappings, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 9);
    CHECK(mprotect(at + 2 * PAGE, PAGE, PROT_READ) == 0);
    CHECK(mprotect(at + 5 * PAGE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC) == 0);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    HOLDS(to, N, 9);
    ON_DEVICE(fd, at, 2, RW);
    ON_DEVICE(fd, at + 2 * PAGE, 1, RO);
    ON_DEVICE(fd, at + 3 * PAGE, N - 3, RW);
    HOLDS(at, N, 9);
}

TEST(migrate_of_nothing_is_EINVAL_and_pieces_stay_done, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 10);
    CHECK(munmap(at + 4 * PAGE, PAGE) == 0);
    FAILS(fd, MIGRATE_TO_DEV, at, to, N, EINVAL);
    ON_DEVICE(fd, at, 4, RW);
    AT_HOME(fd, at + 5 * PAGE, N - 5, RW);
    ALL(to, N, UNSET);
    FAILS(fd, MIGRATE_TO_DEV, at + 4 * PAGE, to, 1, EINVAL);
    HOLDS(at, 4, 10);
}

TEST(migrate_without_permission_to_read_is_EINVAL, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 11);
    CHECK(mprotect(at + 4 * PAGE, PAGE, PROT_NONE) == 0);
    FAILS(fd, MIGRATE_TO_DEV, at, to, N, EINVAL);
    ON_DEVICE(fd, at, 4, RW);
    CHECK(mprotect(at + 4 * PAGE, PAGE, PROT_READ | PROT_WRITE) == 0);
    AT_HOME(fd, at + 4 * PAGE, N - 4, RW);
    HOLDS(at, N, 11);
}

TEST(migrate_into_a_bad_buffer_is_EFAULT, BOTH) {
    int fd = device(0);
    char *at = anonymous(N);
    fill(at, N, 12);
    FAILS(fd, MIGRATE_TO_DEV, at, (char *)8, N, EFAULT);
    HOLDS(at, N, 12);
}

TEST(migrate_leaves_shared_memory, BOTH) {
    int fd = device(0), file = file_of(N, 13);
    char *to = buffer(N);
    char *maps[] = {shared(N), mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)};
    for (int i = 0; i < 2; i++) {
        char *at = maps[i];
        CHECK(at != MAP_FAILED);
        fill(at, N, 13);
        FAILS(fd, MIGRATE_TO_DEV, at, to, N, ENOENT); /* no entries */
        AT_HOME(fd, at, N, RW);
        HOLDS(at, N, 13);
        DOES(fd, READ, at, to, N, N, 1);
        DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0); /* entries, which a migration by the same device leaves */
        AT_HOME(fd, at, N, RW);
    }
}

TEST(migrate_leaves_pages_of_files, BOTH) {
    int fd = device(0), file = file_of(N, 14);
    char *at = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0), *to = buffer(N);
    CHECK(at != MAP_FAILED);
    HOLDS(at, N, 14);
    FAILS(fd, MIGRATE_TO_DEV, at, to, N, ENOENT);
    AT_HOME(fd, at, N, RO);
    DOES(fd, READ, at, to, N, N, 1);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    AT_HOME(fd, at, N, RO);
    HOLDS(at, N, 14);
}

TEST(migrate_moves_written_pages_of_private_files, BOTH) {
    int fd = device(0), file = file_of(N, 15);
    char *at = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0), *to = buffer(N);
    CHECK(at != MAP_FAILED);
    fill(at, N, 16);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    HOLDS(to, N, 16);
    LOOKS(fd, at, N, RW | (coherent ? COHERENT_MINE : MINE));
    HOLDS(at, N, 16);
    CHECK(pread(file, to, N * PAGE, 0) == (ssize_t)(N * PAGE));
    HOLDS(to, N, 15);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, coherent ? N : 0, 0);
    HOLDS(at, N, 16);
}

TEST(migrate_leaves_pages_of_another_device, BOTH) {
    int fd = device(0), other = device(1);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 17);
    FAILS(other, MIGRATE_TO_DEV, at, to, N, ENOENT);
    ON_DEVICE(fd, at, N, RW);
    DOES(other, MIGRATE_TO_SYS, at, NULL, N, 0, 0);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 17);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, coherent ? N : 0, 0);
    DOES(other, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(other, at, N, RW);
    HOLDS(at, N, 17);
}

TEST(migrate_of_a_pool_page_is_EINVAL, BOTH) {
    int fd = device(0);
    char *at = pool_pages(1), *to = buffer(512);
    fill(at, 512, 18);
    FAILS(fd, MIGRATE_TO_DEV, at, to, 512, EINVAL);
    FAILS(fd, MIGRATE_TO_DEV, at, to, 1, EINVAL);
    DOES(fd, READ, at, to, 512, 512, 1);
    HOLDS(to, 512, 18);
    fill(to, 512, 19);
    WORKS(fd, WRITE, at, to, 512);
    HOLDS(at, 512, 19);
    CHECK(munmap(at, BLOCK) == 0);
}

TEST(migrate_erases_entries_of_others_and_not_its_own, BOTH) {
    int fd = device(0), same = device(0), other = device(1);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 20);
    DOES(fd, READ, at, to, N, N, 1);
    DOES(other, READ, at, to, N, N, 1);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    DOES(fd, READ, at, to, N, N, 0);
    DOES(same, READ, at, to, N, N, 1);
    ON_DEVICE(fd, at, N, RW);
    DOES(other, READ, at, to, N, N, 1);
    HOLDS(to, N, 20);
    HOLDS(at, N, 20);
}

TEST(migrate_to_system_counts_what_moves, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, 0, 0);
    fill(at, N, 21);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, 0, 0);
    DOES(fd, MIGRATE_TO_DEV, at + PAGE, to, 5, 5, 0);
    ON_DEVICE(fd, at + PAGE, 5, RW);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, 3, 2, 0);
    AT_HOME(fd, at, 3, RW);
    ON_DEVICE(fd, at + 3 * PAGE, 3, RW);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, 3, 0);
    AT_HOME(fd, at, N, RW);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, 0, 0);
    HOLDS(at, N, 21);
}

TEST(migrate_to_system_erases_the_entries, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 22);
    DOES(fd, READ, at, to, N, N, 0);
    CHECK(at[0] == at[0]);
    WORKS(fd, MIGRATE_TO_DEV, at, to, N);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, N, 0);
    AT_HOME(fd, at, N, RW);
    HOLDS(at, N, 22);
}

TEST(migrate_many_times, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    for (uint64_t round = 0; round < 100; round++) {
        MOVED(fd, at, N, round);
        if (round & 1)
            DOES(fd, MIGRATE_TO_SYS, at, NULL, N, N, 0);
        HOLDS(at, N, round);
        DOES(fd, READ, at, to, N, N, coherent && !(round & 1) ? 0 : 1);
    }
}

TEST(migrate_more_than_a_block, BOTH) {
    int fd = device(0);
    enum { many = 1300 };
    char *at = anonymous(many), *to = buffer(many);
    fill(at, many, 23);
    DOES(fd, MIGRATE_TO_DEV, at, to, many, many, 0);
    HOLDS(to, many, 23);
    IS(at, many, coherent ? HERE : AWAY);
    HOLDS(at, many, 23);
}

TEST(a_huge_page_moves_as_one, BOTH) {
    int fd = device(0);
    char *at = aligned(1), *to = buffer(512);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    fill(at, 512, 24);
    if (!is_huge(at))
        SKIP("the kernel gives no huge page");
    DOES(fd, MIGRATE_TO_DEV, at, to, 512, 512, 0);
    ON_DEVICE(fd, at, 512, RW | BIG);
    HOLDS(to, 512, 24);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, 512, 1, 0); /* one entry */
    AT_HOME(fd, at, 512, RW | BIG);
    HOLDS(at, 512, 24);
}

TEST(a_part_of_a_huge_page_moves_in_small, BOTH) {
    int fd = device(0);
    char *at = aligned(1), *to = buffer(512);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    fill(at, 512, 25);
    DOES(fd, MIGRATE_TO_DEV, at + PAGE, to, 500, 500, 0);
    ON_DEVICE(fd, at + PAGE, 500, RW);
    AT_HOME(fd, at, 1, RW);
    AT_HOME(fd, at + 501 * PAGE, 11, RW);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, 512, 500, 0);
    HOLDS(at, 512, 25);
}

TEST(a_failed_allocation_of_a_huge_page_moves_small_ones, BOTH) {
    int fd = device(0);
    char *at = aligned(1), *to = buffer(512);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    fill(at, 512, 26);
    if (!is_huge(at))
        SKIP("the kernel gives no huge page");
    CHECK(madvise(at, BLOCK, MADV_NOHUGEPAGE) == 0); /* nobody makes one of the small ones meanwhile */
    DOES(fd, FLAGS, at, NULL, 1, 0, 0);
    DOES(fd, MIGRATE_TO_DEV, at, to, 512, 512, 0);
    ON_DEVICE(fd, at, 512, RW);
    HOLDS(to, 512, 26);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, 512, 512, 0);
    HOLDS(at, 512, 26);
}

TEST(a_failed_allocation_of_a_page_leaves_it, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 27);
    DOES(fd, FLAGS, at, NULL, 1, 0, 0);
    FAILS(fd, MIGRATE_TO_DEV, at, to, N, ENOENT);
    AT_HOME(fd, at, 1, RW);
    ON_DEVICE(fd, at + PAGE, N - 1, RW);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0); /* it fails once */
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 27);
}

TEST(flags_can_be_cleared, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 28);
    DOES(fd, FLAGS, at, NULL, 1, 0, 0);
    DOES(fd, FLAGS, at, NULL, 2, 0, 0);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 28);
}

TEST(migrate_leaves_pinned_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 29);
    uint64_t parameters[15] = {0};
    int ring = (int)syscall(SYS_io_uring_setup, 1, parameters);
    struct iovec pinned = {at + 2 * PAGE, 3 * PAGE};
    if (ring < 0 || syscall(SYS_io_uring_register, ring, 0 /* buffers */, &pinned, 1) != 0)
        SKIP("nothing here pins pages (io_uring: errno %d)", errno);
    FAILS(fd, MIGRATE_TO_DEV, at, to, N, ENOENT);
    ON_DEVICE(fd, at, 2, RW);
    AT_HOME(fd, at + 2 * PAGE, 3, RW);
    ON_DEVICE(fd, at + 5 * PAGE, N - 5, RW);
    CHECK(syscall(SYS_io_uring_register, ring, 1 /* no buffers */, NULL, 0) == 0 && close(ring) == 0);
    HOLDS(at, N, 29);
}
