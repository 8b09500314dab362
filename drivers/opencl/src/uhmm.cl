// What uhmm puts before every program. A kernel that follows pointers which are stored in memory has the parameter UHMM, and turns each into one of the device with uhmm_ptr.
#define UHMM __global uchar *uhmm_memory, __global uint *uhmm_ranges

// A device that shares the process's pointers has nothing to look up: a stored pointer is itself one of the device, and the parameter is null.
#ifdef UHMM_NATIVE
#define uhmm_ptr(p) ((__global void *)(p))
#else
#define uhmm_ptr(p) uhmm_find(uhmm_memory, uhmm_ranges, (ulong)(p))
#endif

// The table: whether an address was not found, how many ranges there are, that address; from number 16 on 4096 bytes that stand for what was not found; then the beginnings of all
// ranges in the process, in order, and after them for each its bytes (28 bits) and its offset in the device's memory, in 16 bytes: what is left of it is that of the address.
inline __global void *uhmm_find(__global uchar *memory, __global uint *table, ulong p)
{
    __global ulong *starts = (__global ulong *)table + 528;
    uint count = table[1], low = 0, high = count;
    while (low < high) {
        uint middle = low + (high - low) / 2;
        if (starts[middle] <= p)
            low = middle + 1;
        else
            high = middle;
    }
    if (low > 0) {
        ulong start = starts[low - 1], rest = starts[count + low - 1];
        if (p - start < (rest & 0xfffffff))
            return memory + ((rest >> 28) * 16 + start % 16 + (p - start));
    }
    if (atomic_cmpxchg((volatile __global uint *)table, 0, 1) == 0)
        ((__global ulong *)table)[1] = p;
    return (__global uchar *)table + 128;
}
#line 1
