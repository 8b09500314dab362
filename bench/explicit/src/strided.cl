// One number of each page.
__kernel void strided(__global float *restrict r, __global const float *restrict a)
{
    r[get_global_id(0)] = a[get_global_id(0) * 1024] * 2.0f;
}
