//! Images of one number a pixel, from 0 (black) to 1 (white): read from PNG files, assembled from the digits, written, and drawn.

use super::kernel::Shape;
use crate::digits::{self, SIDE};
use crate::npy;
use anyhow::{Context, Result, ensure};
use std::io::{BufReader, Write as _};
use std::path::Path;

/// How many times a digit is enlarged, both ways.
const SCALE: usize = 8;
/// The most pixels: as many as an image of 32768 by 32768 has.
const MOST: usize = 1 << 30;

/// An image.
pub(crate) struct Image {
    pub(crate) shape: Shape,
    /// Row after row.
    pub(crate) pixels: Vec<f32>,
}

impl Image {
    /// A square of `side` by `side` pixels, tiled with the handwritten digits, enlarged.
    pub(crate) fn digits(side: usize) -> Result<Image> {
        let images = digits::images()?;
        let (images, _) = images.as_slice().as_chunks::<{ SIDE * SIDE }>();
        let tile = SIDE * SCALE;
        let across = side.div_ceil(tile);
        let pixel = |y: usize, x: usize| {
            let image = &images[(y / tile * across + x / tile) % images.len()];
            image[y % tile / SCALE * SIDE + x % tile / SCALE] / 16.0
        };
        let pixels = (0..side).flat_map(|y| (0..side).map(move |x| pixel(y, x))).collect();
        Ok(Image { shape: Shape { width: side, height: side }, pixels })
    }

    /// Reads a PNG file, of any kind; colours become their brightness, and transparency is left out.
    pub(crate) fn open(path: &Path) -> Result<Image> {
        Self::read(path).with_context(|| format!("{}", path.display()))
    }

    fn read(path: &Path) -> Result<Image> {
        let mut decoder = png::Decoder::new(BufReader::new(npy::open_file(path)?));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info().map_err(explain)?;
        let (width, height) = (reader.info().width as usize, reader.info().height as usize);
        ensure!(width * height <= MOST, "the image has {width} x {height} pixels: at most {MOST} are supported");
        let size = reader.output_buffer_size().context("the image does not fit into memory")?;
        let mut bytes = vec![0; size];
        let info = reader.next_frame(&mut bytes).map_err(explain)?;
        let channels = info.color_type.samples();
        let brightness = |pixel: &[u8]| match *pixel {
            [r, g, b] | [r, g, b, _] => (0.299 * f32::from(r) + 0.587 * f32::from(g) + 0.114 * f32::from(b)) / 255.0,
            [grey, ..] => f32::from(grey) / 255.0,
            [] => 0.0,
        };
        let pixels: Vec<f32> = bytes[..info.buffer_size()].chunks_exact(channels).map(brightness).collect();
        ensure!(pixels.len() == width * height, "the image holds {} pixels of {width} x {height}", pixels.len());
        Ok(Image { shape: Shape { width, height }, pixels })
    }

    /// Writes it as a grey PNG file; one that is there already is replaced.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        npy::replace(path, |mut to| {
            let mut encoder = png::Encoder::new(&mut to, self.shape.width as u32, self.shape.height as u32);
            encoder.set_color(png::ColorType::Grayscale);
            encoder.set_depth(png::BitDepth::Eight);
            let bytes: Vec<u8> = self.pixels.iter().map(|x| (x * 255.0).round() as u8).collect();
            let mut writer = encoder.write_header()?;
            writer.write_image_data(&bytes)?;
            writer.finish()?;
            Ok(to.flush()?)
        })
    }

    /// The corner at the top left, of `rows` times two characters for each line, each the mean of some pixels.
    pub(crate) fn corner(&self, rows: usize) -> Vec<String> {
        let Shape { width, height } = self.shape;
        let step = SCALE / 2;
        let (across, down) = ((width / step).min(2 * rows), (height / step).min(rows));
        let mean = |y: usize, x: usize| {
            let square = (0..step).flat_map(|dy| (0..step).map(move |dx| (y * step + dy) * width + x * step + dx));
            square.map(|at| self.pixels[at]).sum::<f32>() / (step * step) as f32 * 16.0
        };
        let means: Vec<f32> = (0..down).flat_map(|y| (0..across).map(move |x| mean(y, x))).collect();
        if across == 0 { vec![] } else { digits::draw(&means, across) }
    }
}

/// What is wrong with the file.
fn explain(error: png::DecodingError) -> anyhow::Error {
    match error {
        png::DecodingError::IoError(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            anyhow::anyhow!("the image is cut short")
        }
        png::DecodingError::Format(error) => anyhow::anyhow!("not a PNG file that can be read: {error}"),
        other => anyhow::anyhow!("the image cannot be read: {other}"),
    }
}
