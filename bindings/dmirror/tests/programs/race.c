/* Threads open, use, copy and close devices while others fork children that use what they find. */
#include "check.h"
#include <time.h>

static volatile int stop;
static int shared;

static void *work(void *number) {
    for (unsigned turn = (uintptr_t)number; !stop; turn++) {
        char path[32];
        sprintf(path, "/dev/hmm_dmirror%u", turn % 4);
        int fd = open(path, O_RDWR | O_CLOEXEC);
        CHECK(fd >= 0 && flags(fd) == 0);
        int copy = dup(fd);
        CHECK(copy >= 0 && close(fd) == 0 && flags(copy) == 0);
        struct command command = {.addr = PAGE, .ptr = PAGE, .npages = 1};
        CHECK(ioctl(copy, CHECK_EXCLUSIVE, &command) == 0);
        CHECK(close(copy) == 0);
    }
    return 0;
}

static void *forks(void *unused) {
    (void)unused;
    for (int turn = 0; !stop; turn++) {
        pid_t child = fork();
        if (child == 0) {
            CHECK(flags(shared) == 0);
            if (turn % 4 == 0) {
                int own = open(DEVICE, O_RDWR);
                CHECK(own >= 0 && flags(own) == 0 && close(own) == 0);
            }
            _exit(0);
        }
        well(child);
    }
    return 0;
}

int main(void) {
    const char *seconds = getenv("UHMM_TEST_SECONDS");
    shared = open("/dev/hmm_dmirror2", O_RDWR);
    CHECK(shared >= 0);
    pthread_t threads[5];
    for (uintptr_t i = 0; i < 5; i++)
        CHECK(pthread_create(&threads[i], 0, i < 3 ? work : forks, (void *)i) == 0);
    sleep(seconds ? atoi(seconds) : 3);
    stop = 1;
    for (int i = 0; i < 5; i++)
        CHECK(pthread_join(threads[i], 0) == 0);
    CHECK(flags(shared) == 0);
    return 0;
}
