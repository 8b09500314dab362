/* A touch by the CPU, of the program or of the kernel for somebody, of pages on a device: a private page comes back, a coherent one is used in place. */
#include "parity.h"
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <sys/socket.h>

#define N 4ul

/* Where a page is after such a touch. */
#define TOUCHED(fd, at, n)                  \
    do {                                    \
        if (coherent)                       \
            ON_DEVICE(fd, at, n, RW);       \
        else                                \
            AT_HOME(fd, at, n, RW);         \
    } while (0)

TEST(touch_by_reading, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *whole = buffer(N);
    MOVED(fd, at, N, 1);
    fill(whole, N, 1);
    EQ(((volatile uint64_t *)at)[512 + 7], ((uint64_t *)whole)[512 + 7]); /* one word of page 1 */
    TOUCHED(fd, at + PAGE, 1);
    ON_DEVICE(fd, at, 1, RW);
    ON_DEVICE(fd, at + 2 * PAGE, N - 2, RW);
    HOLDS(at, N, 1);
    TOUCHED(fd, at, N);
}

TEST(touch_by_writing, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 2);
    at[2 * PAGE + 5] = 99;
    TOUCHED(fd, at + 2 * PAGE, 1);
    ON_DEVICE(fd, at, 2, RW);
    DOES(fd, READ, at, to, N, N, coherent ? 0 : 1);
    CHECK(to[2 * PAGE + 5] == 99);
    fill(at, N, 3);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 3);
}

TEST(touch_by_atomics, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 4);
    uint64_t before = ((uint64_t *)to)[0];
    (void)before;
    uint64_t old = __atomic_fetch_add((uint64_t *)at, 5, __ATOMIC_SEQ_CST);
    TOUCHED(fd, at, 1);
    WORKS(fd, READ, at, to, N);
    EQ(*(uint64_t *)to, old + 5);
}

TEST(touch_beyond_the_edge_of_a_page, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *whole = buffer(N);
    MOVED(fd, at, N, 5);
    fill(whole, N, 5);
    uint64_t got, expected;
    memcpy(&got, at + PAGE - 3, 8), memcpy(&expected, whole + PAGE - 3, 8); /* one load over two pages */
    EQ(got, expected);
    TOUCHED(fd, at, 2);
    ON_DEVICE(fd, at + 2 * PAGE, 2, RW);
}

TEST(touch_by_write_2, BOTH) {
    int fd = device(0), file = file_of(N, 1);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 6);
    EQ(pwrite(file, at, N * PAGE, 0), (long)(N * PAGE)); /* the kernel reads */
    TOUCHED(fd, at, N);
    EQ(pread(file, to, N * PAGE, 0), (long)(N * PAGE));
    HOLDS(to, N, 6);
}

TEST(touch_by_read_2, BOTH) {
    int fd = device(0), file = file_of(N, 7);
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 8);
    EQ(pread(file, at, N * PAGE, 0), (long)(N * PAGE)); /* the kernel writes */
    TOUCHED(fd, at, N);
    HOLDS(at, N, 7);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 7);
    MOVED(fd, at, N, 9);
    EQ(pread(file, at + PAGE + 8, 16, 8), 16); /* a part */
    to = buffer(N);
    fill(to, N, 9);
    CHECK(memcmp(at, to, PAGE + 8) == 0 && memcmp(at + PAGE + 24, to + PAGE + 24, (N - 1) * PAGE - 24) == 0);
    CHECK(pread(file, to, 16, 8) == 16 && memcmp(at + PAGE + 8, to, 16) == 0);
}

TEST(touch_through_a_pipe_and_a_socket, BOTH) {
    int fd = device(0), ends[2];
    char *at = anonymous(N), *back = anonymous(N);
    MOVED(fd, at, N, 10);
    MOVED(fd, back, N, 11);
    CHECK(pipe(ends) == 0);
    EQ(write(ends[1], at, N * PAGE), (long)(N * PAGE));
    EQ(read(ends[0], back, N * PAGE), (long)(N * PAGE));
    HOLDS(back, N, 10);
    TOUCHED(fd, at, N);
    MOVED(fd, back, N, 12);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    EQ(send(ends[1], at, PAGE, 0), (long)PAGE);
    EQ(recv(ends[0], back, PAGE, MSG_WAITALL), (long)PAGE);
    HOLDS(back, 1, 10);
    TOUCHED(fd, back, 1);
    ON_DEVICE(fd, back + PAGE, N - 1, RW);
}

