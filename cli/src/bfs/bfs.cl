// One level of a breadth-first search: all nodes that an edge leads to from the frontier, and that had no distance, get the distance `level`, and are the next frontier.
//
// The edges of node v are to[first[v]] up to to[first[v + 1] - 1]. A work item takes a node of the frontier; nodes with very many edges are left for the whole group, so that no item works alone
// while the others wait. What an item finds it keeps until it has some, and then gets room for all of them in the next frontier at once: a counter that all groups share is touched seldom.
#define ITEMS 64
#define HELD 16
#define MANY 512
#define UNSEEN 0xffffffffu

struct held {
    uint count;
    uint nodes[HELD];
};

void release(struct held *held, __global uint *next, volatile __global uint *found)
{
    const uint at = held->count > 0 ? atomic_add(found, held->count) : 0;
    for (uint i = 0; i < held->count; i++)
        next[at + i] = held->nodes[i];
    held->count = 0;
}

void visit(uint node, uint level, volatile __global uint *distance, struct held *held, __global uint *next, volatile __global uint *found)
{
    // Most nodes have been seen: a look is cheaper than an exchange.
    if (distance[node] != UNSEEN || atomic_cmpxchg(distance + node, UNSEEN, level) != UNSEEN)
        return;
    held->nodes[held->count++] = node;
    if (held->count == HELD)
        release(held, next, found);
}

__kernel void bfs(volatile __global uint *distance, __global uint *next, volatile __global uint *found, __global const uint *frontier, __global const uint *restrict first,
                  __global const uint *restrict to, uint level, ulong uhmm_len_3)
{
    __local uint left[ITEMS];
    __local uint count;
    const uint item = get_local_id(0);
    const ulong at = get_global_id(0);
    struct held held;
    held.count = 0;
    if (item == 0)
        count = 0;
    barrier(CLK_LOCAL_MEM_FENCE);
    if (at < uhmm_len_3) {
        const uint node = frontier[at];
        const uint start = first[node], end = first[node + 1];
        if (end - start > MANY)
            left[atomic_inc(&count)] = node;
        else
            for (uint edge = start; edge < end; edge++)
                visit(to[edge], level, distance, &held, next, found);
        release(&held, next, found);
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = 0; i < count; i++) {
        const uint end = first[left[i] + 1];
        for (uint edge = first[left[i]] + item; edge < end; edge += ITEMS)
            visit(to[edge], level, distance, &held, next, found);
    }
    release(&held, next, found);
}
