/* munmap, mremap, mprotect and madvise of memory that a device mirrors or has. */
#include "parity.h"

#define N 8ul

/* A part of a pattern, which begins at some page. */
#define HOLDS_PART(at, first, n, seed)                                                     \
    do {                                                                                   \
        char *whole_ = buffer((first) + (n));                                              \
        fill(whole_, (first) + (n), seed);                                                 \
        if (memcmp(at, whole_ + (first) * PAGE, (n) * PAGE))                               \
            WRONG("%s of %s: other data from page %ld on", #seed, #at, (long)(first));     \
        CHECK(munmap(whole_, ((first) + (n)) * PAGE) == 0);                                \
    } while (0)

TEST(munmap_frees_device_pages, BOTH) {
    int fd = device(0);
    char *to = buffer(N);
    for (uint64_t round = 0; round < 20; round++) {
        char *at = anonymous(N);
        MOVED(fd, at, N, round);
        CHECK(munmap(at, N * PAGE) == 0);
        LOOKS(fd, at, N, ERROR);
        FAILS(fd, READ, at, to, N, EFAULT);
        FAILS(fd, MIGRATE_TO_DEV, at, to, N, EINVAL);
        CHECK(mmap(at, N * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == at);
        LOOKS(fd, at, N, NONE);
        DOES(fd, READ, at, to, N, N, 1);
        ALL(to, N, 0ul);
        ALL(at, N, 0ul);
        CHECK(munmap(at, N * PAGE) == 0);
    }
}

TEST(munmap_of_a_part_frees_that_part, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 1);
    CHECK(munmap(at + 2 * PAGE, 2 * PAGE) == 0);
    ON_DEVICE(fd, at, 2, RW);
    LOOKS(fd, at + 2 * PAGE, 2, ERROR);
    ON_DEVICE(fd, at + 4 * PAGE, N - 4, RW);
    FAILS(fd, READ, at, to, N, EFAULT);
    DOES(fd, READ, at, to, 2, 2, 0);
    HOLDS(to, 2, 1);
    HOLDS(at, 2, 1);
    HOLDS_PART(at + 4 * PAGE, 4, N - 4, 1);
}

TEST(mapping_over_frees_device_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 2);
    CHECK(mmap(at + PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at + PAGE);
    LOOKS(fd, at + PAGE, 2, NONE);
    ON_DEVICE(fd, at, 1, RW);
    DOES(fd, READ, at, to, N, N, 1);
    HOLDS(to, 1, 2);
    ALL(to + PAGE, 2, 0ul);
    HOLDS_PART(to + 3 * PAGE, 3, N - 3, 2);
    ALL(at + PAGE, 2, 0ul);
    HOLDS_PART(at + 3 * PAGE, 3, N - 3, 2);
}

TEST(munmap_erases_entries, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 3);
    DOES(fd, READ, at, to, N, N, 1);
    CHECK(munmap(at + PAGE, PAGE) == 0);
    DOES(fd, READ, at, to, 1, 1, 0);
    FAILS(fd, READ, at, to, 2, EFAULT);
    CHECK(mmap(at + PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at + PAGE);
    DOES(fd, READ, at, to, N, N, 1);
    HOLDS(to, 1, 3);
    ALL(to + PAGE, 1, 0ul);
}

TEST(mremap_takes_device_pages_along, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 4);
    char *target = anonymous(N);
    char *moved = mremap(at, N * PAGE, N * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target);
    CHECK(moved == target);
    ON_DEVICE(fd, moved, N, RW);
    LOOKS(fd, at, N, ERROR);
    FAILS(fd, READ, at, to, N, EFAULT);
    DOES(fd, READ, moved, to, N, N, 1); /* still on the device */
    ON_DEVICE(fd, moved, N, RW);
    HOLDS(to, N, 4);
    HOLDS(moved, N, 4);
}

