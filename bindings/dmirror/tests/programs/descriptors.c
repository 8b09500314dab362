/* A descriptor of a device is one like any other. */
#include "check.h"
#include <dirent.h>

static int count_descriptors(void) {
    DIR *all = opendir("/proc/self/fd");
    int count = 0;
    while (readdir(all))
        count++;
    closedir(all);
    return count;
}

static void send_descriptor(int to, int fd) {
    char byte = 0, room[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET, header->cmsg_type = SCM_RIGHTS, header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    CHECK(sendmsg(to, &message, 0) == 1);
}

static int receive_descriptor(int from) {
    char byte, room[CMSG_SPACE(sizeof(int))];
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    int fd;
    CHECK(recvmsg(from, &message, 0) == 1 && CMSG_FIRSTHDR(&message));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

int main(void) {
    /* A process that exists before anything is opened. */
    int pair[2], pair2[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    pid_t other = fork();
    if (other == 0) {
        close(pair[0]); /* so that this ends if the other does */
        int fd = receive_descriptor(pair[1]);
        CHECK(flags(fd) == 0);
        struct stat status;
        CHECK(fstat(fd, &status) == 0 && S_ISCHR(status.st_mode));
        _exit(0);
    }

    int before = count_descriptors();
    close(0);
    CHECK(open(DEVICE, O_RDWR) == 0);
    CHECK(count_descriptors() == before);
    CHECK(fcntl(0, F_GETFD) == 0);
    int fd = open(DEVICE, O_RDWR | O_CLOEXEC);
    CHECK(fd > 2 && fcntl(fd, F_GETFD) == FD_CLOEXEC);
    CHECK(count_descriptors() == before + 1);
    send_descriptor(pair[0], fd);
    well(other);

    /* dup and its kin, and the last copy's close. */
    int copy = dup(fd), third = fcntl(fd, F_DUPFD, 40);
    CHECK(copy > fd && third >= 40 && dup2(fd, 50) == 50 && dup3(fd, 51, O_CLOEXEC) == 51);
    CHECK(close(fd) == 0);
    CHECK(flags(copy) == 0 && flags(third) == 0 && flags(50) == 0 && flags(51) == 0);
    FAILS(flags(fd), EBADF);
    FAILS(close(fd), EBADF);
    CHECK(open("/dev/hmm_dmirror1", O_RDWR) == fd);
    CHECK(dup2(0, fd) == fd && flags(fd) == 0); /* which closes the second device */
    CHECK(dup2(fd, fd) == fd && flags(fd) == 0);
    FAILS(dup2(200, fd), EBADF);
    CHECK(flags(fd) == 0);
    CHECK(close(copy) == 0 && close(third) == 0 && close(50) == 0 && close(51) == 0 && close(fd) == 0);

    /* What is the program's is all that it can close. */
    CHECK(close_range(3, ~0u, 0) == 0);
    CHECK(flags(0) == 0);
    fd = open("/dev/hmm_dmirror2", O_RDWR);
    CHECK(fd == 3 && flags(fd) == 0);

    /* Many. */
    for (int i = 0; i < 100; i++)
        CHECK(open(i % 2 ? "/dev/hmm_dmirror1" : "/dev/hmm_dmirror3", O_RDWR) == 4 + i);
    for (int i = 0; i < 100; i++)
        CHECK(flags(4 + i) == 0 && close(4 + i) == 0);
    closefrom(4);

    /* Whatever is written to it, its commands go on. */
    for (int i = 0; i < 300; i++) {
        char garbage[100];
        memset(garbage, i, sizeof garbage);
        CHECK(write(3, garbage, (size_t)i % 100 + 1) > 0);
        send_descriptor(3, 0);
    }
    pid_t child = fork();
    if (child == 0) {
        CHECK(flags(3) == 0);
        _exit(0);
    }
    well(child);
    CHECK(flags(3) == 0 && read(3, &child, 1) == 0);

    /* Other ways to open. */
    CHECK((fd = openat(AT_FDCWD, DEVICE, O_RDWR)) == 4 && flags(fd) == 0 && close(fd) == 0);
    CHECK((fd = openat(3, DEVICE, O_RDWR)) == 4 && flags(fd) == 0 && close(fd) == 0);
    CHECK((fd = open64(DEVICE, O_RDWR)) == 4 && close(fd) == 0);
    CHECK((fd = open(DEVICE, O_RDWR | O_CREAT, 0600)) == 4 && flags(fd) == 0 && close(fd) == 0);
    FAILS(open(DEVICE, O_RDWR | O_CREAT | O_EXCL, 0600), EEXIST);
    FAILS(open(DEVICE, O_RDONLY | O_DIRECTORY), ENOTDIR);
    FAILS(open("/dev/hmm_dmirror4", O_RDWR), ENOENT);
    FAILS(open("/dev/hmm_dmirror", O_RDWR), ENOENT);
    FAILS(open("/dev/hmm_dmirror00", O_RDWR), ENOENT);
    FAILS(open((char *)1, O_RDWR), EFAULT);
    FAILS(open((char *)1, O_RDWR | O_CREAT, 0600), EFAULT);
    CHECK(syscall(SYS_access, DEVICE, F_OK) == -1); /* nobody made a file of that name */

    /* Nothing is left to read, and no other descriptor is a device. */
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair2) == 0);
    FAILS(flags(pair2[0]), ENOTTY);
    FAILS(flags(-1), EBADF);
    FAILS(mmap(0, PAGE, PROT_READ, MAP_SHARED, pair2[0], 0), ENODEV);
    return 0;
}
