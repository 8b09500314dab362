//! The matrix product of rows, in f32: what the `mul_mat` kernel runs for each of its groups, on the device and on the host alike.
//!
//! The usual blocked scheme: a strip of B is packed so that the innermost loop reads it front to back, a block of A likewise, and a
//! tile of [`MR`] rows by two vectors of R is kept in registers over the whole depth. SIMD is `pulp`'s, chosen at run time.
//!
//! An ordinary `Vec` begins 16 bytes behind a page's start, a device's buffer at it. Vectors that cross cache lines made the same kernel
//! a tenth slower in the one than in the other, so [`Columns`] begins its vectors where R's cache lines begin.
//!
//! Rules: safe code only; the caller gives the scratch memory; every element of R is written, none is read before.

use pulp::{Arch, Simd, WithSimd};

/// Rows of R that the innermost loop keeps in registers: with two vectors each, 12 of the 16 registers of AVX2.
const MR: usize = 6;
/// Vectors of a tile's row.
const VECTORS: usize = 2;
/// The most elements in a tile's row, whatever the vector length: two vectors of 512 bits.
const MAX_NR: usize = 32;
/// The most columns that are left of a strip: less than a tile, and less than a vector.
const REST: usize = 2 * MAX_NR;
/// Depth of a block: a packed panel of B, KC by two vectors of 8, is 16 KiB and stays in the first-level cache.
const KC: usize = 256;
/// Rows of a block of A: MC by KC is 96 KiB and stays in the second-level cache.
const MC: usize = 96;
/// Columns of a strip of B: KC by NC is 1 MiB and stays in the last-level cache.
const NC: usize = 1024;

/// The scratch memory, in elements, that [`mul_rows`] needs for any number of rows of an `n`-column product of depth `k`.
pub(crate) fn scratch_len(n: usize, k: usize) -> usize {
    let depth = k.min(KC);
    depth * (MC + n.min(NC).next_multiple_of(MAX_NR) + MAX_NR)
}

/// `r = a * b` for some rows of a product: `a` holds those rows (each `k` long), `b` is the whole right side (`k` rows of `n`), and
/// `r` the rows of the result (each `n` long). All are row-major. `scratch` may hold anything.
///
/// # Panics
/// If the lengths do not fit each other, or `scratch` has less than [`scratch_len`] elements.
pub(crate) fn mul_rows(r: &mut [f32], a: &[f32], b: &[f32], n: usize, k: usize, scratch: &mut [f32]) {
    if r.is_empty() {
        return;
    }
    let rows = r.len() / n;
    assert!(rows * n == r.len(), "{} elements of the result are not whole rows of {n}", r.len());
    assert!(a.len() == rows * k, "{rows} rows of {k} have {} elements, not {}", rows * k, a.len());
    assert!(b.len() == k * n, "{k} rows of {n} have {} elements, not {}", k * n, b.len());
    assert!(scratch.len() >= scratch_len(n, k), "the scratch memory has {} elements, {} are needed", scratch.len(), scratch_len(n, k));
    if k == 0 {
        r.fill(0.0);
        return;
    }
    Arch::new().dispatch(MulRows { r, a, b, n, k, scratch });
}

struct MulRows<'a> {
    r: &'a mut [f32],
    a: &'a [f32],
    b: &'a [f32],
    n: usize,
    k: usize,
    scratch: &'a mut [f32],
}

impl WithSimd for MulRows<'_> {
    type Output = ();

    #[inline(always)] // so that the loops are compiled with the target features that `dispatch` found
    fn with_simd<S: Simd>(self, simd: S) {
        let MulRows { r, a, b, n, k, scratch } = self;
        let (a_pack, b_pack) = scratch.split_at_mut(MC * k.min(KC));
        let lead = r.as_ptr().align_offset(size_of::<S::f32s>()) % S::F32_LANES;
        for left in core::iter::once(0).chain((lead + NC..n).step_by(NC)) {
            let columns = match left {
                0 => Columns { left, lead, right: (lead + NC).min(n) },
                _ => Columns { left, lead: 0, right: (left + NC).min(n) },
            };
            for top in (0..k).step_by(KC) {
                let depth = top..(top + KC).min(k);
                let b_pack = pack_b::<S>(b_pack, &b[depth.start * n..depth.end * n], n, columns);
                for (r, a) in r.chunks_mut(MC * n).zip(a.chunks(MC * k)) {
                    let a_pack = pack_a(a_pack, a, k, depth.clone());
                    let tiles = Tiles { n, columns, depth: depth.len(), first: top == 0 };
                    tiles.multiply(simd, r, a_pack, b_pack);
                }
            }
        }
    }
}

