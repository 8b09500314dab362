/* A locked page does not move to memory that is not locked. */
#include "limits.h"

int main(void) {
    int fd = userfaultfd(MOVE_FEATURE);
    char *at = anonymous(1), *place = anonymous(1);
    at[0] = 1;
    CHECK(watch(fd, place, 1) == 0);
    if (mlock(at, PAGE) != 0)
        SKIP("this user may lock no memory (%s)", strerrorname_np(errno));
    FACT("move a locked page away", move(fd, place, at));
    CHECK(munlock(at, PAGE) == 0);
    FACT("move it when it is not locked", move(fd, place, at));
    return 0;
}
