//! The state file as a file of the disk: it appears whole, it is refused when it is damaged, and it goes on being used when a
//! disk that was full has room again.

use std::{
    cell::RefCell,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use redb::{
    Builder, Database, DatabaseError, ReadTransaction, ReadableDatabase, StorageError,
    TransactionError, WriteTransaction, backends::InMemoryBackend,
};

use crate::failure::{Failure, Kind, Result};

/// Where traffic goes is the owner's business.
const FILE_MODE: u32 = 0o600;
/// The rules are in memory anyway; redb's default cache of 1 GiB is not wanted.
const CACHE_BYTES: usize = 4 << 20;

/// The database in the file.
#[derive(Debug)]
pub(super) struct Store {
    /// `None` after a failure from which it could not be opened again.
    database: RefCell<Option<Database>>,
    /// `None` for a copy in memory.
    path: Option<PathBuf>,
}

impl Store {
    /// Opens the file for writing, which is made if it does not exist.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            database: RefCell::new(Some(open_or_make(path)?)),
            path: Some(path.to_owned()),
        })
    }

    /// A copy of the file in memory: it may be repaired after a daemon was killed, and locks out no daemon that is starting.
    pub(super) fn copy(path: &Path, bytes: &[u8]) -> Result<Self> {
        if bytes.is_empty() {
            return Err(empty(path));
        }
        let backend = InMemoryBackend::new();
        let written = redb::StorageBackend::set_len(&backend, bytes.len() as u64)
            .and_then(|()| redb::StorageBackend::write(&backend, 0, bytes));
        written.map_err(|error| {
            Failure::new(Kind::Failed, format!("copy {}: {error}", path.display()))
        })?;
        let database = Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(backend)
            .map_err(|error| failed("read", path, error))?;
        Ok(Self {
            database: RefCell::new(Some(database)),
            path: None,
        })
    }

    /// What is in the file.
    pub(super) fn begin_read(&self) -> Result<ReadTransaction, TransactionError> {
        match &*self.database.borrow() {
            Some(database) => database.begin_read(),
            None => Err(latched()),
        }
    }

    /// A change of the file. After a failure of the disk redb refuses everything; what was committed before is read again then.
    pub(super) fn begin_write(&self) -> Result<WriteTransaction, TransactionError> {
        let begun = match &*self.database.borrow() {
            Some(database) => database.begin_write(),
            None => Err(latched()),
        };
        match (begun, &self.path) {
            (Err(TransactionError::Storage(StorageError::PreviousIo)), Some(path)) => {
                // The old one first: it holds the lock.
                drop(self.database.take());
                let database = open_existing(path).map_err(|error| {
                    let error = if let DatabaseError::Storage(error) = error {
                        error
                    } else {
                        StorageError::Io(io::Error::other(error))
                    };
                    TransactionError::Storage(error)
                })?;
                let begun = database.begin_write();
                self.database.replace(Some(database));
                begun
            }
            (begun, _) => begun,
        }
    }
}

fn latched() -> TransactionError {
    TransactionError::Storage(StorageError::PreviousIo)
}

fn open_or_make(path: &Path) -> Result<Database> {
    let opening = |error| failed("open", path, error);
    match fs::metadata(path) {
        // Made under another name until there is a database in it, so an empty file is none that a daemon has left.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let unfinished = path.with_extension("redb.new");
            let file = options()
                .create(true)
                .truncate(true)
                .open(&unfinished)
                .map_err(|error| opening(error.into()))?;
            let database = Builder::new()
                .set_cache_size(CACHE_BYTES)
                .create_file(file)
                .map_err(opening)?;
            fs::rename(&unfinished, path).map_err(|error| opening(error.into()))?;
            Ok(database)
        }
        Err(error) => Err(opening(error.into())),
        Ok(metadata) if metadata.len() == 0 => Err(empty(path)),
        Ok(_) => open_existing(path).map_err(opening),
    }
}

fn open_existing(path: &Path) -> Result<Database, DatabaseError> {
    let file = options().open(path)?;
    Builder::new().set_cache_size(CACHE_BYTES).create_file(file)
}

/// The file as it is.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn options() -> fs::OpenOptions {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .mode(FILE_MODE)
        // A link may lead to a file of somebody else's.
        .custom_flags(libc::O_NOFOLLOW);
    options
}

fn empty(path: &Path) -> Failure {
    let failure = Failure::new(
        Kind::Failed,
        format!("open {}: it is empty", path.display()),
    );
    failure.hint(about_damage(path))
}

fn failed(doing: &str, path: &Path, error: DatabaseError) -> Failure {
    if matches!(error, DatabaseError::DatabaseAlreadyOpen) {
        return Failure::new(
            Kind::Conflict,
            format!("another daemon has {} open", path.display()),
        )
        .hint("one daemon runs per instance; `portfwd status` shows it, --instance names another");
    }
    let error = redb::Error::from(error);
    let failure = Failure::during(format!("{doing} {}", path.display()), &error);
    match hint(path, &error) {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// What to do about an error of the file.
fn hint(path: &Path, error: &redb::Error) -> Option<String> {
    if matches!(error, redb::Error::UpgradeRequired(_)) {
        return Some(format!(
            "it was written by another version of portfwd: run that one, or move it away with `mv {0} {0}.old`",
            path.display()
        ));
    }
    if matches!(
        error,
        redb::Error::Corrupted(_) | redb::Error::RepairAborted
    ) {
        return Some(about_damage(path));
    }
    let redb::Error::Io(error) = error else {
        return None;
    };
    if matches!(
        error.kind(),
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
    ) {
        return Some(about_damage(path));
    }
    Failure::advice(path, error)
}

fn about_damage(path: &Path) -> String {
    format!(
        "put a copy of it back, or move it away with `mv {0} {0}.damaged`: the daemon starts without rules then",
        path.display()
    )
}
