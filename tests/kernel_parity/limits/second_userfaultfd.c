/* One mapping, one userfaultfd: what the library watches for a device no other userfaultfd of the program can watch, nor the other way round. */
#include "limits.h"

int main(void) {
    int first = userfaultfd(0), second = userfaultfd(0);
    char *at = anonymous(4);
    CHECK(watch(first, at, 2) == 0);
    FACT("watch what another userfaultfd watches", watch(second, at, 2));
    FACT("watch a part of it, and more", watch(second, at + PAGE, 3));
    FACT("watch what lies beside it", watch(second, at + 2 * PAGE, 2));
    CHECK(unwatch(first, at, 2) == 0);
    FACT("watch it when the other has let go", watch(second, at, 2));
    return 0;
}
