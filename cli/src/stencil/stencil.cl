// One step of heat flow over an image, r from a: every pixel takes `rate` of what its four neighbours have more than it. Nothing flows over the image's edges.
//
// A group makes `rows` rows. Its work items stand side by side, eight pixels each, and walk down: what was the row below is the middle row of the next, and is in registers already. All
// arrays are read and written in whole vectors next to each other, for caches of CPUs as for the memory of GPUs.

// A product and a sum that become one operation round once instead of twice; every device, and the check, is to have the same bits.
#pragma OPENCL FP_CONTRACT OFF

#define FLOW(here, up, down, left, right) ((here) + rate * ((((up) + (down)) + ((left) + (right))) - 4.0f * (here)))

__kernel void stencil(__global float *restrict r, __global const float *restrict a, uint width, uint rows, float rate, ulong uhmm_len_0)
{
    const ulong height = uhmm_len_0 / width;
    const ulong first = get_group_id(0) * (ulong)rows, last = min(first + rows, height);
    const uint whole = width & ~7u;
    for (uint x = 8 * get_local_id(0); x < whole; x += 8 * get_local_size(0)) {
        __global const float *from = a + first * width + x;
        __global float *to = r + first * width + x;
        float8 here = vload8(0, from), up = first == 0 ? here : vload8(0, from - width);
        for (ulong y = first; y < last; y++, from += width, to += width) {
            const float8 down = y + 1 < height ? vload8(0, from + width) : here;
            const float8 left = x > 0 ? vload8(0, from - 1) : (float8)(here.s0, here.s0123, here.s456);
            const float8 right = x + 8 < width ? vload8(0, from + 1) : (float8)(here.s1234, here.s567, here.s7);
            vstore8(FLOW(here, up, down, left, right), 0, to);
            up = here;
            here = down;
        }
    }
    // The columns that are no whole vector.
    for (uint x = whole + get_local_id(0); x < width; x += get_local_size(0)) {
        for (ulong y = first; y < last; y++) {
            __global const float *from = a + y * width + x;
            const float here = from[0];
            const float up = y > 0 ? from[-(long)width] : here, down = y + 1 < height ? from[width] : here;
            const float left = x > 0 ? from[-1] : here, right = x + 1 < width ? from[1] : here;
            r[y * width + x] = FLOW(here, up, down, left, right);
        }
    }
}
