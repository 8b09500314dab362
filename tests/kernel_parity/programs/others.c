/* What else a program has: userfaultfds of its own, and the file that pins pages. */
#include "parity.h"
#include <linux/userfaultfd.h>

#define N 4ul

static int userfaultfd(void) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd < 0 && errno == EPERM)
        SKIP("this user may not have a userfaultfd");
    struct uffdio_api api = {.api = UFFD_API};
    CHECK(fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0);
    return fd;
}

static void watch(int uffd, char *at, size_t n) {
    struct uffdio_register range = {.range = {(uint64_t)at, n * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    CHECK(ioctl(uffd, UFFDIO_REGISTER, &range) == 0);
}

struct provider {
    int uffd;
    char *at, *content;
    size_t n, given;
};

/* Provides each page that is asked for, with the content's page of that place. */
static void *provide(void *argument) {
    struct provider *this = argument;
    while (this->given < this->n) {
        struct uffd_msg message;
        if (read(this->uffd, &message, sizeof message) != sizeof message)
            break;
        CHECK(message.event == UFFD_EVENT_PAGEFAULT);
        usleep(2000);
        uint64_t page = message.arg.pagefault.address & ~(PAGE - 1);
        struct uffdio_copy copy = {.dst = page, .src = (uint64_t)this->content + (page - (uint64_t)this->at), .len = PAGE};
        CHECK(ioctl(this->uffd, UFFDIO_COPY, &copy) == 0 || errno == EEXIST);
        this->given++;
    }
    return NULL;
}

TEST(read_unlocked_waits_for_a_userfaultfd, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *content = anonymous(N), *to = buffer(N);
    fill(content, N, 1);
    struct provider provider = {userfaultfd(), at, content, N, 0};
    watch(provider.uffd, at, N);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, provide, &provider) == 0);
    WORKS(fd, READ_UNLOCKED, at, to, N);
    CHECK(pthread_join(thread, NULL) == 0);
    HOLDS(to, N, 1);
    HOLDS(at, N, 1);
    DOES(fd, READ_UNLOCKED, at, to, N, N, 0);
    DOES(fd, READ, at, to, N, N, 0);
}

TEST(read_unlocked_of_what_was_dropped, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *content = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 2);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, N, 0);
    fill(content, N, 3);
    struct provider provider = {userfaultfd(), at, content, 2, 0};
    watch(provider.uffd, at, N);
    CHECK(madvise(at + PAGE, 2 * PAGE, MADV_DONTNEED) == 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, provide, &provider) == 0);
    WORKS(fd, READ_UNLOCKED, at, to, N);
    CHECK(pthread_join(thread, NULL) == 0);
    char *old = buffer(N);
    fill(old, N, 2);
    CHECK(memcmp(to, old, PAGE) == 0 && memcmp(to + PAGE, content + PAGE, 2 * PAGE) == 0 && memcmp(to + 3 * PAGE, old + 3 * PAGE, PAGE) == 0);
}

TEST(a_userfaultfd_on_other_ranges, BOTH) {
    int fd = device(0);
    char *at = anonymous(N), *away = anonymous(N), *content = anonymous(N), *to = buffer(N);
    fill(content, N, 4);
    struct provider provider = {userfaultfd(), at, content, N, 0};
    watch(provider.uffd, at, N);
    MOVED(fd, away, N, 5);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, provide, &provider) == 0);
    HOLDS(at, N, 4); /* its own faults reach it, and nobody else's */
    CHECK(pthread_join(thread, NULL) == 0);
    EQ(provider.given, N);
    ON_DEVICE(fd, away, N, RW);
    HOLDS(away, N, 5);
    struct uffdio_range range = {(uint64_t)at, N * PAGE};
    CHECK(ioctl(provider.uffd, UFFDIO_UNREGISTER, &range) == 0 && close(provider.uffd) == 0);
    WORKS(fd, MIGRATE_TO_DEV, at, to, N);
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 4);
}

