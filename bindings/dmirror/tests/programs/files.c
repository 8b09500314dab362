/* What the files look like from outside. */
#include "check.h"

#define GUP "/sys/kernel/debug/gup_test"

int main(void) {
    for (int i = 0; i < 4; i++) {
        char path[32];
        struct stat a, b, c, d, e;
        struct statx x, y;
        sprintf(path, "/dev/hmm_dmirror%d", i);
        CHECK(access(path, F_OK) == 0 && access(path, R_OK | W_OK) == 0);
        FAILS(access(path, X_OK), EACCES);
        CHECK(euidaccess(path, R_OK) == 0 && faccessat(AT_FDCWD, path, W_OK, 0) == 0 && faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) == 0);
        CHECK(stat(path, &a) == 0 && lstat(path, &b) == 0 && fstatat(AT_FDCWD, path, &c, 0) == 0);
        int fd = open(path, O_RDWR);
        CHECK(fd >= 0 && fstat(fd, &d) == 0 && fstatat(fd, "", &e, AT_EMPTY_PATH) == 0);
        CHECK(S_ISCHR(a.st_mode) && minor(a.st_rdev) == (unsigned)i && major(a.st_rdev) != 0);
        CHECK(!memcmp(&a, &b, sizeof a) && !memcmp(&a, &c, sizeof a) && !memcmp(&a, &d, sizeof a) && !memcmp(&a, &e, sizeof a));
        CHECK(statx(AT_FDCWD, path, 0, STATX_ALL, &x) == 0 && statx(fd, "", AT_EMPTY_PATH, STATX_ALL, &y) == 0);
        CHECK(S_ISCHR(x.stx_mode) && x.stx_rdev_minor == (unsigned)i && x.stx_rdev_major == major(a.st_rdev));
        CHECK(x.stx_ino == a.st_ino && y.stx_ino == x.stx_ino && y.stx_mode == x.stx_mode);
        FAILS(syscall(SYS_access, path, F_OK), ENOENT);
        FAILS(stat(path, (void *)8), EFAULT);
    }
    struct stat a, b;
    FAILS(stat("/dev/hmm_dmirror4", &a), ENOENT);
    FAILS(access("/dev/hmm_dmirror4", F_OK), ENOENT);
    FAILS(stat((char *)1, &a), EFAULT);

    /* Others are as they are. */
    CHECK(stat("/dev/null", &a) == 0 && syscall(SYS_stat, "/dev/null", &b) == 0 && !memcmp(&a, &b, sizeof a));
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK(fstat(pair[0], &a) == 0 && S_ISSOCK(a.st_mode));

    if (geteuid() == 0) {
        int fd = open(GUP, O_RDWR);
        CHECK(access(GUP, R_OK) == 0 && stat(GUP, &a) == 0 && S_ISREG(a.st_mode));
        CHECK(fd >= 0 && fstat(fd, &b) == 0 && S_ISREG(b.st_mode) && a.st_ino == b.st_ino);
    }
    return 0;
}
