/* The file that pins pages. */
#include "check.h"

struct gup {
    uint64_t get, put, addr, size;
    uint32_t per_call, gup_flags, test_flags, which[8];
};
#define COMMAND(number) _IOWR('g', number, struct gup)

int main(void) {
    int fd = open("/sys/kernel/debug/gup_test", O_RDWR);
    CHECK(fd >= 0);
    char *at = pages(8);
    memset(at, 5, 8 * PAGE);
    munmap(at + 6 * PAGE, 2 * PAGE);
    for (int number = 1; number <= 6; number++) {
        struct gup gup = {.addr = (uint64_t)at, .size = 6 * PAGE, .per_call = 4, .gup_flags = 1, .get = -1ul, .put = -1ul};
        CHECK(ioctl(fd, COMMAND(number), &gup) == 0 && gup.size == 6 * PAGE && gup.get != -1ul && gup.put != -1ul);
        gup.size = 8 * PAGE;
        CHECK(ioctl(fd, COMMAND(number), &gup) == 0 && gup.size == 6 * PAGE); /* as far as there is memory */
        gup.addr += 6 * PAGE;
        CHECK(ioctl(fd, COMMAND(number), &gup) == 0 && gup.size == 0);
        FAILS(ioctl(fd, COMMAND(number), NULL), EFAULT);
    }
    CHECK(mprotect(at, PAGE, PROT_READ) == 0);
    struct gup gup = {.addr = (uint64_t)at, .size = PAGE, .per_call = 1, .gup_flags = 1};
    CHECK(ioctl(fd, COMMAND(4), &gup) == 0 && gup.size == 0); /* may not be written */
    gup.size = PAGE, gup.gup_flags = 0;
    CHECK(ioctl(fd, COMMAND(4), &gup) == 0 && gup.size == PAGE && *at == 5);
    FAILS(ioctl(fd, COMMAND(7), &gup), EINVAL);
    FAILS(ioctl(fd, READ, &gup), EINVAL);
    return 0;
}
