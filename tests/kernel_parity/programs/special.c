/* Mappings that are not what they seem: of the kernel's own pages, of /dev/zero, guarded, locked. */
#include "parity.h"
#include <linux/perf_event.h>

#define N 4ul
#define MADV_GUARD_INSTALL_ 102
#define MADV_GUARD_REMOVE_ 103

/* A mapping of the kernel's that is named so in /proc/self/maps. */
static char *named(const char *name) {
    FILE *maps = fopen("/proc/self/maps", "r");
    CHECK(maps);
    char line[512], *at = NULL;
    while (!at && fgets(line, sizeof line, maps))
        if (strstr(line, name))
            at = (char *)strtoul(line, NULL, 16);
    CHECK(fclose(maps) == 0);
    if (!at)
        SKIP("there is no mapping %s", name);
    return at;
}

/* Pages that are no memory: nothing can be done with them. */
static void no_memory(char *at, int write) {
    int fd = device(0);
    char *to = buffer(1);
    LOOKS(fd, at, 1, ERROR);
    FAILS(fd, READ, at, to, 1, EFAULT);
    FAILS(fd, READ_UNLOCKED, at, to, 1, EFAULT);
    FAILS(fd, WRITE, at, to, 1, EFAULT);
    FAILS(fd, EXCLUSIVE, at, to, 1, EFAULT);
    FAILS(fd, MIGRATE_TO_DEV, at, to, 1, EINVAL);
    FAILS(fd, MIGRATE_TO_SYS, at, to, 1, EINVAL);
    CHECK(*(volatile char *)at == *at || write);
    LOOKS(fd, at, 1, ERROR);
    FAILS(fd, READ, at, to, 1, EFAULT);
    ALL(to, 1, UNSET);
}

TEST(the_kernels_clock_pages_are_an_error, BOTH) { no_memory(named("[vvar]"), 0); }

TEST(mapped_pages_of_no_memory_are_an_error, BOTH) {
    struct perf_event_attr event = {.type = PERF_TYPE_SOFTWARE, .size = sizeof event, .config = PERF_COUNT_SW_CPU_CLOCK, .exclude_kernel = 1};
    int counter = (int)syscall(SYS_perf_event_open, &event, 0, -1, -1, 0);
    if (counter < 0)
        SKIP("this user may not count events");
    char *at = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, counter, 0), line[512] = "";
    CHECK(at != MAP_FAILED);
    FILE *maps = fopen("/proc/self/smaps", "r");
    CHECK(maps);
    for (int here = 0; fgets(line, sizeof line, maps);) {
        char *end;
        unsigned long start = strtoul(line, &end, 16);
        here = *end == '-' ? start == (unsigned long)at : here;
        if (here && !strncmp(line, "VmFlags:", 8))
            break;
    }
    CHECK(fclose(maps) == 0);
    if (!strstr(line, " pf"))
        SKIP("this kernel counts in ordinary memory");
    no_memory(at, 1);
}

TEST(the_kernels_code_can_be_read, BOTH) {
    int fd = device(0);
    char *at = named("[vdso]"), *to = buffer(1), *from = buffer(1);
    DOES(fd, READ, at, to, 1, 1, 1);
    CHECK(memcmp(to, at, PAGE) == 0);
    LOOKS(fd, at, 1, RO);
    FAILS(fd, WRITE, at, from, 1, EPERM);
    FAILS(fd, MIGRATE_TO_DEV, at, to, 1, EINVAL);
}

static char *of_zero(size_t npages, int protection) {
    int zero = open("/dev/zero", O_RDWR);
    char *at = mmap(NULL, npages * PAGE, protection, MAP_PRIVATE, zero, 0);
    CHECK(at != MAP_FAILED && close(zero) == 0);
    return at;
}

