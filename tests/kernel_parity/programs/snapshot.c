/* SNAPSHOT: each permission byte. */
#include "parity.h"

#define N 4ul

TEST(snapshot_of_ordinary_pages, BOTH) {
    int fd = device(0);
    char *at = anonymous(N);
    LOOKS(fd, at, N, NONE);
    IS(at, N, EMPTY); /* nothing was faulted */
    ALL(at, 1, 0ul);
    fill(at + PAGE, 1, 1);
    fill(at + 2 * PAGE, 1, 2);
    CHECK(mprotect(at + 2 * PAGE, PAGE, PROT_READ) == 0);
    unsigned char bytes[N];
    DOES(fd, SNAPSHOT, at, bytes, N, N, 0);
    EQ(bytes[0], RO | ZERO);
    EQ(bytes[1], RW);
    EQ(bytes[2], RO);
    EQ(bytes[3], NONE);
}

TEST(snapshot_of_what_cannot_be_read_is_an_error, BOTH) {
    int fd = device(0);
    char *at = anonymous(N);
    fill(at, N, 3);
    CHECK(munmap(at + PAGE, PAGE) == 0 && mprotect(at + 2 * PAGE, PAGE, PROT_NONE) == 0);
    LOOKS(fd, at, 1, RW);
    LOOKS(fd, at + PAGE, 2, ERROR);
    LOOKS(fd, at + 3 * PAGE, 1, RW);
    unsigned char bytes[N];
    DOES(fd, SNAPSHOT, at, bytes, N, N, 0);
    EQ(bytes[0], RW);
    EQ(bytes[1], ERROR);
    EQ(bytes[2], ERROR);
    EQ(bytes[3], RW);
    CHECK(mprotect(at + 2 * PAGE, PAGE, PROT_WRITE) == 0);
    LOOKS(fd, at + 2 * PAGE, 1, ERROR); /* no permission to read */
    LOOKS(fd, (void *)PAGE, 1, ERROR);
}

TEST(snapshot_of_the_zero_page, BOTH) {
    int fd = device(0);
    char *at = anonymous(N);
    ALL(at, N, 0ul);
    LOOKS(fd, at, N, RO | ZERO);
    CHECK(mprotect(at, PAGE, PROT_READ) == 0);
    LOOKS(fd, at, N, RO | ZERO);
    fill(at + PAGE, 1, 4);
    LOOKS(fd, at, 1, RO | ZERO);
    LOOKS(fd, at + PAGE, 1, RW);
}

TEST(snapshot_of_pages_shared_with_a_child, BOTH) {
    char *at = anonymous(N);
    fill(at, N, 5);
    int go[2];
    CHECK(pipe(go) == 0);
    pid_t child = CHILD({
        char byte;
        CHECK(read(go[0], &byte, 1) == 1);
        HOLDS(at, N, 5);
    });
    int fd = device(0);
    LOOKS(fd, at, N, RO);
    fill(at, 1, 6);
    LOOKS(fd, at, 1, RW);
    LOOKS(fd, at + PAGE, N - 1, RO);
    CHECK(write(go[1], "", 1) == 1);
    well(child);
}

TEST(snapshot_of_files, BOTH) {
    int fd = device(0), file = file_of(2, 7);
    char *at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    CHECK(at != MAP_FAILED);
    LOOKS(fd, at, 4, NONE);
    fill(at, 1, 8);
    LOOKS(fd, at, 1, RW);
    LOOKS(fd, at + 2 * PAGE, 2, NONE); /* beyond its end: nothing there */
    char *private = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0), *from = buffer(2);
    CHECK(private != MAP_FAILED);
    LOOKS(fd, private, 2, NONE);
    CHECK(memcmp(private, at, 2 * PAGE) == 0);
    LOOKS(fd, private, 2, RO);
    memcpy(private, from, PAGE);
    LOOKS(fd, private, 1, RW);
    LOOKS(fd, private + PAGE, 1, RO);
}

TEST(snapshot_of_shared_memory, BOTH) {
    int fd = device(0);
    char *at = shared(N);
    LOOKS(fd, at, N, NONE);
    fill(at, N, 9);
    LOOKS(fd, at, N, RW);
    CHECK(mprotect(at, PAGE, PROT_READ) == 0);
    LOOKS(fd, at, 1, RO);
}

TEST(snapshot_of_pages_on_a_device, BOTH) {
    int fd = device(0), other = device(1), second = device(0);
    char *at = anonymous(N);
    MOVED(fd, at, N, 10);
    LOOKS(fd, at, N, RW | (coherent ? COHERENT_MINE : MINE));
    LOOKS(second, at, N, RW | (coherent ? COHERENT_MINE : MINE)); /* memory is the device's, not the open's */
    LOOKS(other, at, N, coherent ? RW | COHERENT_OTHER : NONE);
    CHECK(mprotect(at, PAGE, PROT_READ) == 0);
    LOOKS(fd, at, 1, RO | (coherent ? COHERENT_MINE : MINE));
    LOOKS(other, at, 1, coherent ? RO | COHERENT_OTHER : NONE);
    ON_DEVICE(fd, at + PAGE, N - 1, RW);
    CHECK(mprotect(at, PAGE, PROT_NONE) == 0);
    LOOKS(fd, at, 1, ERROR);
    CHECK(mprotect(at, PAGE, PROT_READ | PROT_WRITE) == 0);
    HOLDS(at, N, 10);
}

