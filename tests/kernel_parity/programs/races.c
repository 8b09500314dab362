/* Changes of mappings against a device that reads, writes and migrates all the while: no wrong byte, nothing lost, no hang.
 *
 * Every word of a page names its page and a generation that only grows. The device's own thread writes none of the pages that the program writes, so each has one writer, and what is read is at
 * most as new as what was written, and never older than what was read before. */
#include "parity.h"
#include <stdatomic.h>

#define N 64ul
#define HALF 32ul /* pages before it are written by the CPU, from it on by the device */

static char *at;
static int fd;
static atomic_int over;
static atomic_long reads, writes, moves;
static double end;

static uint64_t word(size_t page, uint64_t generation) { return (uint64_t)page << 48 | generation; }

/* A page is of one generation or, where it is just being written, of two; or it is zero, where pages may be dropped. */
static void one_of(const char *what, const uint64_t *words, size_t page, int may_be_zero) {
    for (size_t i = 0; i < 512; i++)
        if (words[i] >> 48 != page && !(may_be_zero && words[i] == 0))
            WRONG("%s: page %ld has %#lx in word %ld", what, (long)page, (long)words[i], (long)i);
}

static void set(char *page, size_t number, uint64_t generation) {
    for (size_t i = 0; i < 512; i++)
        ((volatile uint64_t *)page)[i] = word(number, generation);
}

/* What errors the device may give: no mapping or no permission just then, or no entry after the migration. */
static int may_fail, may_be_zero;
static void allow(int error, const char *what) {
    if (error == 0 || error == EBUSY)
        return;
    if (may_fail && (error == EFAULT || error == EPERM || error == EINVAL))
        return;
    if (error == ENOENT && !strcmp(what, "migrate"))
        return;
    WRONG("%s gives error %d (%s)", what, error, strerror(error));
}

static int ask(unsigned request, size_t page, char *data, size_t n) {
    struct command command = {(uint64_t)(at + page * PAGE), (uint64_t)data, n, UNSET, UNSET};
    return ioctl(fd, request, &command) == 0 ? 0 : errno;
}

static void *device_reads(void *unused) {
    char *data = anonymous(N);
    while (!over) {
        int error = ask(READ, 0, data, N);
        allow(error, "read");
        if (error == 0) {
            reads++;
            for (size_t page = 0; page < N; page++)
                one_of("the device reads", (uint64_t *)(data + page * PAGE), page, may_be_zero);
        }
    }
    return unused;
}

static void *device_writes(void *unused) {
    char *data = anonymous(N);
    for (uint64_t generation = 1; !over; generation++) {
        for (size_t page = HALF; page < N; page++)
            set(data + page * PAGE, page, generation);
        int error = ask(WRITE, HALF, data + HALF * PAGE, N - HALF);
        allow(error, "write");
        writes += error == 0;
    }
    return unused;
}

static void *device_moves(void *unused) {
    char *data = anonymous(N);
    for (size_t round = 0; !over; round++) {
        size_t first = round * 7 % N, n = 1 + round * 11 % (N - first);
        int error = ask(MIGRATE_TO_DEV, first, data, n);
        allow(error, "migrate");
        if (error == 0) {
            moves++;
            for (size_t page = first; page < first + n; page++)
                one_of("the migration reads", (uint64_t *)(data + (page - first) * PAGE), page, may_be_zero);
        }
        if (round % 3 == 0)
            allow(ask(MIGRATE_TO_SYS, first, NULL, n), "come home");
    }
    return unused;
}

