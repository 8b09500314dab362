//! Matrices: loaded from `.npy` files by mapping them, taken from the program itself, or made in memory; and written back.
//!
//! A file is checked whole before any of it is used. Rules: f32, little-endian, row after row (C order), two dimensions, each from
//! 1 to `u32::MAX`, and not a byte too few or too many; everything else is refused with what it is and what to do.

use anyhow::{Context, Result, anyhow, bail, ensure};
use memmap2::Mmap;
use ndarray::{Array2, ArrayView2};
use ndarray_npy::{ReadNpyExt, ViewNpyError, ViewNpyExt, WriteNpyExt};
use std::fs::{File, Permissions};
use std::io::BufWriter;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

/// A matrix of f32, row after row.
pub(crate) struct Matrix {
    rows: usize,
    columns: usize,
    data: Data,
}

/// Who holds the elements.
enum Data {
    /// A mapped file, of which the elements are the last bytes.
    Mapped(Mmap),
    /// Bytes in the program's own file.
    Bundled(&'static [u8]),
    /// Ordinary memory.
    Owned(Vec<f32>),
}

impl Matrix {
    /// Maps the file `path`.
    pub(crate) fn open(path: &Path) -> Result<Matrix> {
        Self::map(path).with_context(|| format!("{}", path.display()))
    }

    fn map(path: &Path) -> Result<Matrix> {
        let file = open_file(path)?;
        let mapping = map_file(&file)?;
        match check(&mapping)? {
            Checked::InPlace(rows, columns) => Ok(Matrix { rows, columns, data: Data::Mapped(mapping) }),
            Checked::Copied(matrix) => Ok(matrix),
        }
    }

    /// The matrix in the bytes of a `.npy` file that is part of the program.
    pub(crate) fn bundled(bytes: &'static [u8]) -> Result<Matrix> {
        match check(bytes)? {
            Checked::InPlace(rows, columns) => Ok(Matrix { rows, columns, data: Data::Bundled(bytes) }),
            Checked::Copied(matrix) => Ok(matrix),
        }
    }

    /// A matrix of numbers between -0.5 and 0.5, the same for the same seed.
    pub(crate) fn random(rows: usize, columns: usize, seed: u64) -> Matrix {
        let mut random = fastrand::Rng::with_seed(seed);
        let data = (0..rows * columns).map(|_| random.f32() - 0.5).collect();
        Matrix { rows, columns, data: Data::Owned(data) }
    }

    /// This matrix with rows and columns exchanged, in ordinary memory.
    pub(crate) fn transposed(&self) -> Matrix {
        let from = self.as_slice();
        let data = (0..self.columns).flat_map(|column| (0..self.rows).map(move |row| from[row * self.columns + column])).collect();
        Matrix { rows: self.columns, columns: self.rows, data: Data::Owned(data) }
    }

    /// Rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// All elements, row after row, wherever they lie.
    pub(crate) fn as_slice(&self) -> &[f32] {
        let bytes: &[u8] = match &self.data {
            Data::Owned(data) => return data,
            Data::Mapped(mapping) => mapping,
            Data::Bundled(bytes) => bytes,
        };
        let size = self.rows * self.columns * size_of::<f32>();
        bytemuck::cast_slice(&bytes[bytes.len() - size..])
    }

    /// The elements as the known library wants them.
    pub(crate) fn view(&self) -> Result<ArrayView2<'_, f32>> {
        Ok(ArrayView2::from_shape((self.rows, self.columns), self.as_slice())?)
    }
}

/// Writes `rows` rows to the file `path`. A file that is there already is replaced as a whole, never overwritten: it may be one of
/// the matrices that are mapped.
pub(crate) fn write(path: &Path, rows: usize, columns: usize, data: &[f32]) -> Result<()> {
    let matrix = ArrayView2::from_shape((rows, columns), data)?;
    replace(path, |to| Ok(matrix.write_npy(to)?))
}

/// Makes the file `path` anew, by what `write` writes. One that is there already is replaced when all of it is written.
pub(crate) fn replace(path: &Path, write: impl FnOnce(BufWriter<&mut File>) -> Result<()>) -> Result<()> {
    replace_whole(path, write).with_context(|| format!("writing {}", path.display()))
}

fn replace_whole(path: &Path, write: impl FnOnce(BufWriter<&mut File>) -> Result<()>) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        // A pipe or a device: nothing to replace.
        return write(BufWriter::new(&mut File::options().write(true).open(path)?));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let permissions = Permissions::from_mode(0o666); // less the umask, as for any new file
    let mut file = tempfile::Builder::new().permissions(permissions).tempfile_in(folder)?;
    write(BufWriter::new(file.as_file_mut()))?;
    file.persist(path)?;
    Ok(())
}