TEST(a_userfaultfd_on_memory_that_was_on_the_device, BOTH) {
    int fd = device(0), uffd = userfaultfd();
    char *at = anonymous(N);
    MOVED(fd, at, N, 6);
    DOES(fd, MIGRATE_TO_SYS, at, NULL, N, N, 0);
    watch(uffd, at, N);
    struct uffdio_range range = {(uint64_t)at, N * PAGE};
    CHECK(ioctl(uffd, UFFDIO_UNREGISTER, &range) == 0);
    MOVED(fd, at, N, 7);
    HOLDS(at, N, 7);
}

TEST(a_userfaultfd_on_memory_that_is_on_the_device, BOTH) {
    int fd = device(0), uffd = userfaultfd();
    char *at = anonymous(N);
    MOVED(fd, at, N, 8);
    watch(uffd, at, N); /* pages that are on a device are not missing */
    HOLDS(at, N, 8);
    struct uffd_msg message;
    CHECK(fcntl(uffd, F_SETFL, O_NONBLOCK) == 0);
    EQ(read(uffd, &message, sizeof message), -1);
    EQ(errno, EAGAIN);
}

/* The struct of the file that pins: times, a range, pages a call, flags. */
struct gup {
    uint64_t get_usec, put_usec, addr, size;
    uint32_t per_call, gup_flags, test_flags, which[8];
};
enum { LONGTERM_BENCHMARK = 3, GET_BASIC = 4, PIN_BASIC = 5, FOR_WRITE = 1 };

static void pin(int gup, int kind, char *at, size_t n, uint32_t flags) {
    struct gup command = {.addr = (uint64_t)at, .size = n * PAGE, .per_call = (uint32_t)n, .gup_flags = flags};
    int result = ioctl(gup, _IOWR('g', kind, struct gup), &command);
    if (result != 0 || command.size != n * PAGE)
        WRONG("gup_test command %d: %d (errno %d), %#lx bytes", kind, result, errno, (long)command.size);
}

static int gup_test(void) {
    int gup = open("/sys/kernel/debug/gup_test", O_RDWR);
    if (gup < 0)
        SKIP("there is no gup_test");
    return gup;
}

TEST(pins_of_pages_on_the_device, BOTH) {
    int fd = device(0), gup = gup_test();
    char *at = anonymous(N);
    for (int kind = GET_BASIC; kind <= PIN_BASIC; kind++)
        for (uint32_t flags = 0; flags <= FOR_WRITE; flags++) {
            MOVED(fd, at, N, 9);
            pin(gup, kind, at, N, flags);
            if (coherent)
                ON_DEVICE(fd, at, N, RW);
            else
                AT_HOME(fd, at, N, RW);
            HOLDS(at, N, 9);
        }
}

TEST(a_pin_for_long_takes_pages_off_the_device, BOTH) {
    int fd = device(0), gup = gup_test();
    char *at = anonymous(N), *to = buffer(N);
    MOVED(fd, at, N, 10);
    pin(gup, LONGTERM_BENCHMARK, at, N, FOR_WRITE);
    AT_HOME(fd, at, N, RW);
    HOLDS(at, N, 10);
    DOES(fd, MIGRATE_TO_DEV, at, to, N, N, 0); /* the pin has ended with the call */
    ON_DEVICE(fd, at, N, RW);
    HOLDS(at, N, 10);
}

TEST(a_pin_ends_where_there_is_no_memory, BOTH) {
    int fd = device(0), gup = gup_test();
    char *at = anonymous(N);
    MOVED(fd, at, N, 11);
    CHECK(munmap(at + 2 * PAGE, PAGE) == 0);
    struct gup command = {.addr = (uint64_t)at, .size = N * PAGE, .per_call = 1, .gup_flags = FOR_WRITE};
    EQ(ioctl(gup, _IOWR('g', PIN_BASIC, struct gup), &command), 0);
    EQ(command.size, 2 * PAGE);
    HOLDS(at, 2, 11);
}
