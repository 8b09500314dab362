/* WRITE: what reaches the memory, what it needs, and what it leaves alone. */
#include "parity.h"

#define N 8ul

TEST(write_costs_one_round_then_none, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *from = anonymous(N), *to = buffer(N);
    fill(at, N, 1), fill(from, N, 2);
    DOES(fd, WRITE, at, from, N, N, 1);
    HOLDS(at, N, 2);
    fill(from, N, 3);
    DOES(fd, WRITE, at, from, N, N, 0);
    HOLDS(at, N, 3);
    DOES(fd, READ, at, to, N, N, 0);
    HOLDS(to, N, 3);
    AT_HOME(fd, at, N, RW);
}

TEST(write_of_a_hole, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *from = anonymous(1);
    fill(from, 1, 4);
    DOES(fd, WRITE, at + 3 * PAGE, from, 1, 1, 1);
    IS(at, 3, EMPTY);
    IS(at + 4 * PAGE, N - 4, EMPTY);
    HOLDS(at + 3 * PAGE, 1, 4);
    ALL(at, 3, 0ul);
    ALL(at + 4 * PAGE, N - 4, 0ul);
}

TEST(write_replaces_zero_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *beside = anonymous(N), *from = anonymous(N), *to = buffer(N);
    ALL(at, N, 0ul);
    ALL(beside, N, 0ul);
    LOOKS(fd, at, N, RO | ZERO);
    DOES(fd, READ, at, to, N, N, 1);
    fill(from, N, 5);
    DOES(fd, WRITE, at, from, N, N, 1); /* the entries were for reading */
    AT_HOME(fd, at, N, RW);
    HOLDS(at, N, 5);
    ALL(beside, N, 0ul);
}

TEST(write_of_read_only_memory_is_EPERM, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *from = anonymous(N), *to = buffer(N);
    fill(at, N, 6), fill(from, N, 7);
    CHECK(mprotect(at, N * PAGE, PROT_READ) == 0);
    FAILS(fd, WRITE, at, from, N, EPERM);
    DOES(fd, READ, at, to, N, N, 1);
    FAILS(fd, WRITE, at, from, N, EPERM);
    HOLDS(at, N, 6);
    FAILS(fd, WRITE, at, (char *)8, N, EFAULT); /* the buffer is read first */
    CHECK(mprotect(at, N * PAGE, PROT_READ | PROT_WRITE) == 0);
    DOES(fd, WRITE, at, from, N, N, 1);
    HOLDS(at, N, 7);
    CHECK(mprotect(at, N * PAGE, PROT_READ) == 0); /* erases the entries */
    FAILS(fd, WRITE, at, from, N, EPERM);
}

TEST(write_of_nothing_is_EFAULT, BOTH) {
    int fd = device(0), file = file_of(2, 8);
    char *at = anonymous(N), *from = anonymous(N);
    fill(at, N, 8), fill(from, N, 9);
    CHECK(mprotect(at, PAGE, PROT_NONE) == 0);
    FAILS(fd, WRITE, at, from, N, EFAULT);
    CHECK(munmap(at + PAGE, PAGE) == 0);
    FAILS(fd, WRITE, at + PAGE, from, 1, EFAULT);
    char *map = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(map != MAP_FAILED);
    FAILS(fd, WRITE, map + 2 * PAGE, from, 1, EFAULT);
    DOES(fd, WRITE, map + PAGE, from, 1, 1, 1);
}

TEST(write_from_a_bad_buffer_is_EFAULT_and_writes_nothing, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *from = anonymous(N);
    fill(at, N, 10), fill(from, N, 11);
    FAILS(fd, WRITE, at, (char *)8, N, EFAULT);
    CHECK(mprotect(from + (N - 1) * PAGE, PAGE, PROT_NONE) == 0);
    FAILS(fd, WRITE, at, from, N, EFAULT);
    HOLDS(at, N, 10);
}