TEST(private_memory_of_dev_zero_is_anonymous, BOTH) {
    int fd = device(0);
    char *at = of_zero(2 * N, PROT_READ | PROT_WRITE), *to = buffer(2 * N), *from = anonymous(N);
    LOOKS(fd, at, 2 * N, NONE);
    fill(at, N, 1);
    DOES(fd, MIGRATE_TO_DEV, at, to, 2 * N, 2 * N, 0); /* and N holes */
    HOLDS(to, N, 1);
    ALL(to + N * PAGE, N, 0ul);
    ON_DEVICE(fd, at, 2 * N, RW);
    HOLDS(at, N, 1);
    ALL(at + N * PAGE, N, 0ul);
    LOOKS(fd, at, 2 * N, coherent ? RW | COHERENT_MINE : RW);
    MOVED(fd, at, N, 2);
    fill(from, N, 3);
    WORKS(fd, WRITE, at, from, N);
    ON_DEVICE(fd, at, N, RW);
    CHECK(madvise(at, PAGE, MADV_DONTNEED) == 0);
    LOOKS(fd, at, 1, NONE);
    char *moved = mremap(at, 2 * N * PAGE, 2 * N * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, anonymous(2 * N));
    CHECK(moved != MAP_FAILED);
    ON_DEVICE(fd, moved + PAGE, N - 1, RW);
    ALL(moved, 1, 0ul);
    CHECK(memcmp(moved + PAGE, from + PAGE, (N - 1) * PAGE) == 0);
    CHECK(munmap(moved, 2 * N * PAGE) == 0);
    LOOKS(fd, moved, 2 * N, ERROR);
}

TEST(private_memory_of_dev_zero_after_fork_and_exclusive, BOTH) {
    int fd = device(0);
    char *at = of_zero(N, PROT_READ | PROT_WRITE), *to = buffer(N), *only = of_zero(N, PROT_READ);
    WORKS(fd, EXCLUSIVE, at, to, N);
    ALL(to, N, 0ul);
    FAILS(fd, CHECK_EXCLUSIVE, at, NULL, N, EPERM);
    MOVED(fd, at, N, 4);
    well(CHILD({
        HOLDS(at, N, 4);
        fill(at, N, 5);
    }));
    HOLDS(at, N, 4);
    DOES(fd, MIGRATE_TO_DEV, only, to, N, N, 0);
    ON_DEVICE(fd, only, N, RO);
    ALL(only, N, 0ul);
}

TEST(shared_memory_of_dev_zero_is_shared, BOTH) {
    int fd = device(0), zero = open("/dev/zero", O_RDWR);
    char *at = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, zero, 0), *to = buffer(N);
    CHECK(at != MAP_FAILED);
    fill(at, N, 6);
    FAILS(fd, MIGRATE_TO_DEV, at, to, N, ENOENT);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 6);
    LOOKS(fd, at, N, RW);
}

static sigjmp_buf after;
static void jump(int signal) { siglongjmp(after, signal); }

/* The signal that a touch raises; 0 if there is none. */
static int signal_of(char *at, int write) {
    struct sigaction action = {.sa_handler = jump, .sa_flags = SA_NODEFER}, before[2];
    CHECK(sigaction(SIGSEGV, &action, &before[0]) == 0 && sigaction(SIGBUS, &action, &before[1]) == 0);
    int raised = sigsetjmp(after, 1);
    if (!raised) {
        if (write)
            *(volatile char *)at = 1;
        else
            (void)*(volatile char *)at;
    }
    CHECK(sigaction(SIGSEGV, &before[0], NULL) == 0 && sigaction(SIGBUS, &before[1], NULL) == 0);
    return raised;
}

static void guard(char *at, size_t npages) {
    if (madvise(at, npages * PAGE, MADV_GUARD_INSTALL_) != 0) {
        CHECK(errno == EINVAL);
        SKIP("this kernel has no guard pages");
    }
}

TEST(guards_take_pages_off_the_device, BOTH) {
    int fd = device(0);
    char *at = anonymous(2 * N), *to = buffer(2 * N);
    MOVED(fd, at, 2 * N, 7);
    guard(at + N * PAGE, 2);
    ON_DEVICE(fd, at, N, RW);
    ON_DEVICE(fd, at + (N + 2) * PAGE, N - 2, RW);
    LOOKS(fd, at + N * PAGE, 2, NONE);
    EQ(signal_of(at + N * PAGE, 0), SIGSEGV);
    EQ(signal_of(at + (N + 1) * PAGE, 1), SIGSEGV);
    FAILS(fd, READ, at, to, 2 * N, EFAULT);
    FAILS(fd, MIGRATE_TO_DEV, at + N * PAGE, to, 1, ENOENT);
    DOES(fd, MIGRATE_TO_SYS, at + N * PAGE, NULL, 2, 0, 0);
    EQ(signal_of(at + N * PAGE, 1), SIGSEGV);
    HOLDS(at, N, 7);
    CHECK(madvise(at + N * PAGE, 2 * PAGE, MADV_GUARD_REMOVE_) == 0);
    LOOKS(fd, at + N * PAGE, 2, NONE);
    ALL(at + N * PAGE, 2, 0ul);
    fill(at, 2 * N, 8);
    DOES(fd, MIGRATE_TO_DEV, at, to, 2 * N, 2 * N, 0);
    HOLDS(to, 2 * N, 8);
    HOLDS(at, 2 * N, 8);
}

