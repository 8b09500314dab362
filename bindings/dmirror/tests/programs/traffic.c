/* Threads send their own memory to devices, write it there and read it here, while children read their parent's memory and others fork, protect and unmap. */
#include "check.h"

#define N 16ul

static volatile int stop;
static int devices[4];
static char *constant;

static struct command command(void *addr, void *ptr) {
    return (struct command){.addr = (uint64_t)addr, .ptr = (uint64_t)ptr, .npages = N};
}

/* A page that is just being unshared after a fork, or that a fork has just brought home, may stay; and one that a fork has left on the device has lost its entry, which a read enters
 * again: that is no error of the program's. */
static void on_device(int fd, unsigned long request, void *addr, void *ptr) {
    struct command wanted = command(addr, ptr);
    while (ioctl(fd, request, &wanted) != 0) {
        CHECK(errno == ENOENT || errno == EBUSY);
        struct command read = command(addr, ptr);
        if (request == MIGRATE_TO_DEV)
            ioctl(fd, READ, &read);
    }
}

static void *work(void *number) {
    char *data = pages(N), *buffer = pages(N);
    for (unsigned turn = (uintptr_t)number; !stop; turn++) {
        int fd = devices[turn % 4];
        memset(data, (char)turn, N * PAGE);
        on_device(fd, MIGRATE_TO_DEV, data, buffer);
        CHECK(buffer[0] == (char)turn && buffer[N * PAGE - 1] == (char)turn);
        if (turn % 3 == 0) {
            memset(buffer, (char)(turn + 1), N * PAGE);
            on_device(fd, WRITE, data, buffer);
            CHECK(data[0] == (char)(turn + 1) && data[N * PAGE - 1] == (char)(turn + 1));
        } else {
            for (size_t i = 0; i < N * PAGE; i++)
                CHECK(data[i] == (char)turn);
        }
        if (turn % 5 == 0) {
            CHECK(mprotect(data, N * PAGE, PROT_READ) == 0);
            struct command write = command(data, buffer);
            FAILS(ioctl(fd, WRITE, &write), EPERM);
            CHECK(mprotect(data, N * PAGE, PROT_READ | PROT_WRITE) == 0);
        }
        on_device(fd, MIGRATE_TO_SYS, data, 0); /* what is on one device does not go to another */
        if (turn % 7 == 0) {
            CHECK(munmap(data, N * PAGE) == 0);
            data = pages(N);
        }
    }
    return 0;
}

static void *forks(void *unused) {
    (void)unused;
    for (int turn = 0; !stop; turn++) {
        pid_t child = fork();
        if (child == 0) {
            char *buffer = pages(N);
            memset(constant, 0, N * PAGE); /* the child's own */
            on_device(devices[turn % 4], READ, constant, buffer);
            for (size_t i = 0; i < N * PAGE; i++)
                CHECK(buffer[i] == 99);
            int own = open(DEVICE, O_RDWR);
            CHECK(own >= 0);
            on_device(own, READ, constant, buffer);
            CHECK(buffer[0] == 0 && close(own) == 0);
            _exit(0);
        }
        well(child);
        char *buffer = pages(N);
        on_device(devices[turn % 2], turn % 2 ? MIGRATE_TO_DEV : READ, constant, buffer);
        CHECK(munmap(buffer, N * PAGE) == 0);
    }
    return 0;
}

int main(void) {
    const char *seconds = getenv("UHMM_TEST_SECONDS");
    for (int i = 0; i < 4; i++) {
        char path[32];
        sprintf(path, "/dev/hmm_dmirror%d", i);
        CHECK((devices[i] = open(path, O_RDWR)) >= 0);
    }
    constant = pages(N);
    memset(constant, 99, N * PAGE);
    pthread_t threads[4];
    for (uintptr_t i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], 0, i < 3 ? work : forks, (void *)i) == 0);
    sleep(seconds ? atoi(seconds) : 5);
    stop = 1;
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], 0) == 0);
    for (size_t i = 0; i < N * PAGE; i++)
        CHECK(constant[i] == 99);
    return 0;
}
