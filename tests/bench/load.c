/*
 * load.c - load generator for the Postfix policy delegation protocol
 *
 * SYNOPSIS
 *   load [-c connections] [-d seconds] [-w seconds] [-n requests] [-R rate]
 *        [-k users] [-D domains] [-s stage] [-r recipients] [-e reply]
 *        [-t seconds] [-S seed] [-p core] inet:ADDRESS:PORT | unix:/PATH
 *
 * DESCRIPTION
 *   A closed loop: every connection has exactly one request outstanding and
 *   sends the next one when the reply has been checked. A request carries the
 *   29 attributes that smtpd of Postfix 3.7 sends, in its order, with an
 *   "instance" of its own, so that no server can take it for a repeat.
 *
 *   -c  connections (1)
 *   -d  seconds measured (2), after -w seconds of warm-up (0)
 *   -n  instead of -d: send this many requests and end
 *   -R  instead of a closed loop: so many requests a second, evenly spaced, on
 *       whichever connection is idle. Latency counts from when a request was
 *       due, so waiting for an idle connection is part of it.
 *   -k  users (10000), spread over -D domains (997). With -d users are drawn
 *       uniformly; with -n they are walked through in order: 0, 1, 2, ...
 *   -s  protocol_state: END-OF-MESSAGE (default), DATA, RCPT
 *   -r  recipient_count at END-OF-MESSAGE and DATA (1)
 *   -e  the reply expected, compared byte for byte ("action=DUNNO")
 *   -t  a reply later than this ends the run with an error (30)
 *   -S  random seed (1)
 *   -p  run on this core only
 *
 *   A reply must be one line "action=...", an empty line, and not one byte
 *   more; anything else, and a lost connection, ends the run. Well-formed
 *   replies other than -e are counted as "others", with the text of the first
 *   and the number of the request that it answered: so the same program shows
 *   that a server limits at all.
 *
 *   Latency is kept in a histogram of 128 buckets per power of two (error
 *   below 0.8 %). Counted are the replies that come after the warm-up, and what
 *   is outstanding when the time is up is waited for: slow replies are not cut
 *   off. The rate is that of the replies until the last one.
 *
 * DIAGNOSTICS
 *   One JSON object on stdout. Exit 0: ran to its end; 1: a server broke the
 *   protocol, hung up or hung (stderr says how); 2: could not run.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define REQUEST_MAX 2048
#define REPLY_MAX 2048
#define CONNECTIONS_MAX 10000
#define EVENTS 256

/* ---- options ------------------------------------------------------------ */
static int connections = 1, recipients = 1;
static unsigned users = 10000, domains = 997;
static uint64_t requests_max;                           /* 0: by time */
static double seconds = 2, warmup = 0, timeout = 30, rate = 0;
static const char *stage = "END-OF-MESSAGE";
static char expected[REPLY_MAX];
static size_t expected_bytes;

static void die(int status, const char *what)
{
    fprintf(stderr, "load: %s\n", what);
    exit(status);
}

