/* Without the right to handle page faults there is no device. */
#include "check.h"

int main(void) {
    FAILS(open(DEVICE, O_RDWR), ENODEV);
    FAILS(open(DEVICE, O_RDWR), ENODEV);
    CHECK(access(DEVICE, R_OK) == 0);
    return 0;
}
