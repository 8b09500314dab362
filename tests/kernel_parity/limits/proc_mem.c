/* Who looks at a process's memory through /proc or ptrace does not wait for a page that a userfaultfd would provide: the look fails, and the userfaultfd hears nothing of it. */
#include "limits.h"
#include <poll.h>
#include <pthread.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

static int fd;
static volatile int faults;

/* Provides each page that is asked for. */
static void *serve(void *page) {
    struct uffd_msg message;
    while (read(fd, &message, sizeof message) == (ssize_t)sizeof message) {
        faults++;
        struct uffdio_copy copy = {message.arg.pagefault.address & -PAGE, (uint64_t)page, PAGE, 0, 0};
        ioctl(fd, UFFDIO_COPY, &copy);
    }
    return NULL;
}

int main(int argc, char **argv) {
    (void)argc;
    if (!argv[1]) { /* again, with an argument of several pages: one of them holds nothing else */
        static char long_one[4 * PAGE];
        memset(long_one, 'x', sizeof long_one - 1);
        execl("/proc/self/exe", argv[0], long_one, NULL);
        CHECK(0);
    }
    fd = userfaultfd(0);
    char *at = anonymous(1), *page = anonymous(1), byte = 0;
    page[0] = 'y';
    pthread_t thread;
    CHECK(watch(fd, at, 1) == 0 && pthread_create(&thread, NULL, serve, page) == 0);

    int memory = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    CHECK(memory >= 0);
    FACT("read a missing page through /proc/PID/mem", pread(memory, &byte, 1, (off_t)(uintptr_t)at));
    printf("faults that the userfaultfd heard of: %d\n", faults);
    struct iovec local = {&byte, 1}, remote = {at, 1};
    FACT("read it by process_vm_readv", process_vm_readv(getpid(), &local, 1, &remote, 1, 0));
    printf("faults that the userfaultfd heard of: %d\n", faults);
    FACT("read it through /proc/PID/mem now", pread(memory, &byte, 1, (off_t)(uintptr_t)at));

    /* The arguments: a page of them goes. */
    char *argument = (char *)(((uintptr_t)argv[1] + 2 * PAGE) & -PAGE);
    CHECK(madvise(argument, PAGE, MADV_DONTNEED) == 0 && watch(fd, argument, 1) == 0);
    static char words[8 * PAGE];
    int list = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    size_t got = 0;
    for (ssize_t n; (n = read(list, words + got, sizeof words - got)) > 0;)
        got += (size_t)n;
    printf("/proc/PID/cmdline ends at a missing page: %s\n", got == (size_t)(argument - argv[0]) ? "yes" : "no");
    printf("faults that the userfaultfd heard of: %d\n", faults);

    pid_t child = fork();
    if (child == 0) {
        int own = userfaultfd(0);
        CHECK(unwatch(own, at, 1) == 0 && madvise(at, PAGE, MADV_DONTNEED) == 0 && watch(own, at, 1) == 0);
        CHECK(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0 && raise(SIGSTOP) == 0);
        _exit(0);
    }
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFSTOPPED(status));
    errno = 0;
    long word = ptrace(PTRACE_PEEKDATA, child, at, NULL);
    FACT("read a missing page by ptrace", word == -1 && errno ? -1 : 0);
    ptrace(PTRACE_KILL, child, NULL, NULL);
    return 0;
}