TEST(mremap_grows_and_moves, BOTH) {
    int fd = device(0);
    char *at = anonymous(2 * N), *to = buffer(4 * N);
    MOVED(fd, at, N, 5); /* the rest is in its way */
    char *moved = mremap(at, N * PAGE, 4 * N * PAGE, MREMAP_MAYMOVE);
    CHECK(moved != MAP_FAILED);
    ON_DEVICE(fd, moved, N, RW);
    LOOKS(fd, moved + N * PAGE, 3 * N, NONE);
    WORKS(fd, READ, moved, to, 4 * N);
    HOLDS(to, N, 5);
    ALL(to + N * PAGE, 3 * N, 0ul);
    ON_DEVICE(fd, moved, N, RW);
    HOLDS(moved, N, 5);
}

TEST(mremap_grows_in_place, BOTH) {
    int fd = device(0);
    char *at = anonymous(2 * N), *to = buffer(2 * N);
    CHECK(munmap(at + N * PAGE, N * PAGE) == 0);
    MOVED(fd, at, N, 6);
    CHECK(mremap(at, N * PAGE, 2 * N * PAGE, 0) == at);
    ON_DEVICE(fd, at, N, RW);
    WORKS(fd, MIGRATE_TO_DEV, at, to, 2 * N);
    HOLDS(to, N, 6);
    HOLDS(at, N, 6);
    ALL(at + N * PAGE, N, 0ul);
}

TEST(mremap_shrinks, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 7);
    CHECK(mremap(at, N * PAGE, 3 * PAGE, 0) == at);
    ON_DEVICE(fd, at, 3, RW);
    LOOKS(fd, at + 3 * PAGE, N - 3, ERROR);
    FAILS(fd, READ, at, to, N, EFAULT);
    DOES(fd, READ, at, to, 3, 3, 0);
    HOLDS(to, 3, 7);
    HOLDS(at, 3, 7);
}