/* ---- time, random numbers ----------------------------------------------- */
static uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static uint64_t seed = 1;
static uint64_t random_u64(void)                        /* splitmix64 */
{
    uint64_t z = (seed += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* ---- latency histogram -------------------------------------------------- */
#define SUB_BITS 7
#define BUCKETS ((64 - SUB_BITS + 1) << SUB_BITS)
static uint64_t histogram[BUCKETS], measured, latency_max;

static void histogram_add(uint64_t ns)
{
    unsigned index = (unsigned)ns;
    if (ns >= 1u << SUB_BITS) {
        unsigned shift = 63u - (unsigned)__builtin_clzll(ns) - SUB_BITS;
        index = ((shift + 1) << SUB_BITS) + (unsigned)((ns >> shift) & ((1u << SUB_BITS) - 1));
    }
    histogram[index]++;
    measured++;
    if (ns > latency_max)
        latency_max = ns;
}

static double quantile_us(double q)
{
    uint64_t wanted = (uint64_t)(q * (double)measured), seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++)
        if ((seen += histogram[i]) > wanted) {
            if (i < 1u << SUB_BITS)
                return i / 1e3;
            unsigned shift = (i >> SUB_BITS) - 1;
            uint64_t low = (uint64_t)((i & ((1u << SUB_BITS) - 1)) | 1u << SUB_BITS) << shift;
            return (double)(low + (1ull << shift) / 2) / 1e3;
        }
    return (double)latency_max / 1e3;
}

/* ---- requests ----------------------------------------------------------- */
/*
 * A template with runs of marker bytes, which every request fills with digits
 * of fixed width: the generator must cost less than the server it measures.
 */
enum marker { HOST = 1, PORT, USER, DOMAIN, RECIPIENT, EXCHANGER, QUEUE, SERIAL, SIZE, MARKERS };
#define HOST_ "\1\1\1"
#define USER_ "user\3\3\3\3\3\3\3@dom\4\4\4\4.example.org"
#define RECIPIENT_ "rcpt\5\5\5\5\5\5\5@mx\6\6\6\6.example.com"
#define QUEUE_ "4X\7\7\7\7\7\7\7\7"
#define SERIAL_ "\10\10\10\10\10\10\10\10"
#define SIZE_ "\11\11\11\11\11\11"
static const char ATTRIBUTES[] =
    "request=smtpd_access_policy\nprotocol_state=%s\nprotocol_name=ESMTP\nclient_address=192.0.2." HOST_ "\n"
    "client_name=client-" HOST_ ".access.example.net\nclient_port=\2\2\2\2\2\n"
    "reverse_client_name=client-" HOST_ ".access.example.net\nserver_address=198.51.100.25\nserver_port=587\n"
    "helo_name=[192.0.2." HOST_ "]\nsender=" USER_ "\nrecipient=" RECIPIENT_ "\nrecipient_count=%d\nqueue_id=%s\n"
    "instance=%x.%lx." SERIAL_ ".0\nsize=" SIZE_ "\netrn_domain=\nstress=\nsasl_method=PLAIN\n"
    "sasl_username=" USER_ "\nsasl_sender=\nccert_subject=\nccert_issuer=\nccert_fingerprint=\n"
    "ccert_pubkey_fingerprint=\nencryption_protocol=TLSv1.3\nencryption_cipher=TLS_AES_256_GCM_SHA384\n"
    "encryption_keysize=256\npolicy_context=submission\n\n";

static struct { int offset, width; enum marker what; } fields[32];
static char request[REQUEST_MAX];
static int request_bytes, field_count;
static uint64_t sent;

static void prepare_request(void)
{
    int counted = strcmp(stage, "RCPT") != 0;           /* there is no queue file before the first recipient */
    request_bytes = snprintf(request, sizeof request, ATTRIBUTES, stage, counted ? recipients : 0,
                             counted ? QUEUE_ : "", (unsigned)getpid(), (unsigned long)time(NULL));
    for (int i = 0, width; i < request_bytes; i += width ? width : 1) {
        for (width = 0; request[i] < MARKERS && request[i + width] == request[i]; width++)
            ;
        if (width) {
            fields[field_count].offset = i;
            fields[field_count].width = width;
            fields[field_count++].what = (enum marker)request[i];
        }
    }
}

static void build_request(void)
{
    uint64_t r = random_u64(), values[MARKERS];
    uint64_t user = requests_max ? sent % users : (random_u64() >> 32) * users >> 32;
    values[HOST] = 100 + (r & 127);
    values[PORT] = 10000 + (r >> 8 & 0x7fff);
    values[USER] = user;
    values[DOMAIN] = user % domains;
    values[RECIPIENT] = r >> 24 & 0xfffff;
    values[EXCHANGER] = r >> 48 & 0xfff;
    values[QUEUE] = r >> 16 & 0xffffff;
    values[SERIAL] = ++sent;
    values[SIZE] = 100000 + (r >> 40 & 0x7ffff);
    for (int i = 0; i < field_count; i++) {
        uint64_t value = values[fields[i].what];
        for (char *p = request + fields[i].offset + fields[i].width; p > request + fields[i].offset; value /= 10)
            *--p = (char)('0' + value % 10);
    }
}

/* ---- connections -------------------------------------------------------- */
struct connection {
    int fd, waiting, got;
    uint64_t sent_at, number;
    char reply[REPLY_MAX];
};
static struct connection *all;
static int epoll_fd, outstanding;
static struct connection **idle;                        /* with -R: a stack of those that wait for a request */
static int idle_count;
static uint64_t due;
static uint64_t measure_from, others, first_other_at;
static char first_other[REPLY_MAX];

static void parse_target(const char *target, struct sockaddr_storage *sa, socklen_t *size)
{
    memset(sa, 0, sizeof *sa);
    if (!strncmp(target, "unix:", 5)) {
        struct sockaddr_un *un = (void *)sa;
        if (strlen(target + 5) >= sizeof un->sun_path)
            die(2, "the socket's path is too long");
        un->sun_family = AF_UNIX;
        strcpy(un->sun_path, target + 5);
        *size = sizeof *un;
        return;
    }
    struct sockaddr_in *in = (void *)sa;
    char host[64];
    unsigned port;
    if (sscanf(target, "inet:%63[0-9.]:%u", host, &port) != 2 || inet_pton(AF_INET, host, &in->sin_addr) != 1)
        die(2, "the target must be inet:ADDRESS:PORT or unix:/PATH");
    in->sin_family = AF_INET;
    in->sin_port = htons((unsigned short)port);
    *size = sizeof *in;
}

static void open_connection(struct connection *c, const struct sockaddr_storage *sa, socklen_t size)
{
    int one = 1;
    c->fd = socket(sa->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* a unix socket with a full backlog (some servers have one of 5) answers EAGAIN: wait up to 5 s */
    for (int tries = 0; c->fd < 0 || connect(c->fd, (const void *)sa, size); tries++) {
        if (c->fd < 0 || errno != EAGAIN || tries == 1000)
            die(2, strerror(errno));
        usleep(5000);
    }
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    if (sa->ss_family == AF_INET)
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event ev = { .events = EPOLLIN, .data.ptr = c };
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &ev);
}

static void send_request(struct connection *c)
{
    build_request();
    c->got = 0;
    c->waiting = 1;
    c->number = sent;
    outstanding++;
    c->sent_at = rate ? due : now_ns();
    /* one request is far below any socket buffer, and none is outstanding: a short write means trouble */
    if (send(c->fd, request, (size_t)request_bytes, MSG_NOSIGNAL) != request_bytes)
        die(1, "the server hung up (or its socket is full)");
}

/* 1: the reply is complete and right; 0: more is to come */
static int read_reply(struct connection *c)
{
    ssize_t n = recv(c->fd, c->reply + c->got, (size_t)(REPLY_MAX - c->got), 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n <= 0)
        die(1, "the server hung up");
    if (!c->waiting)
        die(1, "bytes that nobody asked for");
    c->got += (int)n;
    char *end = memmem(c->reply, (size_t)c->got, "\n\n", 2);
    if (!end) {
        if (c->got == REPLY_MAX)
            die(1, "a reply without an end");
        return 0;
    }
    if (end + 2 != c->reply + c->got || memcmp(c->reply, "action=", 7) || memchr(c->reply, '\n', (size_t)c->got) != end)
        die(1, "a reply that is not one action line and one empty line");
    if ((size_t)c->got != expected_bytes || memcmp(c->reply, expected, expected_bytes)) {
        if (!others++) {
            first_other_at = c->number;
            memcpy(first_other, c->reply, (size_t)c->got - 2);
        }
    }
    return 1;
}

/* with -R: send what is due, as far as there are idle connections; returns how long nothing will be, in ns */
static uint64_t send_due(uint64_t stop_at)
{
    uint64_t now = now_ns();
    for (; idle_count && due <= now && now < stop_at; due += (uint64_t)(1e9 / rate))
        send_request(idle[--idle_count]);
    return idle_count && due > now ? due - now : 100000000;
}

static void print_json_string(const char *s)
{
    putchar('"');
    for (; *s; s++)
        if (*s == '"' || *s == '\\')
            printf("\\%c", *s);
        else
            putchar((unsigned char)*s < ' ' || (unsigned char)*s > 126 ? '?' : *s);
    putchar('"');
}

static double cpu_seconds(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void options(int argc, char **argv)
{
    const char *reply = "action=DUNNO";
    cpu_set_t cores;
    CPU_ZERO(&cores);
    int o;
    while ((o = getopt(argc, argv, "c:d:w:n:R:k:D:s:r:e:t:S:p:")) != -1)
        switch (o) {
        case 'c': connections = atoi(optarg); break;
        case 'd': seconds = atof(optarg); break;
        case 'w': warmup = atof(optarg); break;
        case 'n': requests_max = strtoull(optarg, NULL, 10); break;
        case 'R': rate = atof(optarg); break;
        case 'k': users = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'D': domains = (unsigned)strtoul(optarg, NULL, 10); break;
        case 's': stage = optarg; break;
        case 'r': recipients = atoi(optarg); break;
        case 'e': reply = optarg; break;
        case 't': timeout = atof(optarg); break;
        case 'S': seed = strtoull(optarg, NULL, 10); break;
        case 'p':
            CPU_SET(atoi(optarg), &cores);
            if (sched_setaffinity(0, sizeof cores, &cores))
                die(2, strerror(errno));
            break;
        default: die(2, "usage: see the head of load.c");
        }
    if (optind != argc - 1 || connections < 1 || connections > CONNECTIONS_MAX || !users || !domains ||
        seconds <= 0 || rate < 0 || (rate > 0 && requests_max) || strlen(stage) > 32 || strlen(reply) > REPLY_MAX - 3)
        die(2, "usage: see the head of load.c");
    expected_bytes = (size_t)snprintf(expected, sizeof expected, "%s\n\n", reply);
}

int main(int argc, char **argv)
{
    struct sockaddr_storage sa;
    socklen_t sa_bytes;
    options(argc, argv);
    parse_target(argv[optind], &sa, &sa_bytes);
    prepare_request();
    prctl(PR_SET_TIMERSLACK, 1000UL);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    all = calloc((size_t)connections, sizeof *all);
    idle = calloc((size_t)connections, sizeof *idle);
    if (!all || !idle)
        die(2, "out of memory");
    for (int i = 0; i < connections; i++)
        open_connection(&all[i], &sa, sa_bytes);

    double cpu_before = cpu_seconds();
    uint64_t start = now_ns(), stop_at = UINT64_MAX, last_reply = start, heard = start, t;
    measure_from = start;
    if (!requests_max) {
        measure_from += (uint64_t)(warmup * 1e9);
        stop_at = measure_from + (uint64_t)(seconds * 1e9);
    }
    due = start;
    for (int i = 0; i < connections && (!requests_max || sent < requests_max); i++)
        if (rate)
            idle[idle_count++] = &all[i];
        else
            send_request(&all[i]);

    struct epoll_event events[EVENTS];
    while (outstanding || (rate && now_ns() < stop_at)) {
        struct timespec patience = { .tv_nsec = rate ? (long)send_due(stop_at) : 100000000 };
        int n = epoll_pwait2(epoll_fd, events, EVENTS, &patience, NULL);
        if (n == 0 && (double)(now_ns() - heard) > timeout * 1e9)
            die(1, "no reply in time");
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            if (!read_reply(c))
                continue;
            t = heard = now_ns();
            c->waiting = 0;
            outstanding--;
            if (t >= measure_from) {
                histogram_add(t - c->sent_at);
                last_reply = t;
            }
            if (rate)
                idle[idle_count++] = c;
            else if (requests_max ? sent < requests_max : t < stop_at)
                send_request(c);
        }
    }
    double elapsed = last_reply > measure_from ? (double)(last_reply - measure_from) / 1e9 : 0;
    printf("{\"connections\": %d, \"users\": %u, \"sent\": %llu, \"requests\": %llu, \"seconds\": %.4f, "
           "\"per_second\": %.1f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f, \"max_us\": %.1f, "
           "\"load_cpu_s\": %.3f, \"others\": %llu, \"first_other_at\": %llu, \"first_other\": ",
           connections, users, (unsigned long long)sent, (unsigned long long)measured, elapsed,
           elapsed > 0 ? (double)measured / elapsed : 0, quantile_us(.5), quantile_us(.99), quantile_us(.999),
           (double)latency_max / 1e3, cpu_seconds() - cpu_before, (unsigned long long)others,
           (unsigned long long)first_other_at);
    print_json_string(first_other);
    printf("}\n");
    return 0;
}
