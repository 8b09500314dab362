//! The handwritten digits that come with the program: 1797 images of 8 by 8 pixels with values from 0 to 16, and their names.
//!
//! Source and licence: the file NOTICE.

use crate::npy::Matrix;
use anyhow::Result;

/// The width and height of an image, in pixels.
pub(crate) const SIDE: usize = 8;

#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

static IMAGES: &Aligned<[u8]> = &Aligned(*include_bytes!("../data/digits.npy"));
static LABELS: &[u8] = include_bytes!("../data/digits-labels.npy");

/// The images, one a row. They lie in the program's own file, mapped like any file.
pub(crate) fn images() -> Result<Matrix> {
    Matrix::bundled(&IMAGES.0)
}

/// Which digit each image shows.
pub(crate) fn labels() -> Result<Vec<u8>> {
    use ndarray_npy::ReadNpyExt;
    Ok(ndarray::Array1::<u8>::read_npy(LABELS)?.to_vec())
}

/// An image of rows of `width` pixels as lines of text, two characters a pixel.
pub(crate) fn draw(image: &[f32], width: usize) -> Vec<String> {
    const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];
    let shade = |&value: &f32| SHADES[((value / 16.0 * 4.0).round() as usize).min(4)];
    let line = |row: &[f32]| row.iter().map(shade).flat_map(|shade| [shade, shade]).collect();
    image.chunks(width).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_set_is_whole() {
        let (images, labels) = (images().unwrap(), labels().unwrap());
        assert_eq!((images.rows(), images.columns(), labels.len()), (1797, SIDE * SIDE, 1797));
        assert!(images.as_slice().iter().all(|&value| (0.0..=16.0).contains(&value) && value.fract() == 0.0));
        // The sums, so that a changed byte is noticed: made with Python's csv module from the source file.
        assert_eq!(images.as_slice().iter().map(|&value| f64::from(value)).sum::<f64>(), IMAGE_SUM);
        assert_eq!(labels.iter().map(|&label| u32::from(label)).sum::<u32>(), LABEL_SUM);
    }

    const IMAGE_SUM: f64 = 561718.0;
    const LABEL_SUM: u32 = 8070;

    #[test]
    fn a_drawing_has_a_line_for_each_row() {
        let images = images().unwrap();
        let lines = draw(&images.as_slice()[..SIDE * SIDE], SIDE);
        assert_eq!(lines.len(), SIDE);
        assert!(lines.iter().all(|line| line.chars().count() == 2 * SIDE));
        assert_eq!(lines[0], "    ░░▓▓▒▒      ");
    }
}
