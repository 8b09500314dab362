/* fork: both processes see the contents as of the fork, and each has its own from then on. */
#include "parity.h"

#define N 4ul

/* Lets one process wait for the other. */
static int to_child[2], to_parent[2];
static void ends(void) { CHECK(pipe(to_child) == 0 && pipe(to_parent) == 0); }
static void tell(int *pipe) { CHECK(write(pipe[1], "", 1) == 1); }
static void await(int *pipe) {
    char byte;
    CHECK(read(pipe[0], &byte, 1) == 1);
}

TEST(fork_with_pages_on_the_device, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    ends();
    MOVED(fd, at, N, 1);
    pid_t child = CHILD({
        HOLDS(at, N, 1);
        fill(at, N, 2);
        tell(to_parent), await(to_child);
        HOLDS(at, N, 2);
    });
    await(to_parent);
    HOLDS(at, N, 1);
    fill(at, N, 3);
    tell(to_child);
    well(child);
    HOLDS(at, N, 3);
    WORKS(fd, READ, at, to, N); /* fork erased the entries; a coherent page may be on the device still */
    WORKS(fd, MIGRATE_TO_DEV, at, to, N);
    HOLDS(to, N, 3);
}

TEST(fork_and_the_parent_writes_by_the_device, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *from = anonymous(N);
    ends();
    MOVED(fd, at, N, 4);
    fill(from, N, 5);
    pid_t child = CHILD({
        await(to_child);
        HOLDS(at, N, 4);
    });
    WORKS(fd, WRITE, at, from, N);
    HOLDS(at, N, 5);
    tell(to_child);
    well(child);
}

TEST(fork_and_a_write_copies_a_coherent_page, COHERENT) {
    int fd = device(0);
    char *at = anonymous(N);
    ends();
    MOVED(fd, at, N, 12);
    pid_t child = CHILD({
        await(to_child);
        HOLDS(at, N, 12);
    });
    LOOKS(fd, at, N, RO | COHERENT_MINE);
    at[PAGE]++;
    LOOKS(fd, at, 1, RO | COHERENT_MINE);
    LOOKS(fd, at + PAGE, 1, RW); /* the copy is the system's */
    LOOKS(fd, at + 2 * PAGE, N - 2, RO | COHERENT_MINE);
    tell(to_child);
    well(child);
    at[PAGE]--;
    HOLDS(at, N, 12);
}

TEST(fork_erases_entries, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    ends();
    fill(at, N, 6);
    DOES(fd, READ, at, to, N, N, 1);
    DOES(fd, READ, at, to, N, N, 0);
    pid_t child = CHILD(await(to_child));
    DOES(fd, READ, at, to, N, N, 1);
    HOLDS(to, N, 6);
    tell(to_child);
    well(child);
}

TEST(fork_and_the_child_uses_the_parents_descriptor, BOTH) {
    int fd = device(0);
    char *at = anonymous(N);
    ends();
    fill(at, N, 7);
    pid_t child = CHILD({
        char *to = buffer(N), *from = anonymous(N);
        fill(at, N, 8); /* the child's own, of which the device knows nothing */
        WORKS(fd, READ, at, to, N);
        HOLDS(to, N, 7);
        fill(from, N, 9);
        WORKS(fd, WRITE, at, from, N);
        HOLDS(at, N, 8);
        tell(to_parent), await(to_child);
        WORKS(fd, MIGRATE_TO_DEV, at, to, N);
        HOLDS(to, N, 10);
        FAILS(fd, READ, at, (char *)8, N, EFAULT); /* the buffer is the caller's */
    });
    await(to_parent);
    HOLDS(at, N, 9);
    fill(at, N, 10);
    tell(to_child);
    well(child);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 10);
}

TEST(fork_and_the_child_opens_its_own, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    ends();
    MOVED(fd, at, N, 11);
    pid_t child = CHILD({
        int own = device(0);
        HOLDS(at, N, 11);
        MOVED(own, at, N, 12);
        WORKS(fd, READ, at, to, N);
        HOLDS(to, N, 11); /* the parent's */
        WORKS(own, READ, at, to, N);
        HOLDS(to, N, 12);
        tell(to_parent), await(to_child);
        HOLDS(at, N, 12);
        CHECK(close(own) == 0);
    });
    await(to_parent);
    HOLDS(at, N, 11);
    MOVED(fd, at, N, 13);
    tell(to_child);
    well(child);
    HOLDS(at, N, 13);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 13);
}

