/* What the programs share. They know nothing but the device's interface. A case that finds all as it should be returns; one that does not says what is wrong and ends with 1; one that cannot
 * be done here says why and ends with 77. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct command {
    uint64_t addr, ptr, npages, cpages, faults;
};

#define READ 0xC0284800u
#define WRITE 0xC0284801u
#define MIGRATE_TO_DEV 0xC0284802u
#define MIGRATE_TO_SYS 0xC0284803u
#define SNAPSHOT 0xC0284804u
#define EXCLUSIVE 0xC0284805u
#define CHECK_EXCLUSIVE 0xC0284806u
#define RELEASE 0xC0284807u
#define FLAGS 0xC0284808u
#define READ_UNLOCKED 0xC0284809u

/* Permission bytes. */
enum { ERROR = 0xff, NONE = 0, RO = 1, RW = 2, BIG = 4, GIANT = 8, ZERO = 0x10, MINE = 0x20, COHERENT_MINE = 0x40, COHERENT_OTHER = 0x50 };

#define PAGE 4096ul
#define BLOCK (512 * PAGE)
/* What is in the outputs before a command, and in buffers. */
#define UNSET 0x5a5a5a5a5a5a5a5aul

/* Cases, and for which kinds of memory each is. */
enum { PRIVATE = 1, COHERENT = 2, BOTH = 3 };
struct test {
    const char *name;
    int kinds;
    void (*run)(void);
    struct test *next;
};
extern struct test *tests;
#define TEST(name_, kinds_)                                        \
    static void name_(void);                                       \
    __attribute__((constructor)) static void add_##name_(void) {   \
        static struct test test = {#name_, kinds_, name_, NULL};   \
        test.next = tests, tests = &test;                          \
    }                                                              \
    static void name_(void)

/* This run's memory is coherent. */
extern int coherent;
extern const char *self;

/* Gives back what `pool_pages`, `pool_giant` and `swap_on` took from the system; does nothing otherwise. */
void restore_pool(void);
#define WRONG(...)                                       \
    do {                                                 \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);  \
        fprintf(stderr, __VA_ARGS__);                    \
        fputc('\n', stderr);                             \
        restore_pool();                                  \
        _exit(1);                                        \
    } while (0)
#define SKIP(...)                                                     \
    do {                                                              \
        printf("skipped: "), printf(__VA_ARGS__), putchar('\n');      \
        fflush(stdout);                                               \
        _exit(77);                                                    \
    } while (0)
