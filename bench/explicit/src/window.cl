// Makes `len` elements of r, from `from` on, of those of a: sixteen a work item.
__kernel void window(__global float *restrict r, __global const float *restrict a, ulong from, ulong len)
{
    const ulong at = get_global_id(0) * 16;
    if (at + 16 <= len)
        vstore16(vload16(0, a + from + at) * 2.0f + 1.0f, 0, r + from + at);
    else
        for (ulong i = at; i < len; i++)
            r[from + i] = a[from + i] * 2.0f + 1.0f;
}
