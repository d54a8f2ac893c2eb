//! The directory that survives a restart.
//!
//! One file, replaced as a whole: written beside it, flushed to the disk, renamed over it, and the directory flushed. So there is the old state or
//! the new one, whenever the process or the machine dies. A lock keeps a second process out, which would overwrite what the first one
//! knows.

use super::image::{self, Image, ImageError, MAGIC};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

const STATE: &str = "state.kvlane";
const BESIDE: &str = "state.kvlane.new";
const LOCK: &str = "lock";

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// It cannot be made or written to.
    #[error("cannot use the state directory {0}: {1}")]
    Io(PathBuf, io::Error),
    /// Another process uses it.
    #[error("the state directory {0} is in use by another process: give each its own")]
    InUse(PathBuf),
}

/// Opens the state directory and reads it. A file that cannot be used is told and left out: all of it can be learnt anew.
pub(crate) async fn open(path: Option<&Path>) -> Result<(Option<StateDir>, Vec<Image>), StateDirError> {
    let Some(path) = path else { return Ok((None, Vec::new())) };
    let dir = StateDir::open(path)?;
    let (dir, loaded) = tokio::task::spawn_blocking(move || {
        let loaded = dir.load();
        (dir, loaded)
    })
    .await
    .expect("reading a file does not panic");
    let images = loaded.unwrap_or_else(|error| {
        tracing::warn!(path = %path.display(), "the saved state is not used: {error}");
        Vec::new()
    });
    let bytes: usize = images.iter().map(Image::bytes).sum();
    tracing::info!(path = %path.display(), ranks = images.len(), bytes, "state directory open");
    Ok((Some(dir), images))
}

/// A locked state directory.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    #[expect(dead_code, reason = "holds the lock until it is closed")]
    lock: File,
}

impl StateDir {
    /// Makes the directory if need be, and locks it.
    pub(crate) fn open(path: &Path) -> Result<Self, StateDirError> {
        let failed = |error| StateDirError::Io(path.to_owned(), error);
        std::fs::create_dir_all(path).map_err(failed)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join(LOCK))
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StateDirError::InUse(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        // What a killed process left unfinished.
        match std::fs::remove_file(path.join(BESIDE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        Ok(Self { path: path.to_owned(), lock })
    }

    /// What was written last; empty the first time. Blocks.
    pub(crate) fn load(&self) -> Result<Vec<Image>, ImageError> {
        match File::open(self.path.join(STATE)) {
            Ok(file) => image::read_all(&mut BufReader::with_capacity(1 << 20, file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Begins a new state, which takes the old one's place in [`Saving::commit`].
    pub(crate) fn save(&self) -> io::Result<Saving<'_>> {
        let file = File::create(self.path.join(BESIDE))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.write_all(MAGIC)?;
        Ok(Saving { dir: self, out })
    }
}

/// A state that is being written.
pub(crate) struct Saving<'a> {
    dir: &'a StateDir,
    out: BufWriter<File>,
}

impl Saving<'_> {
    pub(crate) fn add(&mut self, image: &Image) -> io::Result<()> {
        image.write(&mut self.out)
    }

    /// Makes it the state; returns its bytes.
    pub(crate) fn commit(mut self) -> io::Result<u64> {
        image::write_end(&mut self.out)?;
        let file = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        let bytes = file.metadata()?.len();
        std::fs::rename(self.dir.path.join(BESIDE), self.dir.path.join(STATE))?;
        File::open(&self.dir.path)?.sync_all()?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::image::tests::sample;
    use super::*;

    /// An empty directory that is gone at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("kvlane-state-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_old_state_stands_until_the_new_one_is_whole() {
        let scratch = Scratch::new("whole");
        let dir = StateDir::open(&scratch.0).unwrap();
        assert!(dir.load().unwrap().is_empty());
        let mut saving = dir.save().unwrap();
        saving.add(&sample(0)).unwrap();
        assert!(saving.commit().unwrap() > 0);
        // A process that dies before the end has changed nothing.
        let mut saving = dir.save().unwrap();
        saving.add(&sample(1)).unwrap();
        drop(saving);
        assert_eq!(dir.load().unwrap(), [sample(0)]);
        drop(dir);
        let dir = StateDir::open(&scratch.0).unwrap();
        assert!(!scratch.0.join(BESIDE).exists());
        assert_eq!(dir.load().unwrap(), [sample(0)]);
    }

    #[test]
    fn a_second_process_is_kept_out_and_a_damaged_file_is_an_error() {
        let scratch = Scratch::new("second");
        let dir = StateDir::open(&scratch.0).unwrap();
        let error = StateDir::open(&scratch.0).unwrap_err().to_string();
        assert!(error.contains("in use by another process"), "{error}");
        std::fs::write(scratch.0.join(STATE), b"KVLIMG\x00\x01xx").unwrap();
        assert!(matches!(dir.load(), Err(ImageError::Corrupt)));
        std::fs::write(scratch.0.join(STATE), b"hello, world").unwrap();
        assert!(matches!(dir.load(), Err(ImageError::Magic)));
    }
}
