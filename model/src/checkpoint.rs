//! Safetensors files: memory-mapped reading, shard by shard, and writing that is whole or absent.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::error::{Error, Result};

/// File name of an unsharded model.
pub const MODEL_FILE: &str = "model.safetensors";
/// File name of the list of shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// How a file begins that Git LFS left in place of a large one.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// The tensors of one or more safetensors files, mapped and not yet read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    metadata: HashMap<String, String>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Where its bytes lie in the shard.
    bytes: Range<usize>,
}

impl Checkpoint {
    /// Opens the weights of a model folder: one file, or the shards that its index lists.
    ///
    /// # Errors
    /// [`Error::MissingFile`] without weights, [`Error::Safetensors`] for a file that lies about
    /// its contents, [`Error::Io`] for a missing shard.
    pub fn open_folder(folder: &Path) -> Result<Self> {
        Self::open(folder, Self::files(folder)?)
    }

    /// The files of a model folder's weights: one, or the shards that its index lists.
    ///
    /// # Errors
    /// [`Error::MissingFile`] without weights, and what is wrong with an index.
    pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
        let index = folder.join(INDEX_FILE);
        let single = folder.join(MODEL_FILE);
        let files = match (index.exists(), single.exists()) {
            (true, _) => shard_files(&index)?,
            (false, true) => vec![MODEL_FILE.to_owned()],
            (false, false) => {
                return Err(match other_weights(folder) {
                    Some(found) => Error::OtherWeights {
                        folder: folder.into(),
                        found,
                    },
                    None => Error::MissingFile {
                        folder: folder.into(),
                        file: MODEL_FILE,
                    },
                });
            }
        };
        Ok(files.iter().map(|file| folder.join(file)).collect())
    }

    /// Opens one safetensors file.
    pub fn open_file(path: &Path) -> Result<Self> {
        Self::open(path, [path.to_path_buf()])
    }

    fn open(path: &Path, files: impl IntoIterator<Item = PathBuf>) -> Result<Self> {
        let mut checkpoint = Self {
            path: path.into(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: HashMap::new(),
        };
        for file in files {
            checkpoint.add(file)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let io = |source| Error::Io {
            action: "open",
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(io)?;
        // SAFETY: the mapping is only read; a file that is truncated while it is mapped can fault,
        // as with every memory-mapped reader.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let damaged = |reason: String| Error::Safetensors {
            path: path.clone(),
            reason,
        };
        if map.starts_with(LFS_POINTER) {
            let reason = "it is Git LFS's pointer to the file, which `git lfs pull` gets".into();
            return Err(damaged(reason));
        }
        let (length, header) =
            SafeTensors::read_metadata(&map).map_err(|e| damaged(e.to_string()))?;
        let data = size_of::<u64>() + length; // after the header and its length
        self.metadata
            .extend(header.metadata().clone().unwrap_or_default());
        for (name, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            let entry = Entry {
                shard: self.shards.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: data + start..data + end,
            };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(damaged(format!("{name} is in another shard, too")));
            }
        }
        self.shards.push(Shard { path, map });
        Ok(())
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names and shapes of all tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors
            .iter()
            .map(|(name, entry)| (name.as_str(), entry.shape.as_slice()))
    }

    /// Shape of a tensor, if there is such a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// What a file says of itself under `key`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A tensor as the file has it.
    pub fn view(&self, name: &str) -> Option<TensorView<'_>> {
        let entry = self.tensors.get(name)?;
        let bytes = &self.shards[entry.shard].map[entry.bytes.clone()];
        let view = TensorView::new(entry.dtype, entry.shape.clone(), bytes);
        Some(view.expect("checked when the file was opened"))
    }

    /// Lets the pages of a tensor go that was read through [`Checkpoint::view`].
    pub fn release(&self, name: &str) {
        if let Some(entry) = self.tensors.get(name) {
            self.shards[entry.shard].release(&entry.bytes);
        }
    }

    /// Compares names and shapes with what a model needs.
    ///
    /// # Errors
    /// [`Error::Tensors`] lists everything that is missing, of another shape or left over.
    pub fn check(
        &self,
        wanted: &[(String, Vec<usize>)],
        ignored: impl Fn(&str) -> bool,
    ) -> Result<()> {
        match self.differences(wanted, ignored) {
            problems if problems.is_empty() => Ok(()),
            problems => Err(Error::Tensors {
                path: self.path.clone(),
                problems,
            }),
        }
    }

    /// One sentence for everything that is missing, of another shape, or neither wanted nor
    /// ignored.
    pub fn differences(
        &self,
        wanted: &[(String, Vec<usize>)],
        ignored: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, shape) in wanted {
            match self.shape(name) {
                None => problems.push(format!("{name} is missing")),
                Some(found) if found != shape => {
                    problems.push(format!("{name} is {found:?}, expected {shape:?}"));
                }
                Some(_) => {}
            }
        }
        let known: BTreeSet<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
        for name in self.tensors.keys() {
            if !known.contains(name.as_str()) && !ignored(name) {
                problems.push(format!("{name} is unexpected"));
            }
        }
        problems
    }

    /// Reads a tensor as f32, whatever float type the file holds, and lets its pages go.
    ///
    /// # Errors
    /// [`Error::Tensors`] if there is no such tensor; [`Error::Safetensors`] if it is not F32, F16
    /// or BF16.
    pub fn read(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.floats(name)?;
        Ok(self.convert(entry, entry.bytes.clone()))
    }

    /// Reads some rows of a tensor, that is slices along its first dimension, as
    /// [`Checkpoint::read`] does.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let entry = self.floats(name)?;
        let count = entry.shape.first().copied().unwrap_or(0);
        assert!(
            rows.start <= rows.end && rows.end <= count,
            "rows {rows:?} of {count}"
        );
        let row_bytes = entry.bytes.len() / count.max(1);
        let at = |row| entry.bytes.start + row * row_bytes;
        Ok(self.convert(entry, at(rows.start)..at(rows.end)))
    }

    /// The type of a tensor's elements, one that [`Checkpoint::read`] takes.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn float_dtype(&self, name: &str) -> Result<Dtype> {
        self.floats(name).map(|entry| entry.dtype)
    }

    fn floats(&self, name: &str) -> Result<&Entry> {
        let entry = self.tensors.get(name).ok_or_else(|| Error::Tensors {
            path: self.path.clone(),
            problems: vec![format!("{name} is missing")],
        })?;
        match entry.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(entry),
            other => Err(Error::Safetensors {
                path: self.shards[entry.shard].path.clone(),
                reason: format!("{name} is {other:?}, expected F32, F16 or BF16"),
            }),
        }
    }

    fn convert(&self, entry: &Entry, range: Range<usize>) -> Vec<f32> {
        let shard = &self.shards[entry.shard];
        let bytes = &shard.map[range.clone()];
        let values = match entry.dtype {
            Dtype::F16 => convert::<2>(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => convert::<2>(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            _ => convert::<4>(bytes, f32::from_le_bytes),
        };
        shard.release(&range);
        values
    }
}

impl Shard {
    /// Gives the pages of a tensor back, so that loading holds the model plus one tensor and not
    /// the file as well.
    fn release(&self, bytes: &Range<usize>) {
        #[cfg(unix)]
        {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is a read-only view of a file, so dropped pages are read again
            // from it when they are needed. A refusal only costs memory.
            let _ = unsafe {
                self.map
                    .unchecked_advise_range(advice, bytes.start, bytes.len())
            };
        }
    }
}

/// Turns little-endian elements of `N` bytes into f32, on all cores.
fn convert<const N: usize>(bytes: &[u8], one: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
    let (elements, _) = bytes.as_chunks::<N>();
    elements
        .par_iter()
        .with_min_len(1 << 14)
        .map(|e| one(*e))
        .collect()
}

/// Appends elements as a file holds them, each rounded to the nearest number of its type, ties to
/// the even one.
///
/// # Panics
/// If the type is not F32, F16 or BF16.
pub fn encode(values: &[f32], dtype: Dtype, bytes: &mut Vec<u8>) {
    match dtype {
        Dtype::F32 => append(values, bytes, f32::to_le_bytes),
        Dtype::F16 => append(values, bytes, |x| f16::from_f32(x).to_le_bytes()),
        Dtype::BF16 => append(values, bytes, |x| bf16::from_f32(x).to_le_bytes()),
        other => panic!("{other:?} is none of the float types of a checkpoint"),
    }
}

/// Appends f32 as little-endian elements of `N` bytes, on all cores.
fn append<const N: usize>(
    values: &[f32],
    bytes: &mut Vec<u8>,
    one: impl Fn(f32) -> [u8; N] + Sync,
) {
    let start = bytes.len();
    bytes.resize(start + N * values.len(), 0);
    let (elements, _) = bytes[start..].as_chunks_mut::<N>();
    let elements = elements.par_iter_mut().with_min_len(1 << 14);
    elements
        .zip(values)
        .for_each(|(element, x)| *element = one(*x));
}

/// What [`encode`] makes of a number.
///
/// # Panics
/// As [`encode`].
pub fn rounded(x: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        other => panic!("{other:?} is none of the float types of a checkpoint"),
    }
}

