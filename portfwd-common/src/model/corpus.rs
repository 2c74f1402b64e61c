//! Inputs that did something new, or failed once: kept in a folder beside the tests, and tried again by every run.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::{Path, PathBuf},
};

use super::mutation::{Random, Run, mutate};

/// Most inputs that a run begins with or adds, so that every day's run stays short.
const MOST: usize = 400;

/// A folder of inputs, a file each: a line of hexadecimal digits.
#[derive(Clone, Debug)]
pub struct Corpus {
    folder: PathBuf,
    /// Longest input that is kept for being new, bytes.
    longest: usize,
}

/// What inputs are made of.
#[derive(Clone, Debug)]
pub struct Matter<'a> {
    /// Inputs to begin with.
    pub seeds: Vec<Vec<u8>>,
    /// Pieces that mean something.
    pub words: &'a [&'a [u8]],
    /// Inputs that every day's run tries beside those that are known.
    pub usual: u64,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Inputs that were tried beside the seeds and the kept ones.
    pub inputs: u64,
    /// Those of them that did something new.
    pub new: usize,
    /// Different things that were seen to happen.
    pub things: usize,
}

impl Corpus {
    /// The inputs of a folder, which need not be there.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>, longest: usize) -> Self {
        let folder = folder.into();
        Self { folder, longest }
    }

    /// The kept inputs by their files, in the same order every time.
    ///
    /// # Panics
    ///
    /// If a file is not what this writes: an input that cannot be read is an input that is not tried.
    #[must_use]
    pub fn kept(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let files = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return BTreeMap::new(),
            files => files.expect("read the folder of kept inputs"),
        };
        files
            .map(|file| file.expect("read the folder of kept inputs").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "hex"))
            .map(|path| {
                let input = read(&path);
                (path, input)
            })
            .collect()
    }

    /// Keeps an input.
    ///
    /// # Errors
    ///
    /// As writing a file has them.
    pub fn keep(&self, input: &[u8]) -> io::Result<PathBuf> {
        let mut hasher = DefaultHasher::new();
        input.hash(&mut hasher);
        fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(format!("{:016x}.hex", hasher.finish()));
        fs::write(&path, format!("{}\n", Hex(input)))?;
        Ok(path)
    }

    /// Tries the seeds, the kept inputs, and then mutations of them for as long as the run lasts. `attempt` panics when an input breaks
    /// what must hold, and otherwise says what the input did, each thing by a number of its own. An input that fails is kept, whatever
    /// the run; one that does something new is kept by a run that lasts minutes.
    ///
    /// # Panics
    ///
    /// If `attempt` does, or an input cannot be kept.
    pub fn explore(
        &self,
        matter: Matter<'_>,
        mut attempt: impl FnMut(&[u8]) -> BTreeSet<u64>,
    ) -> Found {
        let mut attempt = |input: &[u8]| {
            let guard = Guard {
                corpus: self,
                input,
            };
            let things = attempt(input);
            drop(guard);
            things
        };
        let mut pool = matter.seeds;
        pool.extend(self.kept().into_values());
        let mut known: BTreeSet<_> = pool.iter().flat_map(|input| attempt(input)).collect();
        let mut run = Run::of_environment(matter.usual);
        let writes = matches!(run, Run::Until(_));
        let mut random = Random::new(run.seed());
        let (mut inputs, first) = (0, pool.len());
        while run.goes_on() {
            inputs += 1;
            let mut input = pool[random.below(pool.len())].clone();
            let other = &pool[random.below(pool.len())];
            mutate(&mut random, &mut input, other, matter.words);
            let things = attempt(&input);
            if input.len() <= self.longest && pool.len() < MOST && !things.is_subset(&known) {
                known.extend(things);
                if writes {
                    self.keep(&input).expect("keep an input");
                }
                pool.push(input);
            }
        }
        Found {
            inputs,
            new: pool.len() - first,
            things: known.len(),
        }
    }
}

fn read(path: &Path) -> Vec<u8> {
    let text = fs::read_to_string(path).expect("read a kept input");
    let digits = text.trim_end().as_bytes();
    digits
        .chunks(2)
        .map(|pair| {
            let pair = str::from_utf8(pair).ok();
            pair.filter(|pair| pair.len() == 2)
                .and_then(|pair| u8::from_str_radix(pair, 16).ok())
                .unwrap_or_else(|| panic!("{} is no line of digits", path.display()))
        })
        .collect()
}

/// Bytes as a file has them.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Keeps an input and says which it was if it is dropped in a panic.
struct Guard<'a> {
    corpus: &'a Corpus,
    input: &'a [u8],
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        eprintln!("the input was {}", Hex(self.input));
        eprintln!("as text: {:?}", String::from_utf8_lossy(self.input));
        match self.corpus.keep(self.input) {
            Ok(path) => eprintln!("it is kept in {}", path.display()),
            Err(error) => eprintln!("it could not be kept: {error}"),
        }
    }
}