TEST(guards_erase_entries, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N), *from = anonymous(N);
    fill(at, N, 9);
    DOES(fd, READ, at, to, N, N, 1);
    guard(at + PAGE, 1);
    FAILS(fd, READ, at + PAGE, to, 1, EFAULT);
    FAILS(fd, WRITE, at + PAGE, from, 1, EFAULT);
    DOES(fd, READ, at, to, 1, 1, 0);
    CHECK(madvise(at + PAGE, PAGE, MADV_GUARD_REMOVE_) == 0);
    DOES(fd, READ, at, to, N, N, 1);
    ALL(to + PAGE, 1, 0ul);
}

TEST(guards_in_a_huge_page, BOTH) {
    int fd = device(0);
    char *at = aligned(1), *to = buffer(512);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    fill(at, 512, 10);
    DOES(fd, MIGRATE_TO_DEV, at, to, 512, 512, 0);
    IS(at, 512, coherent ? HERE : AWAY);
    guard(at + 256 * PAGE, 256);
    LOOKS(fd, at + 256 * PAGE, 256, NONE);
    EQ(signal_of(at + 256 * PAGE, 0), SIGSEGV);
    EQ(signal_of(at + 511 * PAGE, 1), SIGSEGV);
    HOLDS(at, 256, 10);
    CHECK(madvise(at + 256 * PAGE, 256 * PAGE, MADV_GUARD_REMOVE_) == 0);
    ALL(at + 256 * PAGE, 256, 0ul);
}

static char *locked(size_t npages) {
    char *at = anonymous(npages);
    if (mlock(at, npages * PAGE) != 0)
        SKIP("this user may not lock memory");
    return at;
}

TEST(locked_memory_migrates, BOTH) {
    int fd = device(0);
    char *at = locked(N), *to = buffer(N), *from = anonymous(N);
    MOVED(fd, at, N, 11);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 11);
    ON_DEVICE(fd, at, N, RW);
    fill(from, N, 12);
    WORKS(fd, WRITE, at, from, N);
    HOLDS(at, N, 12);
    MOVED(fd, at, N, 13);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, N, 0);
    AT_HOME(fd, at, N, RW);
    HOLDS(at, N, 13);
    MOVED(fd, at, N, 14);
    CHECK(munlock(at, N * PAGE) == 0);
    HOLDS(at, N, 14);
    MOVED(fd, at, N, 15);
    CHECK(mlock(at, N * PAGE) == 0); /* populates, as a touch */
    HOLDS(at, N, 15);
    MOVED(fd, at, N, 16);
    CHECK(close(fd) == 0);
    IS(at, N, HERE);
    HOLDS(at, N, 16);
}

TEST(locked_blocks_migrate, BOTH) {
    int fd = device(0);
    char *at = aligned(2), *to = buffer(1024);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    fill(at, 1024, 17);
    if (mlock(at, 2 * BLOCK) != 0)
        SKIP("this user may not lock so much memory");
    DOES(fd, MIGRATE_TO_DEV, at, to, 1024, 1024, 0);
    IS(at, 1024, coherent ? HERE : AWAY);
    HOLDS(to, 1024, 17);
    well(CHILD({ HOLDS(at, 1024, 17); }));
    HOLDS(at, 1024, 17);
    if (!coherent) { /* a coherent page has stayed, and lost its entry by the fork */
        WORKS(fd, MIGRATE_TO_DEV, at, to, 1024);
        IS(at, 1024, AWAY);
    }
    CHECK(command(fd, MIGRATE_TO_SYS, at, NULL, 1024) == 0);
    IS(at, 1024, HERE);
    HOLDS(at, 1024, 17);
    WORKS(fd, MIGRATE_TO_DEV, at, to, 1024);
    CHECK(munmap(at, BLOCK) == 0);
    CHECK(munlock(at + BLOCK, BLOCK) == 0);
    char *second = anonymous(1024);
    fill(second, 1024, 17);
    CHECK(memcmp(at + BLOCK, second + BLOCK, BLOCK) == 0);
}

TEST(memory_that_locks_what_comes_migrates, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    if (mlock2(at, N * PAGE, 1 /* ONFAULT */) != 0)
        SKIP("this user may not lock memory");
    fill(at, 1, 18);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0); /* and holes */
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, 1, 18);
    ALL(at + PAGE, N - 1, 0ul);
}