TEST(touch_by_process_vm_readv_of_another_process, BOTH) {
    int fd = device(0);
    char *at = anonymous(N);
    MOVED(fd, at, N, 13);
    pid_t parent = getpid();
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    int go[2];
    CHECK(pipe(go) == 0);
    pid_t child = CHILD({
        char byte;
        CHECK(read(go[0], &byte, 1) == 1);
        char *to = buffer(N);
        struct iovec here = {to, N * PAGE}, there = {at, N * PAGE};
        EQ(process_vm_readv(parent, &here, 1, &there, 1, 0), (long)(N * PAGE));
        HOLDS(to, N, 14);
    });
    MOVED(fd, at, N, 14);
    CHECK(write(go[1], "", 1) == 1);
    well(child);
    TOUCHED(fd, at, N);
    HOLDS(at, N, 14);
}

TEST(touch_by_process_vm_writev_of_another_process, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    pid_t parent = getpid();
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
    int go[2];
    CHECK(pipe(go) == 0);
    pid_t child = CHILD({
        char byte;
        CHECK(read(go[0], &byte, 1) == 1);
        char *from = buffer(N);
        fill(from, N, 16);
        struct iovec here = {from, N * PAGE}, there = {at, N * PAGE};
        EQ(process_vm_writev(parent, &here, 1, &there, 1, 0), (long)(N * PAGE));
    });
    MOVED(fd, at, N, 15);
    CHECK(write(go[1], "", 1) == 1);
    well(child);
    TOUCHED(fd, at, N);
    HOLDS(at, N, 16);
    WORKS(fd, READ, at, to, N);
    HOLDS(to, N, 16);
}

static void *wake(void *word) {
    usleep(20000);
    __atomic_store_n((uint32_t *)word, 2, __ATOMIC_SEQ_CST);
    while (syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0) == 0)
        usleep(1000);
    return NULL;
}

TEST(touch_by_futex, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    uint32_t *word = (uint32_t *)(at + PAGE);
    for (int op = FUTEX_WAIT; op <= (FUTEX_WAIT | FUTEX_PRIVATE_FLAG); op += FUTEX_PRIVATE_FLAG) {
        *word = 1;
        DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
        ON_DEVICE(fd, at, N, RW);
        EQ(syscall(SYS_futex, word, op, 7, NULL, NULL, 0), -1); /* another value */
        EQ(errno, EAGAIN);
        TOUCHED(fd, at + PAGE, 1);
    }
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
    ON_DEVICE(fd, at, N, RW);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, wake, word) == 0);
    long result = syscall(SYS_futex, word, FUTEX_WAIT, 1, NULL, NULL, 0);
    CHECK(result == 0 || errno == EAGAIN);
    EQ(*word, 2);
    if (result != 0) /* it was woken before it waited: let the other find a waiter */
        syscall(SYS_futex, word, FUTEX_WAIT, 2, NULL, &(struct timespec){1, 0}, 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

TEST(touch_of_a_huge_page, BOTH) {
    int fd = device(0);
    char *at = aligned(1), *to = buffer(512);
    CHECK(madvise(at, BLOCK, MADV_HUGEPAGE) == 0);
    fill(at, 512, 17);
    DOES(fd, MIGRATE_TO_DEV, at, to, 512, 512, 0);
    IS(at, 512, coherent ? HERE : AWAY);
    CHECK(((volatile char *)at)[300 * PAGE] == to[300 * PAGE]);
    IS(at + 300 * PAGE, 1, HERE);
    HOLDS(at, 512, 17);
    IS(at, 512, HERE);
}

static void *reader(void *at) {
    HOLDS(at, N, 18);
    return NULL;
}

TEST(touch_by_many_threads_at_once, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 18);
    for (int round = 0; round < 30; round++) {
        DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0);
        ON_DEVICE(fd, at, N, RW);
        pthread_t threads[4];
        for (int i = 0; i < 4; i++)
            CHECK(pthread_create(threads + i, NULL, reader, at) == 0);
        for (int i = 0; i < 4; i++)
            CHECK(pthread_join(threads[i], NULL) == 0);
        TOUCHED(fd, at, N);
    }
}

TEST(touch_of_an_exclusive_page_by_the_kernel, BOTH) {
    int fd = device(0), ends[2];
    char *at = anonymous(N), *to = buffer(N);
    fill(at, N, 19);
    WORKS(fd, EXCLUSIVE, at, to, N);
    FAILS(fd, CHECK_EXCLUSIVE, at, NULL, 1, EPERM);
    CHECK(pipe(ends) == 0);
    EQ(write(ends[1], at, PAGE), (long)PAGE);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, 1, 0, 0);
    FAILS(fd, CHECK_EXCLUSIVE, at + PAGE, NULL, N - 1, EPERM);
    EQ(read(ends[0], to, PAGE), (long)PAGE);
    HOLDS(to, 1, 19);
    HOLDS(at, N, 19);
    DOES(fd, CHECK_EXCLUSIVE, at, NULL, N, 0, 0);
}