/// Whether every value stays a finite number when it is rounded to a type.
pub fn fits(values: &[f32], dtype: Dtype) -> bool {
    let largest = match dtype {
        Dtype::F16 => f16::MAX.to_f32(),
        Dtype::BF16 => bf16::MAX.to_f32(),
        _ => f32::MAX,
    };
    values.iter().all(|x| x.abs() <= largest)
}

/// A file of a folder that holds weights in a format that is not read.
fn other_weights(folder: &Path) -> Option<String> {
    let entries = folder.read_dir().ok()?.filter_map(std::result::Result::ok);
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let others = [".bin", ".pth", ".pt", ".gguf", ".safetensors"];
    names
        .filter(|name| others.iter().any(|suffix| name.ends_with(suffix)))
        .min()
}

/// The files that an index names, each a plain name inside the folder.
fn shard_files(index: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(index).map_err(|source| Error::Io {
        action: "read",
        path: index.into(),
        source,
    })?;
    let json: Value = serde_json::from_str(&text).map_err(|source| Error::Json {
        path: index.into(),
        source,
    })?;
    let damaged = |reason: &str| Error::Safetensors {
        path: index.into(),
        reason: reason.into(),
    };
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| damaged("it has no weight_map"))?;
    let mut files = BTreeSet::new();
    for file in map.values() {
        let file = file
            .as_str()
            .ok_or_else(|| damaged("a file name is not a string"))?;
        if file.contains(['/', '\\']) || file.starts_with("..") {
            return Err(damaged("a shard lies outside of the folder"));
        }
        files.insert(file.to_owned());
    }
    Ok(files.into_iter().collect())
}

