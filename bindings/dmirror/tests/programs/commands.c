/* Commands reach the memory that they are about, and their answers the memory that they are for. */
#include "check.h"

#define N 4ul

static struct command done(int fd, unsigned long request, void *addr, void *ptr) {
    struct command command = {.addr = (uint64_t)addr, .ptr = (uint64_t)ptr, .npages = N, .cpages = 99, .faults = 99};
    if (ioctl(fd, request, &command) != 0) {
        fprintf(stderr, "command %lx: errno %d (%s)\n", request, errno, strerror(errno));
        _exit(1);
    }
    return command;
}

static int fails(int fd, unsigned long request, void *addr, void *ptr) {
    struct command command = {.addr = (uint64_t)addr, .ptr = (uint64_t)ptr, .npages = N, .cpages = 99, .faults = 99};
    errno = 0;
    CHECK(ioctl(fd, request, &command) == -1 && command.cpages == 99 && command.faults == 99);
    return errno;
}

static void fill(char *at, char first) {
    for (size_t i = 0; i < N * PAGE; i++)
        at[i] = (char)(first + i / PAGE + i % 7);
}

static int is(const char *at, char first) {
    for (size_t i = 0; i < N * PAGE; i++)
        if (at[i] != (char)(first + i / PAGE + i % 7))
            return 0;
    return 1;
}

static int all(const unsigned char *bytes, unsigned char value) {
    for (size_t i = 0; i < N; i++)
        if (bytes[i] != value)
            return 0;
    return 1;
}

