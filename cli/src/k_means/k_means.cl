// One round of k-means over images of DIM pixels: every point gets the label of its nearest centroid, and every group the sums of its points, by label.
//
// Nearest is the centroid c with the largest x.c - |c|^2 / 2, for |x - c|^2 is |x|^2 less twice that. `halves` holds the |c|^2 / 2.
//
// A group takes `part` points, a tile at a time, so that they are still in the nearest cache when they are added up. First each work item labels whole points, which it keeps in registers
// while all centroids pass; then each adds four pixels of every SUBSETS-th point to sums of its own. Next to each other are what work items read at the same time in the second step, and
// what one reads in the first.
#define DIM 64
#define ITEMS 64
#define TILE 128
#define SUBSETS (ITEMS / (DIM / 4))
#ifndef CLUSTERS
#define CLUSTERS 10
#endif

uint nearest(__global const float *restrict point, __global const float *restrict centroids, __global const float *restrict halves)
{
    const float8 x0 = vload8(0, point), x1 = vload8(1, point), x2 = vload8(2, point), x3 = vload8(3, point);
    const float8 x4 = vload8(4, point), x5 = vload8(5, point), x6 = vload8(6, point), x7 = vload8(7, point);
    float best = -INFINITY;
    uint label = 0;
    for (uint j = 0; j < CLUSTERS; j++) {
        __global const float *c = centroids + j * DIM;
        const float8 even = x0 * vload8(0, c) + x2 * vload8(2, c) + x4 * vload8(4, c) + x6 * vload8(6, c);
        const float8 odd = x1 * vload8(1, c) + x3 * vload8(3, c) + x5 * vload8(5, c) + x7 * vload8(7, c);
        const float8 eight = even + odd;
        const float4 four = eight.lo + eight.hi;
        const float2 two = four.lo + four.hi;
        const float score = two.x + two.y - halves[j];
        label = score > best ? j : label; // of equals the first
        best = fmax(best, score);
    }
    return label;
}

// sums: CLUSTERS times DIM numbers for each group; counts: CLUSTERS numbers for each group, and how many labels have changed; labels: one for each point, as it was before.
__kernel void k_means(__global float *restrict sums, __global uint *restrict counts, __global uchar *restrict labels, __global const float *restrict points,
                      __global const float *restrict centroids, __global const float *restrict halves, uint part, ulong uhmm_len_2)
{
    __local float4 own[SUBSETS][CLUSTERS][DIM / 4];
    __local uint tile_labels[TILE];
    __local uint changes[ITEMS];
    const uint item = get_local_id(0), four = item % (DIM / 4), subset = item / (DIM / 4);
    const ulong first = get_group_id(0) * (ulong)part, last = min(first + part, uhmm_len_2);
    uint changed = 0, count = 0;
    for (uint j = 0; j < CLUSTERS; j++)
        own[subset][j][four] = 0;
    for (ulong tile = first; tile < last; tile += TILE) {
        const uint size = min((ulong)TILE, last - tile);
        for (uint p = item; p < size; p += ITEMS) {
            const uint label = nearest(points + (tile + p) * DIM, centroids, halves);
            changed += labels[tile + p] != label;
            labels[tile + p] = label;
            tile_labels[p] = label;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        for (uint p = subset; p < size; p += SUBSETS)
            own[subset][tile_labels[p]][four] += vload4(four, points + (tile + p) * DIM);
        if (item < CLUSTERS)
            for (uint p = 0; p < size; p++)
                count += tile_labels[p] == item;
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    changes[item] = changed;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint at = item; at < CLUSTERS * DIM / 4; at += ITEMS) {
        float4 sum = 0;
        for (uint s = 0; s < SUBSETS; s++)
            sum += own[s][at / (DIM / 4)][at % (DIM / 4)];
        vstore4(sum, at, sums + get_group_id(0) * CLUSTERS * DIM);
    }
    __global uint *to = counts + get_group_id(0) * (CLUSTERS + 1);
    if (item < CLUSTERS)
        to[item] = count;
    if (item == 0) {
        for (uint i = 1; i < ITEMS; i++)
            changed += changes[i];
        to[CLUSTERS] = changed;
    }
}