/// A tensor to be written whose elements are made when it is their turn: a file can be larger than
/// memory.
pub struct LazyTensor<'a, E = Error> {
    /// Key in the file.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Makes the elements, row-major and little-endian.
    pub bytes: Box<dyn FnOnce() -> std::result::Result<Cow<'a, [u8]>, E> + 'a>,
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub struct NamedTensor {
    /// Key in the file.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub values: Vec<f32>,
}

/// Writes tensors one after the other, in the order and with the metadata of the safetensors
/// library for PyTorch, and some more metadata.
///
/// # Errors
/// [`Error::Io`], or what making a tensor's elements failed with; the file is complete or absent.
pub fn write_lazily<E: From<Error>>(
    path: &Path,
    mut tensors: Vec<LazyTensor<E>>,
    metadata: &[(&str, String)],
) -> std::result::Result<(), E> {
    let mut all = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    all.extend(
        metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.clone())),
    );
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut end = 0;
    let info = |tensor: &LazyTensor<E>| {
        let start = end;
        end += tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize() / 8;
        let info = TensorInfo {
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        (tensor.name.clone(), info)
    };
    let infos: Vec<_> = tensors.iter().map(info).collect();
    let header = Metadata::new(Some(all), infos).map_err(|e| Error::Safetensors {
        path: path.into(),
        reason: e.to_string(),
    })?;
    let mut header = serde_json::to_value(&header).expect("names and numbers can be written");
    if let Some(metadata) = header["__metadata__"].as_object_mut() {
        metadata.sort_keys(); // a hash map's order would make two files of one content
    }
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' '); // so that elements are aligned
    write_parts(path, |file| {
        file(&(header.len() as u64).to_le_bytes())?;
        file(&header)?;
        tensors
            .into_iter()
            .try_for_each(|tensor| Ok(file(&(tensor.bytes)()?)?))
    })
}