TEST(snapshot_of_private_pages_by_a_coherent_device, COHERENT) {
    int fd = device(0), private = open("/dev/hmm_dmirror0", O_RDWR);
    CHECK(private >= 0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 11);
    DOES(private, MIGRATE_TO_DEV, at, to, N, N, 0);
    IS(at, N, AWAY);
    LOOKS(private, at, N, RW | MINE);
    LOOKS(fd, at, N, NONE);
    HOLDS(at, N, 11);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    LOOKS(private, at, N, RW | COHERENT_OTHER);
}

TEST(snapshot_of_an_exclusive_page, BOTH) {
    int fd = device(0), other = device(1);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 12);
    WORKS(fd, EXCLUSIVE, at, to, N);
    LOOKS(fd, at, N, NONE);
    LOOKS(other, at, N, NONE);
    FAILS(fd, CHECK_EXCLUSIVE, at, NULL, N, EPERM); /* looking revoked nothing */
    HOLDS(at, 1, 12);
    LOOKS(fd, at, 1, RW);
    LOOKS(fd, at + PAGE, N - 1, NONE);
}

TEST(snapshot_of_huge_pages, BOTH) {
    int fd = device(0);
    char *at = aligned(1);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    fill(at, 512, 13);
    if (!is_huge(at))
        SKIP("the kernel gives no huge page");
    LOOKS(fd, at, 512, RW | BIG);
    CHECK(mprotect(at, BLOCK, PROT_READ) == 0);
    LOOKS(fd, at, 512, RO | BIG);
    CHECK(mprotect(at, BLOCK, PROT_READ | PROT_WRITE) == 0);
    HOLDS(at, 512, 13);
    CHECK(mprotect(at, PAGE, PROT_READ) == 0); /* splits the entry */
    LOOKS(fd, at, 1, RO);
    LOOKS(fd, at + PAGE, 511, RW);
}

TEST(snapshot_of_the_huge_zero_page, BOTH) {
    int fd = device(0);
    char *at = aligned(1);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    CHECK(*(volatile char *)at == 0);
    if (!is_huge(at))
        SKIP("the kernel gives no huge zero page");
    LOOKS(fd, at, 512, RO | BIG);
}

TEST(snapshot_of_a_pool_page, BOTH) {
    int fd = device(0);
    char *at = pool_pages(1);
    fill(at, 512, 14);
    LOOKS(fd, at, 512, RW | BIG);
    CHECK(munmap(at, BLOCK) == 0);
}

TEST(snapshot_of_a_pool_page_of_1_GiB, BOTH) {
    int fd = device(0);
    char *at = pool_giant(), *to = buffer(2);
    LOOKS(fd, at, 1, NONE);
    fill(at + BLOCK, 2, 15); /* all of it is there then */
    LOOKS(fd, at, 2, RW | GIANT);
    LOOKS(fd, at + BLOCK, 2, RW | GIANT);
    LOOKS(fd, at + 512 * BLOCK - PAGE, 1, RW | GIANT);
    WORKS(fd, READ, at + BLOCK, to, 2);
    HOLDS(to, 2, 15);
    FAILS(fd, MIGRATE_TO_DEV, at, to, 1, EINVAL);
    CHECK(mprotect(at, 512 * BLOCK, PROT_READ) == 0);
    LOOKS(fd, at, 1, RO | GIANT);
    CHECK(munmap(at, 512 * BLOCK) == 0);
}

TEST(snapshot_of_pages_that_were_swapped_out, BOTH) {
    swap_on();
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 16);
    for (double end = now() + 5; where(at) == HERE || where(at + (N - 1) * PAGE) == HERE;) {
        if (madvise(at, N * PAGE, 21 /* PAGEOUT */) != 0 || now() > end) {
            restore_pool();
            SKIP("the kernel swaps nothing out");
        }
    }
    IS(at, N, AWAY);
    LOOKS(fd, at, N, NONE);
    IS(at, N, AWAY);
    DOES(fd, READ, at + PAGE, to, N - 1, N - 1, 1);
    IS(at, 1, AWAY);
    IS(at + PAGE, N - 1, HERE);
    LOOKS(fd, at, 1, NONE);
    HOLDS(at, N, 16);
    CHECK(memcmp(to, at + PAGE, (N - 1) * PAGE) == 0);
    MOVED(fd, at, N, 17);
    HOLDS(at, N, 17);
}

TEST(snapshot_into_a_bad_buffer_is_EFAULT, BOTH) {
    int fd = device(0);
    char *at = anonymous(N);
    fill(at, N, 15);
    FAILS(fd, SNAPSHOT, at, (char *)8, N, EFAULT);
}

TEST(snapshot_of_many_pages, BOTH) {
    int fd = device(0);
    enum { many = 2000 };
    char *at = anonymous(many), *to = buffer(1), expected[many];
    for (size_t page = 0; page < many; page += 3)
        at[page * PAGE] = 1;
    for (size_t page = 0; page < many; page++)
        expected[page] = page % 3 ? NONE : RW;
    DOES(fd, SNAPSHOT, at, to + 7, many, many, 0);
    CHECK(memcmp(to + 7, expected, many) == 0 && to[6] == (char)UNSET && to[many + 7] == (char)UNSET);
}
