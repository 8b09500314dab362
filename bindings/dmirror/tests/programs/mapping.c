/* Mappings of the device's file: zeroed, and nobody else's. And ordinary mappings go on to be. */
#include "check.h"

int main(void) {
    int fd = open(DEVICE, O_RDWR);
    CHECK(fd >= 0);
    char *a = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), *b = mmap(0, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(a != MAP_FAILED && b != MAP_FAILED && a != b);
    for (size_t i = 0; i < 4 * PAGE; i++)
        CHECK(a[i] == 0);
    memset(a, 1, 4 * PAGE);
    CHECK(b[0] == 0 && b[4 * PAGE - 1] == 0);
    char *read_only = mmap(0, PAGE, PROT_READ, MAP_SHARED, fd, 0), *own = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    CHECK(read_only != MAP_FAILED && *read_only == 0 && own != MAP_FAILED && *own == 0);
    CHECK(mmap(a + PAGE, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == a + PAGE && a[PAGE] == 0 && a[0] == 1 && a[2 * PAGE] == 1);
    FAILS(mmap(0, 0, PROT_READ, MAP_SHARED, fd, 0), EINVAL);
    FAILS(mmap(0, PAGE, PROT_READ, MAP_SHARED, 300, 0), EBADF);
    CHECK(open("/dev/null", O_RDONLY) == fd + 1); /* no file is left open */
    CHECK(close(fd) == 0 && a[0] == 1); /* it stays when the device is closed */

    fd = open(DEVICE, O_RDWR);
    char *p = pages(8);
    memset(p, 3, 8 * PAGE);
    CHECK(mprotect(p, PAGE, PROT_NONE) == 0 && mprotect(p, PAGE, PROT_READ | PROT_WRITE) == 0 && *p == 3);
    CHECK(madvise(p, PAGE, MADV_DONTNEED) == 0 && *p == 0 && p[PAGE] == 3);
    CHECK(madvise(p + PAGE, PAGE, MADV_FREE) == 0);
    FAILS(madvise(p + 1, PAGE, MADV_DONTNEED), EINVAL);
    FAILS(mprotect(p, PAGE, 0x100), EINVAL);
    char *q = mremap(p + 4 * PAGE, 4 * PAGE, 16 * PAGE, MREMAP_MAYMOVE);
    CHECK(q != MAP_FAILED && *q == 3 && q[3 * PAGE] == 3 && q[4 * PAGE] == 0);
    char *to = pages(4);
    CHECK(mremap(q, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to && *to == 3);
    FAILS(mremap(q, 4 * PAGE, 4 * PAGE, 0), EFAULT);
    CHECK(munmap(to, 4 * PAGE) == 0);
    FAILS(munmap(p + 1, PAGE), EINVAL);
    FAILS(munmap(p, 0), EINVAL);
    CHECK(mmap(p, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p && *p == 0);
    return 0;
}