TEST(mremap_shrinks_and_moves, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *target = anonymous(N);
    MOVED(fd, at, N, 8);
    CHECK(mremap(at, N * PAGE, 3 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
    ON_DEVICE(fd, target, 3, RW);
    LOOKS(fd, at, N, ERROR);
    HOLDS(target, 3, 8);
}

TEST(mremap_of_a_part, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *target = anonymous(N);
    MOVED(fd, at, N, 9);
    CHECK(mremap(at + 2 * PAGE, 3 * PAGE, 3 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
    ON_DEVICE(fd, target, 3, RW);
    ON_DEVICE(fd, at, 2, RW);
    LOOKS(fd, at + 2 * PAGE, 3, ERROR);
    ON_DEVICE(fd, at + 5 * PAGE, N - 5, RW);
    HOLDS_PART(target, 2, 3, 9);
    HOLDS(at, 2, 9);
    HOLDS_PART(at + 5 * PAGE, 5, N - 5, 9);
}

TEST(mremap_of_a_range_that_is_partly_on_the_device, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N), *target = anonymous(N);
    fill(at, N, 10);
    DOES(fd, MIGRATE_TO_DEV, at + 3 * PAGE, to, 2, 2, 0);
    ON_DEVICE(fd, at + 3 * PAGE, 2, RW);
    CHECK(mremap(at, N * PAGE, N * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
    AT_HOME(fd, target, 3, RW);
    ON_DEVICE(fd, target + 3 * PAGE, 2, RW);
    AT_HOME(fd, target + 5 * PAGE, N - 5, RW);
    HOLDS(target, N, 10);
}

TEST(mremap_that_leaves_the_mapping, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 11);
    char *moved = mremap(at, N * PAGE, N * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    CHECK(moved != MAP_FAILED && moved != at);
    ON_DEVICE(fd, moved, N, RW);
    LOOKS(fd, at, N, NONE);
    DOES(fd, READ, at, to, N, N, 1);
    ALL(to, N, 0ul);
    ALL(at, N, 0ul);
    HOLDS(moved, N, 11);
    MOVED(fd, at, N, 12);
    HOLDS(at, N, 12);
    HOLDS(moved, N, 11);
}

TEST(mremap_to_another_place_within_a_block, BOTH) {
    int fd = device(0);
    char *at = aligned(2), *target = aligned(3), *to = buffer(600);
    fill(at, 600, 13);
    DOES(fd, MIGRATE_TO_DEV, at, to, 600, 600, 0);
    IS(at, 600, coherent ? HERE : AWAY);
    target += 37 * PAGE;
    CHECK(mremap(at, 600 * PAGE, 600 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
    IS(target, 600, coherent ? HERE : AWAY);
    WORKS(fd, READ, target, to, 600);
    HOLDS(to, 600, 13);
    IS(target, 600, coherent ? HERE : AWAY);
    HOLDS(target, 600, 13);
}

TEST(mremap_of_a_huge_page, BOTH) {
    int fd = device(0);
    char *at = aligned(1), *to = buffer(512);
    char *targets[] = {aligned(1), aligned(2) + 5 * PAGE};
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    for (uint64_t i = 0; i < 2; i++) {
        fill(at, 512, 14 + i);
        DOES(fd, MIGRATE_TO_DEV, at, to, 512, 512, 0);
        IS(at, 512, coherent ? HERE : AWAY);
        CHECK(mremap(at, BLOCK, BLOCK, MREMAP_MAYMOVE | MREMAP_FIXED, targets[i]) == targets[i]);
        at = targets[i];
        IS(at, 512, coherent ? HERE : AWAY);
        DOES(fd, READ, at, to, 512, 512, 1);
        HOLDS(to, 512, 14 + i);
        HOLDS(at, 512, 14 + i);
    }
}

TEST(mremap_erases_entries, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N), *target = anonymous(N);
    fill(at, N, 16);
    DOES(fd, READ, at, to, N, N, 1);
    DOES(fd, READ, target, to, N, N, 1);
    CHECK(mremap(at, N * PAGE, N * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
    FAILS(fd, READ, at, to, N, EFAULT);
    DOES(fd, READ, target, to, N, N, 1);
    HOLDS(to, N, 16);
}

TEST(realloc_of_memory_on_the_device, BOTH) {
    int fd = device(0);
    char *to = buffer(64), *at = malloc(64 * PAGE + 100);
    char *start = (char *)(((uintptr_t)at + PAGE - 1) & ~(PAGE - 1));
    long offset = start - at;
    fill(start, 63, 17);
    DOES(fd, MIGRATE_TO_DEV, start, to, 63, 63, 0);
    IS(start, 63, coherent ? HERE : AWAY);
    at = realloc(at, 1024 * PAGE);
    CHECK(at);
    HOLDS(at + offset, 63, 17);
    at = realloc(at, 70 * PAGE);
    HOLDS(at + offset, 63, 17);
    free(at);
}

TEST(mprotect_erases_entries, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N), *from = anonymous(N);
    fill(at, N, 18), fill(from, N, 19);
    DOES(fd, WRITE, at, from, N, N, 1);
    CHECK(mprotect(at, N * PAGE, PROT_READ) == 0);
    DOES(fd, READ, at, to, N, N, 1);
    HOLDS(to, N, 19);
    FAILS(fd, WRITE, at, from, N, EPERM);
    CHECK(mprotect(at, N * PAGE, PROT_NONE) == 0);
    FAILS(fd, READ, at, to, N, EFAULT);
    FAILS(fd, WRITE, at, from, N, EFAULT);
    CHECK(mprotect(at, N * PAGE, PROT_READ | PROT_WRITE) == 0);
    DOES(fd, WRITE, at, from, N, N, 1);
}

TEST(mprotect_of_pages_on_the_device, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N), *from = anonymous(N);
    MOVED(fd, at, N, 20);
    CHECK(mprotect(at, N * PAGE, PROT_READ) == 0);
    ON_DEVICE(fd, at, N, RO);
    FAILS(fd, WRITE, at, from, N, EPERM);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 20);
    ON_DEVICE(fd, at, N, RO);
    CHECK(mprotect(at, N * PAGE, PROT_READ | PROT_WRITE) == 0);
    fill(from, N, 21);
    WORKS(fd, WRITE, at, from, N);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 21);
}

TEST(madvise_dontneed_frees_device_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 22);
    CHECK(madvise(at + PAGE, 3 * PAGE, MADV_DONTNEED) == 0);
    ON_DEVICE(fd, at, 1, RW);
    LOOKS(fd, at + PAGE, 3, NONE);
    ON_DEVICE(fd, at + 4 * PAGE, N - 4, RW);
    DOES(fd, READ, at, to, N, N, 1);
    HOLDS(to, 1, 22);
    ALL(to + PAGE, 3, 0ul);
    ALL(at + PAGE, 3, 0ul);
    HOLDS(at, 1, 22);
    HOLDS_PART(at + 4 * PAGE, 4, N - 4, 22);
    WORKS(fd, MIGRATE_TO_DEV, at, to, N);
    CHECK(madvise(at, N * PAGE, MADV_DONTNEED) == 0);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, 0, 0);
    ALL(at, N, 0ul);
}

TEST(madvise_dontneed_of_a_huge_page, BOTH) {
    int fd = device(0);
    char *at = aligned(1), *to = buffer(512);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    fill(at, 512, 23);
    DOES(fd, MIGRATE_TO_DEV, at, to, 512, 512, 0);
    IS(at, 512, coherent ? HERE : AWAY);
    CHECK(madvise(at + 256 * PAGE, 256 * PAGE, MADV_DONTNEED) == 0);
    ALL(at + 256 * PAGE, 256, 0ul);
    HOLDS(at, 256, 23);
}

TEST(madvise_of_other_kinds_returns_0, BOTH) {
    static const int kinds[] = {MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, 20 /* COLD */, 21 /* PAGEOUT */, 25 /* COLLAPSE */};
    int fd = device(0);
    char *at = aligned(1), *to = buffer(512);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
        fill(at, 512, i);
        DOES(fd, MIGRATE_TO_DEV, at, to, 512, 512, 0);
        IS(at, 512, coherent ? HERE : AWAY);
        errno = 0;
        int result = madvise(at, BLOCK, kinds[i]);
        if (result != 0)
            WRONG("madvise %d gives errno %d", kinds[i], errno);
        HOLDS(at, 512, i);
    }
}

static void freed(char *at, char *to, size_t n) {
    int fd = device(0);
    fill(at, n, 25);
    DOES(fd, MIGRATE_TO_DEV, at, to, n, n, 0);
    IS(at, n, coherent ? HERE : AWAY);
    EQ(madvise(at, n * PAGE, 8 /* FREE */), 0);
    char *whole = anonymous(n);
    fill(whole, n, 25);
    for (size_t page = 0; page < n; page++) { /* each as it was, or zeros */
        char *here = at + page * PAGE;
        if (memcmp(here, whole + page * PAGE, PAGE))
            ALL(here, 1, 0ul);
    }
    fill(at, n, 26);
    HOLDS(at, n, 26);
}

TEST(madvise_free_of_pages, BOTH) { freed(anonymous(N), buffer(N), N); }

TEST(madvise_free_of_a_huge_page, BOTH) {
    char *at = aligned(1);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    freed(at, buffer(512), 512);
}

TEST(madvise_dontneed_erases_entries, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 24);
    DOES(fd, READ, at, to, N, N, 1);
    CHECK(madvise(at, N * PAGE, MADV_DONTNEED) == 0);
    DOES(fd, READ, at, to, N, N, 1);
    ALL(to, N, 0ul);
}