TEST(write_breaks_copy_on_write, BOTH) {
    char *at = anonymous(N), *from = anonymous(N), *to = buffer(N);
    fill(at, N, 12), fill(from, N, 13);
    int go[2], fd = device(0);
    CHECK(pipe(go) == 0);
    DOES(fd, READ, at, to, N, N, 1);
    pid_t child = CHILD({
        char byte;
        CHECK(read(go[0], &byte, 1) == 1);
        HOLDS(at, N, 12);
    });
    LOOKS(fd, at, N, RO); /* shared copy-on-write */
    DOES(fd, READ, at, to, N, N, 1);
    DOES(fd, WRITE, at, from, N, N, 1);
    LOOKS(fd, at, N, RW);
    CHECK(write(go[1], "", 1) == 1);
    well(child);
    HOLDS(at, N, 13);
}

TEST(write_of_a_private_file_leaves_the_file, BOTH) {
    int fd = device(0), file = file_of(N, 14);
    char *at = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0), *from = anonymous(N), *to = buffer(N);
    CHECK(at != MAP_FAILED);
    DOES(fd, READ, at, to, N, N, 1);
    LOOKS(fd, at, N, RO);
    fill(from, N, 15);
    DOES(fd, WRITE, at, from, N, N, 1);
    LOOKS(fd, at, N, RW);
    HOLDS(at, N, 15);
    CHECK(pread(file, to, N * PAGE, 0) == (ssize_t)(N * PAGE));
    HOLDS(to, N, 14);
}

static long dirty(const void *at) {
    FILE *maps = fopen("/proc/self/smaps", "r");
    CHECK(maps);
    char line[512];
    unsigned long start, end;
    long sum = 0, kib;
    for (int in = 0; fgets(line, sizeof line, maps);) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            in = start <= (uintptr_t)at && (uintptr_t)at < end;
        else if (in && (sscanf(line, "Shared_Dirty: %ld", &kib) == 1 || sscanf(line, "Private_Dirty: %ld", &kib) == 1))
            sum += kib;
    }
    fclose(maps);
    return sum;
}

TEST(write_dirties_file_pages, BOTH) {
    int fd = device(0);
    char path[] = "/var/tmp/parity-XXXXXX";
    int file = mkstemp(path);
    CHECK(file >= 0 && unlink(path) == 0);
    char *from = anonymous(N), *to = buffer(N);
    fill(from, N, 16);
    CHECK(pwrite(file, from, N * PAGE, 0) == (ssize_t)(N * PAGE));
    CHECK(fsync(file) == 0);
    char *at = mmap(NULL, N * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(at != MAP_FAILED);
    HOLDS(at, N, 16);
    if (dirty(at) != 0)
        SKIP("this file system's pages are dirty when they have been written back");
    fill(from, N, 17);
    DOES(fd, WRITE, at, from, N, N, 1);
    EQ(dirty(at), (long)(N * 4));
    CHECK(pread(file, to, N * PAGE, 0) == (ssize_t)(N * PAGE));
    HOLDS(to, N, 17);
    CHECK(munmap(at, N * PAGE) == 0);
    CHECK(fsync(file) == 0 && posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED) == 0);
    CHECK(pread(file, to, N * PAGE, 0) == (ssize_t)(N * PAGE));
    HOLDS(to, N, 17);
}

TEST(write_of_shared_memory_is_seen_by_all, BOTH) {
    int fd = device(0);
    char *at = shared(N), *from = anonymous(N);
    fill(at, N, 18), fill(from, N, 19);
    int go[2];
    CHECK(pipe(go) == 0);
    pid_t child = CHILD({
        char byte;
        CHECK(read(go[0], &byte, 1) == 1);
        HOLDS(at, N, 19);
    });
    DOES(fd, WRITE, at, from, N, N, 1);
    CHECK(write(go[1], "", 1) == 1);
    well(child);
    HOLDS(at, N, 19);
}

TEST(write_leaves_a_device_page_where_it_is, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *from = anonymous(N);
    MOVED(fd, at, N, 20);
    fill(from, N, 21);
    DOES(fd, WRITE, at, from, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 21);
}

TEST(write_by_another_device, BOTH) {
    int fd = device(0), other = device(1);
    char *at = anonymous(N), *from = anonymous(N);
    MOVED(fd, at, N, 22);
    fill(from, N, 23);
    DOES(other, WRITE, at, from, N, N, 1);
    if (coherent)
        ON_DEVICE(fd, at, N, RW);
    else
        AT_HOME(fd, at, N, RW);
    HOLDS(at, N, 23);
}