/// The columns of a strip of B and of R as tiles: whole ones from behind the first `lead` columns, where a cache line of R's first row
/// begins; then those that are left at the end and the first `lead`, together in as few tiles as hold them.
#[derive(Clone, Copy)]
struct Columns {
    left: usize,
    lead: usize,
    right: usize,
}

impl Columns {
    /// The columns of the whole tiles.
    fn whole(self, width: usize) -> core::ops::Range<usize> {
        let from = (self.left + self.lead).min(self.right);
        from..from + (self.right - from) / width * width
    }

    /// The others: behind those, and before them.
    fn rest(self, width: usize) -> [core::ops::Range<usize>; 2] {
        let whole = self.whole(width);
        [whole.end..self.right, self.left..whole.start]
    }

    /// How many tiles there are.
    fn tiles(self, width: usize) -> usize {
        let [behind, before] = self.rest(width);
        self.whole(width).len() / width + (behind.len() + before.len()).div_ceil(width)
    }
}

/// Packs the columns of some rows of B into panels of one tile's width, each row by row; what no column fills is zero (it is multiplied
/// and thrown away; leftovers could be subnormal and slow). B is read row by row, as it lies in memory.
#[inline(always)]
fn pack_b<'a, S: Simd>(pack: &'a mut [f32], b: &[f32], n: usize, columns: Columns) -> &'a [S::f32s] {
    let width = VECTORS * S::F32_LANES;
    let depth = b.len() / n;
    let [behind, before] = columns.rest(width);
    let pack = &mut S::as_mut_simd_f32s(pack).0[..columns.tiles(width) * depth * VECTORS];
    let mut rest = [0.0; REST];
    for (row, from) in b.chunks_exact(n).enumerate() {
        rest[..behind.len()].copy_from_slice(&from[behind.clone()]);
        rest[behind.len()..][..before.len()].copy_from_slice(&from[before.clone()]);
        let tiles = from[columns.whole(width)].chunks_exact(width).chain(rest.chunks_exact(width));
        for (panel, from) in pack.chunks_exact_mut(depth * VECTORS).zip(tiles) {
            panel[row * VECTORS..][..VECTORS].copy_from_slice(S::as_simd_f32s(from).0);
        }
    }
    pack
}

/// Packs columns `depth` of some rows of A into panels of [`MR`] rows, each column by column; missing rows are zero,
/// for the same reason.
#[inline(always)]
fn pack_a<'a>(pack: &'a mut [f32], a: &[f32], k: usize, depth: core::ops::Range<usize>) -> &'a [f32] {
    let rows = a.len() / k;
    let pack = &mut pack[..rows.next_multiple_of(MR) * depth.len()];
    for (panel, rows) in pack.chunks_exact_mut(MR * depth.len()).zip(a.chunks(MR * k)) {
        for i in 0..MR {
            let to = panel.iter_mut().skip(i).step_by(MR);
            match rows.get(i * k + depth.start..i * k + depth.end) {
                Some(from) => to.zip(from).for_each(|(to, from)| *to = *from),
                None => to.for_each(|to| *to = 0.0),
            }
        }
    }
    pack
}

/// Where one packed block of A times one packed strip of B goes.
struct Tiles {
    n: usize,
    columns: Columns,
    depth: usize,
    /// R holds nothing yet: store instead of adding.
    first: bool,
}

impl Tiles {
    #[inline(always)]
    fn multiply<S: Simd>(&self, simd: S, r: &mut [f32], a: &[f32], b: &[S::f32s]) {
        let width = VECTORS * S::F32_LANES;
        let whole = self.columns.whole(width);
        for (b, left) in b.chunks_exact(self.depth * VECTORS).zip((whole.start..).step_by(width)) {
            for (a, r) in a.chunks_exact(MR * self.depth).zip(r.chunks_mut(MR * self.n)) {
                let sums = tile(simd, a, b);
                for (r, sums) in r.chunks_exact_mut(self.n).zip(&sums) {
                    if left < whole.end {
                        for (r, &sum) in S::as_mut_simd_f32s(&mut r[left..left + width]).0.iter_mut().zip(sums) {
                            *r = if self.first { sum } else { simd.add_f32s(*r, sum) };
                        }
                    } else {
                        self.store_rest::<S>(r, sums, left - whole.end);
                    }
                }
            }
        }
    }