static void race(void (*event)(uint64_t round)) {
    at = anonymous(N);
    fd = device(0);
    for (size_t page = 0; page < N; page++)
        set(at + page * PAGE, page, 0);
    pthread_t threads[3];
    void *(*works[])(void *) = {device_reads, device_writes, device_moves};
    for (int i = 0; i < 3; i++)
        CHECK(pthread_create(threads + i, NULL, works[i], NULL) == 0);
    end = now() + race_seconds();
    for (uint64_t round = 1; now() < end; round++)
        event(round);
    over = 1;
    for (int i = 0; i < 3; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    if (!reads || !writes || !moves)
        WRONG("%ld reads, %ld writes and %ld migrations are no race", (long)reads, (long)writes, (long)moves);
    for (size_t page = 0; page < N; page++)
        one_of("in the end", (uint64_t *)(at + page * PAGE), page, may_be_zero);
}

static void by_cpu(uint64_t round) {
    size_t page = round * 5 % HALF;
    set(at + page * PAGE, page, round);
    for (size_t i = 0; i < 512; i++) /* what was just written, though it moves */
        if (((volatile uint64_t *)(at + page * PAGE))[i] != word(page, round))
            WRONG("page %ld lost its write of round %ld", (long)page, (long)round);
    one_of("the CPU reads", (uint64_t *)(at + (HALF + page) * PAGE), HALF + page, may_be_zero);
}

TEST(race_with_the_cpu, BOTH) { race(by_cpu); }

static void by_munmap(uint64_t round) {
    size_t page = round * 3 % HALF, n = 1 + round % 4;
    by_cpu(round);
    CHECK(munmap(at + page * PAGE, n * PAGE) == 0);
    if (round & 1)
        sched_yield();
    CHECK(mmap(at + page * PAGE, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at + page * PAGE);
    for (size_t i = page; i < page + n && i < HALF; i++) {
        for (size_t j = 0; j < 512; j++)
            if (((volatile uint64_t *)(at + i * PAGE))[j] != 0)
                WRONG("page %ld came back after munmap", (long)i);
        set(at + i * PAGE, i, round);
    }
}

TEST(race_with_munmap, BOTH) {
    may_fail = may_be_zero = 1;
    race(by_munmap);
}

static void by_mremap(uint64_t round) {
    static char *spare;
    if (!spare)
        spare = anonymous(HALF);
    size_t page = round * 3 % (HALF - 4), n = 1 + round % 4;
    by_cpu(round);
    for (size_t i = page; i < page + n; i++)
        set(at + i * PAGE, i, round);
    char *old = at + page * PAGE, *new = spare + page * PAGE;
    CHECK(mremap(old, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, new) == new);
    for (size_t i = page; i < page + n; i++)
        for (size_t j = 0; j < 512; j += 64)
            if (((volatile uint64_t *)(spare + i * PAGE))[j] != word(i, round))
                WRONG("page %ld lost data when it moved away", (long)i);
    CHECK(mremap(new, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, old) == old);
    for (size_t i = page; i < page + n; i++)
        for (size_t j = 0; j < 512; j++)
            if (((volatile uint64_t *)(at + i * PAGE))[j] != word(i, round))
                WRONG("page %ld lost data when it moved back", (long)i);
}

TEST(race_with_mremap, BOTH) {
    may_fail = 1;
    race(by_mremap);
}

static void by_mprotect(uint64_t round) {
    static const int protections[] = {PROT_READ, PROT_NONE, PROT_READ};
    size_t page = round * 3 % (HALF - 4), n = 1 + round % 4;
    by_cpu(round);
    for (size_t i = page; i < page + n; i++)
        set(at + i * PAGE, i, round);
    CHECK(mprotect(at + page * PAGE, n * PAGE, protections[round % 3]) == 0);
    if (protections[round % 3] & PROT_READ)
        for (size_t i = page; i < page + n; i++)
            if (*(volatile uint64_t *)(at + i * PAGE) != word(i, round))
                WRONG("page %ld lost data when it was protected", (long)i);
    CHECK(mprotect(at + page * PAGE, n * PAGE, PROT_READ | PROT_WRITE) == 0);
    for (size_t i = page; i < page + n; i++)
        for (size_t j = 0; j < 512; j += 64)
            if (((volatile uint64_t *)(at + i * PAGE))[j] != word(i, round))
                WRONG("page %ld lost data by mprotect", (long)i);
}

TEST(race_with_mprotect, BOTH) {
    may_fail = 1;
    race(by_mprotect);
}

static void by_madvise(uint64_t round) {
    size_t page = round * 3 % (HALF - 4), n = 1 + round % 4;
    by_cpu(round);
    CHECK(madvise(at + page * PAGE, n * PAGE, MADV_DONTNEED) == 0);
    for (size_t i = page; i < page + n; i++) {
        for (size_t j = 0; j < 512; j++)
            if (((volatile uint64_t *)(at + i * PAGE))[j] != 0)
                WRONG("page %ld came back after MADV_DONTNEED", (long)i);
        set(at + i * PAGE, i, round);
    }
}

TEST(race_with_madvise, BOTH) {
    may_be_zero = 1;
    race(by_madvise);
}

static void by_fork(uint64_t round) {
    by_cpu(round);
    size_t page = round * 5 % HALF;
    well(CHILD({
        for (size_t i = 0; i < N; i++)
            one_of("the child reads", (uint64_t *)(at + i * PAGE), i, 0);
        for (size_t i = 0; i < 512; i++)
            if (((uint64_t *)(at + page * PAGE))[i] != word(page, round))
                WRONG("page %ld has other contents in the child", (long)page);
        set(at + page * PAGE, page, ~0ul >> 16);
    }));
    if (*(volatile uint64_t *)(at + page * PAGE) != word(page, round))
        WRONG("the child's write reached the parent");
}

TEST(race_with_fork, BOTH) { race(by_fork); }

static void *exclusive(void *unused) {
    char *data = anonymous(N);
    while (!over) {
        int error = ask(EXCLUSIVE, 0, data, HALF);
        if (error != 0 && error != ENOENT && error != EBUSY)
            WRONG("EXCLUSIVE gives error %d", error);
        for (size_t page = 0; page < HALF && error == 0; page++)
            one_of("exclusive", (uint64_t *)(data + page * PAGE), page, 0);
    }
    return unused;
}

TEST(race_of_exclusive_access, BOTH) {
    pthread_t thread;
    CHECK((at = anonymous(N)) && (fd = device(0)) >= 0);
    for (size_t page = 0; page < N; page++)
        set(at + page * PAGE, page, 0);
    CHECK(pthread_create(&thread, NULL, exclusive, NULL) == 0);
    end = now() + race_seconds();
    for (uint64_t round = 1; now() < end; round++)
        by_cpu(round);
    over = 1;
    CHECK(pthread_join(thread, NULL) == 0);
}
