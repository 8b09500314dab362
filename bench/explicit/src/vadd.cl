// The sum of two vectors, sixteen elements a work item.
__kernel void vadd(__global float *r, __global const float *a, __global const float *b, ulong len)
{
    const ulong from = get_global_id(0) * 16;
    if (from + 16 <= len)
        vstore16(vload16(0, a + from) + vload16(0, b + from), 0, r + from);
    else
        for (ulong i = from; i < len; i++)
            r[i] = a[i] + b[i];
}
