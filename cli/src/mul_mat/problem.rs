//! A product to compute, with the answer of a known library (`ndarray`, whose product is the `matrixmultiply` crate's).

use super::programs::Shape;
use crate::digits;
use crate::matmul::rows_per_group;
use crate::npy::Matrix;
use crate::options;
use anyhow::{Result, bail};
use ndarray::Array2;

/// A, B and what their product must be.
pub(crate) struct Problem {
    /// The left side.
    pub(crate) a: Matrix,
    /// The right side.
    pub(crate) b: Matrix,
    /// Sizes.
    pub(crate) shape: Shape,
    want: Array2<f32>,
    /// The largest size of an element of the product.
    largest: f64,
    /// How far an element may be from the library's.
    tolerance: f64,
}

/// The two sides, loaded and checked before a device is opened.
pub(crate) struct Sides {
    a: Matrix,
    b: Matrix,
    /// Whole numbers whose products have no rounding errors.
    exact: bool,
}

impl Sides {
    /// What the command line asks for.
    pub(crate) fn from_args(args: &options::MulMat) -> Result<Sides> {
        match (&args.a, &args.b, args.size) {
            (Some(a), Some(b), _) => Sides::new(Matrix::open(a)?, Matrix::open(b)?, false),
            (_, _, Some(size)) => {
                let size = size as usize;
                Sides::new(Matrix::random(size, size, 1), Matrix::random(size, size, 2), false)
            }
            _ => Sides::digits(),
        }
    }

    /// The digits and their transpose: whole numbers, with sums below 2^24, so the product must be exact.
    pub(crate) fn digits() -> Result<Sides> {
        let images = digits::images()?;
        let transposed = images.transposed();
        Sides::new(images, transposed, true)
    }

    fn new(a: Matrix, b: Matrix, exact: bool) -> Result<Sides> {
        if a.columns() != b.rows() {
            bail!(
                "the matrices do not fit: A is {} x {} and B is {} x {}, but A must have as many columns as B has rows",
                a.rows(),
                a.columns(),
                b.rows(),
                b.columns()
            );
        }
        for (name, matrix) in [("A", &a), ("B", &b)] {
            if !largest(matrix.as_slice()).is_finite() {
                bail!("{name} holds infinite values or values that are no number: a product cannot be checked");
            }
        }
        if largest(a.as_slice()) * largest(b.as_slice()) * a.columns() as f64 > f64::from(f32::MAX) {
            bail!("the product of such large values can exceed what f32 holds: scale the matrices down");
        }
        Ok(Sides { a, b, exact })
    }
}

impl Problem {
    /// Computes what the product must be, and divides the work for `threads` threads.
    pub(crate) fn new(Sides { a, b, exact }: Sides, threads: usize) -> Result<Problem> {
        let shape = Shape { m: a.rows(), k: a.columns(), n: b.columns(), rows: rows_per_group(a.rows(), threads) };
        let want = a.view()?.dot(&b.view()?);
        // Rounding errors of a sum of k products grow like k at worst, like the root of k in general; a wrong element or a stale
        // page is far beyond that.
        let depth = shape.k as f64;
        let unit = f64::from(f32::EPSILON) * largest(a.as_slice()) * largest(b.as_slice());
        let tolerance = if exact { 0.0 } else { unit * depth * depth.sqrt().max(8.0) };
        let largest = want.as_slice().map_or(0.0, largest);
        Ok(Problem { a, b, shape, want, largest, tolerance })
    }

    /// How far `r` is from the library's product: the largest difference, relative to the largest element of the product.
    ///
    /// # Errors
    /// If an element is further off than rounding explains; for whole numbers, if any differs at all.
    pub(crate) fn check(&self, who: &str, r: &[f32]) -> Result<f64> {
        let mut worst = 0.0f64;
        for (at, (&got, &want)) in r.iter().zip(&self.want).enumerate() {
            let difference = (f64::from(got) - f64::from(want)).abs();
            if difference <= self.tolerance {
                worst = worst.max(difference);
            } else {
                let (row, column) = (at / self.shape.n, at % self.shape.n);
                bail!("wrong product: {who} has {got} in row {row}, column {column}, the library has {want}");
            }
        }
        Ok(if self.largest > 0.0 { worst / self.largest } else { worst })
    }
}

/// The largest absolute value; infinite if one is no number.
fn largest(data: &[f32]) -> f64 {
    data.iter().fold(0.0, |largest, value| if value.is_nan() { f64::INFINITY } else { f64::max(largest, f64::from(value.abs())) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_element_is_noticed() {
        let problem = Problem::new(Sides::digits().unwrap(), 2).unwrap();
        let mut r = problem.want.as_slice().unwrap().to_vec();
        assert_eq!(problem.check("it", &r).unwrap(), 0.0);
        r[1797 + 2] += 1.0;
        let message = problem.check("it", &r).unwrap_err().to_string();
        assert!(message.contains("it has") && message.contains("row 1, column 2"), "{message}");
        r[1797 + 2] = f32::NAN;
        assert!(problem.check("it", &r).is_err());
    }

    #[test]
    fn rounding_is_forgiven_and_a_missing_product_is_not() {
        let (a, b) = (Matrix::random(20, 500, 1), Matrix::random(500, 20, 2));
        let missing = a.as_slice()[499] * b.as_slice()[499 * 20];
        let problem = Problem::new(Sides::new(a, b, false).unwrap(), 2).unwrap();
        let mut r = problem.want.as_slice().unwrap().to_vec();
        r[0] += 1e-6;
        assert!(problem.check("it", &r).unwrap() > 0.0);
        assert!(missing.abs() > 1e-2, "{missing}");
        r[0] -= missing;
        assert!(problem.check("it", &r).is_err());
    }
}