TEST(fork_before_the_device_is_opened, BOTH) {
    char *at = anonymous(N);
    fill(at, N, 14);
    pid_t children[3];
    for (uint64_t i = 0; i < 3; i++)
        children[i] = CHILD({
            int own = device((int)i & 1);
            HOLDS(at, N, 14);
            MOVED(own, at, N, 15 + i);
            HOLDS(at, N, 15 + i);
        });
    for (int i = 0; i < 3; i++)
        well(children[i]);
    HOLDS(at, N, 14);
}

TEST(fork_and_the_child_ends_first, BOTH) {
    int fd = device(0);
    char *at = anonymous(N);
    MOVED(fd, at, N, 20);
    for (int round = 0; round < 5; round++)
        well(CHILD(HOLDS(at, 1, 20)));
    HOLDS(at, N, 20);
    WORKS(fd, READ, at, buffer(N), N); /* fork erased the entries; a coherent page may be on the device still */
    MOVED(fd, at, N, 21);
    well(CHILD({
        int own = device(0);
        CHECK(own >= 0); /* left open */
    }));
    HOLDS(at, N, 21);
    WORKS(fd, READ, at, buffer(N), N);
    MOVED(fd, at, N, 22);
    HOLDS(at, N, 22);
}

TEST(fork_and_the_parent_ends_first, BOTH) {
    ends();
    int done[2];
    CHECK(pipe(done) == 0);
    pid_t parent = CHILD({
        int fd = device(0);
        char *at = anonymous(N), *to = buffer(N);
        MOVED(fd, at, N, 23);
        CHILD({
            await(to_child); /* the parent is gone */
            HOLDS(at, N, 23);
            int error = command(fd, READ, at, to, N); /* whose memory the descriptor mirrored is gone too */
            CHECK(error != 0);
            int own = device(0);
            MOVED(own, at, N, 24);
            HOLDS(at, N, 24);
            tell(done);
        });
        HOLDS(at, N, 23);
    });
    well(parent);
    usleep(20000);
    tell(to_child);
    CHECK(close(done[1]) == 0);
    await(done);
}

TEST(fork_and_shared_memory, BOTH) {
    int fd = device(0);
    char *at = shared(N), *from = anonymous(N), *to = buffer(N);
    ends();
    fill(at, N, 25);
    pid_t child = CHILD({
        await(to_child);
        HOLDS(at, N, 26);
        fill(at, N, 27);
        tell(to_parent);
    });
    fill(from, N, 26);
    WORKS(fd, WRITE, at, from, N);
    tell(to_child);
    await(to_parent);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 27);
    well(child);
}

TEST(fork_and_shared_memory_by_devices_of_both, BOTH) {
    char *at = shared(N);
    ends();
    fill(at, N, 28);
    pid_t child = CHILD({
        int own = device(0);
        char *to = buffer(N), *from = anonymous(N);
        await(to_child);
        WORKS(own, READ, at, to, N);
        HOLDS(to, N, 29);
        fill(from, N, 30);
        WORKS(own, WRITE, at, from, N);
        tell(to_parent);
    });
    int fd = device(1);
    char *from = anonymous(N), *to = buffer(N);
    fill(from, N, 29);
    WORKS(fd, WRITE, at, from, N);
    tell(to_child), await(to_parent);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 30);
    well(child);
}

TEST(fork_of_a_fork, BOTH) {
    int fd = device(0);
    char *at = anonymous(N);
    MOVED(fd, at, N, 31);
    well(CHILD({
        int own = device(0);
        HOLDS(at, N, 31);
        MOVED(own, at, N, 32);
        well(CHILD({
            HOLDS(at, N, 32);
            int mine = device(1);
            MOVED(mine, at, N, 33);
            HOLDS(at, N, 33);
        }));
        HOLDS(at, N, 32);
    }));
    HOLDS(at, N, 31);
}

TEST(fork_with_a_huge_page_on_the_device, BOTH) {
    int fd = device(0);
    char *at = aligned(1), *to = buffer(512);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    fill(at, 512, 34);
    DOES(fd, MIGRATE_TO_DEV, at, to, 512, 512, 0);
    IS(at, 512, coherent ? HERE : AWAY);
    pid_t child = CHILD({
        HOLDS(at, 512, 34);
        fill(at, 512, 35);
    });
    HOLDS(at, 512, 34);
    fill(at, 512, 36);
    well(child);
    HOLDS(at, 512, 36);
}

TEST(vfork_and_spawn, BOTH) {
    int fd = device(0), status;
    char *at = anonymous(N);
    MOVED(fd, at, N, 37);
    pid_t child = vfork();
    if (child == 0)
        _exit(0);
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    CHECK(system("true") == 0);
    HOLDS(at, N, 37);
}
