/* Runs one case, or lists them all. */
#include "parity.h"

struct test *tests;
int coherent;
const char *self;
struct command out;

int device(int which) {
    char path[] = "/dev/hmm_dmirror0";
    path[sizeof path - 2] = (char)('0' + which + 2 * coherent);
    int fd = open(path, O_RDWR);
    if (fd < 0 && coherent && (errno == ENOENT || errno == ENXIO))
        SKIP("there is no %s", path);
    CHECK(fd >= 0);
    return fd;
}

int command(int fd, unsigned request, const void *addr, const void *ptr, uint64_t npages) {
    out = (struct command){(uint64_t)addr, (uint64_t)ptr, npages, UNSET, UNSET};
    int result = ioctl(fd, request, &out), error = errno;
    CHECK(out.addr == (uint64_t)addr && out.ptr == (uint64_t)ptr && out.npages == npages);
    if (result != 0 && result != -1)
        WRONG("ioctl gave %d", result);
    return result == 0 ? 0 : error;
}

char *anonymous(size_t npages) {
    char *at = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

char *shared(size_t npages) {
    char *at = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

char *aligned(size_t blocks) {
    char *at = anonymous((blocks + 1) * 512);
    char *start = (char *)(((uintptr_t)at + BLOCK - 1) & ~(BLOCK - 1)), *end = start + blocks * BLOCK, *last = at + (blocks + 1) * BLOCK;
    CHECK((start == at || munmap(at, (size_t)(start - at)) == 0) && (end == last || munmap(end, (size_t)(last - end)) == 0));
    return start;
}

/* From now on no other case changes what all of the system has: it would take the changed setting for the one to restore. */
static void alone(void) {
    int program = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    CHECK(program >= 0 && flock(program, LOCK_EX) == 0); /* until this process ends */
}

static const char pool_small[] = "/proc/sys/vm/nr_hugepages", pool_large[] = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
static const char *pool;
static long pool_before = -1;
static pid_t pool_owner;

static int set_pool(long count) {
    FILE *setting = fopen(pool, "w");
    if (!setting)
        return -1;
    int bad = fprintf(setting, "%ld\n", count) < 0;
    return fclose(setting) != 0 || bad ? -1 : 0;
}

static char swap_path[64];

void swap_on(void) {
    enum { npages = 4096 };
    alone();
    FILE *all = fopen("/proc/swaps", "r");
    char line[256];
    int count = 0;
    while (all && fgets(line, sizeof line, all))
        count++;
    if (!all)
        SKIP("this kernel has no swap");
    CHECK(fclose(all) == 0);
    if (count > 1)
        return; /* there is some */
    char path[] = "/var/tmp/parity-swap-XXXXXX";
    int file = mkstemp(path);
    if (file < 0)
        SKIP("a file to swap to cannot be made (errno %d)", errno);
    char *page = anonymous(1);
    uint32_t head[] = {1, npages - 1, 0};
    int bad = 0;
    for (size_t i = 0; i < npages; i++) {
        if (i == 0)
            memcpy(page + 1024, head, sizeof head), memcpy(page + PAGE - 10, "SWAPSPACE2", 10);
        bad |= write(file, page, PAGE) != (ssize_t)PAGE;
        if (i == 0)
            memset(page, 0, PAGE);
    }
    bad |= fsync(file) != 0 || close(file) != 0 || swapon(path, 0) != 0;
    if (bad) {
        int error = errno;
        unlink(path);
        SKIP("swap cannot be enabled here (errno %d)", error);
    }
    memcpy(swap_path, path, sizeof path), pool_owner = getpid();
}

void restore_pool(void) {
    if (swap_path[0] && pool_owner == getpid())
        swapoff(swap_path), unlink(swap_path);
    swap_path[0] = 0;
    if (pool_before >= 0 && pool_owner == getpid())
        set_pool(pool_before);
    pool_before = -1;
}

static char *pool_map(const char *setting_, size_t count, size_t len, int size) {
    alone();
    FILE *setting = fopen(setting_, "r");
    long before = -1;
    if (!setting || fscanf(setting, "%ld", &before) != 1)
        SKIP("this kernel has no pool of such huge pages");
    fclose(setting);
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | size;
    char *at = mmap(NULL, len, PROT_READ | PROT_WRITE, kind, -1, 0);
    if (at == MAP_FAILED) {
        pool = setting_, pool_before = before, pool_owner = getpid();
        if (set_pool(before + (long)count) != 0)
            SKIP("the pool of huge pages is empty, and this user may not fill it");
        at = mmap(NULL, len, PROT_READ | PROT_WRITE, kind, -1, 0);
        if (at == MAP_FAILED) {
            restore_pool();
            SKIP("there are no huge pages for the pool");
        }
    }
    return at;
}

char *pool_pages(size_t count) { return pool_map(pool_small, count, count * BLOCK, 0); }

char *pool_giant(void) { return pool_map(pool_large, 1, 512 * BLOCK, 30 << 26 /* MAP_HUGE_1GB */); }

int file_of(size_t npages, uint64_t seed) {
    int fd = memfd_create("parity", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)(npages * PAGE)) == 0);
    char *at = anonymous(npages);
    fill(at, npages, seed);
    CHECK(pwrite(fd, at, npages * PAGE, 0) == (ssize_t)(npages * PAGE) && munmap(at, npages * PAGE) == 0);
    return fd;
}

