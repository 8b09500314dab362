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

/* Pages that are no memory: nothing can be done with them, and that is said at once. */
static void no_memory(char *at, int write) {
    int fd = device(0);
    char *to = buffer(1);
    double start = now();
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
    CHECK(now() - start < 0.9);
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
