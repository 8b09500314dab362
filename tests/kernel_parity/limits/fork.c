/* A child has no page that its parent has somewhere else. What is missing when a process forks is missing in the child too, and reads as zeros there: who would provide it must be told of the
 * fork, which needs a right, and must go on as long as the child lives. A page that both have is not moved away from either. So the library brings pages home when a process forks, where the
 * kernel lets both have an entry for the page on the device. */
#include "limits.h"
#include <linux/capability.h>
#include <pthread.h>

/* Reads the event of a fork, which waits for that, and closes the descriptor that comes with it: nobody provides anything to the child. */
static void *hear(void *uffd) {
    struct uffd_msg message;
    CHECK(read(*(int *)uffd, &message, sizeof message) == (ssize_t)sizeof message && message.event == UFFD_EVENT_FORK);
    CHECK(close((int)message.arg.fork.ufd) == 0);
    return NULL;
}

/* What a child reads at `at`. */
static int of_child(const char *at) {
    int fds[2];
    CHECK(pipe(fds) == 0);
    pid_t child = fork();
    if (child == 0)
        _exit(write(fds[1], at, 1) != 1);
    char byte = 77;
    CHECK(child > 0 && read(fds[0], &byte, 1) == 1 && waitpid(child, NULL, 0) == child);
    return byte;
}

int main(void) {
    int fd = userfaultfd(MOVE_FEATURE);
    char *at = anonymous(1), *device = anonymous(1), *shared = anonymous(1);
    at[0] = 5;
    CHECK(watch(fd, device, 1) == 0 && move(fd, device, at) == 0); /* it is on the device now */
    CHECK(unwatch(fd, device, 1) == 0 && watch(fd, at, 1) == 0);
    printf("a child reads 5, which is elsewhere, as: %d\n", of_child(at));

    shared[0] = 6;
    pid_t child = fork();
    if (child == 0)
        for (;;)
            pause();
    FACT("move a page away that a child has too", move(fd, at, shared));
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
    FACT("move it when the child is gone", move(fd, at, shared));

    int told = userfaultfd(UFFD_FEATURE_EVENT_FORK);
    char *missing = anonymous(1);
    pthread_t thread;
    CHECK(watch(told, missing, 1) == 0 && pthread_create(&thread, NULL, hear, &told) == 0);
    printf("a child reads a missing page, when the descriptor that came with the event is closed, as: %d\n", of_child(missing));

    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {0};
    CHECK(syscall(SYS_capset, &header, none) == 0);
    int mine = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {UFFD_API, UFFD_FEATURE_EVENT_FORK, 0};
    CHECK(mine >= 0);
    FACT("ask to be told of forks without CAP_SYS_PTRACE", ioctl(mine, UFFDIO_API, &api));
    return 0;
}