char *buffer(size_t npages) {
    char *at = anonymous(npages);
    memset(at, (int)(UNSET & 0xff), npages * PAGE);
    return at;
}

static uint64_t word_of(uint64_t seed, size_t index) { return seed * 0x9e3779b97f4a7c15ul + index * 0x100000001b3ul + 1; }

void fill(void *at, size_t npages, uint64_t seed) {
    for (size_t index = 0; index < npages * PAGE / 8; index++)
        ((uint64_t *)at)[index] = word_of(seed, index);
}

long differs(const void *at, size_t npages, uint64_t seed) {
    for (size_t index = 0; index < npages * PAGE / 8; index++)
        if (((const uint64_t *)at)[index] != word_of(seed, index))
            return (long)index;
    return -1;
}

enum where where(const void *at) {
    static int pagemap = -1;
    static pid_t whose;
    if (whose != getpid()) {
        pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        whose = getpid();
        CHECK(pagemap >= 0);
    }
    uint64_t entry;
    CHECK(pread(pagemap, &entry, 8, (off_t)((uintptr_t)at / PAGE * 8)) == 8);
    return entry >> 63 ? HERE : entry >> 62 & 1 ? AWAY : EMPTY;
}

#define PM_SCAN _IOWR('f', 16, struct { uint64_t words[12]; })
#define PM_HUGE (1ul << 6)

int is_huge(const void *at) {
    struct {
        uint64_t start, end, categories;
    } region = {0, 0, 0};
    struct {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, any, result;
    } scan = {96, 0, (uint64_t)at, (uint64_t)at + PAGE, 0, (uint64_t)&region, 1, 0, 0, PM_HUGE, 0, PM_HUGE};
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC), found = ioctl(pagemap, PM_SCAN, &scan);
    CHECK(close(pagemap) == 0);
    if (found < 0)
        SKIP("this kernel does not tell where huge pages are");
    return found == 1;
}

int look(int fd, const void *at) {
    unsigned char bytes[3] = {0xee, 0xee, 0xee};
    DOES(fd, SNAPSHOT, at, bytes + 1, 1, 1, 0);
    CHECK(bytes[0] == 0xee && bytes[2] == 0xee);
    return bytes[1];
}

void well(pid_t child) {
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        _exit(77);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        WRONG("a child ended with status %#x", status);
}

double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

double race_seconds(void) {
    const char *value = getenv("UHMM_TEST_SECONDS");
    double seconds = value ? atof(value) : 0;
    return seconds > 0 ? seconds : 5;
}

int main(int argc, char **argv) {
    self = argv[0];
    if (argc < 3) {
        for (struct test *test = tests; test; test = test->next)
            printf("%s%s%s\n", test->name, test->kinds & PRIVATE ? " private" : "", test->kinds & COHERENT ? " coherent" : "");
        return 0;
    }
    coherent = !strcmp(argv[2], "coherent");
    for (struct test *test = tests; test; test = test->next)
        if (!strcmp(test->name, argv[1])) {
            test->run();
            restore_pool();
            return 0;
        }
    WRONG("no such case: %s", argv[1]);
}
