//! What is pushed, from the disk or from memory.

use std::fs::{self, File};
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::hub::digest::sha256;

/// A file of a repository.
#[derive(Debug, Clone)]
pub struct PushFile {
    /// Its path there.
    pub name: String,
    /// What is in it.
    pub content: Content,
}

/// Where the bytes of a file are.
#[derive(Debug, Clone)]
pub enum Content {
    /// On the disk.
    File(PathBuf),
    /// Here.
    Bytes(Vec<u8>),
}

impl Content {
    pub(super) fn size(&self) -> Result<u64> {
        match self {
            Content::File(path) => Ok(fs::metadata(path).map_err(|e| self.unread(e))?.len()),
            Content::Bytes(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// The bytes from `start` on.
    pub(super) fn open(&self, start: u64) -> Result<Box<dyn Read + '_>> {
        match self {
            Content::File(path) => {
                let mut file = File::open(path).map_err(|e| self.unread(e))?;
                file.seek(SeekFrom::Start(start))
                    .map_err(|e| self.unread(e))?;
                Ok(Box::new(file))
            }
            Content::Bytes(bytes) => {
                let mut bytes = Cursor::new(bytes.as_slice());
                bytes.set_position(start);
                Ok(Box::new(bytes))
            }
        }
    }

    /// The first bytes, at most so many.
    pub(super) fn read(&self, most: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = self.open(0)?.take(most).read_to_end(&mut bytes);
        read.map_err(|e| self.unread(e))?;
        Ok(bytes)
    }

    pub(super) fn sha256(&self) -> Result<String> {
        sha256(&mut *self.open(0)?).map_err(|e| self.unread(e))
    }

    fn unread(&self, source: io::Error) -> Error {
        let path = match self {
            Content::File(path) => path.clone(),
            Content::Bytes(_) => PathBuf::new(), // in memory, where reading cannot fail
        };
        Error::Io {
            action: "read",
            path,
            source,
        }
    }
}
