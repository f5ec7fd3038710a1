// Reads 512 MiB with every thread, as STREAM would if it had a kernel that only reads; prints the best rate in bytes/s.
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define COUNT ((size_t) 512 << 17)  // of 8 bytes
#define ROUNDS 10

int main(void) {
    unsigned long *data = aligned_alloc(1 << 21, COUNT * sizeof *data), total = 0;
    double best = 0;
    if (!data) return 1;
#ifdef MADV_HUGEPAGE
    madvise(data, COUNT * sizeof *data, MADV_HUGEPAGE);  // as NumPy has its arrays
#endif
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < COUNT; i++) data[i] = i;
    for (int round = 0; round < ROUNDS; round++) {
        double started = omp_get_wtime();
#pragma omp parallel for schedule(static) reduction(+ : total)
        for (size_t i = 0; i < COUNT; i++) total += data[i];
        double rate = COUNT * sizeof *data / (omp_get_wtime() - started);
        if (rate > best) best = rate;
    }
    printf("%.0f\n", best);
    free(data);
    return total == 1;  // the sum is used, so that it is computed
}
