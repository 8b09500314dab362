/* Devices that do nothing say that they did everything. */
#include "check.h"

int main(void) {
    int fd = open(DEVICE, O_RDWR), coherent = open("/dev/hmm_dmirror3", O_RDWR | O_CLOEXEC);
    CHECK(fd == 3 && coherent == 4);
    char *data = pages(2), *buffer = pages(2);
    memset(data, 1, 2 * PAGE), memset(buffer, 2, 2 * PAGE);
    for (unsigned long request = READ; request <= READ_UNLOCKED; request++) {
        struct command command = {.addr = (uint64_t)data, .ptr = (uint64_t)buffer, .npages = 2, .cpages = 9, .faults = 9};
        CHECK(ioctl(request & 1 ? fd : coherent, request, &command) == 0 && command.cpages == 2 && command.faults == 0);
    }
    for (size_t i = 0; i < 2 * PAGE; i++)
        CHECK(data[i] == 1 && buffer[i] == 2);
    FAILS(ioctl(fd, READ, NULL), EFAULT);
    pid_t child = fork();
    if (child == 0) {
        struct command command = {.addr = (uint64_t)data, .ptr = (uint64_t)buffer, .npages = 2};
        CHECK(ioctl(fd, READ, &command) == 0 && command.cpages == 2);
        _exit(0);
    }
    well(child);
    char *mapped = mmap(0, PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK(mapped != MAP_FAILED && *mapped == 0);
    CHECK(close(fd) == 0 && close(coherent) == 0);
    return 0;
}
