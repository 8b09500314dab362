/* mremap(2) to a fixed place moves several mappings together, but not if one of them is watched. So the library moves them one by one. */
#include "limits.h"

/* Four pages in two mappings. */
static char *two(void) {
    char *at = anonymous(4);
    memset(at, 1, 4 * PAGE);
    CHECK(mprotect(at + 2 * PAGE, 2 * PAGE, PROT_READ) == 0);
    return at;
}

static int together(char *from, size_t pages) {
    char *to = anonymous(4);
    return mremap(from, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to ? 0 : -1;
}

int main(void) {
    int fd = userfaultfd(0);
    if (together(two(), 4) < 0)
        SKIP("this kernel moves no two mappings together, watched or not (%s)", strerrorname_np(errno));
    puts("move two mappings together: done");
    char *watched = two();
    CHECK(watch(fd, watched, 4) == 0);
    FACT("move two watched mappings together", together(watched, 4));
    FACT("move one of them", together(watched, 2));
    char *second = two();
    CHECK(watch(fd, second + 2 * PAGE, 2) == 0);
    FACT("move two together of which the second is watched", together(second, 4));
    return 0;
}
