/* A program that has a userfaultfd of its own: it may watch what was on a device and is not any more, and the device waits for the pages that it provides. */
#include "check.h"
#include <linux/userfaultfd.h>

#define N 2ul

static int uffd;

static void *serve(void *content) {
    for (size_t served = 0; served < N; served++) {
        struct uffd_msg message;
        CHECK(read(uffd, &message, sizeof message) == sizeof message && message.event == UFFD_EVENT_PAGEFAULT);
        usleep(10000);
        struct uffdio_copy copy = {.dst = message.arg.pagefault.address & ~(PAGE - 1), .src = (uint64_t)content, .len = PAGE};
        CHECK(ioctl(uffd, UFFDIO_COPY, &copy) == 0);
    }
    return 0;
}

int main(void) {
    int fd = open(DEVICE, O_RDWR);
    CHECK(fd >= 0);
    char *data = pages(N), *buffer = pages(N), *content = pages(1);
    memset(data, 1, N * PAGE), memset(content, 8, PAGE), memset(buffer, 0, N * PAGE);
    struct command command = {.addr = (uint64_t)data, .ptr = (uint64_t)buffer, .npages = N};
    CHECK(ioctl(fd, MIGRATE_TO_DEV, &command) == 0 && ioctl(fd, MIGRATE_TO_SYS, &command) == 0 && command.cpages == N);

    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    CHECK(uffd >= 0);
    struct uffdio_api api = {.api = UFFD_API};
    CHECK(ioctl(uffd, UFFDIO_API, &api) == 0);
    struct uffdio_register watch = {.range = {(uint64_t)data, N * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    CHECK(ioctl(uffd, UFFDIO_REGISTER, &watch) == 0);
    CHECK(madvise(data, N * PAGE, MADV_DONTNEED) == 0);

    pthread_t thread;
    CHECK(pthread_create(&thread, 0, serve, content) == 0);
    CHECK(ioctl(fd, READ_UNLOCKED, &command) == 0 && command.cpages == N);
    CHECK(pthread_join(thread, 0) == 0);
    for (size_t i = 0; i < N * PAGE; i++)
        CHECK(buffer[i] == 8 && data[i] == 8);
    FAILS(ioctl(uffd, UFFDIO_REGISTER, (void *)1), EFAULT);
    return 0;
}