/// Writes F32 tensors, see [`write_lazily`].
///
/// # Errors
/// [`Error::Io`]; the file is complete or absent.
pub fn write_safetensors(
    path: &Path,
    tensors: &[NamedTensor],
    metadata: &[(&str, String)],
) -> Result<()> {
    let lazy = tensors.iter().map(|tensor| LazyTensor::<Error> {
        name: tensor.name.clone(),
        dtype: Dtype::F32,
        shape: tensor.shape.clone(),
        bytes: Box::new(|| Ok(bytemuck::cast_slice(&tensor.values).into())),
    });
    write_lazily(path, lazy.collect(), metadata)
}

/// Writes a file under a temporary name, flushes it to the disk and renames it.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    write_parts(path, |file| file(bytes))
}

/// Why a temporary file cannot be made, without its name, which nobody has given.
pub(crate) fn without_name(error: std::io::Error) -> std::io::Error {
    match error.to_string().rsplit_once(" at path ") {
        Some((reason, _)) => std::io::Error::new(error.kind(), reason),
        None => error,
    }
}

/// [`write_file`] part by part: `write` gets a function that appends to the file.
fn write_parts<E: From<Error>>(
    path: &Path,
    write: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<()>) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let io = |source| Error::Io {
        action: "write",
        path: path.into(),
        source,
    };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let mut builder = tempfile::Builder::new();
    builder.prefix(".part-");
    #[cfg(unix)]
    {
        // temporary files are private to their owner; what a run leaves behind follows the umask
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder
        .tempfile_in(folder.unwrap_or(Path::new(".")))
        .map_err(|error| io(without_name(error)))?;
    write(&mut |bytes| file.write_all(bytes).map_err(io))?;
    file.as_file().sync_all().map_err(io)?;
    file.persist(path).map_err(|e| io(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize]) -> NamedTensor {
        let count: usize = shape.iter().product();
        NamedTensor {
            name: name.into(),
            shape: shape.to_vec(),
            values: (0..count).map(|i| i as f32 - 2.5).collect(),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let (a, b) = (tensor("a", &[2, 3]), tensor("b", &[4]));
        let more = ["x", "y", "z", "u", "v", "w"].map(|key| (key, key.to_owned()));
        let write = || write_safetensors(&path, &[a.clone(), b.clone()], &more).unwrap();
        write();
        let bytes = std::fs::read(&path).unwrap();
        write();
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "the same each time");
        let read = Checkpoint::open_file(&path).unwrap();
        assert_eq!(read.metadata("format"), Some("pt"));
        assert_eq!(read.metadata("x"), Some("x"));
        assert_eq!(read.read("a").unwrap(), a.values);
        assert_eq!(read.shape("b"), Some(&[4][..]));
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "no temporary file is left");
    }

    #[test]
    fn half_precision_becomes_f32_exactly() {
        let values = [1.0f32, -0.5, 65504.0, 6.1e-5];
        let halves: Vec<u8> = values
            .iter()
            .flat_map(|v| f16::from_f32(*v).to_le_bytes())
            .collect();
        let read = convert::<2>(&halves, |b| f16::from_le_bytes(b).to_f32());
        for (value, read) in values.iter().zip(read) {
            assert_eq!(f16::from_f32(*value).to_f32(), read);
        }
    }

    /// Every way in which a header can lie ends in an error that names the file.
    #[test]
    fn lying_headers_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        write_safetensors(&path, &[tensor("a", &[2, 3])], &[]).unwrap();
        let good = std::fs::read(&path).unwrap();
        let header = String::from_utf8(good[8..good.len() - 24].to_vec()).unwrap();
        let with_header = |text: &str| {
            let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
            bytes.extend(text.as_bytes());
            bytes.extend(&good[good.len() - 24..]);
            bytes
        };
        let mut cases = vec![
            Vec::new(),
            good[..4].to_vec(),
            good[..good.len() - 1].to_vec(),
        ];
        cases.push([&u64::MAX.to_le_bytes()[..], &good[8..]].concat());
        for (from, to) in [
            ("[2,3]", "[2,4]"),
            ("[0,24]", "[0,2400]"),
            ("[0,24]", "[4,24]"),
            ("F32", "F64"),
            ("F32", "Q7"),
            ("[2,3]", "[18446744073709551615,3]"),
        ] {
            assert!(header.contains(from), "{header}");
            cases.push(with_header(&header.replace(from, to)));
        }
        for bytes in cases {
            std::fs::write(&path, &bytes).unwrap();
            let error = Checkpoint::open_file(&path).unwrap_err().to_string();
            assert!(error.contains("a.safetensors"), "{error}");
        }
    }

    #[test]
    fn check_lists_everything_that_differs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        write_safetensors(&path, &[tensor("a", &[2, 3]), tensor("odd", &[1])], &[]).unwrap();
        let wanted = [("a".into(), vec![3, 2]), ("b".into(), vec![1])];
        let read = Checkpoint::open_file(&path).unwrap();
        let text = read.check(&wanted, |_| false).unwrap_err().to_string();
        for part in [
            "a is [2, 3], expected [3, 2]",
            "b is missing",
            "odd is unexpected",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(
            read.check(&[("a".into(), vec![2, 3])], |name| name == "odd")
                .is_ok()
        );
    }

    #[test]
    fn elements_are_rounded_to_the_nearest_and_even() {
        let bytes = |x: f32, dtype| {
            let mut bytes = Vec::new();
            encode(&[x], dtype, &mut bytes);
            bytes
        };
        // bf16 keeps 7 bits after the point: 1 + 1/256 and 1 + 3/256 lie in the middle
        for (x, nearest) in [
            (1.0 + 1.0 / 256.0, 0x3f80_u16),
            (1.0 + 3.0 / 256.0, 0x3f82),
            (1.0 + 1.1 / 256.0, 0x3f81),
            (-1.5, 0xbfc0),
        ] {
            assert_eq!(bytes(x, Dtype::BF16), nearest.to_le_bytes(), "{x}");
        }
        // f16 keeps 10
        for (x, nearest) in [
            (1.0 + 1.0 / 2048.0, 0x3c00_u16),
            (1.0 + 3.0 / 2048.0, 0x3c02),
        ] {
            assert_eq!(bytes(x, Dtype::F16), nearest.to_le_bytes(), "{x}");
        }
        assert_eq!(bytes(0.1, Dtype::F32), 0.1f32.to_le_bytes());
    }

    #[test]
    fn values_beyond_a_type_do_not_fit_it() {
        for (x, fitting) in [
            (65504.0, [true, true, true]),
            (65536.0, [false, true, true]),
            (f32::MAX, [false, false, true]),
            (f32::INFINITY, [false; 3]),
            (f32::NAN, [false; 3]),
        ] {
            let found = [Dtype::F16, Dtype::BF16, Dtype::F32].map(|dtype| fits(&[0.0, -x], dtype));
            assert_eq!(found, fitting, "{x}");
        }
    }

    #[test]
    fn rows_are_slices_of_the_first_dimension() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let (a, b) = (tensor("a", &[4, 2, 3]), tensor("b", &[4]));
        write_safetensors(&path, &[a.clone(), b.clone()], &[]).unwrap();
        let read = Checkpoint::open_file(&path).unwrap();
        assert_eq!(read.read_rows("a", 1..3).unwrap(), a.values[6..18]);
        assert_eq!(read.read_rows("b", 3..4).unwrap(), b.values[3..]);
        assert!(read.read_rows("a", 2..2).unwrap().is_empty());
        assert!(read.read_rows("c", 0..1).is_err());
    }

    #[test]
    fn an_index_cannot_leave_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join(INDEX_FILE);
        std::fs::write(&index, r#"{"weight_map": {"a": "../secret.safetensors"}}"#).unwrap();
        assert!(Checkpoint::open_folder(dir.path()).is_err());
        std::fs::write(&index, r#"{"weight_map": {"a": "model-1.safetensors"}}"#).unwrap();
        let error = Checkpoint::open_folder(dir.path()).unwrap_err().to_string();
        assert!(error.contains("model-1.safetensors"), "{error}");
    }
}
