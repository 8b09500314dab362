// What uhmm puts before every program. A kernel that follows pointers which are stored in memory has the parameter UHMM, and turns each into one of the device with uhmm_ptr.
#define UHMM __global uchar *uhmm_memory, __global uint *uhmm_ranges

// A device that shares the process's pointers has nothing to look up: a stored pointer is itself one of the device, and the parameter is null.
#ifdef UHMM_NATIVE
#define uhmm_ptr(p) ((__global void *)(p))
#else
#define uhmm_ptr(p) uhmm_find(uhmm_memory, uhmm_ranges, (ulong)(p))
#endif

// The table: whether an address was not found, how many ranges there are, that address; from number 2 on, for each range, its beginning and end in the process and its offset in the
// device's memory, in order. From byte 1024 on a page that stands for what was not found.
inline __global void *uhmm_find(__global uchar *memory, __global uint *table, ulong p)
{
    __global ulong *numbers = (__global ulong *)table;
    uint low = 0, high = table[1];
    while (low < high) {
        uint middle = (low + high) / 2;
        if (numbers[3 + 3 * middle] <= p)
            low = middle + 1;
        else
            high = middle;
    }
    if (low < table[1] && numbers[2 + 3 * low] <= p)
        return memory + numbers[4 + 3 * low] + (p - numbers[2 + 3 * low]);
    if (atomic_cmpxchg((volatile __global uint *)table, 0, 1) == 0)
        numbers[1] = p;
    return (__global uchar *)table + 1024;
}
#line 1
