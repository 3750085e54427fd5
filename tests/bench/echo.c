/*
 * echo.c - the physical limit of a policy server on this machine
 *
 * SYNOPSIS
 *   echo inet:127.0.0.1:PORT | unix:/PATH
 *
 * DESCRIPTION
 *   One thread, epoll. Answers "action=DUNNO" to every empty line; parses
 *   nothing and decides nothing. Only for measuring. Runs until it is killed.
 *
 * DIAGNOSTICS
 *   Exits 2 when it cannot listen. A connection that sends MAX_REQUEST bytes
 *   without an empty line is dropped.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define MAX_REQUEST 16384
#define EVENTS 256

static const char REPLY[] = "action=DUNNO\n\n";
enum { REPLY_BYTES = sizeof REPLY - 1 };

struct connection {
    int fd, filled;
    char buffer[MAX_REQUEST];
};

static int address(const char *target, struct sockaddr_storage *sa, socklen_t *size)
{
    memset(sa, 0, sizeof *sa);
    if (!strncmp(target, "unix:", 5)) {
        struct sockaddr_un *un = (void *)sa;
        if (strlen(target + 5) >= sizeof un->sun_path)
            return -1;
        un->sun_family = AF_UNIX;
        strcpy(un->sun_path, target + 5);
        *size = sizeof *un;
        return 0;
    }
    struct sockaddr_in *in = (void *)sa;
    unsigned port;
    char host[64];
    if (sscanf(target, "inet:%63[0-9.]:%u", host, &port) != 2 || inet_pton(AF_INET, host, &in->sin_addr) != 1)
        return -1;
    in->sin_family = AF_INET;
    in->sin_port = htons((unsigned short)port);
    *size = sizeof *in;
    return 0;
}

static void accept_all(int listener, int ep, int is_inet)
{
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *c = malloc(sizeof *c);
        if (!c) {
            close(fd);
            return;
        }
        if (is_inet)
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c->fd = fd;
        c->filled = 0;
        struct epoll_event ev = { .events = EPOLLIN, .data.ptr = c };
        epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev);
    }
}

/* 0: the connection lives on; -1: drop it */
static int serve(struct connection *c)
{
    ssize_t got = recv(c->fd, c->buffer + c->filled, (size_t)(MAX_REQUEST - c->filled), 0);
    if (got <= 0)
        return got < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -1;
    c->filled += (int)got;
    char *end;
    while ((end = memmem(c->buffer, (size_t)c->filled, "\n\n", 2))) {
        int used = (int)(end + 2 - c->buffer);
        if (send(c->fd, REPLY, REPLY_BYTES, MSG_NOSIGNAL) != REPLY_BYTES)
            return -1;
        c->filled -= used;
        memmove(c->buffer, c->buffer + used, (size_t)c->filled);
    }
    return c->filled == MAX_REQUEST ? -1 : 0;
}

int main(int argc, char **argv)
{
    struct sockaddr_storage sa;
    socklen_t sa_bytes;
    if (argc != 2 || address(argv[1], &sa, &sa_bytes)) {
        fprintf(stderr, "usage: echo inet:ADDRESS:PORT | unix:/PATH\n");
        return 2;
    }
    int one = 1, listener = socket(sa.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (void *)&sa, sa_bytes) || listen(listener, 1024)) {
        perror("echo: listen");
        return 2;
    }
    int ep = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event ev = { .events = EPOLLIN, .data.ptr = NULL }, events[EVENTS];
    epoll_ctl(ep, EPOLL_CTL_ADD, listener, &ev);
    for (;;) {
        int n = epoll_wait(ep, events, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c)
                accept_all(listener, ep, sa.ss_family == AF_INET);
            else if (serve(c)) {
                close(c->fd);
                free(c);
            }
        }
    }
}
