//! Numbers one after the other: in memory while they are few, in a temporary file when there are
//! many.

use std::fs::File;
use std::io::Write;
use std::ops::Deref;

use bytemuck::Pod;
use memmap2::Mmap;

use crate::error::{Error, Result};

/// What may be kept in memory before the file is begun.
const MEMORY_BYTES: usize = 32 << 20;
/// What is gathered for one write into the file.
const WRITE_BYTES: usize = 1 << 20;

/// Numbers that are still being written.
#[derive(Debug)]
pub(super) struct Spool<T> {
    memory: Vec<T>,
    memory_bytes: usize,
    /// The file has no name: it is gone with the process, however that ends.
    file: Option<File>,
    written: usize,
}

impl<T: Pod> Spool<T> {
    pub(super) fn new() -> Self {
        Self::with_memory(MEMORY_BYTES)
    }

    /// Keeps everything in memory, however much it is.
    pub(super) fn in_memory() -> Self {
        Self::with_memory(usize::MAX)
    }

    fn with_memory(memory_bytes: usize) -> Self {
        Self {
            memory: Vec::new(),
            memory_bytes,
            file: None,
            written: 0,
        }
    }

    /// How many numbers there are.
    pub(super) fn len(&self) -> usize {
        self.written + self.memory.len()
    }

    /// Adds numbers at the end.
    ///
    /// # Errors
    /// [`Error::Temporary`] when the file cannot be written to, above all on a full disk.
    pub(super) fn extend(&mut self, items: &[T]) -> Result<()> {
        self.memory.extend_from_slice(items);
        if size_of_val(self.memory.as_slice()) >= self.memory_bytes {
            self.write()?;
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile().map_err(temporary)?),
        };
        file.write_all(bytemuck::cast_slice(&self.memory))
            .map_err(temporary)?;
        self.written += self.memory.len();
        self.memory.clear();
        self.memory_bytes = self.memory_bytes.min(WRITE_BYTES);
        self.memory.shrink_to(self.memory_bytes / size_of::<T>());
        Ok(())
    }

    /// Ends the writing.
    ///
    /// # Errors
    /// As [`Spool::extend`].
    pub(super) fn finish(mut self) -> Result<Pages<T>> {
        if self.file.is_none() {
            self.memory.shrink_to_fit();
            return Ok(Pages::Memory(self.memory));
        }
        self.write()?;
        match &self.file {
            // SAFETY: nobody else can open a file without a name, and it is not written to again.
            Some(file) => unsafe { Mmap::map(file) }
                .map(Pages::Mapped)
                .map_err(temporary),
            None => Ok(Pages::Memory(Vec::new())),
        }
    }
}

fn temporary(source: std::io::Error) -> Error {
    Error::Temporary {
        folder: std::env::temp_dir(),
        source,
    }
}

/// Numbers that have been written.
#[derive(Debug)]
pub(super) enum Pages<T> {
    Memory(Vec<T>),
    Mapped(Mmap),
}

impl<T> Default for Pages<T> {
    fn default() -> Self {
        Self::Memory(Vec::new())
    }
}

impl<T: Pod> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Self::Memory(items) => items,
            Self::Mapped(bytes) => bytemuck::cast_slice(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_numbers_go_through_a_file_and_come_back() -> Result<()> {
        let mut spool = Spool::<u32>::with_memory(100);
        let numbers: Vec<u32> = (0..1000).collect();
        for part in numbers.chunks(7) {
            spool.extend(part)?;
        }
        assert_eq!(spool.len(), 1000);
        let pages = spool.finish()?;
        assert!(matches!(pages, Pages::Mapped(_)));
        assert_eq!(*pages, *numbers);
        Ok(())
    }

    #[test]
    fn few_numbers_stay_in_memory() -> Result<()> {
        let mut spool = Spool::<u32>::new();
        spool.extend(&[1, 2])?;
        let pages = spool.finish()?;
        assert!(matches!(pages, Pages::Memory(_)));
        assert_eq!(*pages, [1, 2]);
        assert!(Spool::<u32>::new().finish()?.is_empty());
        Ok(())
    }
}
