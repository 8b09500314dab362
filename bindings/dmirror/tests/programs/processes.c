/* Whose device it is: forked children, programs that are executed, an owner that has died. */
#include "check.h"
#include <spawn.h>

static int device(const char *path) {
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0);
    return fd;
}

/* The errors of a device whose process has ended. */
static void is_dead(int fd) {
    struct command command = {.addr = (uint64_t)pages(1), .ptr = (uint64_t)pages(1), .npages = 1};
    FAILS(ioctl(fd, READ, &command), EFAULT);
    FAILS(ioctl(fd, WRITE, &command), EFAULT);
    FAILS(ioctl(fd, MIGRATE_TO_DEV, &command), EINVAL);
    FAILS(ioctl(fd, MIGRATE_TO_SYS, &command), EINVAL);
    FAILS(ioctl(fd, UNKNOWN, &command), EINVAL);
    CHECK(ioctl(fd, RELEASE, &command) == 0);
}

int main(int count, char **arguments) {
    if (count == 3) { /* the program that was executed */
        struct stat status;
        int fd = atoi(arguments[1]);
        CHECK(fstat(fd, &status) == 0 && S_ISCHR(status.st_mode));
        is_dead(fd);
        FAILS(flags(atoi(arguments[2])), EBADF);
        fd = device(DEVICE);
        CHECK(flags(fd) == 0);
        return 0;
    }

    /* A child that opens, whose parent has not. */
    pid_t child = fork();
    if (child == 0) {
        int fd = device(DEVICE);
        CHECK(flags(fd) == 0 && close(fd) == 0);
        _exit(0);
    }
    well(child);

    int fd = device(DEVICE);
    child = fork();
    if (child == 0) {
        CHECK(flags(fd) == 0); /* the parent's */
        struct command bad = {.addr = 1, .npages = 1};
        FAILS(ioctl(fd, READ, &bad), EINVAL);
        FAILS(ioctl(fd, READ, (void *)1), EFAULT);
        struct command write = {.addr = PAGE, .ptr = PAGE, .npages = 1};
        FAILS(ioctl(fd, WRITE, &write), EFAULT);
        int own = device("/dev/hmm_dmirror1");
        CHECK(flags(own) == 0 && flags(fd) == 0);
        pid_t grandchild = fork();
        if (grandchild == 0) {
            CHECK(flags(own) == 0 && flags(fd) == 0);
            int third = device("/dev/hmm_dmirror2");
            CHECK(flags(own) == 0 && flags(fd) == 0 && flags(third) == 0);
            CHECK(close(third) == 0 && close(own) == 0 && close(fd) == 0);
            _exit(0);
        }
        well(grandchild);
        CHECK(flags(own) == 0 && close(own) == 0 && close(fd) == 0);
        _exit(0);
    }
    well(child);
    CHECK(flags(fd) == 0);

    /* The child outlives the process that opened. */
    int tell[2];
    CHECK(pipe(tell) == 0);
    child = fork();
    if (child == 0) {
        int own = device(DEVICE);
        pid_t heir = fork();
        CHECK(heir >= 0);
        if (heir == 0) {
            while (getppid() != 1 && kill(getppid(), 0) == 0 && flags(own) == 0 && ({
                       struct command command = {.addr = (uint64_t)tell, .npages = 1};
                       command.addr &= ~(PAGE - 1);
                       errno = 0;
                       ioctl(own, MIGRATE_TO_SYS, &command) == 0 || errno != EINVAL;
                   }))
                usleep(1000);
            is_dead(own);
            CHECK(write(tell[1], "x", 1) == 1);
            _exit(0);
        }
        usleep(20000);
        _exit(0);
    }
    well(child);
    char byte;
    CHECK(close(tell[1]) == 0);
    CHECK(read(tell[0], &byte, 1) == 1);

    /* Spawned programs and shells, which share memory for a while or do not. */
    CHECK(system("exit 0") == 0);
    CHECK(flags(fd) == 0);
    pid_t vchild = vfork();
    if (vchild == 0) {
        close(fd);
        _exit(0);
    }
    well(vchild);
    CHECK(flags(fd) == 0);

    int gone = open("/dev/hmm_dmirror1", O_RDWR | O_CLOEXEC);
    CHECK(gone > fd);
    char numbers[2][16];
    sprintf(numbers[0], "%d", fd);
    sprintf(numbers[1], "%d", gone);
    execl("/proc/self/exe", arguments[0], numbers[0], numbers[1], NULL);
    CHECK(!"executed");
}
