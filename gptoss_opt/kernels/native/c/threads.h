/* Units of work, taken by threads from a counter.
 *
 * The threads are those of the OpenMP runtime that the caller names (torch's own, so that the two never compete), or new
 * ones where there is none. */
#pragma once
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef void (*fork_join)(void (*work)(void *), void *job, unsigned num_threads, unsigned flags);

typedef struct {
    fork_join parallel; /* GOMP_parallel of the caller's OpenMP runtime, or NULL */
    int num_threads;
} Team;

typedef struct {
    void (*unit)(const void *arguments, long index, void *scratch);
    const void *arguments;
    long num_units;
    size_t scratch_bytes;
    atomic_long next;
    atomic_int failed;
} Job;

/* Each thread keeps its scratch memory, whose first bytes tell its size: fresh pages for every call would cost more than
 * small calls take. It is freed with the thread. */
static pthread_key_t scratch_key;
static int has_scratch_key;

enum { SCRATCH_HEAD = 64 };

static void create_scratch_key(void) {
    if (!has_scratch_key) has_scratch_key = pthread_key_create(&scratch_key, free) == 0;
}

static void *scratch_of(size_t bytes) {
    if (!has_scratch_key) return NULL;
    char *memory = pthread_getspecific(scratch_key);
    if (!memory || *(size_t *)memory < bytes) {
        const size_t whole = (bytes + SCRATCH_HEAD + 4095) / 4096 * 4096;
        free(memory);
        memory = aligned_alloc(4096, whole);
        if (memory) *(size_t *)memory = whole - SCRATCH_HEAD;
        if (pthread_setspecific(scratch_key, memory)) {
            free(memory);
            memory = NULL;
        }
        if (!memory) return NULL;
    }
    return memory + SCRATCH_HEAD;
}

static void work(void *pointer) {
    Job *job = pointer;
    void *scratch = job->scratch_bytes ? scratch_of(job->scratch_bytes) : NULL;
    if (!scratch && job->scratch_bytes) {
        atomic_store(&job->failed, 1);
        return;
    }
    for (long index; (index = atomic_fetch_add(&job->next, 1)) < job->num_units;)
        job->unit(job->arguments, index, scratch);
}

static void *work_in_thread(void *job) {
    work(job);
    return NULL;
}

static int run(const Team *team, Job *job) {
    long num_threads = team->num_threads < job->num_units ? team->num_threads : job->num_units;
    if (num_threads <= 1)
        work(job);
    else if (team->parallel)
        team->parallel(work, job, (unsigned)num_threads, 0);
    else {
        pthread_t threads[64];
        int started = 0;
        while (started < num_threads - 1 && started < 64 &&
               pthread_create(&threads[started], NULL, work_in_thread, job) == 0)
            started++;
        work(job);
        while (started) pthread_join(threads[--started], NULL);
    }
    return atomic_load(&job->failed) ? -1 : 0;
}