int main(void) {
    int fd = open(DEVICE, O_RDWR), coherent = open("/dev/hmm_dmirror2", O_RDWR);
    CHECK(fd >= 0 && coherent >= 0);
    char *data = pages(N), *buffer = pages(N);
    unsigned char *sights = (unsigned char *)pages(1);
    madvise(data, N * PAGE, MADV_NOHUGEPAGE);

    fill(data, 1);
    struct command answer = done(fd, READ, data, buffer);
    CHECK(answer.cpages == N && answer.faults == 1 && is(buffer, 1));
    fill(buffer, 20);
    answer = done(fd, WRITE, data, buffer);
    CHECK(answer.cpages == N && is(data, 20) && is(buffer, 20));

    memset(buffer, 0, N * PAGE);
    answer = done(fd, MIGRATE_TO_DEV, data, buffer);
    CHECK(answer.cpages == N && answer.faults == 0 && is(buffer, 20));
    answer = done(fd, SNAPSHOT, data, sights);
    CHECK(answer.cpages == N && all(sights, 0x22));
    answer = done(fd, MIGRATE_TO_SYS, data, 0);
    CHECK(answer.cpages == N && is(data, 20));
    CHECK(done(fd, MIGRATE_TO_SYS, data, 0).cpages == 0);
    CHECK(done(fd, SNAPSHOT, data, sights).cpages == N && all(sights, 0x02));

    done(coherent, MIGRATE_TO_DEV, data, buffer);
    done(coherent, SNAPSHOT, data, sights);
    CHECK(all(sights, 0x42) && is(data, 20));
    CHECK(done(fd, SNAPSHOT, data, sights).cpages == N && all(sights, 0x52));
    CHECK(madvise(data, N * PAGE, MADV_FREE) == 0);
    fill(data, 20);
    done(coherent, RELEASE, data, 0);
    CHECK(done(coherent, SNAPSHOT, data, sights).cpages == N && all(sights, 0x02) && is(data, 20));

    done(fd, EXCLUSIVE, data, buffer);
    CHECK(is(buffer, 20) && fails(fd, CHECK_EXCLUSIVE, data, 0) == EPERM);
    done(fd, RELEASE, data, 0);
    done(fd, CHECK_EXCLUSIVE, data, 0);

    /* Whose memory: a child's command on its parent's device is about the parent's memory, with a buffer of the child's. */
    pid_t child = fork();
    if (child == 0) {
        fill(data, 40), fill(buffer, 41);
        answer = done(fd, READ, data, buffer);
        CHECK(answer.cpages == N && answer.faults <= 1 && is(buffer, 20) && is(data, 40));
        fill(buffer, 60);
        CHECK(done(fd, WRITE, data, buffer).cpages == N && is(data, 40));
        CHECK(fails(fd, READ, data, (void *)PAGE) == EFAULT && fails(fd, WRITE, data, (void *)PAGE) == EFAULT);
        CHECK(fails(fd, READ, (void *)PAGE, buffer) == EFAULT && fails(fd, MIGRATE_TO_DEV, (void *)PAGE, buffer) == EINVAL);
        memset(buffer, 0, N * PAGE);
        CHECK(done(coherent, MIGRATE_TO_DEV, data, buffer).cpages == N && is(buffer, 60));
        CHECK(done(coherent, SNAPSHOT, data, sights).cpages == N && all(sights, 0x42));
        CHECK(done(coherent, MIGRATE_TO_SYS, data, buffer).cpages == N);
        int own = open(DEVICE, O_RDWR);
        CHECK(own >= 0 && done(own, READ, data, buffer).cpages == N && is(buffer, 40));
        _exit(0);
    }
    well(child);
    CHECK(is(data, 60));

    /* Bad memory. */
    CHECK(fails(fd, READ, (void *)PAGE, buffer) == EFAULT && fails(fd, MIGRATE_TO_DEV, (void *)PAGE, buffer) == EINVAL);
    CHECK(fails(fd, READ, data, (void *)PAGE) == EFAULT && fails(fd, SNAPSHOT, data, (void *)PAGE) == EFAULT);
    struct command endless = {.addr = 0, .ptr = (uint64_t)sights, .npages = 1ul << 40};
    FAILS(ioctl(fd, SNAPSHOT, &endless), EFAULT);

    /* Much data, and a hole that stays one: a program may count on it. */
    const size_t many = 5000;
    char *much = pages(many), *copied = pages(many), *hole = pages(64);
    munmap(hole, 64 * PAGE);
    for (size_t i = 0; i < many; i++)
        memset(much + i * PAGE, (int)(i % 251), PAGE);
    struct command large = {.addr = (uint64_t)much, .ptr = (uint64_t)copied, .npages = many};
    for (int round = 0; round < 3; round++) {
        CHECK(ioctl(fd, READ, &large) == 0 && large.cpages == many && !memcmp(much, copied, many * PAGE));
        memset(copied, round, many * PAGE);
    }
    child = fork();
    if (child == 0) {
        memset(much, 0, many * PAGE);
        CHECK(ioctl(fd, READ, &large) == 0 && large.cpages == many);
        for (size_t i = 0; i < many; i++)
            CHECK(copied[i * PAGE] == (char)(i % 251) && copied[i * PAGE + PAGE - 1] == (char)(i % 251));
        memset(copied, 17, many * PAGE);
        CHECK(ioctl(fd, WRITE, &large) == 0 && large.cpages == many && much[0] == 0);
        _exit(0);
    }
    well(child);
    for (size_t i = 0; i < many * PAGE; i++)
        CHECK(much[i] == 17);
    CHECK(mmap(hole, 64 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == hole);

    /* What cannot be collapsed or freed lazily is not, and nobody is told. */
    char *block = pages(1024);
    block += -(uintptr_t)block % (512 * PAGE);
    memset(block, 33, 512 * PAGE);
    fill(block + 8 * PAGE, 34);
    done(fd, MIGRATE_TO_DEV, block + 8 * PAGE, buffer);
    CHECK(madvise(block, 512 * PAGE, 25 /* COLLAPSE */) == 0 && *block == 33);
    done(fd, READ, block + 8 * PAGE, buffer);
    CHECK(is(buffer, 34) && madvise(block + 8 * PAGE, N * PAGE, MADV_FREE) == 0);

    /* The struct and the buffer may be on the device too. */
    fill(data, 70);
    struct command *own = (void *)buffer;
    done(fd, MIGRATE_TO_DEV, buffer, pages(N));
    *own = (struct command){.addr = (uint64_t)data, .ptr = (uint64_t)data, .npages = N};
    CHECK(ioctl(fd, MIGRATE_TO_DEV, own) == 0 && own->cpages == N && is(data, 70));

    /* Closing the last copy of an open brings everything home before it returns. */
    int copy = dup(fd), again = open(DEVICE, O_RDWR);
    done(fd, MIGRATE_TO_DEV, data, buffer);
    CHECK(close(fd) == 0 && done(copy, SNAPSHOT, data, sights).cpages == N && all(sights, 0x22));
    CHECK(close(copy) == 0 && done(again, SNAPSHOT, data, sights).cpages == N && all(sights, 0x02)); /* whatever other opens there are */
    done(again, MIGRATE_TO_DEV, data, buffer);
    CHECK(close(again) == 0);
    CHECK((again = open(DEVICE, O_RDWR)) >= 0);
    CHECK(done(again, SNAPSHOT, data, sights).cpages == N && all(sights, 0x02) && is(data, 70));
    done(again, MIGRATE_TO_DEV, data, buffer);
    CHECK(dup2(coherent, again) == again && done(coherent, SNAPSHOT, data, sights).cpages == N && all(sights, 0x02) && is(data, 70));
    CHECK((again = open(DEVICE, O_RDWR)) >= 0);
    done(again, MIGRATE_TO_DEV, data, buffer);
    CHECK(close_range(3, ~0u, 0) == 0 && (fd = open(DEVICE, O_RDWR)) == 3);
    CHECK(done(fd, SNAPSHOT, data, sights).cpages == N && all(sights, 0x02) && is(data, 70));

    /* A file of the device's is memory that it reads. */
    char *file = mmap(0, N * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK(file != MAP_FAILED);
    memset(buffer, 9, N * PAGE);
    CHECK(done(fd, READ, file, buffer).cpages == N && buffer[0] == 0 && buffer[N * PAGE - 1] == 0);
    CHECK(done(fd, SNAPSHOT, file, sights).cpages == N && all(sights, 0x01) && fails(fd, MIGRATE_TO_DEV, file, buffer) == EINVAL);
    return 0;
}