enum Checked {
    InPlace(usize, usize),
    Copied(Matrix),
}

/// Checks the bytes of a whole file.
fn check(bytes: &[u8]) -> Result<Checked> {
    if !bytes.starts_with(b"\x93NUMPY") {
        bail!("not a .npy file: it does not start with the bytes \\x93NUMPY");
    }
    match ArrayView2::<f32>::view_npy(bytes) {
        Ok(view) => {
            let (rows, columns) = dimensions(view.dim(), view.is_standard_layout())?;
            Ok(Checked::InPlace(rows, columns))
        }
        // Some writers put the elements at an odd place; those are copied.
        Err(ViewNpyError::MisalignedData) => {
            let array = Array2::<f32>::read_npy(bytes)?;
            let (rows, columns) = dimensions(array.dim(), array.is_standard_layout())?;
            Ok(Checked::Copied(Matrix { rows, columns, data: Data::Owned(array.into_raw_vec_and_offset().0) }))
        }
        Err(error) => Err(explain(error)),
    }
}

fn dimensions((rows, columns): (usize, usize), c_order: bool) -> Result<(usize, usize)> {
    if rows == 0 || columns == 0 {
        bail!("the matrix has {rows} rows and {columns} columns: both must be at least 1");
    }
    if u32::try_from(rows).is_err() || u32::try_from(columns).is_err() {
        bail!("the matrix has {rows} rows and {columns} columns: at most {} of each are supported", u32::MAX);
    }
    if !c_order {
        bail!("the elements are in Fortran order (column after column): save numpy.ascontiguousarray(a) instead");
    }
    Ok((rows, columns))
}

/// What is wrong with the file, and what to do about it.
fn explain(error: ViewNpyError) -> anyhow::Error {
    match error {
        ViewNpyError::WrongDescriptor(found) => {
            anyhow!("the elements have type {found}, '<f4' (f32, little-endian) is needed: save a.astype('<f4') instead")
        }
        ViewNpyError::NonNativeEndian => {
            anyhow!("the elements are big-endian, '<f4' is needed: save a.astype('<f4') instead")
        }
        ViewNpyError::WrongNdim(_, found) => {
            anyhow!("the array has {found} dimensions, a matrix of 2 is needed: save a.reshape(rows, columns) instead")
        }
        ViewNpyError::MissingBytes(bytes) => {
            anyhow!("the file is cut short: {bytes} bytes of the elements are missing")
        }
        ViewNpyError::ExtraBytes(bytes) => {
            anyhow!("{bytes} bytes follow the last element: the file is damaged, or holds more than one array")
        }
        ViewNpyError::LengthOverflow => {
            anyhow!("the shape is too large: its size in bytes does not fit a number")
        }
        ViewNpyError::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            anyhow!("the file is cut short: it ends within its header")
        }
        ViewNpyError::ParseHeader(error) => {
            // What follows the first line is a drawing of the place.
            let error = error.to_string();
            let first = error.split(" -->").next().and_then(|text| text.lines().next()).unwrap_or_default();
            anyhow!("the header cannot be read: {first}")
        }
        other => anyhow!("the file cannot be read: {other}"),
    }
}

/// Opens a regular file that is not empty.
pub(crate) fn open_file(path: &Path) -> Result<File> {
    // Without waiting for the other end, if it is a pipe.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    ensure!(metadata.is_file(), "not a regular file");
    ensure!(metadata.len() > 0, "the file is empty");
    Ok(file)
}

/// Maps a file for reading.
#[allow(unsafe_code)] // the one call: mapping a file is unsafe because others may change it
pub(crate) fn map_file(file: &File) -> Result<Mmap> {
    // SAFETY: the bytes are only ever read as u8 and f32, of which every value is valid. Whoever changes the file meanwhile changes
    // the numbers of this calculation, and whoever truncates it ends this program with SIGBUS: both are said in the help text.
    Ok(unsafe { Mmap::map(file) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposing_twice_gives_the_matrix_back() {
        let matrix = Matrix::random(3, 5, 1);
        let other = matrix.transposed();
        assert_eq!((other.rows(), other.columns()), (5, 3));
        assert_eq!(other.as_slice()[3], matrix.as_slice()[1]);
        assert_eq!(other.transposed().as_slice(), matrix.as_slice());
    }

    #[test]
    fn data_at_an_odd_place_are_copied() {
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }\n";
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend([1.5f32, -2.0].map(f32::to_le_bytes).concat());
        let leaked: &'static [u8] = bytes.leak();
        assert_eq!(Matrix::bundled(leaked).unwrap().as_slice(), [1.5, -2.0]);
    }
}