#define CHECK(what)                                          \
    do {                                                     \
        if (!(what))                                         \
            WRONG("not so: %s (errno %d)", #what, errno);    \
    } while (0)
#define EQ(what, expected)                                                           \
    do {                                                                             \
        long got_ = (long)(what), expected_ = (long)(expected);                      \
        if (got_ != expected_)                                                       \
            WRONG("%s is %#lx, expected %#lx", #what, got_, expected_);              \
    } while (0)

/* Opens one of the two devices of this run's kind. */
int device(int which);

/* One command: 0 or the error; the outputs are in `out`. */
extern struct command out;
int command(int fd, unsigned request, const void *addr, const void *ptr, uint64_t npages);

/* It succeeds, with these outputs. */
#define DOES(fd, request, addr, ptr, n, pages_done, rounds)                                                                             \
    do {                                                                                                                                \
        int error_ = command(fd, request, addr, ptr, n);                                                                                \
        if (error_ || out.cpages != (uint64_t)(pages_done) || out.faults != (uint64_t)(rounds))                                         \
            WRONG("%s of %s: error %d (%s), cpages %ld, faults %ld; expected cpages %ld, faults %ld", #request, #addr, error_,          \
                  strerror(error_), (long)out.cpages, (long)out.faults, (long)(pages_done), (long)(rounds));                            \
    } while (0)
/* It succeeds, whatever the rounds. */
#define WORKS(fd, request, addr, ptr, n)                                                                               \
    do {                                                                                                               \
        int error_ = command(fd, request, addr, ptr, n);                                                               \
        if (error_ || out.cpages != (uint64_t)(n))                                                                     \
            WRONG("%s of %s: error %d (%s), cpages %ld; expected %ld", #request, #addr, error_, strerror(error_),      \
                  (long)out.cpages, (long)(n));                                                                        \
    } while (0)
/* It fails with just this error, and leaves the struct alone. */
#define FAILS(fd, request, addr, ptr, n, error)                                                                                 \
    do {                                                                                                                        \
        int error_ = command(fd, request, addr, ptr, n);                                                                        \
        if (error_ != (error))                                                                                                  \
            WRONG("%s of %s: error %d (%s), cpages %ld; expected %s", #request, #addr, error_, strerror(error_),                \
                  (long)out.cpages, #error);                                                                                    \
        if (out.cpages != UNSET || out.faults != UNSET)                                                                         \
            WRONG("%s of %s: failed, and changed the struct", #request, #addr);                                                 \
    } while (0)

/* Memory. */
char *anonymous(size_t npages);            /* private, fresh */
char *shared(size_t npages);               /* shared, anonymous */
char *aligned(size_t blocks);              /* private, fresh, aligned to 2 MiB */
char *pool_giant(void);                    /* one page of 1 GiB, likewise */
char *pool_pages(size_t count);            /* huge pages of the pool, which grows for it as long as the case runs */
void swap_on(void);                        /* there is swap as long as the case runs */
int file_of(size_t npages, uint64_t seed); /* a file in memory with this pattern */
char *buffer(size_t npages);               /* with UNSET in every word */

/* A pattern that is different in every word of every page. */
void fill(void *at, size_t npages, uint64_t seed);
long differs(const void *at, size_t npages, uint64_t seed); /* the first word that is not the pattern's, or -1 */
#define HOLDS(at, n, seed)                                                                                                  \
    do {                                                                                                                    \
        const void *at_ = (at);                                                                                             \
        long word_ = differs(at_, n, seed);                                                                                 \
        if (word_ >= 0)                                                                                                     \
            WRONG("%s of %s: word %ld of page %ld is %#lx", #seed, #at, word_ % 512, word_ / 512, ((long *)at_)[word_]);    \
    } while (0)
#define ALL(at, n, value)                                                                                                                \
    do {                                                                                                                                 \
        for (size_t word_ = 0; word_ < (size_t)(n) * PAGE / 8; word_++)                                                                  \
            if (((uint64_t *)(at))[word_] != (value))                                                                                    \
                WRONG("%s: word %ld is %#lx, not %#lx", #at, (long)word_, ((long *)(at))[word_], (long)(value));                          \
    } while (0)

/* Where a page is: what /proc/self/pagemap says. */
enum where { EMPTY, AWAY, HERE };
enum where where(const void *at);
#define IS(at, n, place)                                                                                                  \
    do {                                                                                                                  \
        for (size_t page_ = 0; page_ < (size_t)(n); page_++)                                                              \
            if (where((char *)(at) + page_ * PAGE) != (place))                                                            \
                WRONG("page %ld of %s: it is %d, not %s", (long)page_, #at, where((char *)(at) + page_ * PAGE), #place);  \
    } while (0)

/* Whether the kernel maps a page by a 2 MiB entry, now. */
int is_huge(const void *at);

/* One permission byte. */
int look(int fd, const void *at);
#define LOOKS(fd, at, n, byte)                                                                                                           \
    do {                                                                                                                                 \
        for (size_t page_ = 0; page_ < (size_t)(n); page_++) {                                                                           \
            int byte_ = look(fd, (char *)(at) + page_ * PAGE);                                                                           \
            if (byte_ != (byte))                                                                                                         \
                WRONG("page %ld of %s: SNAPSHOT says %#x, not %#x (%s)", (long)page_, #at, byte_, (int)(byte), #byte);                   \
        }                                                                                                                                \
    } while (0)
/* The pages are on the device, as the kernel tells and as the device does. */
#define ON_DEVICE(fd, at, n, access)                                     \
    do {                                                                 \
        IS(at, n, coherent ? HERE : AWAY);                               \
        LOOKS(fd, at, n, (access) | (coherent ? COHERENT_MINE : MINE));  \
    } while (0)
#define AT_HOME(fd, at, n, access)       \
    do {                                 \
        IS(at, n, HERE);                 \
        LOOKS(fd, at, n, access);        \
    } while (0)
/* Pages with a pattern, on the device. */
#define MOVED(fd, at, n, seed)                                 \
    do {                                                       \
        char *read_back_ = buffer(n);                          \
        fill(at, n, seed);                                     \
        DOES(fd, MIGRATE_TO_DEV, at, read_back_, n, n, 0);     \
        ON_DEVICE(fd, at, n, RW);                              \
        HOLDS(read_back_, n, seed);                            \
        CHECK(munmap(read_back_, (n) * PAGE) == 0);            \
    } while (0)

/* A child that finds all as it should be; one that is left alone ends some day. */
#define CHILD(...)                  \
    ({                              \
        pid_t child_ = fork();      \
        CHECK(child_ >= 0);         \
        if (child_ == 0) {          \
            alarm(40);              \
            __VA_ARGS__;            \
            _exit(0);               \
        }                           \
        child_;                     \
    })
void well(pid_t child);

/* How long a race runs. */
double now(void);
double race_seconds(void);
