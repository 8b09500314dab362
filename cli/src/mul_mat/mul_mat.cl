// The product of matrixes, R = A B, in f32 and by rows: a group makes `rows` rows of R.
//
// One work item a group, for devices whose work items are long vectors (CPUs above all): a panel of B, DEPTH deep and two vectors wide, is packed so that the innermost loop reads it front
// to back, and a tile of six rows by those two vectors of R stays in registers over that depth.
#define DEPTH 256

#define ROW(i) \
    c##i##0 = fma((float16)(a##i[d]), b0, c##i##0); \
    c##i##1 = fma((float16)(a##i[d]), b1, c##i##1);

#define STORE(i) \
    if (i < count) { \
        __global float *to = r + (row + i) * n + column; \
        vstore16(top == 0 ? c##i##0 : c##i##0 + vload16(0, to), 0, to); \
        vstore16(top == 0 ? c##i##1 : c##i##1 + vload16(1, to), 1, to); \
    }

#define START(i) \
    __global const float *a##i = a + (row + min((ulong)i, count - 1)) * k + top; \
    float16 c##i##0 = 0, c##i##1 = 0;

__kernel void mul_mat(__global float *restrict r, __global const float *restrict a, __global const float *restrict b, uint n, uint k, uint rows, ulong uhmm_len_0)
{
    const ulong first = get_group_id(0) * (ulong)rows;
    const ulong last = min(first + rows, uhmm_len_0 / n);
    float16 pack[2 * DEPTH];
    ulong column = 0;
    for (; column + 32 <= n; column += 32) {
        for (uint top = 0; top < max(k, 1u); top += DEPTH) {
            const uint depth = min((uint)DEPTH, k - top);
            for (uint d = 0; d < depth; d++) {
                pack[2 * d] = vload16(0, b + (ulong)(top + d) * n + column);
                pack[2 * d + 1] = vload16(1, b + (ulong)(top + d) * n + column);
            }
            for (ulong row = first; row < last; row += 6) {
                const ulong count = min((ulong)6, last - row);
                START(0) START(1) START(2) START(3) START(4) START(5)
                for (uint d = 0; d < depth; d++) {
                    const float16 b0 = pack[2 * d], b1 = pack[2 * d + 1];
                    ROW(0) ROW(1) ROW(2) ROW(3) ROW(4) ROW(5)
                }
                STORE(0) STORE(1) STORE(2) STORE(3) STORE(4) STORE(5)
            }
        }
    }
    for (ulong row = first; row < last; row++) {
        for (ulong rest = column; rest < n; rest++) {
            float sum = 0;
            for (uint d = 0; d < k; d++)
                sum = fma(a[row * k + d], b[(ulong)d * n + rest], sum);
            r[row * n + rest] = sum;
        }
    }
}
