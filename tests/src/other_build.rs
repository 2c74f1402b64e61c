//! A portfwd whose kernel object is another one, as an upgrade's is.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use object::{File, Object as _, ObjectSection as _, SectionKind};
use portfwd::bpf::OBJECT;
use tempfile::TempPath;

use crate::{daemon::binary, process::run};

/// A piece of a source line, which the object has for the verifier's messages, and what it becomes: the programs do the same.
const CHANGE: (&[u8], &[u8]) = (b"match verdict {", b"match Verdict {");
/// The instruction that ends a program or function, and one that reads where a number points.
const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
const WILD_READ: [u8; 8] = [0x79, 0, 0, 0, 0, 0, 0, 0];

/// A copy of the binary under test with another object in it; gone on drop.
pub struct OtherBuild(TempPath);

impl OtherBuild {
    /// Makes a copy whose programs do the same.
    pub fn new() -> Result<Self> {
        let word = OBJECT
            .windows(CHANGE.0.len())
            .position(|word| word == CHANGE.0)
            .context("the object has not the source line that would be changed")?;
        Self::with(|object| object[word..][..CHANGE.1.len()].copy_from_slice(CHANGE.1))
    }

    /// Makes a copy whose programs no verifier lets in.
    pub fn refused() -> Result<Self> {
        let sections = File::parse(OBJECT).context("the object is an ELF file")?;
        let sections = sections.sections();
        let programs: Vec<_> = sections
            .filter(|section| section.kind() == SectionKind::Text)
            .filter_map(|section| section.file_range())
            .collect();
        Self::with(|object| {
            for (start, length) in programs {
                let program = &mut object[start as usize..][..length as usize];
                for instruction in program.chunks_exact_mut(EXIT.len()) {
                    if *instruction == EXIT {
                        instruction.copy_from_slice(&WILD_READ);
                    }
                }
            }
        })
    }

    /// Makes a copy in which the object is changed.
    fn with(change: impl FnOnce(&mut [u8])) -> Result<Self> {
        let path = binary()?;
        let mut bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let object = find_object(&bytes)
            .with_context(|| format!("{} has another object than this test", path.display()))?;
        change(&mut bytes[object..][..OBJECT.len()]);
        let written = tempfile::NamedTempFile::new()?.into_temp_path();
        fs::write(&written, bytes).with_context(|| format!("write {}", written.display()))?;
        // Another process makes the file that is to be run. What this one writes to, a child that another test has just begun may
        // still have open for writing, and the kernel runs no such file (ETXTBSY).
        let copy = tempfile::NamedTempFile::new()?.into_temp_path();
        run(Command::new("install")
            .args(["-m", "0755"])
            .args([&written, &copy]))?;
        Ok(Self(copy))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// Where the object begins in the binary. It lies where the loader may read its headers as they are.
fn find_object(binary: &[u8]) -> Option<usize> {
    const ALIGNMENT: usize = 8;
    (0..binary.len())
        .step_by(ALIGNMENT)
        .find(|start| binary[*start..].starts_with(OBJECT))
}
