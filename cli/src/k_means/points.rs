//! The points: the handwritten digits, and as many more as are asked for, which are digits with noise.

use super::kernel::DIM;
use crate::digits;
use anyhow::Result;

/// `count` points, each an image, row after row, of whole numbers from 0 to 16: first the digits themselves, then all of them over and over, each pixel up to 2 lighter or darker than it was,
/// the same way every time.
pub(crate) fn points(count: usize) -> Result<Vec<f32>> {
    let images = digits::images()?;
    let images = images.as_slice();
    let mut random = fastrand::Rng::with_seed(1);
    let mut points = Vec::with_capacity(count * DIM);
    points.extend(images.iter().take(count * DIM));
    points.extend((points.len()..count * DIM).map(|at| (images[at % images.len()] + random.i8(-2..=2) as f32).clamp(0.0, 16.0)));
    Ok(points)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digits_come_first_and_noisy_ones_after_them() {
        let points = points(1797 * 2 + 1).unwrap();
        let images = digits::images().unwrap();
        assert_eq!(points.len(), (1797 * 2 + 1) * DIM);
        assert_eq!(&points[..1797 * DIM], images.as_slice());
        let differ: Vec<f32> = points[1797 * DIM..].iter().zip(images.as_slice()).map(|(noisy, image)| noisy - image).collect();
        assert!(differ.iter().all(|by| by.abs() <= 2.0) && [-2.0, -1.0, 0.0, 1.0, 2.0].iter().all(|by| differ.contains(by)));
        assert!(points.iter().all(|x| (0.0..=16.0).contains(x) && x.fract() == 0.0));
    }
}
