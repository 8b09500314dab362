/* A page that a private file mapping has of its own can neither be watched when it is missing nor be moved away. So it is mirrored where it is. */
#include "limits.h"
#include <sys/vfs.h>

int main(void) {
    int fd = userfaultfd(MOVE_FEATURE);
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    struct statfs system;
    CHECK(file >= 0 && fstatfs(file, &system) == 0);
    if (system.f_type == 0x01021994)
        SKIP("this program lies in a file in memory (tmpfs), which is another kind");
    char *mapped = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0), *place = anonymous(1);
    CHECK(mapped != MAP_FAILED);
    mapped[0] = 1; /* the page is anonymous memory now, in all but its mapping */
    FACT("watch a private file mapping for missing pages", watch(fd, mapped, 1));
    CHECK(watch(fd, place, 1) == 0);
    FACT("move a written page of it away", move(fd, place, mapped));

    /* A file in memory may be watched, and its written pages do not move either. */
    int memory = memfd_create("limits", MFD_CLOEXEC);
    CHECK(memory >= 0 && ftruncate(memory, PAGE) == 0);
    char *private = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, memory, 0);
    CHECK(private != MAP_FAILED);
    private[0] = 1;
    FACT("move a written page of a private mapping of a file in memory away", move(fd, place, private));

    char *page = anonymous(1);
    page[0] = 1;
    FACT("move a page of anonymous memory away", move(fd, place, page));
    return 0;
}