/* A ring for one request at a time. */
struct ring {
    int fd;
    unsigned *tail, mask, *array;
    struct io_uring_sqe *entries;
    unsigned *head_done, *tail_done, mask_done;
    struct io_uring_cqe *done;
};

static struct ring ring_of_one(void) {
    struct io_uring_params p;
    memset(&p, 0, sizeof p);
    struct ring ring = {.fd = (int)syscall(SYS_io_uring_setup, 1, &p)};
    if (ring.fd < 0)
        SKIP("io_uring cannot be used here (errno %d)", errno);
    size_t asks = p.sq_off.array + p.sq_entries * sizeof(unsigned), answers = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    char *sq = mmap(NULL, asks, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, (off_t)IORING_OFF_SQ_RING);
    char *cq = mmap(NULL, answers, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, (off_t)IORING_OFF_CQ_RING);
    ring.entries = mmap(NULL, p.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, (off_t)IORING_OFF_SQES);
    CHECK(sq != MAP_FAILED && cq != MAP_FAILED && ring.entries != MAP_FAILED);
    ring.tail = (unsigned *)(sq + p.sq_off.tail), ring.mask = *(unsigned *)(sq + p.sq_off.ring_mask), ring.array = (unsigned *)(sq + p.sq_off.array);
    ring.head_done = (unsigned *)(cq + p.cq_off.head), ring.tail_done = (unsigned *)(cq + p.cq_off.tail);
    ring.mask_done = *(unsigned *)(cq + p.cq_off.ring_mask), ring.done = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
    return ring;
}

/* Does one request, and says what came of it. */
static int by_ring(struct ring *ring, int what, int flags, int file, void *at, unsigned len) {
    unsigned tail = *ring->tail, index = tail & ring->mask;
    struct io_uring_sqe *ask = &ring->entries[index];
    memset(ask, 0, sizeof *ask);
    ask->opcode = (uint8_t)what, ask->flags = (uint8_t)flags, ask->fd = file, ask->addr = (uint64_t)at, ask->len = len;
    ring->array[index] = index;
    __atomic_store_n(ring->tail, tail + 1, __ATOMIC_RELEASE);
    EQ(syscall(SYS_io_uring_enter, ring->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0), 1);
    unsigned head = *ring->head_done;
    CHECK(__atomic_load_n(ring->tail_done, __ATOMIC_ACQUIRE) == head + 1);
    int result = ring->done[head & ring->mask_done].res;
    __atomic_store_n(ring->head_done, head + 1, __ATOMIC_RELEASE);
    return result;
}

/* The program asks itself, or has a thread of the kernel's do it. */
TEST(touch_by_io_uring, BOTH) {
    struct ring ring = ring_of_one();
    for (int flags = 0; flags <= (int)IOSQE_ASYNC; flags += (int)IOSQE_ASYNC) {
        int fd = device(0), file = file_of(N, 21);
        char *at = anonymous(N), *all = buffer(N), *names = anonymous(1), *to = buffer(1);
        MOVED(fd, at, N, 20);
        EQ(by_ring(&ring, IORING_OP_READ, flags, file, at, 2 * PAGE), 2 * PAGE);
        TOUCHED(fd, at, 2);
        ON_DEVICE(fd, at + 2 * PAGE, N - 2, RW);
        fill(all, N, 20), fill(all, 2, 21);
        CHECK(memcmp(at, all, N * PAGE) == 0);
        MOVED(fd, at, N, 22);
        EQ(by_ring(&ring, IORING_OP_WRITE, flags, file, at, N * PAGE), N * PAGE);
        TOUCHED(fd, at, N);
        CHECK(pread(file, all, N * PAGE, 0) == (ssize_t)(N * PAGE));
        HOLDS(all, N, 22);
        /* What is to be done lies on the device itself, and where it is to be done, too. */
        struct iovec *parts = (struct iovec *)names;
        parts[0] = (struct iovec){at + PAGE + 100, PAGE}, parts[1] = (struct iovec){at + 3 * PAGE, 50};
        DOES(fd, MIGRATE_TO_DEV, names, to, 1, 1, 0);
        MOVED(fd, at, N, 23);
        EQ(by_ring(&ring, IORING_OP_READV, flags, file, names, 2), PAGE + 50);
        char *whole = anonymous(N);
        fill(whole, N, 23), fill(all, N, 22);
        memcpy(whole + PAGE + 100, all, PAGE), memcpy(whole + 3 * PAGE, all + PAGE, 50);
        CHECK(memcmp(at, whole, N * PAGE) == 0);
        CHECK(close(fd) == 0 && close(file) == 0);
    }
}