    /// Stores a row of a tile of those that are left, whose first is the one `at`.
    #[inline(always)]
    fn store_rest<S: Simd>(&self, r: &mut [f32], sums: &[S::f32s; VECTORS], at: usize) {
        let [behind, before] = self.columns.rest(VECTORS * S::F32_LANES);
        let mut row = [0.0; MAX_NR];
        let (row, _) = row.split_at_mut(VECTORS * S::F32_LANES);
        S::as_mut_simd_f32s(row).0.copy_from_slice(sums);
        for (column, sum) in behind.chain(before).skip(at).zip(row) {
            r[column] = if self.first { *sum } else { r[column] + *sum };
        }
    }
}

/// The sums of one tile over the depth of its panels, all in registers.
#[inline(always)]
fn tile<S: Simd>(simd: S, a: &[f32], b: &[S::f32s]) -> [[S::f32s; VECTORS]; MR] {
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; MR];
    let ((a, _), (b, _)) = (a.as_chunks::<MR>(), b.as_chunks::<VECTORS>());
    for (a, b) in a.iter().zip(b) {
        for (sums, a) in sums.iter_mut().zip(a) {
            let a = simd.splat_f32s(*a);
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = simd.mul_add_e_f32s(a, *b, *sum);
            }
        }
    }
    sums
}

/// How a product of `m` rows is divided into groups: the rows of each.
///
/// Each group packs all of B for itself, so groups are as large as an even division among the threads allows.
pub(crate) fn rows_per_group(m: usize, threads: usize) -> usize {
    const MOST: usize = 384;
    let threads = threads.max(1);
    let groups = threads * m.div_ceil(threads * MOST).max(1);
    m.div_ceil(groups).next_multiple_of(MR)
}

/// The kernel: R (argument 0) = A (1) times B (2), with the columns of B (3), its rows (4) and the rows of a group (5).
pub(crate) fn mul_mat(ctx: &uhmm::Ctx<'_>) {
    let [n, k, rows] = [3, 4, 5].map(|index| ctx.value::<u32>(index) as usize);
    let (a, b) = (ctx.inp::<f32>(1), ctx.inp::<f32>(2));
    let r = ctx.out::<f32>(0).chunk(rows * n);
    let first = ctx.group() * rows * k;
    let a = &a[first..first + r.len() / n * k];
    mul_rows(r, a, b, n, k, ctx.local::<f32>(scratch_len(n, k)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::npy::Matrix;

    /// Compared with sums in f64, for sizes around every blocking factor, and for every place of R in a cache line.
    #[test]
    fn products_are_right() {
        for (m, n, k) in [(1, 1, 1), (6, 16, 256), (7, 17, 257), (97, 33, 5), (5, 1025, 3), (13, 64, 600), (100, 1040, 260), (3, 2, 1000)] {
            let (a, b) = (Matrix::random(m, k, 1), Matrix::random(k, n, 2));
            let (a, b) = (a.as_slice(), b.as_slice());
            let want = |at: usize| -> f64 {
                let (row, column) = (at / n, at % n);
                (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[i * n + column])).sum()
            };
            let want: Vec<f64> = (0..m * n).map(want).collect();
            for place in 0..16 {
                let (mut r, mut scratch) = (vec![f32::NAN; m * n + 16], vec![f32::NAN; scratch_len(n, k)]);
                mul_rows(&mut r[place..][..m * n], a, b, n, k, &mut scratch);
                for (at, (&got, want)) in r[place..].iter().zip(&want).enumerate() {
                    assert!((f64::from(got) - want).abs() < 1e-4, "{m} x {n} x {k} at {place}: element {at} is {got}, not {want}");
                }
                assert!(
                    r[..place].iter().chain(&r[place + m * n..]).all(|other| other.is_nan()),
                    "{m} x {n} x {k} at {place}: wrote beyond R"
                );
            }
        }
    }

    #[test]
    fn a_depth_of_zero_gives_zeros() {
        let mut r = [f32::NAN; 6];
        mul_rows(&mut r, &[], &[], 3, 0, &mut []);
        assert_eq!(r, [0.0; 6]);
    }

    #[test]
    #[should_panic(expected = "2 rows of 3 have 6 elements, not 5")]
    fn lengths_must_fit() {
        mul_rows(&mut [0.0; 8], &[0.0; 5], &[0.0; 12], 4, 3, &mut [0.0; 10_000]);
    }

    #[test]
    fn groups_are_even_and_cover_all_rows() {
        for (m, threads, want) in [(1797, 2, 300), (1024, 2, 258), (2048, 2, 342), (1, 8, 6), (100, 3, 36)] {
            let rows = rows_per_group(m, threads);
            assert_eq!(rows, want, "{m} rows on {threads} threads");
            assert!(rows * m.div_ceil(rows) >= m);
        }
    }
}
