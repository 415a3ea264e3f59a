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

/* Each thread keeps its scratch memory: fresh pages for every call would cost more than small calls take. */
static _Thread_local void *scratch_memory;
static _Thread_local size_t scratch_size;

static void *scratch_of(size_t bytes) {
    if (bytes > scratch_size) {
        free(scratch_memory);
        bytes = (bytes + 4095) / 4096 * 4096;
        scratch_memory = aligned_alloc(4096, bytes);
        scratch_size = scratch_memory ? bytes : 0;
    }
    return scratch_memory;
}

static void work(void *pointer) {
    Job *job = pointer;
    void *scratch = scratch_of(job->scratch_bytes);
    if (!scratch && job->scratch_bytes) {
        atomic_store(&job->failed, 1);
        return;
    }
    for (long index; (index = atomic_fetch_add(&job->next, 1)) < job->num_units;)
        job->unit(job->arguments, index, scratch);
}

static void *work_in_thread(void *job) {
    work(job);
    free(scratch_memory);
    scratch_memory = NULL;
    scratch_size = 0;
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
